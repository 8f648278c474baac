"""Looks by several models: which columns, and that frames and lines are at the right patches."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from locat_lightning.figures.looks import (
    DIMMED,
    GAP,
    attention_of,
    clusters_of,
    components_of,
    foreground_of,
    kernels_of,
    looks_figure,
    matches_figure,
    similarity_of,
)
from locat_lightning.structure import Foreground, Matches

IMAGES = [np.full((20, 40, 3), 0.5, np.float32), np.full((30, 20, 3), 0.5, np.float32)]
GRIDS = [(2, 4), (3, 2)]


def maps(*front):
    torch.manual_seed(0)
    return [torch.rand(*front, *grid) for grid in GRIDS]


def columns():
    kernels = [[torch.rand(i * j, i, j)] * 2 for i, j in GRIDS]
    cuts = [Foreground(each > 0.5, each) for each in maps()]
    clusters = [(3 * each).long() for each in maps()]
    return [
        *kernels_of(IMAGES, [0, 7], kernels),
        *attention_of(IMAGES, maps(4)),
        *components_of(maps(3)),
        *similarity_of(IMAGES, maps(), (1, 2)),
        *clusters_of(IMAGES, clusters, np.eye(3, dtype=np.uint8)),
        *foreground_of(IMAGES, cuts),
    ]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def notes(figure):
    return [axes.texts[0].get_text() for axes in figure.axes]


def test_the_columns_of_one_model_say_what_they_show():
    figure = looks_figure(IMAGES, {"alone": columns()}, side=20)
    assert titles(figure) == [
        *("input", "kernels, block 0", "kernels, block 7", "attention of [CLS]", "PCA of patch features"),
        *("similarity", "clusters of patches", "eigenvector", "foreground"),
    ]


def test_the_columns_of_several_models_say_whose_they_are():
    long = "a_name_that_is_longer_than_a_tile_is_wide"
    figure = looks_figure(IMAGES, {"one": columns()[2:4], long: columns()[2:3]}, side=20)
    assert titles(figure) == ["input", "one", "one", f"…{long[-23:]}"]
    assert notes(figure)[1] == notes(figure)[3] == "attention of [CLS], last block, mean of heads"


def test_the_chosen_patch_is_framed_in_the_first_image_alone():
    figure = looks_figure(IMAGES, {"alone": columns()[4:5]}, side=20)
    (frame,) = [each for each in figure.axes[1].patches if isinstance(each, Rectangle)]
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((20, 10), 10, 10)
    heat = figure.axes[1].images[1].get_array()
    cosines = torch.cat([each.flatten() for each in maps()])
    expected = (maps()[0] - cosines.min()) / (cosines.max() - cosines.min())
    np.testing.assert_allclose(heat, expected, atol=1e-6)


def test_the_background_is_dimmed():
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2] = True
    _, column = foreground_of(IMAGES[:1], [Foreground(mask, mask.float())])
    figure = looks_figure(IMAGES[:1], {"alone": [column]}, side=20)
    expected = np.full((20, 40, 3), 0.5 * DIMMED)
    expected[10:, 20:30] = 0.5
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), expected, atol=1e-6)


@pytest.mark.parametrize("most", [1, 5])
def test_lines_join_the_matched_patches(most):
    found = Matches(torch.tensor([[6, 1], [0, 4]]), torch.tensor([0.9, 0.8]))
    figure = matches_figure(
        IMAGES, {"alone": [(found, GRIDS[0], GRIDS[1])]}, most=most, side=60
    )  # 120 and 40 pixels wide
    lines = [tuple(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines]
    second = 120 + GAP
    expected = [((75, 45), (second + 30, 10)), ((15, 15), (second + 10, 50))]
    assert len(lines) == min(most, 2)
    for line, points in zip(lines, expected, strict=False):
        np.testing.assert_allclose(line, points)


def test_a_row_for_each_image_after_the_first():
    found = [
        (Matches(torch.empty(0, 2, dtype=torch.int64), torch.empty(0)), GRIDS[0], grid) for grid in GRIDS
    ]
    figure = matches_figure([*IMAGES, IMAGES[0]], {"a": found[::-1], "b": found[::-1]}, most=9, side=60)
    assert titles(figure) == ["a", "b"]
    assert [len(axes.images) for axes in figure.axes] == [2, 2]
    assert figure.axes[0].images[0].get_array().shape == (60, 120 + GAP + 40, 3)
