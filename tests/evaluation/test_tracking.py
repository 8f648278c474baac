"""Label propagation against DINO's description written as NumPy loops; J and F against DAVIS's definition."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image

from locat_lightning.data.videos import VideoData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.tracking import (
    Propagation,
    boundary_accuracy,
    measure_tracking,
    one_hot,
    propagate,
    region_similarity,
)

PATCH = 8


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(
            "locatvit_tiny", img_size=32, patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, num_classes=0,
            dynamic_img_size=True,
        ).eval()  # fmt: skip


def reference_propagation(features, sources, labels, neighbours, radius, temperature):
    """Features [D, H, W] and labels [C, H, W] of the frames; shares [C, H, W]."""
    _, H, W = features.shape
    unit = [each / np.linalg.norm(each, axis=0) for each in (features, *sources)]
    shares = np.zeros((len(labels[0]), H, W))
    for y, x in np.ndindex(H, W):
        votes = []
        for source, label in zip(unit[1:], labels, strict=True):
            for v, u in np.ndindex(H, W):
                if abs(y - v) <= radius and abs(x - u) <= radius:
                    cosine = unit[0][:, y, x] @ source[:, v, u]
                    votes.append((math.exp(cosine / temperature), label[:, v, u]))
        last = sorted((weight for weight, _ in votes), reverse=True)[:neighbours][-1]
        votes = [(weight, label) for weight, label in votes if weight >= last]
        total = sum(weight for weight, _ in votes)
        shares[:, y, x] = sum(weight / total * label for weight, label in votes)
    return shares


@pytest.mark.parametrize(
    ("frames", "neighbours", "radius", "temperature"),
    [(1, 5, 12, 0.1), (3, 5, 1, 0.1), (8, 2, 2, 0.5), (2, 60, 1, 1)],
)
def test_propagation_equals_the_description_written_as_loops(frames, neighbours, radius, temperature):
    rng = np.random.default_rng(frames)
    features, *sources = rng.normal(size=(1 + frames, 6, 4, 7))
    labels = rng.dirichlet(np.ones(3), size=(frames, 4, 7)).transpose(0, 3, 1, 2)
    expected = reference_propagation(features, sources, labels, neighbours, radius, temperature)
    unit = [torch.from_numpy(each / np.linalg.norm(each, axis=0)).float() for each in (features, *sources)]
    settings = Propagation(frames, radius, neighbours, temperature)
    found = propagate(unit[0], torch.stack(unit[1:]), torch.from_numpy(labels).float(), settings)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    torch.testing.assert_close(found.sum(0), torch.ones(4, 7))


def test_a_low_temperature_does_not_overflow():
    features = torch.nn.functional.normalize(torch.randn(6, 3, 3, generator=torch.manual_seed(0)), dim=0)
    labels = torch.eye(9).view(1, 9, 3, 3)
    found = propagate(features, features[None], labels, Propagation(temperature=1e-3))
    torch.testing.assert_close(found, labels[0])


def bilinear(table, height, width):
    """align_corners=False: pixel centres are at halves, and beyond the outermost nothing changes."""
    result = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        at = [(y + 0.5) * len(table) / height - 0.5, (x + 0.5) * table.shape[1] / width - 0.5]
        at = [max(0.0, place) for place in at]
        for dy, dx in np.ndindex(2, 2):
            row, column = int(at[0]) + dy, int(at[1]) + dx
            weight = (1 - abs(at[0] - row)) * (1 - abs(at[1] - column))
            result[y, x] += weight * table[min(row, len(table) - 1), min(column, table.shape[1] - 1)]
    return result


def nearest(table, height, width):
    rows = ((np.arange(height) + 0.5) * len(table) / height).astype(int)
    columns = ((np.arange(width) + 0.5) * table.shape[1] / width).astype(int)
    return table[rows][:, columns]


@torch.no_grad()
def reference_tracking(model, batches, previous, neighbours, radius, temperature):
    """The objects of every frame, at the annotation's size."""
    first = batches[0].masks[0].numpy()
    first = np.where(first == 255, 0, first)
    memory, found = [], [first]
    for number, batch in enumerate(batches):
        features = patch_features(model, batch.images, norm=True)[0].double().numpy()
        if not number:
            small = nearest(first, *features.shape[1:])
            shares = np.stack([small == label for label in range(first.max() + 1)]).astype(float)
            memory.append((features, shares))
            continue
        used = [memory[0], *memory[1:][-previous:]]
        options = neighbours, radius, temperature
        shares = reference_propagation(features, *zip(*used, strict=True), *options)
        memory.append((features, shares))
        scores = np.stack([bilinear(each, *batch.images.shape[2:]) for each in shares])
        scores -= scores.min((1, 2), keepdims=True)
        scores /= scores.max((1, 2), keepdims=True)
        found.append(nearest(scores.argmax(0), *first.shape))
    return np.stack(found)


def reference_iou(found, true):
    return np.sum(found & true) / np.sum(found | true) if np.any(found | true) else 1.0


def reference_boundary(mask):
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y, x in np.ndindex(height, width):
        down, right = y + 1 < height, x + 1 < width
        if down and right:
            result[y, x] = len({mask[y, x], mask[y + 1, x], mask[y, x + 1], mask[y + 1, x + 1]}) > 1
        elif right:
            result[y, x] = mask[y, x] != mask[y, x + 1]
        elif down:
            result[y, x] = mask[y, x] != mask[y + 1, x]
    return result


