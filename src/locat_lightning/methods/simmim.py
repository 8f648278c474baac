"""SimMIM: squares of an image are hidden by a mask token, and one layer predicts their pixels."""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.backbones.channels import channels_of
from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.methods.base import Output, freeze_pooling
from locat_lightning.methods.pixels import PixelPrediction
from locat_lightning.nn import MaskToken


class SimMim(PixelPrediction):
    """Train a timm model (a Vision Transformer or Swin) to predict the pixels of hidden squares.

    The backbone sees a mask token in the place of each hidden patch, so its grid is whole. PRR, like all that
    pools tokens, has no part in the loss: it is there where features are measured.

    Source: "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022). The defaults are its own;
    those of the optimizer are in `simmim_small.yaml`.

    Args:
        backbone: timm's name of the model.
        mask_ratio: share of the squares that are hidden.
        mask_size: side of a square in pixels, a multiple of a patch.
        options: those of every pre-training (`Pretraining`).
    """

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        mask_ratio: OpenUnitInterval = 0.6,
        mask_size: PositiveInt = 32,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)

    def build(self, make_backbone: Callable[[], Any]) -> None:
        hp = self.hp
        self.backbone = backbone = make_backbone()
        self.start(backbone)
        freeze_pooling(self.backbone)
        patch: int = backbone.patch_embed.patch_size[0]
        if hp.mask_size % patch:
            raise InputError(
                f"model.mask_size ({hp.mask_size}) has to be a multiple of a patch ({patch} pixels)"
            )
        height, width = backbone.patch_embed.grid_size
        self.patch, self.square = patch, hp.mask_size // patch  # in pixels; in patches
        self.squares = ceil(height / self.square), ceil(width / self.square)
        self.grid, self.places = (height, width), self.squares[0] * self.squares[1]
        last = backbone.feature_info[-1]
        self.mask_token = MaskToken(backbone.patch_embed.proj.out_channels)
        nn.init.trunc_normal_(self.mask_token.token, std=0.02)
        backbone.patch_embed.register_forward_hook(self.mask_token)
        self.decoder = nn.Sequential(
            nn.Conv2d(last["num_chs"], channels_of(backbone) * last["reduction"] ** 2, 1),
            nn.PixelShuffle(last["reduction"]),
        )
        self._features = torch.compile(features, **self.compiler_options()) if hp.compile else features

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compute the mean absolute error of the hidden pixels."""
        images, noise = self.images_and_noise(batch)
        predicted, hidden, final = self.predict(images, noise)
        with torch.autocast(self.device.type, enabled=False):
            loss = pixel_loss(predicted.float(), images.float(), hidden)
        with torch.no_grad():
            pooled = self.backbone.forward_head(final.detach(), pre_logits=True)
        return Output(loss, {"hidden_share": hidden.float().mean()}, pooled)

    def predict(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict images [N, C, H, W] without the squares with the least noise, noise being [N, squares].

        Returns:
            The images [N, C, H, W], which pixels were hidden [N, 1, H, W], and what the backbone pools.
        """
        count = ceil(self.places * self.hp.mask_ratio)
        hidden = (noise.argsort(1).argsort(1) < count).unflatten(1, self.squares)
        of_patches = enlarge(hidden, self.square)[:, : self.grid[0], : self.grid[1]]
        self.mask_token.hidden = of_patches
        try:
            final, patches = self._features(self.backbone, images)
        finally:
            self.mask_token.hidden = None
        return self.decoder(patches), enlarge(of_patches, self.patch).unsqueeze(1), final

    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        predicted, hidden, _ = self.predict(images, noise)
        return predicted.float(), hidden


def features(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a backbone pools, and patch features [N, D, h, w], both after the final norm."""
    final, [patches] = backbone.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
    return final, patches


def enlarge(grid: Tensor, times: int) -> Tensor:
    """Repeat the cells of [N, h, w] in both directions."""
    return grid.repeat_interleave(times, 1).repeat_interleave(times, 2)


def pixel_loss(predicted: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Return the mean absolute error [] of images [N, C, H, W], over pixels that are hidden [N, 1, H, W]."""
    error = F.l1_loss(predicted, images, reduction="none")
    return (error * hidden).sum() / (images.shape[1] * hidden.sum())
