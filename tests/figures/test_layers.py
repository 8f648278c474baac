"""The chart of layers: what is drawn where, and gaps where a model has no such layer."""

import numpy as np

from locat_lightning.figures.layers import layers_figure, layers_of

VIT = {"distance": {"block_00": 4.0}, "distance_px": {"block_00": 16.0, "block_01": 15.0}}
LOCAT = {"distance_px": {"block_00": 9.0, "block_01": 8.0, "prr": 12.0}, "patch_cosine": {"norm": -0.5}}


def test_a_line_for_each_model_with_gaps():
    figure = layers_figure({"epoch 1": {"vit": VIT}, "epoch 2": {"vit": VIT, "locat": LOCAT}})
    first, second, _, cosines = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["epoch 1", "epoch 2", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["distance\nin px", "", "cosine of pairs", ""]
    assert [line.get_label() for line in first.lines] == ["vit"]
    vit, locat = second.lines
    assert vit.get_color() == first.lines[0].get_color() != locat.get_color()
    np.testing.assert_equal(vit.get_ydata(), [16, 15, np.nan, np.nan])
    np.testing.assert_equal(locat.get_ydata(), [9, 8, np.nan, 12])
    assert [tick.get_text() for tick in cosines.get_xticklabels()] == ["0", "1", "norm", "PRR"]
    assert first.get_ylim()[0] == 0
    assert cosines.get_ylim()[0] < -0.5


def test_layers_are_in_the_order_of_the_model():
    many = {f"block_{number:02}": 0.0 for number in (10, 2, 0)}
    assert layers_of([{"entropy": {"prr": 0.0}}, {"entropy": many | {"norm": 0.0}}]) == [
        "block_00",
        "block_02",
        "block_10",
        "norm",
        "prr",
    ]
