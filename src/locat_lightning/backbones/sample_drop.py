"""Stochastic depth that computes each branch for some images only, and so saves what it drops.

Source: "DINOv2: Learning Robust Visual Features without Supervision" (Oquab et al. 2023), efficient
stochastic depth.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class SampledBlock(Block):
    """timm's block; in training, each of its branches sees random images, at least one of a batch.

    What they gain is scaled by the batch over their number, and the other images stay as they are.

    Attributes:
        sample_drop: share of the images that a branch leaves out.
    """

    sample_drop: float

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens [B, N, D] to tokens."""
        if not self.training:
            out: Tensor = super().forward(x, attn_mask, is_causal)
            return out
        if attn_mask is not None or is_causal:
            raise ValueError("SampledBlock takes no attn_mask and is not causal")
        x = self._of_some(x, lambda some: self.ls1(self.attn(self.norm1(some))))
        return self._of_some(x, lambda some: self.ls2(self.mlp(self.norm2(some))))

    def _of_some(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        kept = max(int(len(x) * (1 - self.sample_drop)), 1)
        places = torch.randperm(len(x), device=x.device)[:kept]
        return x.index_add(0, places, branch(x[places]).to(x.dtype), alpha=len(x) / kept)


def drop_samples(model: nn.Module, rate: float) -> None:
    """Turn all of a model's blocks into `SampledBlock`s in place: `ValueError` if they are not timm's."""
    blocks: list[Any] = [module for module in model.modules() if type(module) is Block]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has none of timm's blocks")
    for block in blocks:
        block.__class__ = SampledBlock
        block.sample_drop = rate
