"""The method itself: Gaussian-augmented attention and patch representation refinement.

Dimensions, in the names of tensors' shapes throughout this package:

    B  images          N  tokens: P prefix tokens ([CLS], registers), then the patches, row by row
    h  heads           H, W  rows and columns of the patch grid, so N = P + H·W
    d  width of a head
"""

from locat_lightning.nn.attention import gaussian_attention
from locat_lightning.nn.gaussian import GaussianAugmentation, GaussianMixture, gaussian_kernel
from locat_lightning.nn.layers import (
    GaussianAttention,
    GaussianEvaAttention,
    GaussianRopeAttention,
    GaussianSelfAttention,
    GaussianWindowAttention,
)
from locat_lightning.nn.patches import MaskToken, PatchGrid, PatchSelection, patch_selection
from locat_lightning.nn.refinement import PatchRefinement

__all__ = [
    "GaussianAttention",
    "GaussianAugmentation",
    "GaussianEvaAttention",
    "GaussianMixture",
    "GaussianRopeAttention",
    "GaussianSelfAttention",
    "GaussianWindowAttention",
    "MaskToken",
    "PatchGrid",
    "PatchRefinement",
    "PatchSelection",
    "gaussian_attention",
    "gaussian_kernel",
    "patch_selection",
]