def reference_f(found, true):
    """Distances of every pixel of a boundary to every one of the other's."""
    radius = math.ceil(0.008 * math.hypot(*true.shape))
    own, other = (np.argwhere(reference_boundary(mask)) for mask in (found, true))
    if not len(own) or not len(other):
        return float(len(own) == len(other))
    near = ((own[:, None] - other[None]) ** 2).sum(2) <= radius**2
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def masks():
    """Pairs of masks: shifted, far apart, touching the edges, empty, full."""
    square = np.zeros((40, 70), bool)
    square[10:25, 20:50] = True
    edge = np.zeros_like(square)
    edge[25:, 40:] = True
    noise = np.random.default_rng(0).random(square.shape) < 0.02
    nothing, all_of_it = np.zeros_like(square), np.ones_like(square)
    shifted = np.roll(square, (1, 2), (0, 1))
    return [
        (square, shifted), (square, np.roll(square, 18, 1)), (square, edge), (edge, np.roll(edge, -3, 0)),
        (square, noise), (square, square), (nothing, square), (square, nothing), (nothing, nothing),
        (all_of_it, square), (noise, edge),
    ]  # fmt: skip


def test_j_and_f_equal_their_definitions():
    found, true = (np.stack(each) for each in zip(*masks(), strict=True))
    tensors = torch.from_numpy(found), torch.from_numpy(true)
    expected = [[reference(*pair) for pair in masks()] for reference in (reference_iou, reference_f)]
    np.testing.assert_allclose(region_similarity(*tensors), expected[0], rtol=1e-6)
    np.testing.assert_allclose(boundary_accuracy(*tensors), expected[1], rtol=1e-6)
    assert (expected[0][5:9], expected[1][5:9]) == ([1, 0, 0, 1], [1, 0, 0, 1])
    assert 0 < expected[1][1] < expected[1][0] < 1


def test_a_void_pixel_is_background_and_a_patch_has_the_object_in_its_middle():
    objects = torch.zeros(8, 12, dtype=torch.uint8)
    objects[:3, 7:] = 2
    assert one_hot(objects, (2, 3)).argmax(0).tolist() == [[0, 0, 2], [0, 0, 0]]
    assert one_hot(objects, (2, 3)).shape == (3, 2, 3)


def data(root, **options):
    return VideoData(root=str(root), num_workers=0, short_side=64, **options)


def measured(root, videos=range(2), **options):
    source = data(root)
    loader, written = source.frames_dataloader("val", videos, PATCH), {}
    scores = measure_tracking(
        build(),
        loader,
        source.source("val"),
        "cpu",
        Propagation(**options),
        write=written.__setitem__,
        progress=False,
    )
    return scores, written


def larger(root, factor=2):
    """Have annotations that are larger than the frames."""
    for path in root.glob("Annotations/480p/*/*.png"):
        with Image.open(path) as mask:
            mask.resize((mask.width * factor, mask.height * factor), Image.Resampling.NEAREST).save(path)


@pytest.mark.parametrize(("factor", "previous"), [(1, 7), (2, 2)])
def test_whole_videos_equal_the_description(davis, factor, previous):
    larger(davis, factor)
    scores, written = measured(davis, previous=previous, radius=3)
    source, start = data(davis), 0
    for number, name, frames, objects in ((0, "boat", 5, 1), (1, "cars", 6, 2)):
        batches = list(source.frames_dataloader("val", [number], PATCH))
        expected = reference_tracking(build(), batches, previous, 5, 3, 0.1)
        found = np.stack([written[start + frame].numpy() for frame in range(frames)])
        # Rounding decides where two objects are equally likely.
        assert (found != expected).mean() < 1e-3
        true = np.concatenate([batch.masks.numpy() for batch in batches])
        assert true.shape == found.shape
        for label in range(1, objects + 1):
            pairs = [(found[frame] == label, true[frame] == label) for frame in range(1, frames - 1)]
            j, f = (np.mean([each(*pair) for pair in pairs]) for each in (reference_iou, reference_f))
            np.testing.assert_allclose(scores[name][label - 1], [j, f], rtol=1e-6)
            assert j > 0.5  # the squares are followed
        start += frames
    assert list(scores) == ["boat", "cars"]


def test_only_the_first_frame_has_to_be_annotated(davis):
    (davis / "Annotations/480p/boat/00003.png").unlink()
    (davis / "Annotations/480p/cars/00005.png").unlink()  # the last one is not scored anyway
    scores, written = measured(davis)
    assert list(scores) == ["cars"]
    assert len(written) == 11
    assert written[3].shape == (64, 96)


def test_a_video_without_objects_has_no_scores(davis):
    for path in davis.glob("Annotations/480p/boat/*.png"):
        Image.new("L", (96, 64)).save(path)
    assert list(measured(davis)[0]) == ["cars"]


def test_an_unreadable_first_frame_is_a_mistake(davis):
    (davis / "JPEGImages/480p/boat/00000.jpg").write_bytes(b"")
    source = data(davis, max_unreadable=1)
    loader = source.frames_dataloader("val", [0], PATCH)
    with pytest.raises(InputError, match="the first frame of boat cannot be read"):
        measure_tracking(build(), loader, source.source("val"), "cpu", Propagation(), progress=False)


def process(rank, root, out):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save(measured(root, [[0, 1], []][rank])[0], f"{out}{rank}a")
        torch.save(measured(root, [[1], [0]][rank])[0], f"{out}{rank}b")
    finally:
        dist.destroy_process_group()


def test_two_processes_share_the_videos_and_both_get_all_scores(davis, two_processes, tmp_path):
    two_processes(process, davis, tmp_path / "out")
    alone = measured(davis)[0]
    for name in ("0a", "1a", "0b", "1b"):
        torch.testing.assert_close(torch.load(tmp_path / f"out{name}"), alone)
