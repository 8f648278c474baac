"""Pictures of what a model makes of images: which columns, and what each tile shows where."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from torch.nn import functional as F

from locat_lightning.figures.validation import MARK, RIGHT, WRONG, validation_figure
from locat_lightning.inspection import pca_colours


def images(count=2, size=(16, 16)):
    return list(np.random.default_rng(0).random((count, *size, 3), np.float32))


EVERYTHING = {
    "kernels": [torch.rand(2, 16, 4, 4)] * 5,
    "attention": {"student": torch.rand(2, 3, 4, 4), "teacher": torch.rand(2, 3, 4, 4)},
    "features": torch.rand(2, 8, 4, 4),
    "probabilities": torch.tensor([[0.1, 0.9], [0.5, 0.5]]),
}
TITLES = {
    "kernels": ["kernels, block 0", "kernels, block 2", "kernels, block 4"],
    "attention": ["attention of [CLS]"] * 2,
    "features": ["PCA of patch features"],
    "probabilities": ["prediction"],
}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def column(figure, title):
    return figure.axes[titles(figure).index(title)]


@pytest.mark.parametrize("left_out", [None, *EVERYTHING])
def test_a_column_for_each_thing_given(left_out):
    parts = {name: part for name, part in EVERYTHING.items() if name != left_out}
    figure = validation_figure(images(), [1, -1], ["ant", "bee"], side=56, **parts)
    assert titles(figure) == ["input", *(title for name in parts for title in TITLES[name])]


def test_notes_name_the_networks_and_the_scale():
    figure = validation_figure(images(), [0, 0], side=56, **EVERYTHING)
    notes = [axes.texts[0].get_text() for axes in figure.axes]
    peak = max(float(each[[10, 0, 15]].max()) for each in EVERYTHING["kernels"][0])
    assert notes[1] == f"mean of heads, brightest {peak:.2f}"
    assert notes[4:6] == ["student: last block, mean of heads", "teacher: last block, mean of heads"]
    alone = validation_figure(images(), [0, 0], attention={"": torch.rand(2, 3, 4, 4)})
    assert alone.axes[1].texts[0].get_text() == "last block, mean of heads"


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (112, 56)])
def test_tiles_keep_the_shape_of_the_images_and_do_not_overlap(size):
    figure = validation_figure(images(3, size), [0, 1, 2], kernels=[torch.rand(3, 16, 4, 4)], side=56)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        boxes = [tile.get_window_extent() for tile in axes.images[:: len(axes.images) // 3]]
        for box in boxes:
            assert (box.height, box.width) == pytest.approx([56 * length / min(size) for length in size])
        assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))
    left, right = (axes.get_window_extent() for axes in figure.axes)
    assert left.x1 < right.x0


def test_an_image_is_shown_as_it_is_and_a_kernel_where_it_is():
    kernel = torch.zeros(1, 16, 4, 4)
    kernel[0, 2 * 4 + 2, 2, 2] = 3.0  # the middle patch sees only itself
    [image] = images(1)
    figure = validation_figure([image], [0], kernels=[kernel], side=64)
    assert np.array_equal(figure.axes[0].images[0].get_array(), image)
    assert figure.axes[0].images[0].get_extent() == [0, 64, 64, 0]
    _, heat = figure.axes[1].images
    assert np.argwhere(heat.get_array() == 1).tolist() == [[2, 2]]
    assert heat.get_array().sum() == 1
    marked = [patch.get_bbox().bounds for patch in figure.axes[1].patches if isinstance(patch, Rectangle)]
    assert marked == [(32, 32, 16, 16), (0, 0, 16, 16), (48, 48, 16, 16)]


def test_each_network_has_its_attention_and_the_features_their_colours():
    hot, features = torch.eye(4).view(1, 1, 4, 4), torch.rand(1, 5, 4, 4)
    figure = validation_figure(
        images(1), [0], attention={"student": hot.flip(-1), "teacher": hot, "none": None}, features=features
    )
    student, teacher, colours = (axes.images[-1].get_array() for axes in figure.axes[1:])
    assert np.array_equal(student, np.fliplr(np.eye(4)))
    assert np.array_equal(teacher, np.eye(4))
    assert np.array_equal(colours, pca_colours(features)[0].movedim(0, -1))


def test_a_model_that_has_diverged_is_drawn_all_the_same():
    nan = torch.full((1, 3, 4, 4), math.nan)
    figure = validation_figure(
        images(1),
        [1],
        kernels=[torch.full((1, 16, 4, 4), math.nan), torch.zeros(1, 16, 4, 4)],
        attention={"student": nan, "teacher": torch.zeros(1, 3, 4, 4)},
        features=nan,
        probabilities=torch.full((1, 5), math.nan),
        side=56,
    )
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 7


@pytest.mark.parametrize("predicted", [0, 1])
def test_the_prediction_is_green_where_true_and_red_where_false(predicted):
    probabilities = 0.5 * F.one_hot(torch.tensor([predicted]), 2) + 0.25
    axes = validation_figure(images(1), [1], ["ant", "bee"], probabilities=probabilities).axes[-1]
    first, second = ("bee", "ant") if predicted else ("ant", "bee")
    assert [text.get_text() for text in axes.texts[1:]] == [first, "75%", second, "25%", "true: bee"]
    colours = [text.get_color() for text in axes.texts]
    assert colours[1] == (RIGHT if predicted else WRONG)
    assert (colours[3] == RIGHT) == (predicted == 0)
    bars = [bar.get_width() / 224 for bar in axes.patches]
    assert bars == pytest.approx([1, 0.75, 1, 0.25])


def test_a_label_that_nobody_knows_is_neither_right_nor_wrong():
    axes = validation_figure(images(1), [-1], probabilities=torch.eye(3)[:1]).axes[-1]
    assert not any(text.get_text().startswith("true") for text in axes.texts)
    assert not {RIGHT, WRONG, MARK} & {text.get_color() for text in axes.texts}
