"""Images of which some patches are corrupted: the first of a random order, the same for every model.

The natural corruptions are those of ImageNet-C: "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations" (Hendrycks & Dietterich, ICLR 2019).
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from locat_lightning.errors import InputError

# By severity, 1 to 5: standard deviation of the noise, of the blur (in pixels of an image of 224), and the
# factor of the contrast.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
KINDS = ("noise", "blur", "contrast", "occlusion", "shuffle")


def orders(indices: Iterable[int], patches: int, seed: int) -> Tensor:
    """Return for each image an order of its patches, [B, patches] int64, which follows from (seed, index)."""
    drawn = [np.random.default_rng([seed, index]).permutation(patches) for index in indices]
    return torch.from_numpy(np.stack(drawn))


def perturbed(
    images: Tensor,
    indices: Sequence[int],
    kind: str,
    numbers: Iterable[int],
    *,
    patch: int,
    severity: int = 5,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    bounded: bool = True,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Corrupt the first n patches of each image's order (see `orders`), for each n of `numbers`.

    `noise`, `blur` and `contrast` are computed of the whole image, of which the patches are taken; an
    occluded patch has the colour `mean`; with `shuffle`, each of the n patches takes the place of the one
    before it in the order, and the last that of the first.

    Args:
        images: [B, C, H, W], from 0 to 1 if they are `bounded`; height and width are multiples of `patch`.
        indices: of the images in the data set, not negative.
        kind: one of `KINDS`, or `none`.
        numbers: numbers of patches, from 0 to all.
        patch: height and width of a patch in pixels.
        severity: of ImageNet-C, 1 to 5.
        mean: a colour, a value for each channel, or one for all.
        bounded: whether noise ends at 0 and 1.
        seed: of the order of the patches and of the noise.

    Yields:
        Corrupted images [B, C, H, W], for each number.
    """
    grid = patch_grid(images, patch)
    order = orders(indices, math.prod(grid), seed).to(images.device)
    rank = order.argsort(1)
    whole = None if kind == "shuffle" else _corrupted(images, indices, kind, severity, mean, bounded, seed)
    for number in numbers:
        if whole is None:
            yield _shuffled(images, order[:, :number], grid, patch)
        else:
            chosen = (rank < number).unflatten(1, grid)
            chosen = chosen.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
            yield torch.where(chosen.unsqueeze(1), whole, images)


def patch_grid(images: Tensor, patch: int) -> tuple[int, int]:
    """Return rows and columns of patches of images [..., H, W]; `InputError` if they do not divide it."""
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise InputError(
            f"images of {height} × {width} pixels have no whole patches of {patch}: set --patch_size, or "
            "the size of the images"
        )
    return height // patch, width // patch


def _corrupted(
    images: Tensor,
    indices: Sequence[int],
    kind: str,
    severity: int,
    mean: Sequence[float],
    bounded: bool,
    seed: int,
) -> Tensor:
    """Corrupt whole images [B, C, H, W]."""
    if kind == "none":
        return images
    if kind == "noise":
        rngs = [np.random.default_rng([seed, index, 1]) for index in indices]
        noise = np.stack([rng.standard_normal(images.shape[1:], np.float32) for rng in rngs])
        noisy = images + NOISE[severity - 1] * torch.from_numpy(noise).to(images.device)
        return noisy.clamp(0, 1) if bounded else noisy
    if kind == "blur":
        sigma = BLUR[severity - 1] * min(images.shape[-2:]) / 224
        blurred: Tensor = gaussian_blur(images, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
        return blurred
    if kind == "contrast":
        of_image = images.mean((-2, -1), keepdim=True)
        return (images - of_image) * CONTRAST[severity - 1] + of_image
    if kind == "occlusion":
        return images.new_tensor(mean).view(1, -1, 1, 1).expand_as(images)
    raise InputError(f"there is no corruption {kind!r}: use one of {', '.join(KINDS)}")


def _shuffled(images: Tensor, chosen: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Move patches [B, n] one place on, by their positions in the grid."""
    if not chosen.shape[1]:
        return images
    rows, columns = grid
    patches = images.unflatten(2, (rows, patch)).unflatten(4, (columns, patch))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, rows · columns, C, patch, patch]
    moved = patches.clone()
    images_of = torch.arange(len(images), device=images.device)[:, None]
    moved[images_of, chosen.roll(-1, 1)] = patches[images_of, chosen]
    result: Tensor = moved.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return result
