"""The attention of [CLS] to the patches: one row of a softmax, read while a model is trained."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from locat_lightning.nn.layers import rotate_patches
from locat_lightning.nn.refinement import PatchRefinement


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √d) [B, h, N] float32 of the query [B, h, 1, d] of [CLS].

    It is also that row of Gaussian-augmented attention, where S is 0. Of several queries it is the mean.
    """
    rows: Tensor = (q * q.shape[-1] ** -0.5 @ k.mT).float().softmax(-1)
    return rows.mean(-2)


class ClassAttention:
    """Keeps the attention of [CLS] in each training pass of a Vision Transformer, by hooks on its layers.

    Queries and keys are those that the layer has computed, so that it takes N products of d numbers a head.

    Args:
        model: a Vision Transformer of timm that pools [CLS].
        of: `class`, the attention of the last block, or `refined`, that of PRR behind it.

    Attributes:
        heads: [B, h, H·W] float32, without gradient, of the latest pass in training; None before it.

    Raises:
        ValueError: the model has no such attention.
    """

    heads: Tensor | None = None

    def __init__(self, model: Any, of: Literal["class", "refined"] = "class") -> None:
        refinement: Any = getattr(model, "attn_pool", None)
        pooled = getattr(model, "global_pool", None)
        if pooled == "prr":
            pooled = refinement.pool
        if getattr(model, "cls_token", None) is None or pooled != "token":
            raise ValueError("it pools no [CLS] token, whose attention could be read")
        if not hasattr(model, "num_prefix_tokens"):
            raise ValueError("its [CLS] and patches do not pass its blocks together, as in timm's ViTs")
        if getattr(getattr(model, "patch_drop", None), "prob", 0):
            raise ValueError("it drops patches (patch_drop_rate), so that their attention is not known")
        self._classes, self._prefix = model.cls_token.shape[1], model.num_prefix_tokens
        self._q: Tensor | None = None
        self._rope: Tensor | None = None
        if of == "refined":
            if not isinstance(refinement, PatchRefinement):
                raise ValueError("it has no PRR, whose attention could be read")
            refinement.register_forward_pre_hook(self._note_refinement)
            return
        attention: Any = getattr(next(reversed(getattr(model, "blocks", ())), None), "attn", None)
        if not hasattr(attention, "q_norm"):
            raise ValueError("its last block does not show queries and keys")
        attention.register_forward_pre_hook(self._note_rope, with_kwargs=True)
        attention.q_norm.register_forward_hook(self._note_queries)
        attention.k_norm.register_forward_hook(self._note_keys)
        self._halves = getattr(attention, "rotate_half", False)

    def _note_rope(self, layer: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        self._rope = options.get("rope")

    def _note_queries(self, norm: nn.Module, inputs: Any, q: Tensor) -> None:
        self._q = q[:, :, : self._classes].detach()

    @torch.no_grad()
    def _note_keys(self, norm: nn.Module, inputs: Any, k: Tensor) -> None:
        q, rope, k = self._q, self._rope, k.detach()
        self._q = self._rope = None
        if q is None or not norm.training:
            return
        if rope is not None:
            k = rotate_patches(k, rope, self._prefix, half=self._halves).type_as(k)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # of grouped queries
        self.heads = class_attention(q, k)[..., self._prefix :]

    @torch.no_grad()
    def _note_refinement(self, refinement: PatchRefinement, inputs: tuple[Tensor, ...]) -> None:
        if refinement.training:
            heads = refinement.by_head(refinement.pre_norm(inputs[0].detach()))
            self.heads = class_attention(heads[:, :, : self._classes], heads)[..., self._prefix :]
