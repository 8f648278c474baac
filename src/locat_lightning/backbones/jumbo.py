"""Jumbo: a Vision Transformer whose [CLS] is several tokens wide, with an MLP of its own.

Source: method of "Locality-Attending Vision Transformer" (ICLR 2026), its Jumbo backbones.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp, PatchDropout
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from locat_lightning.backbones.locate import add_locat
from locat_lightning.nn import PatchRefinement


class JumboBlock(Block):
    """timm's block for J [CLS] tokens and patches: one attention, two MLPs.

    After the attention, the J tokens are one vector of J·D with its own norm, MLP, layer scale and drop path;
    the patches go through the block's usual MLP.

    Args:
        jumbo_mlp: of the J·D vector, shared by all blocks.
        class_tokens: J.
        **kwargs: of timm's `Block`.
    """

    def __init__(self, *, jumbo_mlp: nn.Module, class_tokens: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        place: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.class_tokens = class_tokens
        width = class_tokens * kwargs["dim"]
        self.norm3 = nn.LayerNorm(width, **place)
        self.jumbo_mlp = jumbo_mlp
        init_values = kwargs["init_values"]
        self.ls3 = LayerScale(width, init_values=init_values, **place) if init_values else nn.Identity()
        self.drop_path3 = DropPath(kwargs["drop_path"]) if kwargs["drop_path"] > 0 else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens [B, J + H·W, D] to tokens."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        cls, patches = x[:, : self.class_tokens], x[:, self.class_tokens :]
        patches = patches + self.drop_path2(self.ls2(self.mlp(self.norm2(patches))))
        jumbo = cls.flatten(1)
        jumbo = jumbo + self.drop_path3(self.ls3(self.jumbo_mlp(self.norm3(jumbo))))
        return torch.cat([jumbo.view(cls.shape), patches], dim=1)


class JumboNorm(nn.LayerNorm):
    """The final norm: one over the J·D of [CLS], and that of the patches if they have one."""

    def forward(self, x: Tensor) -> Tensor:
        J = self.normalized_shape[0] // x.shape[-1]
        cls, patches = x[:, :J], x[:, J:]
        of_patches: nn.Module = self.__dict__["of_patches"]
        return torch.cat([super().forward(cls.flatten(1)).view(cls.shape), of_patches(patches)], dim=1)


class Jumbo(VisionTransformer):
    """A Vision Transformer with J [CLS] tokens of width D, read as one vector of J·D.

    Args:
        jumbo_multiplier: J.
        norm_patches: Whether the patches get a final norm.
        gaug: as of `add_locat`.
        prr: as of `add_locat`; over all J + H·W tokens.
        **kwargs: of timm's `VisionTransformer`. The position embedding is of the patches alone.
    """

    def __init__(
        self,
        *,
        jumbo_multiplier: int = 6,
        norm_patches: bool = False,
        gaug: bool | dict[str, Any] = False,
        prr: bool = False,
        init_values: float | None = 1e-4,
        num_classes: int = 1000,
        global_pool: str = "token",
        **kwargs: Any,
    ) -> None:
        if jumbo_multiplier < 1:
            raise ValueError(f"jumbo_multiplier must be at least 1, not {jumbo_multiplier}")
        if global_pool not in (("token", "prr") if prr else ("token",)):  # timm notes the latter down
            raise ValueError(
                f"Jumbo pools its [CLS] tokens: global_pool must be 'token', not '{global_pool}'"
            )
        if kwargs.get("reg_tokens", 0) or not kwargs.get("class_token", True):
            raise ValueError(
                "Jumbo has [CLS] tokens and no registers: leave reg_tokens and class_token alone"
            )
        place: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        width = jumbo_multiplier * kwargs["embed_dim"]
        jumbo_mlp = Mlp(width, int(width * kwargs.get("mlp_ratio", 4.0)), **place)
        super().__init__(
            block_fn=partial(JumboBlock, jumbo_mlp=jumbo_mlp, class_tokens=jumbo_multiplier),
            init_values=init_values,
            num_classes=num_classes,
            no_embed_class=True,
            **kwargs,
        )
        self.jumbo_mlp = jumbo_mlp
        self.num_prefix_tokens = jumbo_multiplier
        if isinstance(self.patch_drop, PatchDropout):
            self.patch_drop.num_prefix_tokens = jumbo_multiplier
        self.head_hidden_size = width  # pooled; `num_features` is the width D of a token
        self.cls_token = nn.Parameter(torch.zeros(1, jumbo_multiplier, self.embed_dim, **place))
        nn.init.normal_(self.cls_token, std=1e-6)
        self.norm = JumboNorm(width, **place)
        self.norm_patches = nn.LayerNorm(self.embed_dim, **place) if norm_patches else nn.Identity()
        self.norm.__dict__["of_patches"] = self.norm_patches  # whose weights are not the norm's
        self.reset_classifier(num_classes)
        if gaug is not False:
            add_locat(self, gaug=gaug, prr=False)
        if prr:
            heads = self.blocks[-1].attn.num_heads
            self.attn_pool = PatchRefinement(self.embed_dim, heads, prefix=jumbo_multiplier)
            self.global_pool, self.pool_include_prefix = "prr", True

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head, with weights of 0 and biases of -ln(classes)."""
        super().reset_classifier(0, global_pool)
        self.num_classes = num_classes
        if num_classes > 0:
            token = self.cls_token
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=token.device, dtype=token.dtype)
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, -math.log(num_classes))
            self.head.train(self.training)

    def prune_intermediate_layers(self, *args: Any, prune_norm: bool = False, **kwargs: Any) -> list[int]:
        kept: list[int] = super().prune_intermediate_layers(*args, prune_norm=prune_norm, **kwargs)
        if prune_norm:  # both parts of the final norm go together
            self.norm_patches = nn.Identity()
        return kept

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Return [CLS] of tokens [B, J + H·W, D], refined with PRR, as one vector [B, J·D]."""
        if isinstance(self.attn_pool, nn.Module):
            refined: Tensor = self.attn_pool(x)
            return refined
        return x[:, : self.num_prefix_tokens].flatten(1) if self.global_pool else x
