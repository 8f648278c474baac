"""UPerNet for backbones of one scale: a pyramid by up- and down-sampling, pooling of the whole, fusion."""

from functools import partial
from math import log2

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

POOLED = (1, 2, 3, 6)  # sides of the maps to which the coarsest level is pooled
LEVELS = 4
FINEST = 4  # pixels from one column of the finest level to the next, about
DROPOUT = 0.1  # of whole channels, before the classes

_conv = partial(Conv2dNormActivation, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU)


class PyramidDecoder(nn.Module):
    """UPerNet on four levels, about 4, 8, 16 and 32 pixels apart, made from maps of one scale.

    Maps patch features [B, D, h, w] to logits [B, classes, H, W] at the resolution of the finest level, which
    covers the same image.

    A level is a map of the backbone, upsampled by transposed convolutions as in ViTDet or downsampled by
    max-pooling. Pyramid pooling and the feature pyramid are UPerNet's, as mmsegmentation has them.

    Args:
        features: D.
        classes: number of classes.
        hidden: channels of each level.
        layers: blocks whose features are concatenated in D: 1, of which all levels are made, or 4, of which
            the first makes the finest level, as in BEiT.
        patch: pixels from one column of the features to the next.

    Sources: "Unified Perceptual Parsing for Scene Understanding" (Xiao et al., 2018); `UPerHead` of
    github.com/open-mmlab/mmsegmentation; "Exploring Plain Vision Transformer Backbones for Object Detection"
    (Li et al., 2022); "BEiT" (Bao et al., 2022).
    """

    def __init__(
        self, features: int, classes: int, hidden: int = 512, *, layers: int = 1, patch: int = 16
    ) -> None:
        super().__init__()
        if layers not in (1, LEVELS):
            raise ValueError(f"a pyramid is made of 1 or {LEVELS} layers, not of {layers}")
        self.layers = layers
        doublings = max(0, round(log2(patch / FINEST)))  # to the finest level
        width = features // layers
        scales = [doublings - level for level in range(LEVELS)]
        widths = [width >> max(0, scale) for scale in scales]
        self.rescale = nn.ModuleList(rescaling(width, scale) for scale in scales)
        self.pool = nn.ModuleList(_conv(widths[-1], hidden, 1) for _ in POOLED)
        self.pooled = _conv(widths[-1] + len(POOLED) * hidden, hidden, 3)
        self.lateral = nn.ModuleList(_conv(each, hidden, 1) for each in widths[:-1])
        self.smooth = nn.ModuleList(_conv(hidden, hidden, 3) for _ in widths[:-1])
        self.fuse = _conv(LEVELS * hidden, hidden, 3)
        self.drop = nn.Dropout2d(DROPOUT)
        self.classify = nn.Conv2d(hidden, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        maps = features.chunk(self.layers, 1)
        levels = [rescale(maps[level % self.layers]) for level, rescale in enumerate(self.rescale)]
        coarsest = levels[-1]
        pooled = [
            _resized(conv(F.adaptive_avg_pool2d(coarsest, side)), coarsest)
            for side, conv in zip(POOLED, self.pool, strict=True)
        ]
        path = [self.pooled(torch.cat([coarsest, *pooled], 1))]  # from the coarsest level to the finest
        for lateral, level in zip(reversed(self.lateral), reversed(levels[:-1]), strict=True):
            path.append(lateral(level) + _resized(path[-1], level))
        smooth = [path[0], *(conv(each) for conv, each in zip(reversed(self.smooth), path[1:], strict=True))]
        fused = self.fuse(torch.cat([_resized(each, path[-1]) for each in reversed(smooth)], 1))
        logits: Tensor = self.classify(self.drop(fused))
        return logits


def rescaling(width: int, doublings: int) -> nn.Sequential:
    """Return layers that double the sides of a map [B, width, h, w] `doublings` times, or halve them.

    Each doubling halves the width.
    """
    layers: list[nn.Module] = []
    for step in range(doublings):
        before = width >> step
        if step:
            layers += [nn.BatchNorm2d(before), nn.GELU()]
        layers.append(nn.ConvTranspose2d(before, before // 2, 2, stride=2))
    layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-doublings)]
    return nn.Sequential(*layers)


def _resized(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, like.shape[-2:], mode="bilinear")
