"""MAE: the backbone sees a few patches of an image, and a small decoder predicts the others."""

from collections.abc import Callable
from typing import Any

import torch
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM
from lightly.models.utils import (
    initialize_2d_sine_cosine_positional_embedding,
    patchify,
    unpatchify,
)
from torch import Tensor, nn

from locat_lightning.backbones.channels import channels_of
from locat_lightning.backbones.weights import read_state
from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.methods.base import Output, freeze_pooling
from locat_lightning.methods.heads import load_heads, renamed
from locat_lightning.methods.pixels import PixelPrediction
from locat_lightning.nn import GaussianAugmentation, patch_selection

EPSILON = 1e-6  # beside the variance of a patch
# Our names of the original code's decoder, whose blocks are those of lightly's.
NAMES = {r"^mask_token$": "decoder.mask_token", r"^decoder_(pos_embed|blocks\.|norm\.)": r"decoder.\1"}


class Mae(PixelPrediction):
    """Train a timm Vision Transformer as a masked autoencoder.

    The backbone computes the tokens of the visible patches alone. PRR, like all that pools tokens, has no
    part in the loss: it is there where features are measured.

    Source: "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022). The defaults are its own; those of
    the optimizer are in `mae_small.yaml`.

    Args:
        backbone: timm's name of the model.
        mask_ratio: share of the patches that are hidden.
        normalise_pixels: whether the pixels of each patch are predicted at mean 0 and variance 1.
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        decoder_heads: number of its heads.
        heads: whether to take the decoder, too, from the weights that the backbone starts from.
        options: those of every pre-training (`Pretraining`).
    """

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        mask_ratio: OpenUnitInterval = 0.75,
        normalise_pixels: bool = True,
        decoder_dim: PositiveInt = 512,
        decoder_depth: PositiveInt = 8,
        decoder_heads: PositiveInt = 16,
        heads: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)

    def build(self, make_backbone: Callable[[], Any]) -> None:
        hp = self.hp
        self.backbone = backbone = make_backbone()
        try:
            patch_selection(backbone)
        except ValueError as error:
            raise InputError(f"model.backbone: {error}") from error
        height, width = backbone.patch_embed.grid_size
        if height != width or hp.decoder_dim % 4 or hp.decoder_dim % hp.decoder_heads:
            raise InputError(
                f"model.decoder_dim ({hp.decoder_dim}) has to be a multiple of 4 and of model.decoder_heads "
                f"({hp.decoder_heads}), and the grid of patches ({height} × {width}) a square"
            )
        initialise(backbone)
        self.start(backbone)
        freeze_pooling(self.backbone)
        self.places, self.channels = height * width, channels_of(backbone)
        self.side = backbone.patch_embed.patch_size[0]
        self.decoder_embed = nn.Linear(backbone.embed_dim, hp.decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            self.places,
            hp.decoder_dim,
            hp.decoder_depth,
            hp.decoder_heads,
            num_prefix_tokens=backbone.num_prefix_tokens,
        )
        self.decoder_pred = nn.Linear(hp.decoder_dim, self.channels * self.side**2)
        for layer in (self.decoder_embed, self.decoder_pred):
            _xavier(layer)
        if hp.heads and self.weights is not None:
            own = {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}
            load_heads(own, renamed(read_state(self.weights), NAMES), self.weights)
        self._encode = torch.compile(encode, **self.compiler_options()) if hp.compile else encode

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compute the mean squared error of the hidden patches."""
        images, noise = self.images_and_noise(batch)
        predicted, hidden, tokens = self.predict(images, noise)
        with torch.autocast(self.device.type, enabled=False):
            loss = patch_loss(predicted.float(), self.target(images)[0], hidden)
        with torch.no_grad():
            features = self.backbone.forward_head(tokens.detach(), pre_logits=True)
        return Output(loss, {"hidden_share": hidden.float().mean()}, features)

    def predict(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict images [N, C, H, W] from the patches with the least noise, noise being [N, patches].

        Returns:
            The patches [N, patches, C · side²], which of them were hidden [N, patches], and the backbone's
            tokens [N, prefix + visible, D].
        """
        order = noise.argsort(1)
        place = order.argsort(1)
        visible = max(1, int(self.places * (1 - self.hp.mask_ratio)))
        tokens = self._encode(self.backbone, images, order[:, :visible])
        x = self.decoder_embed(tokens)
        prefix = self.backbone.num_prefix_tokens
        mask_token = self.decoder.mask_token.to(x.dtype).expand(len(x), self.places - visible, -1)
        patches = torch.cat([x[:, prefix:], mask_token], dim=1).take_along_dim(place.unsqueeze(-1), dim=1)
        x = self.decoder(torch.cat([x[:, :prefix], patches], dim=1))
        return self.decoder_pred(x[:, prefix:]), place >= visible, tokens

    def target(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the patches to predict [N, patches, C · side²], and their mean and deviation before that."""
        patches = patchify(images.float(), self.side)
        if not self.hp.normalise_pixels:
            return patches, patches.new_zeros(()), patches.new_ones(())
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        deviation = (variance + EPSILON).sqrt()
        return (patches - mean) / deviation, mean, deviation

    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        predicted, hidden, _ = self.predict(images, noise)
        _, mean, deviation = self.target(images)
        hidden = hidden.unsqueeze(-1).expand(-1, -1, self.side**2)
        whole = unpatchify(predicted.float() * deviation + mean, self.side, self.channels)
        return whole, unpatchify(hidden, self.side, 1)


def encode(backbone: Any, images: Tensor, visible: Tensor) -> Tensor:
    """Return the final tokens [N, prefix + n, D] of patches [N, n] of images."""
    backbone.patch_drop.keep(visible)
    tokens: Tensor = backbone.forward_features(images)
    return tokens


def patch_loss(predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Return the mean squared error [] of patches [N, n, D], over those that are hidden [N, n]."""
    error = (predicted - target).square().mean(-1)
    return (error * hidden).sum() / hidden.sum()


def initialise(backbone: Any) -> None:
    """Give a backbone MAE's random weights: Xavier's, and fixed sines and cosines of the position."""
    kernels = {
        part
        for each in backbone.modules()
        if isinstance(each, GaussianAugmentation)
        for part in each.children()
    }
    for layer in backbone.modules():
        if isinstance(layer, nn.Linear) and layer not in kernels:
            _xavier(layer)
    weight = backbone.patch_embed.proj.weight
    nn.init.xavier_uniform_(weight.view(len(weight), -1))
    for token in ("cls_token", "reg_token"):
        if getattr(backbone, token, None) is not None:
            nn.init.normal_(getattr(backbone, token), std=0.02)
    positions = getattr(backbone, "pos_embed", None)
    if positions is not None:
        prefix = positions.shape[1] - backbone.patch_embed.num_patches
        initialize_2d_sine_cosine_positional_embedding(positions, num_prefix_tokens=prefix)


def _xavier(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
