"""timm's self-attention layers with a Gaussian kernel in their logits."""

from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat, register_notrace_module
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.nn.attention import gaussian_attention
from locat_lightning.nn.gaussian import GaussianAugmentation, GaussianMixture
from locat_lightning.nn.patches import PatchGrid


def rotate_patches(t: Tensor, rope: Tensor, prefix: int, *, half: bool) -> Tensor:
    """Return queries or keys [B, h, N, d] with rotary embedding, but for the first `prefix` tokens."""
    patches = apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)
    return torch.cat([t[:, :, :prefix].to(patches.dtype), patches], dim=2)


@register_notrace_module  # `torch.fx` does not look inside: what a layer computes depends on the grid
class GaussianSelfAttention(nn.Module):
    """Self-attention of a Vision Transformer with GAug, for timm's layers that compute q, k and v.

    A subclass names the layer whose weights and other parts it has. `gaug`, the model's `grid` and its number
    of prefix tokens are set on a layer that is built already.

    Source: "Locality-Attending Vision Transformer" (ICLR 2026), Gaussian-augmented attention.
    """

    gaug: GaussianAugmentation | GaussianMixture
    grid: PatchGrid
    num_prefix_tokens: int

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend within [B, N, D]; the kernels depend on the queries before their rotary embedding."""
        if attn_mask is not None or is_causal:
            raise ValueError("Gaussian-augmented attention takes no attn_mask and is not causal")
        this: Any = self
        gate = this.gate(x).sigmoid() if this.gate is not None else None
        q, k, v = self._queries_keys_values(x)
        q, k = this.q_norm(q), this.k_norm(k)
        patches = int(x.shape[1]) - self.num_prefix_tokens
        grid, kept = self.grid.of(patches), self.grid.kept_of(patches)
        gaussians = self.gaug(q, grid, self.grid.built_for, kept=kept)
        if rope is not None:
            half = getattr(this, "rotate_half", False)
            q, k = (rotate_patches(t, rope, self.num_prefix_tokens, half=half).type_as(v) for t in (q, k))
        if q.shape[1] > k.shape[1]:  # grouped queries
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        dropout = this.attn_drop.p if self.training else 0.0
        x = gaussian_attention(q, k, v, gaussians, dropout=dropout).transpose(1, 2).flatten(2)
        x = this.norm(x)
        if gate is not None:
            x = x * gate
        out: Tensor = this.proj_drop(this.proj(x))
        return out

    def _queries_keys_values(self, x: Tensor) -> list[Tensor]:
        """Return [B, h, N, d] each, of one projection or of three."""
        this: Any = self
        d = this.head_dim
        if this.qkv is None:
            each = this.q_proj(x), this.k_proj(x), this.v_proj(x)
            return [t.unflatten(-1, (-1, d)).transpose(1, 2) for t in each]
        if getattr(this, "q_bias", None) is None:
            qkv = this.qkv(x)
        else:
            qkv = F.linear(x, this.qkv.weight, torch.cat([this.q_bias, this.k_bias, this.v_bias]))
        return [each.transpose(1, 2) for each in qkv.unflatten(-1, (3, -1, d)).unbind(2)]


class GaussianAttention(GaussianSelfAttention, Attention):
    """timm's `Attention` (ViT, DeiT, DINO, DINOv2, CLIP, SigLIP) with GAug."""

    qkv: nn.Module
    q_proj = k_proj = v_proj = None


class GaussianRopeAttention(GaussianSelfAttention, AttentionRope):
    """timm's `AttentionRope` (RoPE-ViT and its family) with GAug."""


class GaussianEvaAttention(GaussianSelfAttention, EvaAttention):
    """timm's `EvaAttention` (EVA, EVA-02, DINOv3) with GAug."""


@register_notrace_module
class GaussianWindowAttention(WindowAttention):
    """timm's `WindowAttention` (Swin) with GAug. The grid is the window, and there is no prefix token.

    S is added to the relative position bias and to the mask of shifted windows.
    """

    gaug: GaussianAugmentation | GaussianMixture
    built_for: tuple[int, int]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within [B·windows, N, D], windows of whole images; `mask` is [windows, N, N]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
        gaussians = self.gaug(q, self.window_size, self.built_for)
        bias = self._get_rel_pos_bias()  # private to timm, but the one place where the table is laid out
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
        dropout = self.attn_drop.p if self.training else 0.0
        x = gaussian_attention(q, k, v, gaussians, bias=bias, dropout=dropout).transpose(1, 2).flatten(2)
        out: Tensor = self.proj_drop(self.proj(x))
        return out


ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {
    Attention: GaussianAttention,
    AttentionRope: GaussianRopeAttention,
    EvaAttention: GaussianEvaAttention,
    WindowAttention: GaussianWindowAttention,
}


def add_gaussians(layer: nn.Module, gaug: GaussianAugmentation | GaussianMixture) -> None:
    """Turn one of timm's layers, of `ATTENTIONS`, into that with GAug.

    Its class is replaced, not the layer: weights, hooks and references to it stay valid, and the arguments
    that it was built with need not be known.
    """
    layer.__class__ = ATTENTIONS[type(layer)]
    layer.gaug = gaug.train(layer.training)
