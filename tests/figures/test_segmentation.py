"""Pictures of a segmentation: overlays, the legend, bars, and the confusion matrix."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from locat_lightning.evaluation.iou import count_pixels, iou
from locat_lightning.figures.segmentation import confusion_figure, iou_figure, painted, segmentation_figure
from locat_lightning.labels import IGNORE

COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
NAMES = ["sky", "road", "car"]


def test_pixels_have_the_colours_of_their_classes_or_none():
    classes = np.array([[0, 1, 2], [IGNORE, 0, IGNORE]])
    drawn = painted(classes, COLOURS)
    assert drawn[0].tolist() == [[*colour, round(0.6 * 255)] for colour in COLOURS.tolist()]
    assert drawn[1, :, 3].tolist() == [0, round(0.6 * 255), 0]


def scene():
    images = [np.full((20, 30, 3), 0.5, np.float32), np.full((40, 20, 3), 0.5, np.float32)]
    masks = [torch.zeros(20, 30, dtype=torch.uint8), torch.full((80, 40), IGNORE, dtype=torch.uint8)]
    predictions = [torch.zeros(20, 30, dtype=torch.int64), torch.full((80, 40), 2)]
    return images, masks, predictions


def test_a_row_for_each_image_and_a_legend_of_what_occurs():
    images, masks, predictions = scene()
    kernels = [[torch.rand(6, 2, 3), torch.rand(8, 4, 2)]] * 4
    figure = segmentation_figure(images, masks, predictions, NAMES, COLOURS, kernels=kernels, side=60)
    FigureCanvasAgg(figure).draw()
    blocks = [f"kernels, block {block}" for block in (0, 1, 3)]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["input", "annotation", "prediction", *blocks]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sky", "car"]
    shown = [tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for patch in legend.get_patches()]
    assert shown == [(250, 0, 0), (0, 0, 250)]
    tops = [tile.get_window_extent().y0 for axes in figure.axes for tile in axes.images]
    assert legend.get_window_extent().y1 <= min(tops) + 1


def test_annotation_and_prediction_lie_over_the_images():
    images, masks, predictions = scene()
    figure = segmentation_figure(images, masks, predictions, NAMES, COLOURS, side=60)
    for axes, maps in zip(figure.axes[1:], (masks, predictions), strict=True):
        for grey, drawn, image, classes in zip(
            axes.images[::2], axes.images[1::2], images, maps, strict=True
        ):
            np.testing.assert_allclose(grey.get_array(), image.mean(-1), atol=1e-6)
            assert np.array_equal(drawn.get_array(), painted(classes, COLOURS))
            assert grey.get_extent() == drawn.get_extent()


def scored():
    annotations = torch.tensor([[0, 0, 0, 0, IGNORE, 1]])
    predictions = torch.tensor([[0, 0, 0, 1, 1, 1]])
    return iou(count_pixels(predictions, annotations, 3))


def test_bars_are_as_long_as_the_iou():
    figure = iou_figure(scored(), NAMES, COLOURS, title="whole image")
    [axes] = figure.axes
    assert figure.get_suptitle() == "mIoU 0.6250   whole image"
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert [bar.get_width() for bar in axes.patches[3:]] == pytest.approx([0.75, 0.5, 0])
    assert [text.get_text() for text in axes.texts] == ["0.750", "0.500", "does not occur"]


def test_many_classes_take_several_columns():
    many = iou(count_pixels(torch.arange(150)[None], torch.arange(150)[None], 150))
    colours = np.random.default_rng(0).integers(255, size=(150, 3), dtype=np.uint8)
    names = [f"class {i} of a long name indeed" for i in range(150)]
    figure = iou_figure(many, names, colours, title="")
    assert [len(axes.texts) for axes in figure.axes] == [40, 40, 40, 30]
    confusion = confusion_figure(many.confusion, names).axes[0]
    assert not confusion.texts
    assert not confusion.get_yticklabels()


def test_the_confusion_of_an_annotated_class_fills_its_row():
    axes = confusion_figure(scored().confusion, NAMES).axes[0]
    shares = axes.images[0].get_array()
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert [text.get_text() for text in axes.texts] == ["75%", "100%", "0%"]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == NAMES
