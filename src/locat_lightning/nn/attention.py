"""Attention with a Gaussian kernel added to its logits: the equation, and the choice of how to compute it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from locat_lightning.nn.chunked_attention import chunked_attention
from locat_lightning.nn.gaussian import Gaussians, gaussian_kernel


def gaussian_augmented_attention(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, *, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √d + S) v [B, h, N, d], as the paper has it.

    S is given among the patches, broadcast to [B, h, H·W, H·W]; it is 0 in the rows and columns of prefix
    tokens. A bias [windows, h, N, N], where B is windows of whole images, is added to the logits, too.
    `dropout` is the probability of dropping an attention weight.

    Source: "Locality-Attending Vision Transformer" (ICLR 2026), Gaussian-augmented attention.
    """
    prefix = q.shape[-2] - s.shape[-1]
    s = F.pad(s, (prefix, 0, prefix, 0)).to(q.dtype)
    if bias is not None:
        s = (s.expand(q.shape[0], -1, -1, -1).unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)
    out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=s, dropout_p=dropout)
    return out


def gaussian_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gaussians: Gaussians | Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `gaussian_augmented_attention`, without all of S in memory where that is possible.

    S has to exist as a whole under `torch.compile`, `torch.export` and `torch.jit.trace`, with dropout or a
    bias, and for kernels that are not a product of two factors. Everything else is `chunked_attention`.
    `gaussians` are the kernels of the queries, or S itself; the result has the type of v.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast on a GPU, q-norm and k-norm give float32
    if isinstance(gaussians, Gaussians):
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        # `traced` comes first: a look at the number of images would fix it in an exported program.
        if not traced and gaussians.cross is None and bias is None and dropout == 0 and len(q):
            return chunked_attention(q, k, v, gaussians)
        gaussians = gaussian_kernel(gaussians)
    return gaussian_augmented_attention(q, k, v, gaussians, bias=bias, dropout=dropout)
