"""Patch representation refinement (PRR): a parameter-free self-attention before the pooling.

Source: "Locality-Attending Vision Transformer" (ICLR 2026), the section on patch representation refinement.
"""

from typing import Any, Literal

import torch
from timm.layers import AttentionPoolPrr
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.nn.gaussian import GATE_GAIN


class PatchRefinement(AttentionPoolPrr):
    """PRR, then pooling: x⁺ = softmax(x xᵀ / √d) x by head, of which the pooling takes [CLS] or the mean.

    Values and gradients are those of timm's module, but only the rows that are pooled are computed: O(N)
    instead of O(N²) for [CLS].

    Args:
        dim: Width h·d of a token.
        num_heads: h.
        pool_type: "token" for [CLS]; "avg" for the mean; "" for no pooling, where that is done elsewhere.
        prefix: For "token", the number of tokens of [CLS] (Jumbo's are concatenated; 1 by default); for
            "avg", the number of tokens before the patches, which the mean leaves out (0 by default).
        gated: Return x + g (x⁺ − x) instead of x⁺, where g is a learned gate that starts at 0, so that a
            model to which PRR is added starts with the outputs that it had before.
        **norms: `pre_norm`, `post_norm` and `norm_layer` of timm's module.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pool_type: Literal["token", "avg", ""] = "token",
        prefix: int | None = None,
        *,
        gated: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **norms: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **norms)
        self.pool = pool_type
        first, last = {"token": (0, prefix or 1), "avg": (prefix or 0, None), "": (0, None)}[pool_type]
        self.rows = slice(first, last)
        self.gate = nn.Parameter(torch.zeros((), device=device, dtype=dtype)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """Refine final-normed tokens [B, N, h·d] and pool them to [B, h·d]; without pooling [B, .., h·d]."""
        refined = self.refine(x.flatten(1, -2), self.rows)
        if self.pool == "token":
            return refined.flatten(1)
        return refined.mean(1) if self.pool == "avg" else refined.view(x.shape)

    def refine(self, x: Tensor, rows: slice) -> Tensor:
        """Refine some of the final-normed tokens [B, N, h·d] by all of them: [B, n, h·d]."""
        tokens = self.pre_norm(x)
        heads = self.by_head(tokens)
        found = F.scaled_dot_product_attention(heads[:, :, rows], heads, heads)
        refined: Tensor = found.transpose(1, 2).flatten(2)
        if self.gate is not None:
            before = tokens[:, rows]
            refined = before + GATE_GAIN * self.gate * (refined - before)
        out: Tensor = self.post_norm(refined)
        return out

    def by_head(self, tokens: Tensor) -> Tensor:
        """Return tokens [B, N, h·d] as [B, h, N, d], which are queries, keys and values."""
        heads: Tensor = tokens.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return heads
