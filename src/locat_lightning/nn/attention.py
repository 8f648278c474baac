"""Attention with a Gaussian kernel added to its logits: the equation, and the choice of how to compute it."""

import os
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.nn.chunked_attention import chunked_attention
from locat_lightning.nn.fused_attention import fused_attention, unsupported
from locat_lightning.nn.gaussian import Gaussians, LazyGaussians, gaussian_kernel

FORCED = os.environ.get("LOCAT_ATTENTION", "")


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
    gaussians: LazyGaussians | Gaussians | Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `gaussian_augmented_attention`, without all of S in memory where that is possible.

    `gaussians` are the kernels of the queries, computed or not, or S itself; the result has the type of v.
    """
    way, _ = implementation(v, gaussians, bias=bias, dropout=dropout)
    if isinstance(gaussians, LazyGaussians):
        if way == "Triton":
            return fused_attention(q, k, v, gaussians)
        if gaussians.q is q:
            q = q.contiguous()  # as both want it
            gaussians = gaussians._replace(q=q)
        gaussians = gaussians.compute()
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast on a GPU, q-norm and k-norm give float32
    if isinstance(gaussians, Gaussians):
        if way == "chunks":
            return chunked_attention(q, k, v, gaussians)
        gaussians = gaussian_kernel(gaussians)
    return gaussian_augmented_attention(q, k, v, gaussians, bias=bias, dropout=dropout)


def implementation(
    v: Tensor,
    gaussians: LazyGaussians | Gaussians | Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Literal["Triton", "chunks", "plain"], str]:
    """Choose how to compute an attention with values v [B, h, N, d], and say why it is not Triton.

    S has to exist as a whole ("plain") under `torch.compile`, `torch.export` and `torch.jit.trace`, with
    dropout or a bias, and for kernels that are not a product of two factors. LOCAT_ATTENTION=plain forces
    that; LOCAT_ATTENTION=triton makes it an error where Triton cannot be used.
    """
    if FORCED not in ("", "triton", "plain"):
        raise InputError(f"LOCAT_ATTENTION must be triton or plain, not {FORCED!r}")
    if isinstance(gaussians, LazyGaussians):
        product, why = gaussians.gaug.correlation is None, unsupported(v, gaussians)
    else:
        product, why = getattr(gaussians, "cross", gaussians) is None, "the kernels are given"
    if dropout or bias is not None:
        why = "attention weights are dropped" if dropout else "logits have a bias"
    if FORCED == "plain":
        why = "LOCAT_ATTENTION=plain"
    if not why:
        return "Triton", ""
    if FORCED == "triton":
        raise InputError(f"LOCAT_ATTENTION=triton cannot be used: {why}")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    # `traced` comes first: a look at the number of images would fix it in an exported program.
    chunks = not traced and product and not FORCED and not dropout and bias is None and len(v) > 0
    return "chunks" if chunks else "plain", why
