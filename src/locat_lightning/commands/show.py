"""`locat show`: pictures of what one model or several make of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.fabric import Fabric
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize, to_tensor

from locat.runs import claim
from locat_lightning import structure
from locat_lightning.backbones.channels import take_channels
from locat_lightning.commands import checks, parsing, sources
from locat_lightning.commands.defaults import images_for
from locat_lightning.commands.evaluate import add_run_options, loaded, name_of
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.data.bands import READERS, BandReader, Bands
from locat_lightning.data.base import chosen_channels
from locat_lightning.data.class_lists import distinct_colours
from locat_lightning.data.decoding import RGB, Reader, reason
from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import frozen
from locat_lightning.evaluation.dense import padded_size, patch_features
from locat_lightning.figures import looks
from locat_lightning.figures.grid import Column, rgb
from locat_lightning.figures.validation import drawn_blocks
from locat_lightning.inspection import (
    cls_attention,
    gaussian_kernels,
    layers_with_kernels,
    shared_pca_colours,
)

DESCRIPTION = (
    "Draw what a model makes of images: a PNG for each kind of picture, a row for each image, several models "
    "side by side"
)
Kind = Literal["kernels", "attention", "pca", "similarity", "clusters", "foreground", "matches"]
BY_DEFAULT: list[Kind] = ["kernels", "attention", "pca"]
MOST_PATCHES = 4096  # of an image: kernels and cuts are numbers for each pair of them
MOST_PAIRS = 2**28  # of patches, in all images: 1 GiB for each block whose kernels are drawn
MOST_IMAGES = 32
ENDINGS = tuple(dict.fromkeys((*RGB.endings, *READERS)))


@dataclass
class Model:
    """A model and what it is shown: of each image the input [1, 3, H, W] and the patch features [D, h, w]."""

    backbone: nn.Module
    inputs: list[Tensor]
    maps: list[Tensor]


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat show …`."""
    # `--weights` takes several words, and would take the images that follow.
    words = [each for each in arguments[1:] if not each.startswith("-")]
    files = [each for each in words if each.lower().endswith(ENDINGS) or _images_in(each)]
    config = parsing.parse(_parser(), [*files, *(each for each in arguments[1:] if each not in files)])
    config.images = [file for each in config.images for file in _images_in(each) or [each]]
    kinds = _kinds(config)
    checks.check_name(config.name)
    for weights in config.weights:
        sources.check_weights(weights)
    names = _distinct([name_of(each) for each in config.weights])
    directory = Path(config.runs) / (config.name or f"{'_'.join(names)[: checks.LONGEST - 5]}_show")
    checks.check_writable("--runs", directory)
    reader = _reader(config)
    images = [_read(file, reader) for file in config.images]
    place = _place(config.patch, images[0], config.images[0])
    fabric = Fabric(accelerator=config.accelerator, devices=1)
    fabric.seed_everything(config.seed, verbose=False)
    models = {
        name: _show_to(weights, images, config, fabric.device)
        for name, weights in zip(names, config.weights, strict=True)
    }
    shown = [_thumbnail(image, config.tile) for image in _pictures(images, config.show_channels)]
    run = None
    for kind in kinds:
        if (figure := _draw(kind, models, shown, config, place)) is None:
            print(f"no {kind}: no model has any")
            continue
        run = run or claim(directory)
        figure.savefig(run / f"{kind}.png")
        print(run / f"{kind}.png")


def _parser() -> ArgumentParser:
    parser = parsing.command_parser("show", DESCRIPTION)
    add = parser.add_argument
    add("images", nargs="*", help=f"files ending in {', '.join(ENDINGS)}, or folders of such files")
    help_ = "of one model or several: a checkpoint, a file, an exported folder, a timm name, 'random'"
    add("--weights", type=list[str], required=True, help=help_)
    parsing.add_backbone_options(parser)
    help_ = f"what to draw; by default {', '.join(BY_DEFAULT)}, and similarity if there is a --patch"
    add("--what", type=list[Kind] | None, default=None, help=help_)
    add("--patch", type=str | None, default=None, help="x,y: a pixel of the first image, for similarity")
    help_ = "shorter side of the images in pixels, as models take them; by default each model's own"
    add("--img_size", type=PositiveInt | None, default=None, help=help_)
    help_ = "three channels to show as red, green and blue, of images that are not RGB; by default a PCA"
    three = tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]
    add("--show_channels", type=three | None, default=None, help=help_)
    add("--tile", type=PositiveInt, default=224, help="shorter side of an image in the picture, in pixels")
    add("--pca_foreground", action="store_true", help="leave out of the PCA what its first component divides")
    add("--clusters", type=PositiveInt, default=6, help="number of clusters of patches")
    add("--lines", type=PositiveInt, default=50, help="most matches that are drawn between two images")
    help_ = "cosine above which two patches are alike, for foreground"
    add("--threshold", type=ClosedUnitInterval, default=structure.THRESHOLD, help=help_)
    add_run_options(parser, processes=False, precision=False)
    return parser


