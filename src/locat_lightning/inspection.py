"""Look at what a backbone does with images: Gaussian kernels, attention of [CLS], principal components.

Images are [B, 3, height, width], normalised; for kernels they are padded to whole patches.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.evaluation.batches import frozen
from locat_lightning.evaluation.dense import padded
from locat_lightning.nn import GaussianAugmentation, GaussianSelfAttention, gaussian_kernel
from locat_lightning.nn.class_attention import class_attention

OUTLIERS = 0.01  # share of the patches at either end of a principal component that saturates
NEGLIGIBLE = 1e-5  # spread of a component, relative to the largest feature, that may be rounding error


class Call(NamedTuple):
    """One call of a module."""

    inputs: tuple[Any, ...]
    output: Any


def observe(backbone: nn.Module, images: Tensor, modules: Iterable[nn.Module]) -> list[Call]:
    """Run a backbone in evaluation mode and record the calls of some of its modules, in their order.

    The backbone, which may be one of these modules, is left as it was, hooks and training flags included. A
    compiled one runs uncompiled here, so that its hooks are called.
    """
    calls: list[Call] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append(Call(inputs, output))

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        with frozen(backbone), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def layers_with_kernels(backbone: nn.Module) -> list[GaussianSelfAttention]:
    """Return the attention of each block with GAug."""
    return [layer for layer in backbone.modules() if isinstance(layer, GaussianSelfAttention)]


def gaussian_kernels(
    backbone: nn.Module, images: Tensor, blocks: Sequence[int] | None = None
) -> list[Tensor]:
    """Compute the kernels S of each block with GAug, or of some of them, averaged over the heads.

    Returns:
        For each block [B, H·W, H, W] float32: what each patch (row by row) adds to its logit for each patch.
        Models that are no Vision Transformer, and those with windows, have no kernels.
    """
    gaugs = [layer.gaug for layer in layers_with_kernels(backbone)]
    gaugs = gaugs if blocks is None else [gaugs[block] for block in blocks]
    calls = observe(backbone, padded(backbone, images), gaugs) if gaugs else []
    kernels = []
    for (_, grid, _), output in calls:
        with torch.no_grad():
            s = output if isinstance(output, Tensor) else gaussian_kernel(output)
        s, places = s.expand(len(images), -1, -1, -1).mean(1), math.prod(grid)
        # Of a grid for each channel: to any channel's patches, from the mean of the channels' queries.
        s = s.unflatten(1, (-1, places)).mean(1)[..., :places]
        kernels.append(s.unflatten(-1, grid))
    return kernels


def kernel_widths(backbone: nn.Module, images: Tensor) -> list[tuple[float, float]]:
    """Compute the mean variance and mean alpha of each block, over images, heads, patches and directions.

    Returns:
        (variance in squared patches, alpha), from the first block with GAug to the last.
    """
    gaugs = [module for module in backbone.modules() if isinstance(module, GaussianAugmentation)]
    calls = observe(backbone, padded(backbone, images), gaugs) if gaugs else []
    widths = []
    with torch.no_grad():
        for gaug, ((q, grid, built_for), found) in zip(gaugs, calls, strict=True):
            patches = math.prod(grid) if found.kept is None else found.kept.shape[-1]
            variance, alpha = gaug.variance_and_alpha(q[..., -patches:, :], grid, built_for)
            widths.append((variance.mean().item(), alpha.mean().item()))
    return widths


def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Compute the attention of [CLS] to the patches in the last block: its row of the softmax.

    Returns:
        [B, h, H, W] float32; None if the model is no Vision Transformer or has no [CLS].
    """
    model: Any = backbone
    layers = [getattr(block, "attn", None) for block in getattr(model, "blocks", ())]
    layers = [layer for layer in layers if isinstance(layer, Attention)]
    if not layers or model.cls_token is None:
        return None
    attention: Any = layers[-1]
    of_q, of_k = observe(model, images, [attention.q_norm, attention.k_norm])
    with torch.no_grad():
        row = class_attention(of_q.output[:, :, :1], of_k.output)
    grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    # Of a grid for each channel, the sum over channels.
    patches: Tensor = row[..., model.num_prefix_tokens :].unflatten(-1, (-1, *grid)).sum(-3)
    return patches


def pca_colours(features: Tensor) -> Tensor:
    """Show the first three principal components of all patches together as red, green and blue.

    Each component of features [B, D, H, W] fills its channel from its 1st to its 99th percentile. Its sign is
    chosen so that the third moment is positive: few patches are bright and many dark. A component that does
    not vary is 0.5 everywhere, and so are all components of features that are not finite.

    Returns:
        [B, 3, H, W] float32 on the CPU, from 0 to 1.
    """
    return torch.stack(shared_pca_colours(list(features)))


def shared_pca_colours(maps: Sequence[Tensor], *, foreground: bool = False) -> list[Tensor]:
    """Return the colours of images that may differ in size: the maps [D, H, W] have one basis.

    With `foreground`, the first component only divides the patches at 0: the side with most of the patches at
    the images' borders is black, and the components shown are those of the other side alone (as DINOv2's).

    Returns:
        For each image [3, H, W] float32 on the CPU, from 0 to 1.
    """
    patches = torch.cat([features.detach().float().cpu().flatten(1).T for features in maps])
    if not patches.isfinite().all():
        patches = torch.zeros_like(patches)
    shown = torch.ones(len(patches), dtype=torch.bool)
    if foreground:
        first = _principal(patches, 1)[:, 0]
        shown = first > 0
        at_border = torch.cat([_border(*features.shape[1:]) for features in maps])
        if shown[at_border].float().mean() > 0.5:
            shown = ~shown
    colours = torch.zeros(len(patches), 3)
    if shown.any():
        colours[shown] = _colours(patches[shown])
    parts = colours.split([features[0].numel() for features in maps])
    return [part.T.unflatten(-1, features.shape[1:]) for part, features in zip(parts, maps, strict=True)]


def _colours(patches: Tensor) -> Tensor:
    """Turn the first three components of features [N, D] into colours [N, 3]."""
    components = _principal(patches, 3)
    components = torch.where(components.pow(3).sum(0) < 0, -components, components)
    low, high = components.quantile(torch.tensor([OUTLIERS, 1 - OUTLIERS]), dim=0)
    spread = high - low
    varies = spread > NEGLIGIBLE * patches.abs().max()
    return torch.where(varies, (components - low) / spread, 0.5).clamp(0, 1)


def _principal(patches: Tensor, count: int) -> Tensor:
    """Return the first components [N, count] of features [N, D]; 0 where there are fewer."""
    u, s, _ = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    components = (u * s)[:, :count]
    return F.pad(components, (0, count - components.shape[1]))


def _border(height: int, width: int) -> Tensor:
    """Return which patches [H·W] of a grid are at its border."""
    border = torch.ones(height, width, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border.flatten()
