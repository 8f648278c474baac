"""Patches of several sizes in one Vision Transformer, whose embedding is resized to each as images pass."""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.compiler.config
from lightning.pytorch.utilities import rank_zero_warn
from timm.layers import PatchEmbed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.nn.gaussian import GaussianAugmentation, GaussianMixture

GRAPHS = 8  # that `torch.compile` may make of a model with patches of one size: torch's own limit


def check_rest(model: nn.Module, side: int | None) -> None:
    """Warn if a model does not see all of square images; `InputError` if it does not take them.

    Images of which the side is not known pass.
    """
    embed: Any = getattr(model, "patch_embed", None)
    if side is None or not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
        return
    if not (rest := side % embed.patch_size[0]):
        return
    multiple = f"images of {side} pixels are no multiple of the patch size {embed.patch_size[0]}"
    if not embed.strict_img_size:
        raise InputError(f"{multiple}: set data.img_size, or patch_size in model.backbone_args")
    rank_zero_warn(f"{multiple}: the last {rest} at right and bottom are not seen")


class FlexibleConv(nn.Conv2d):
    """The convolution of a patch embedding, whose kernel is resized to patches of other sizes.

    A kernel w of p × p pixels becomes that of q × q with which a patch that was resized from p to q gives the
    same token: pinv(Bᵀ) w, B being timm's bicubic interpolation (exact for q ≥ p; of smaller patches, least
    squares). The gradient flows through it. The kernel itself is used as it is.

    Source: PI-resize of "FlexiViT: One Model for All Patch Sizes" (CVPR 2023).

    Attributes:
        patch: side of the patches of the images to come.
    """

    patch: int

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Embed images [B, C, height, width]: [B, D, height / patch, width / patch]."""
        own: tuple[int, ...] = self.kernel_size
        if own == (self.patch, self.patch):
            return super().forward(input)
        matrix: Tensor = getattr(self, f"to_{self.patch}")
        exact = torch.promote_types(self.weight.dtype, matrix.dtype)
        with torch.autocast(input.device.type, enabled=False):  # which would round the matrix
            kernel = self.weight.flatten(2).to(exact) @ matrix.to(exact)
        kernel = kernel.unflatten(2, (self.patch, self.patch))
        return F.conv2d(input, kernel.to(self.weight.dtype), self.bias, self.patch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():  # to another device, but not to another type
            if moved is not None and (matrix := exact[name]) is not None:
                self._buffers[name] = matrix.to(moved.device)
        return self


def make_flexible(model: Any, sizes: Iterable[int]) -> None:
    """Let a built timm model take patches of these sizes, in pixels, from `use_patches` on.

    The names of its weights stay: a checkpoint of it is one of a model with patches of one size. Position
    embeddings are resampled to the grid as timm does, and kernels of GAug keep their width in pixels.

    Raises:
        ValueError: the model has no patch embedding of square patches, or is built for one grid.
    """
    sizes = list(sizes)
    embed: Any = getattr(model, "patch_embed", None)
    if not isinstance(model, VisionTransformer) or type(embed) is not PatchEmbed:
        raise ValueError(f"{type(model).__name__} is no plain Vision Transformer, whose patches can change")
    if not model.dynamic_img_size:
        raise ValueError("the model is built for one grid: build it with dynamic_img_size=True")
    own = embed.patch_size[0]
    if embed.patch_size != (own, own) or any(side % size for side in embed.img_size for size in sizes):
        raise ValueError(
            f"images of {' × '.join(map(str, embed.img_size))} pixels have no whole patches of all of "
            f"{', '.join(map(str, sizes))}"
        )
    convolution: Any = embed.proj
    convolution.__class__, convolution.patch = FlexibleConv, own
    weight = convolution.weight
    basis = torch.eye(own**2, dtype=torch.float32, device="cpu").view(-1, 1, own, own)
    for size in {*sizes} - {own}:
        matrix = resample_patch_embed(basis, [size, size]).flatten(1)  # on the CPU: a GPU would be waited for
        convolution.register_buffer(f"to_{size}", matrix.to(weight.device), persistent=False)
    for kernel in model.modules():
        if isinstance(kernel, GaussianAugmentation | GaussianMixture):
            kernel.built_with = tuple(embed.grid_size)
    limit: Any = torch.compiler.config
    limit.recompile_limit = max(limit.recompile_limit, GRAPHS + len(sizes))
    if (grid := getattr(embed, "patch_grid", None)) is not None:
        for size in (*sizes, own):  # for `torch.compile`: a grid that is new would change what it guards
            grid.note(*(side // size for side in embed.img_size))


def use_patches(model: Any, size: int) -> None:
    """Take patches of `size` pixels of the images to come, in a model that is flexible.

    A backward pass has to be over before the next change: a checkpointed block is computed as for these.
    """
    embed = model.patch_embed
    embed.patch_size = (size, size)
    embed.proj.patch = size
    for block in model.feature_info:
        block["reduction"] = size
    if (grid := getattr(embed, "patch_grid", None)) is not None:
        # `embed.grid_size` stays that of the position embeddings.
        grid.built_for = tuple(side // size for side in embed.img_size)
