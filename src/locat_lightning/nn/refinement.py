"""Patch representation refinement (PRR): a parameter-free self-attention before the pooling.

Source: "Locality-Attending Vision Transformer" (ICLR 2026), the section on patch representation refinement.
"""

from timm.layers import AttentionPoolPrr
from torch import Tensor
from torch.nn import functional as F


class PatchRefinement(AttentionPoolPrr):
    """PRR, then pooling: x⁺ = softmax(x xᵀ / √d) x by head, of which the pooling takes [CLS] or the mean.

    timm's module with the same arguments, values and gradients; where only [CLS] is pooled, only its row is
    computed: O(N) instead of O(N²).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Refine and pool final-normed tokens [B, N, h·d] to [B, h·d]."""
        x = self.pre_norm(x)
        heads = x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        queries = heads[:, :, :1] if self.pool == "token" else heads
        refined = F.scaled_dot_product_attention(queries, heads, heads)
        pooled: Tensor = self.post_norm(refined.transpose(1, 2).flatten(2)).mean(1)
        return pooled
