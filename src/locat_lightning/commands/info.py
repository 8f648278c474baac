"""`locat info`: what a model costs, and how wide the kernels of a trained one are."""

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize, to_tensor

from locat_lightning.backbones.create import create_backbone, load_backbone
from locat_lightning.backbones.locate import architecture_of
from locat_lightning.backbones.weights import RANDOM, Role
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.commands.parsing import add_backbone_options, command_parser, mixed_precision, parse
from locat_lightning.commands.sources import check_weights
from locat_lightning.errors import InputError
from locat_lightning.evaluation import cost
from locat_lightning.evaluation.batches import frozen
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.rank import outlying_share
from locat_lightning.inspection import kernel_widths
from locat_lightning.nn.attention import implementation
from locat_lightning.nn.layers import GaussianSelfAttention, GaussianWindowAttention

ATTENTIONS = {
    "Triton": "fused, in Triton",
    "chunks": "PyTorch, in chunks",
    "plain": "PyTorch, with all of S in memory",
}
DESCRIPTION = (
    "Show parameters, multiply-adds, memory and throughput of a model and, if it is trained, how wide its "
    "Gaussian kernels are on the two photographs of scikit-learn"
)


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat info …`."""
    parser = command_parser("info", DESCRIPTION)
    add = parser.add_argument
    add(
        "model", type=str, help="timm's name of a model (without weights), or weights, as --weights elsewhere"
    )
    add_backbone_options(parser)
    add("--batch_size", type=PositiveInt, default=16, help="images at once, for the throughput")
    add("--device", type=str | None, default=None, help="torch's name of it; a GPU if there is one")
    add("--json", action="store_true", help="numbers for machines")
    config = parse(parser, arguments[1:])
    device = _device(config.device)
    of_name = timm.is_model(config.model) and not Path(config.model).is_file()
    if of_name:
        model = create_backbone(config.model, config.backbone_args, num_classes=None)
    else:
        check_weights(config.model)
        network: Role = "student" if config.student else "teacher"
        model = load_backbone(
            config.model, config.backbone, config.backbone_args, network=network, classifier=True
        )
    trained = not of_name and config.model != RANDOM
    found = _measure(model.to(device), device, config.batch_size, trained=trained)
    print(json.dumps(found, indent=2)) if config.json else _show(config.model, found)


def _measure(model: nn.Module, device: torch.device, batch_size: int, *, trained: bool) -> dict[str, Any]:
    """Measure what a timm model on a device costs for images of its size, and its kernels if it is trained.

    Returns:
        `multiply_adds` and `activation_bytes` of an image; `images_per_second`; `attention`, how it is
        computed; `grid`, rows and columns of patches; `outlying_share`, of the patches of two photographs
        (see `evaluation.rank`); `kernels`, mean `width` (standard deviation in patches)
        and `alpha` of each block; and more.
    """
    size = tuple(get_model_input_config(model)["input_size"])
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(device)
    batch = image.expand(batch_size, -1, -1, -1)
    precision = mixed_precision() if device.type == "cuda" else None
    parameters, of_gaug = cost.count_parameters(model)
    threads = torch.get_num_threads()
    of_cpu = f"{device.type.upper()}, {threads} thread{'s' * (threads != 1)}"
    photographs = _photographs(model, size).to(device)
    widths = kernel_widths(model, photographs) if trained else []
    return {
        "architecture": architecture_of(model),
        "parameters": parameters,
        "gaug_parameters": of_gaug,
        "image_size": size,
        "grid": _grid(model, size),
        "multiply_adds": cost.multiply_adds(model, image),
        "activation_bytes": cost.activation_bytes(model, image),
        "images_per_second": cost.images_per_second(model, batch, autocast_dtype=autocast_type(precision)),
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else of_cpu,
        "precision": precision or "32-true",
        "attention": _attention(model, device, autocast_type(precision) or torch.float32),
        "outlying_share": _outlying_share(model, photographs) if trained else None,
        "kernels": [{"width": math.sqrt(variance), "alpha": alpha} for variance, alpha in widths],
    }


def _attention(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say how attention with Gaussian kernels is computed, and why not in Triton; None if there is none."""
    for layer in model.modules():
        if isinstance(layer, GaussianSelfAttention | GaussianWindowAttention):
            this: Any = layer
            v = torch.empty(1, 1, 1, this.proj.in_features // this.num_heads, dtype=dtype, device=device)
            bias = v if isinstance(layer, GaussianWindowAttention) else None
            way, why = implementation(v, this.gaug(v, (1, 1), (1, 1)), bias=bias)
            return f"{ATTENTIONS[way]} (not Triton: {why})" if why else ATTENTIONS[way]
    return None


def _outlying_share(model: nn.Module, images: Tensor) -> float | None:
    """Return the share of patches with outlying norms; None for a model without patch features."""
    if not hasattr(model, "forward_intermediates"):
        return None
    with frozen(model), torch.no_grad():
        return outlying_share(patch_features(model, images).flatten(2).mT).item()


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _grid(model: nn.Module, size: tuple[int, ...]) -> tuple[int, int] | None:
    """Return rows and columns of patches; of a hierarchical model, in its last stage."""
    if not (stages := getattr(model, "feature_info", None)):
        return None
    return math.ceil(size[1] / stages[-1]["reduction"]), math.ceil(size[2] / stages[-1]["reduction"])


def _photographs(model: Any, size: tuple[int, ...]) -> Tensor:
    """Return scikit-learn's two photographs [2, C, height, width], as a model takes its images."""
    pixels = torch.stack([to_tensor(image.copy()) for image in load_sample_images().images])
    pixels = F.interpolate(pixels, size[1:], mode="bicubic", antialias=True)
    images: Tensor = normalize(pixels, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    return images if size[0] == 3 else images.mean(1, keepdim=True).expand(-1, size[0], -1, -1)


def _show(name: str, found: dict[str, Any]) -> None:
    channels, height, width = found["image_size"]
    share = f" (GAug: {found['gaug_parameters']:,})" if found["gaug_parameters"] else ""
    grid = " × ".join(map(str, found["grid"])) if found["grid"] else "none"
    speed = f"{found['images_per_second']:,.1f} images/s"
    rows = {
        "parameters": f"{found['parameters']:,}{share}",
        "images": f"{height} × {width} pixels, {channels} channels",
        "patch grid": grid,
        "multiply-adds": f"{found['multiply_adds'] / 1e9:.4g} G an image",
        "kept for the backward pass": f"{found['activation_bytes'] / 2**20:,.1f} MiB an image, in float32",
        "attention": found["attention"] or "without Gaussian kernels",
        "forward": f"{speed} (batches of {found['batch_size']}, {found['device']}, {found['precision']})",
    }
    if found["outlying_share"] is not None:
        rows["outlying norms"] = f"{found['outlying_share']:.2%} of the patches of two photographs"
    architecture = found["architecture"]
    print(architecture if name == architecture else f"{architecture}: {name}")
    table = Table(show_header=False)
    for row in rows.items():
        table.add_row(*row)
    console = Console()
    console.print(table)
    if found["kernels"]:
        print("kernels on two photographs: width σ in patches, and strength α")
        kernels = Table("block", "width", "alpha")
        for block, kernel in enumerate(found["kernels"]):
            kernels.add_row(str(block), f"{kernel['width']:.2f}", f"{kernel['alpha']:.3f}")
        console.print(kernels)
