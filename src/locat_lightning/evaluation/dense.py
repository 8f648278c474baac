"""Features of every patch of an image, by a backbone that may be frozen: what dense probes read."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import autocast


def patch_features(
    backbone: nn.Module,
    images: Tensor,
    *,
    layers: int | Sequence[int] = 1,
    norm: bool = False,
    with_cls: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the patch tokens of the last block (for a hierarchical model, stage), or of several, as a map.

    They are taken before PRR, without prefix tokens unless `with_cls` is set. Images are `padded` to a
    multiple of the patch, and the map covers the padded image: what is upsampled from it has to be cut. An
    autocast context around this call has no effect inside it.

    Args:
        backbone: any timm model with `forward_intermediates`.
        images: [B, C, height, width], normalised.
        layers: how many of the last blocks, or which blocks, by index from 0; see `feature_width`.
        norm: whether the model's final norm is applied, to the tokens of each block.
        with_cls: whether the [CLS] token of each block follows its features of every patch, D twice as large.
        autocast_dtype: mixed precision in this type; None computes in the type of the weights.

    Returns:
        [B, D, H, W] float32, one column for each patch; the features of several blocks, in their order in the
        model, are concatenated.

    Source: "Locality-Attending Vision Transformer" (ICLR 2026), the segmentation protocol; with `norm`, and
    with four layers, DINOv2's.
    """
    if layers != 1:
        feature_width(backbone, layers)  # for its checks
    if with_cls and getattr(backbone, "cls_token", None) is None:
        raise InputError(f"{type(backbone).__name__} has no [CLS] token: set model.cls_token false")
    images = padded(backbone, images)
    size = tuple(images.shape[-2:])
    timm: Any = backbone
    patches: Any = getattr(timm, "patch_embed", None)
    own = patches.img_size if getattr(patches, "strict_img_size", False) else None
    if own is not None and tuple(own) != size:
        raise InputError(
            f"{type(backbone).__name__} was built for images of {own[0]} × {own[1]} pixels and is given "
            f"{size[0]} × {size[1]}: build it with dynamic_img_size=True (Swin: strict_img_size=False)"
        )
    with autocast(images.device, autocast_dtype):
        options = {"return_prefix_tokens": True} if with_cls else {}
        features = timm.forward_intermediates(
            images, indices=layers, norm=norm, output_fmt="NCHW", intermediates_only=True, **options
        )
    if with_cls:
        features = [
            each
            for tokens, prefix in features
            for each in (tokens, prefix[:, 0, :, None, None].expand_as(tokens))
        ]
    result: Tensor = (features[0] if len(features) == 1 else torch.cat(features, 1)).float()
    return result


def feature_width(backbone: nn.Module, layers: int | Sequence[int] = 1) -> int:
    """Return the number D of features of a patch that `patch_features` gives.

    Raises:
        InputError: the model has no patch features, or no such layers, or their maps differ in size.
    """
    if (known := getattr(backbone, "feature_info", None)) is None:
        kind = type(backbone).__name__
        raise InputError(f"{kind} has no feature_info: choose a timm model with patch features")
    blocks = list(known)
    last = isinstance(layers, int)
    chosen = range(len(blocks) - layers, len(blocks)) if isinstance(layers, int) else layers
    if not chosen or not set(chosen) <= set(range(len(blocks))) or len(set(chosen)) < len(chosen):
        allowed = f"1 to {len(blocks)}" if last else f"indices from 0 to {len(blocks) - 1}, each once"
        raise InputError(f"layers is {layers}, but {type(backbone).__name__} has {allowed}")
    if len({blocks[index]["reduction"] for index in chosen}) > 1:
        raise InputError(
            f"layers {layers}: maps of {type(backbone).__name__} differ in size: take the last one alone (1)"
        )
    return sum(int(blocks[index]["num_chs"]) for index in chosen)


def padded(backbone: nn.Module, images: Tensor) -> Tensor:
    """Pad images [B, 3, height, width] at right and bottom with zeros, their mean, to `padded_size`."""
    height, width = images.shape[-2:]
    size = padded_size(backbone, (height, width))
    return F.pad(images, (0, size[1] - width, 0, size[0] - height))


def upsampled(backbone: nn.Module, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample maps [B, C, h, w] of patches bilinearly to their image, (height, width) without padding."""
    height, width = size
    return F.interpolate(maps.float(), padded_size(backbone, size), mode="bilinear")[..., :height, :width]


def padded_size(backbone: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) in pixels of the image that the map of `patch_features` covers.

    Each is the next multiple of the patch (for a hierarchical model, of its last stage's); the only size that
    a model takes stays as it is.
    """
    timm: Any = backbone
    if not hasattr(timm, "forward_intermediates") or not hasattr(timm, "feature_info"):
        name = type(backbone).__name__
        raise InputError(f"{name} has no patch features: choose a timm model with forward_intermediates")
    patches: Any = getattr(timm, "patch_embed", None)
    if getattr(patches, "strict_img_size", False) and patches.img_size == size:
        return size
    patch = timm.feature_info[-1]["reduction"]
    height, width = (math.ceil(side / patch) * patch for side in size)
    return height, width