def _images_in(folder: str) -> list[str]:
    """Return the image files in a folder, by name; none of what is no folder."""
    if not Path(folder).is_dir():
        return []
    names = sorted(each.name for each in Path(folder).iterdir() if not each.name.startswith("."))
    return [str(Path(folder, name)) for name in names if name.lower().endswith(ENDINGS)]


def _kinds(config: Namespace) -> list[Kind]:
    """Return what to draw; check that the images and options for it are there."""
    if not config.images:
        raise InputError(f"locat show needs images: files ending in {', '.join(ENDINGS)}")
    if len(config.images) > MOST_IMAGES:
        number = len(config.images)
        raise InputError(f"locat show draws at most {MOST_IMAGES} images, not {number:,}: name some of them")
    kinds: list[Kind] = config.what or [*BY_DEFAULT, *(["similarity"] if config.patch else [])]
    if "similarity" in kinds and config.patch is None:
        raise InputError("--what similarity needs --patch x,y: a pixel of the first image")
    if "matches" in kinds and len(config.images) < 2:
        raise InputError("--what matches needs two images or more: the first is matched with each other one")
    return kinds


def _reader(config: Namespace) -> Reader:
    """Return how images are read: as the data were that all weights are of."""
    readers = []
    for weights in config.weights:
        known = images_for(weights)
        reader: Reader = RGB
        if (channels := known["channels"]) is not None:
            taken = chosen_channels(channels, len(known["mean"])).taken
            reader = BandReader(tuple(known["mean"]), tuple(known["std"]), taken)
        readers.append(reader)
    if any(each != readers[0] for each in readers):
        raise InputError("--weights: these are for images of different channels: draw them one by one")
    return readers[0]


def _read(file: str, reader: Reader) -> Image.Image | Bands:
    try:
        with reader(file) as image:
            image.load()
            return image  # type: ignore[no-any-return]
    except IsADirectoryError as error:
        raise InputError(f"{file} is a folder without images in it: name image files") from error
    except InputError:
        raise
    except Exception as error:  # decoders raise anything
        raise InputError(f"cannot read image {file}: {reason(error)}") from error


def _place(patch: str | None, image: Image.Image | Bands, file: str) -> tuple[float, float]:
    """Return a pixel `x,y` of an image as shares of its width and height."""
    if patch is None:
        return 0.0, 0.0
    x, _, y = patch.partition(",")
    if not (x.strip().isdecimal() and y.strip().isdecimal()):
        raise InputError(f"--patch: {patch!r} is not x,y in pixels, such as 120,80")
    if not (int(x) < image.width and int(y) < image.height):
        raise InputError(
            f"--patch: {patch} is outside {file}, which has {image.width} x {image.height} pixels"
        )
    return (int(x) + 0.5) / image.width, (int(y) + 0.5) / image.height


