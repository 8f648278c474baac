"""ChannelViT: a Vision Transformer whose tokens are the patches of each channel, for any subset of channels.

Source: "Channel Vision Transformers: An Image Is Worth 1 x 16 x 16 Words" (Bao, Sivanandan and Karaletsos,
ICLR 2024): one patch embedding of a single channel shared by all, a learned embedding of each channel,
position embeddings shared over channels, and hierarchical channel sampling.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, register_notrace_module, resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def sample_channels(channels: int) -> Tensor:
    """Draw a number from 1 to C, each as likely, then so many of the channels: int64 [m], ascending.

    The values of those that are kept are not scaled, unlike dropout's. The numbers are drawn on the CPU, so
    that a GPU is not waited for.

    Source: hierarchical channel sampling, section 3.2.
    """
    number = int(torch.randint(1, channels + 1, ()))
    return torch.randperm(channels)[:number].sort().values


@register_notrace_module  # `torch.fx` does not look inside: which channels an image has changes
class ChannelPatchEmbed(PatchEmbed):
    """timm's patch embedding of one channel, applied to each, with the embedding of the channel added.

    Args:
        in_chans: C, channels that have an embedding.
        sampling: whether training sees a random subset of the channels, drawn for each batch.
        **kwargs: of timm's `PatchEmbed`.

    Attributes:
        taken: which of the C channels the images have, in their order; None if they have all.
    """

    taken: tuple[int, ...] | None = None

    def __init__(
        self, *args: Any, in_chans: int = 3, embed_dim: int = 768, sampling: bool = True, **kwargs: Any
    ) -> None:
        kwargs |= {"strict_img_size": kwargs.get("strict_img_size", True), "output_fmt": "NHWC"}
        super().__init__(*args, in_chans=1, embed_dim=embed_dim, **kwargs)
        place = {"device": self.proj.weight.device, "dtype": self.proj.weight.dtype}
        self.channel_embed = nn.Parameter(torch.zeros(in_chans, embed_dim, **place))
        trunc_normal_(self.channel_embed, std=0.02)
        self.sampling = sampling

    def forward(self, x: Tensor) -> Tensor:
        """Embed images [B, C', height, width]: [B, m, H, W, D], m = C' but where channels are sampled."""
        taken = torch.arange(len(self.channel_embed)) if self.taken is None else torch.tensor(self.taken)
        if x.shape[1] != len(taken):
            raise ValueError(f"the images have {x.shape[1]} channels, not {len(taken)}: see take_channels")
        if self.training and self.sampling:
            kept = sample_channels(len(taken))
            taken = taken[kept]
            x = x[:, kept.to(x.device, non_blocking=True)]
        patches: Tensor = super().forward(x.flatten(0, 1).unsqueeze(1)).unflatten(0, (-1, len(taken)))
        channel = self.channel_embed[taken.to(x.device, non_blocking=True)]
        return patches + channel[:, None, None]


class ChannelViT(VisionTransformer):
    """A Vision Transformer of C · H · W patch tokens, those of the first channel first.

    Patch features of a place (`forward_intermediates`, as NCHW) are the mean over its channels' tokens.

    With GAug (`add_locat`), the Gaussian of a query, a patch at (row, column) of some channel, is about (row,
    column) on every channel's grid, with the same variance and strength: S is tiled over channels, so that a
    patch attends to its surroundings in all channels alike. PRR refines over the patches of all channels.

    Args:
        in_chans: C, the channels of a file; a subset of them in evaluation is set by `take_channels`.
        channel_sampling: whether training sees random subsets (see `sample_channels`).
        **kwargs: of timm's `VisionTransformer`.
    """

    patch_embed: ChannelPatchEmbed

    def __init__(self, *, in_chans: int = 3, channel_sampling: bool = True, **kwargs: Any) -> None:
        embed = partial(ChannelPatchEmbed, sampling=channel_sampling)
        super().__init__(in_chans=in_chans, embed_layer=embed, **kwargs)

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "patch_embed.channel_embed"}

    def take_channels(self, taken: tuple[int, ...] | None) -> None:
        """Say which of the C channels the images have from now on; None for all."""
        self.patch_embed.taken = taken

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions to patches [B, m, H, W, D], and put [CLS] and registers before them."""
        grid = x.shape[2:4]
        prefix = [
            each.expand(x.shape[0], -1, -1) for each in (self.cls_token, self.reg_token) if each is not None
        ]
        tokens = x.flatten(2, 3)
        if self.pos_embed is None:
            return torch.cat([*prefix, tokens.flatten(1, 2)], dim=1)
        first = 0 if self.no_embed_class else self.num_prefix_tokens
        positions: Tensor = self.pos_embed
        if self.dynamic_img_size and grid != tuple(self.patch_embed.grid_size):
            positions = resample_abs_pos_embed(
                positions, new_size=list(grid), old_size=self.patch_embed.grid_size, num_prefix_tokens=first
            )
        of_prefix, of_patches = positions.split([first, positions.shape[1] - first], dim=1)
        tokens = (tokens + of_patches.unsqueeze(1)).flatten(1, 2)
        if prefix:
            before = torch.cat(prefix, dim=1)
            tokens = torch.cat([before + of_prefix if first else before, tokens], dim=1)
        embedded: Tensor = self.pos_drop(tokens)
        return embedded

    def forward_intermediates(
        self, x: Tensor, indices: Any = None, *args: Any, output_fmt: str = "NCHW", **kwargs: Any
    ) -> Any:
        """Return features of blocks as timm's models do; as maps, the mean over channels."""
        found: Any = super().forward_intermediates(x, indices, *args, output_fmt="NLC", **kwargs)
        if output_fmt == "NLC":
            return found
        size = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))

        def maps(features: list[Any]) -> list[Any]:
            return [
                (_mean_map(each[0], size), each[1]) if isinstance(each, tuple) else _mean_map(each, size)
                for each in features
            ]

        if isinstance(found, dict):
            return found | {"image_intermediates": maps(found["image_intermediates"])}
        return maps(found) if isinstance(found, list) else (found[0], maps(found[1]))


def _mean_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn tokens [B, m · H · W, D] into the mean map [B, D, H, W]."""
    mean: Tensor = tokens.unflatten(1, (-1, *size)).mean(1)
    return mean.permute(0, 3, 1, 2).contiguous()
