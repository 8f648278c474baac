"""A Vision Transformer with a distillation token beside [CLS], and a classifier for each."""

from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

TOKENS = 2  # [CLS] and the distillation token


class Distilled(VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled`, in which PRR refines both tokens that classifiers read.

    Source: "Training Data-Efficient Image Transformers & Distillation through Attention" (ICML 2021).
    """

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map final tokens [B, 2 + H·W, D] to logits [B, classes], the mean of both classifiers'.

        In training with `set_distilled_training`, return those of [CLS] and those of the distillation token.
        """
        if self.attn_pool is not None:
            x = self.attn_pool(x).unflatten(-1, (TOKENS, -1))
        logits: Tensor = super().forward_head(x, pre_logits)
        return logits
