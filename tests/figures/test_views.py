"""Pictures of views: each in its place."""

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from locat_lightning.figures.views import views_figure

MEAN, STD = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


@pytest.mark.parametrize("sizes", [[(2, 16), (3, 8)], [(2, 64), (1, 16)], [(2, 16)]])
def test_a_row_for_each_image_and_the_global_views_first(sizes):
    shown = [torch.rand(count, 2, 3, size, size) for count, size in sizes]
    figure = views_figure([(views - MEAN) / STD for views in shown], side=40)
    titles = [
        (f"{kind} {number}", f"{size} px")
        for kind, (count, size) in zip(("global", "local"), sizes, strict=False)
        for number in range(1, count + 1)
    ]
    assert [(axes.get_title(loc="left"), axes.texts[0].get_text()) for axes in figure.axes] == titles
    views = [view for of_size in shown for view in of_size]
    for axes, view in zip(figure.axes, views, strict=True):
        tops = [tile.get_extent()[3] for tile in axes.images]
        assert tops == sorted(tops)
        for tile, image in zip(axes.images, view, strict=True):
            np.testing.assert_allclose(tile.get_array(), image.movedim(0, -1), atol=1e-6)


def test_half_precision_and_values_beyond_the_range():
    figure = views_figure([torch.full((2, 1, 3, 8, 8), 99.0, dtype=torch.bfloat16)], side=40)
    assert len(figure.axes) == 2
    assert all((axes.images[0].get_array() == 1).all() for axes in figure.axes)