def _show_to(
    weights: str, images: list[Image.Image | Bands], config: Namespace, device: torch.device
) -> Model:
    backbone = loaded(weights, config).to(device)
    known = images_for(weights, backbone)
    if known["channels"] is not None:
        take_channels(backbone, chosen_channels(known["channels"], len(known["mean"])))
    size = config.img_size or known["img_size"]
    patches: Any = getattr(backbone, "patch_embed", None)
    fixed = patches.img_size if getattr(patches, "strict_img_size", False) else None
    side, _ = padded_size(backbone, (1, 1))
    sizes = [fixed or _whole_patches(image, size, side) for image in images]
    counts = [height * width // side**2 for height, width in sizes]
    if max(counts) > MOST_PATCHES or sum(count**2 for count in counts) > MOST_PAIRS:
        raise InputError(
            f"{max(counts):,} patches in an image are too many to draw: lower --img_size ({size})"
        )
    inputs = []
    for image, (height, width) in zip(images, sizes, strict=True):
        if isinstance(image, Bands):
            pixels = F.interpolate(image.pixels[None], (height, width), mode="bicubic", antialias=True)
            inputs.append(pixels.to(device))
            continue
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        inputs.append(normalize(to_tensor(resized), known["mean"], known["std"])[None].to(device))
    with frozen(backbone), torch.no_grad():
        maps = [patch_features(backbone, each)[0].cpu() for each in inputs]
    return Model(backbone, inputs, maps)


def _whole_patches(image: Image.Image | Bands, size: int, side: int) -> tuple[int, int]:
    """Return height and width, in whole patches of `side` pixels, for a shorter side of about `size`."""
    scale = size / min(image.size) / side
    return max(1, round(image.height * scale)) * side, max(1, round(image.width * scale)) * side


def _pictures(images: list[Image.Image | Bands], show: list[int] | None) -> list[Image.Image]:
    """Return images as a viewer shows them: of other channels than RGB, three or principal components."""
    pictures = []
    for image in images:
        if isinstance(image, Bands):
            pixels = rgb(image.pixels[None], {"show": show})[0]
            pictures.append(Image.fromarray((pixels * 255).round().astype(np.uint8)))
        else:
            pictures.append(image)
    return pictures


def _thumbnail(image: Image.Image, side: int) -> np.ndarray:
    """Return an image, [H, W, 3] from 0 to 1, whose shorter side has at most twice `side` pixels."""
    scale = min(1.0, 2 * side / min(image.size))
    size = [max(1, round(length * scale)) for length in image.size]
    return np.asarray(image.resize((size[0], size[1])), np.float32) / 255


def _draw(
    kind: Kind,
    models: dict[str, Model],
    shown: list[np.ndarray],
    config: Namespace,
    place: tuple[float, float],
) -> Figure | None:
    """Draw a kind of picture of all models; None if no model has it."""
    if kind == "matches":
        matches = {name: _matches(model) for name, model in models.items()}
        return looks.matches_figure(shown, matches, most=config.lines, side=config.tile)
    columns = {name: _columns(kind, model, shown, config, place) for name, model in models.items()}
    return looks.looks_figure(shown, columns, side=config.tile) if any(columns.values()) else None


def _matches(model: Model) -> list[tuple[structure.Matches, tuple[int, int], tuple[int, int]]]:
    first, *others = model.maps
    grids = [(each.shape[1], each.shape[2]) for each in model.maps]
    found = [structure.match_patches(first, other) for other in others]
    return [(each, grids[0], grid) for each, grid in zip(found, grids[1:], strict=True)]


def _columns(
    kind: Kind, model: Model, shown: list[np.ndarray], config: Namespace, place: tuple[float, float]
) -> list[Column]:
    if kind == "kernels":
        blocks = drawn_blocks(len(layers_with_kernels(model.backbone)))
        kernels = [gaussian_kernels(model.backbone, each, blocks) for each in model.inputs]
        return looks.kernels_of(shown, blocks, [[each[0] for each in of_image] for of_image in kernels])
    if kind == "attention":
        attention = [cls_attention(model.backbone, each) for each in model.inputs]
        return looks.attention_of(shown, [each[0] for each in attention if each is not None])
    if kind == "pca":
        return looks.components_of(shared_pca_colours(model.maps, foreground=config.pca_foreground))
    if kind == "similarity":
        height, width = model.maps[0].shape[1:]
        patch = int(place[1] * height), int(place[0] * width)
        return looks.similarity_of(shown, structure.similarity_to(model.maps, patch), patch)
    if kind == "clusters":
        clusters = structure.cluster_patches(model.maps, config.clusters, config.seed)
        return looks.clusters_of(shown, clusters, distinct_colours(config.clusters))
    cuts = [structure.cut_foreground(each, config.threshold) for each in model.maps]
    for file, cut in zip(config.images, cuts, strict=True):
        if not cut.mask.any():
            print(f"foreground of {file}: no cut found; lower or raise --threshold ({config.threshold:g})")
    return looks.foreground_of(shown, cuts)


def _distinct(names: list[str]) -> list[str]:
    """Number the names that come more than once."""
    return [
        f"{name}_{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]
