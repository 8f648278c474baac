"""Attention with a Gaussian kernel added to its logits: softmax(q kᵀ / √d + S) v."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from locat_lightning.nn.gaussian import GaussianAugmentation, LogGaussian, PatchGrid, gaussian_kernel


class GaussianAttention(Attention):
    """timm's self-attention with GAug; for the `attn_layer` argument of timm's Vision Transformers.

    Takes the arguments of `timm.layers.Attention`. The model's `PatchGrid` is put into `grid` once its
    patch embedding is known.

    Source: "Locality-Attending Vision Transformer" (ICLR 2026), Gaussian-augmented attention.
    """

    grid: PatchGrid
    num_prefix_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.qkv.weight
        self.gaug = GaussianAugmentation(self.head_dim, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within [B, N, D]; masks are not supported (`ValueError`)."""
        if attn_mask is not None or is_causal:
            raise ValueError("Gaussian-augmented attention takes no attn_mask and is not causal")
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)

        grid = self.grid.of(x.shape[1] - self.num_prefix_tokens)
        log_gaussian = self.gaug(q, grid, self.grid.built_for)
        dropout = self.attn_drop.p if self.training else 0.0
        x = gaussian_attention(q, k, v, log_gaussian, dropout=dropout).transpose(1, 2).flatten(2)

        x = self.norm(x)
        if gate is not None:
            x = x * gate
        out: Tensor = self.proj_drop(self.proj(x))
        return out


def gaussian_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gaussian: LogGaussian, *, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √d + S) v, with S = 0 in every row and column of a prefix token.

    S exists for a few images or heads at a time, in the forward and in the backward pass: the memory is that
    of flash attention. Under `torch.compile`, `torch.export` and with dropout it is one expression instead.

    Args:
        q: Queries [B, h, N, d].
        k: Keys [B, h, N, d].
        v: Values [B, h, N, d].
        log_gaussian: Factors of S for the last H·W tokens.
        dropout: Probability of dropping an attention weight.

    Returns:
        [B, h, N, d] in the type of v.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast on a GPU, q-norm and k-norm give float32
    if torch.compiler.is_compiling() or dropout > 0:
        prefix = q.shape[-2] - log_gaussian.y.shape[-2]
        s = F.pad(gaussian_kernel(log_gaussian).to(q.dtype), (prefix, 0, prefix, 0))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=s, dropout_p=dropout)
    out: Tensor = _ChunkedGaussianAttention.apply(q, k, v, log_gaussian.y, log_gaussian.x)
    return out


class _ChunkedGaussianAttention(torch.autograd.Function):
    """`gaussian_attention` a chunk of images (or of one image's heads) at a time, forward and backward.

    With P = softmax(q kᵀ / √d + S), A its argument and T = ∂A ∘ S, the factors' gradients are
    ∂(ln g_y)[p, i] = Σ_j T[p, (i, j)] and ∂(ln g_x)[p, j] = Σ_i T[p, (i, j)]: one product with an indicator.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, log_y: Tensor, log_x: Tensor) -> Tensor:
        B, h, N, d = q.shape
        out = q.new_empty(B, N, h, d).transpose(1, 2)
        y, x = log_y.exp(), log_x.exp()
        s = None
        for part in _chunks(q):
            s = _kernel_of_tokens(y[part], x[part], N, s)
            mask = s.to(q.dtype)
            out[part] = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=mask)
        ctx.save_for_backward(q, k, v, y, x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v, y, x, out = ctx.saved_tensors
        N, d = q.shape[-2:]
        H, W = y.shape[-1], x.shape[-1]
        scale = d**-0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_yx = y.new_empty(*y.shape[:-1], H + W)
        rows_and_columns = _rows_and_columns(H, W, N - H * W, y)
        mean_grad = (grad * out).sum(-1, keepdim=True, dtype=torch.float32)
        s = None
        for part in _chunks(q):
            pairs = q[part].shape[:2]
            q_, k_, v_, grad_ = (t[part].flatten(0, 1) for t in (q, k, v, grad))
            s = _kernel_of_tokens(y[part], x[part], N, s)
            s_ = s.flatten(0, 1)
            q_ = q_ * scale
            attention = torch.bmm(q_, k_.transpose(1, 2)).float().add_(s_).softmax(-1)
            grad_logits = torch.bmm(grad_, v_.transpose(1, 2)).float()
            grad_logits.sub_(mean_grad[part].flatten(0, 1)).mul_(attention)
            grad_v[part] = torch.bmm(attention.to(q.dtype).transpose(1, 2), grad_).unflatten(0, pairs)
            narrow = grad_logits.to(q.dtype)
            grad_q[part] = torch.bmm(narrow, k_).mul_(scale).unflatten(0, pairs)
            grad_k[part] = torch.bmm(narrow.transpose(1, 2), q_).unflatten(0, pairs)
            by_log_kernel = grad_logits.mul_(s_).flatten(0, 1)
            grad_yx[part] = torch.mm(by_log_kernel, rows_and_columns).view(*pairs, N, -1)[:, :, N - H * W :]
        grad_y, grad_x = grad_yx.split([H, W], dim=-1)
        return grad_q, grad_k, grad_v, grad_y, grad_x


def _chunks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of (images, heads) whose [N, N] matrices stay in a CPU's cache, or fill a GPU once."""
    B, h, N, _ = q.shape
    matrices = max(1, (2**17 if q.device.type == "cpu" else 2**26) // N**2)
    images, heads = max(1, matrices // h), min(h, matrices)
    for b in range(0, B, images):
        for head in range(0, h, heads):
            yield slice(b, b + images), slice(head, head + heads)


def _kernel_of_tokens(y: Tensor, x: Tensor, tokens: int, out: Tensor | None) -> Tensor:
    """S [b, h, N, N] of all tokens from the patches' factors, into `out` where it fits."""
    H, W = y.shape[-1], x.shape[-1]
    prefix = tokens - H * W
    if out is None or out.shape[:2] != y.shape[:2]:
        out = y.new_zeros(*y.shape[:2], tokens, tokens)
    patches = out[..., prefix:, prefix:].unflatten(-1, (H, W))
    torch.mul(y.unsqueeze(-1), x.unsqueeze(-2), out=patches)
    return out


def _rows_and_columns(H: int, W: int, prefix: int, like: Tensor) -> Tensor:
    """Indicator [N, H + W] of each token's row and column; zero for prefix tokens."""
    rows = torch.eye(H, dtype=like.dtype, device=like.device).repeat_interleave(W, 0)
    columns = torch.eye(W, dtype=like.dtype, device=like.device).repeat(H, 1)
    return F.pad(torch.cat([rows, columns], dim=1), (0, 0, prefix, 0))
