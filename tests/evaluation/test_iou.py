"""IoU against mmsegmentation's definition in NumPy, whichever way the pixels are spread."""

import numpy as np
import pytest
import torch

from locat_lightning.errors import InputError
from locat_lightning.evaluation.iou import MeanIoU, class_areas, count_pixels, iou, shares

CLASSES = 7


def segmentations(seed=0, images=6):
    """Maps of different sizes, partly ignored: class 4 is never annotated, 5 never predicted, 6 neither."""
    rng = np.random.default_rng(seed)
    for _ in range(images):
        size = rng.integers(5, 20, 2)
        annotated = rng.choice([0, 1, 2, 3, 5, 255], size, p=[0.3, 0.2, 0.1, 0.05, 0.05, 0.3])
        predicted = np.where(rng.random(size) < 0.6, annotated % 5, rng.integers(0, 5, size))
        yield torch.from_numpy(predicted), torch.from_numpy(annotated.astype(np.uint8))


def reference(segmentations):
    """mmsegmentation's `IoUMetric`: areas by histograms, added up over the images."""
    bins = {"bins": CLASSES, "range": (0, CLASSES - 1)}
    overlap, predicted_area, annotated_area = np.zeros((3, CLASSES))
    for predicted, annotated in segmentations:
        predicted, annotated = predicted.numpy(), annotated.numpy()
        predicted, annotated = predicted[annotated != 255], annotated[annotated != 255]
        overlap += np.histogram(predicted[predicted == annotated], **bins)[0]
        predicted_area += np.histogram(predicted, **bins)[0]
        annotated_area += np.histogram(annotated, **bins)[0]
    with np.errstate(invalid="ignore"):
        per_class = overlap / (predicted_area + annotated_area - overlap)
        accuracy = overlap / annotated_area
    return np.nanmean(per_class), per_class, overlap.sum() / annotated_area.sum(), np.nanmean(accuracy)


def assert_same(result, expected):
    found = (result.miou, result.per_class, result.pixel_accuracy, result.mean_accuracy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.tensor(other, dtype=torch.float32), equal_nan=True)


def measure(segmentations):
    metric = MeanIoU(CLASSES)
    for predicted, annotated in segmentations:
        metric.update(predicted, annotated)
    return metric


@pytest.mark.parametrize("seed", range(3))
def test_equals_mmsegmentation(seed):
    result = measure(segmentations(seed)).compute()
    assert_same(result, reference(segmentations(seed)))
    assert result.per_class[4] == 0
    assert result.per_class[5] == 0
    assert result.per_class[6].isnan()
    assert not torch.isclose(result.miou, result.per_class.nan_to_num().mean())


def test_batches_and_types_do_not_matter():
    predicted, annotated = zip(*segmentations(), strict=True)
    flat = torch.cat([p.flatten() for p in predicted]), torch.cat([a.flatten() for a in annotated])
    once = measure([(flat[0].byte().view(1, 1, -1), flat[1].int().view(1, 1, -1))]).compute()
    assert_same(once, reference(segmentations()))


def test_an_image_without_annotation_counts_for_nothing():
    metric = measure([(torch.zeros(2, 4, 4, dtype=torch.int64), torch.full((2, 4, 4), 255))])
    assert metric.compute().miou.isnan()
    for maps in segmentations():
        metric.update(*maps)
    assert_same(metric.compute(), reference(segmentations()))
    metric.reset()
    assert metric.pixels.sum() == 0


def test_counts_are_exact_beyond_float32():
    pixels = torch.zeros(2 * 2 + 1, dtype=torch.int64)
    pixels[0] = 2**40
    metric = MeanIoU(2)
    metric.pixels += pixels
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    assert metric.pixels.tolist() == [2**40 + 1, 1, 0, 0, 0]
    assert iou(metric.pixels).miou == pytest.approx(0.5)


def test_processes_do_not_matter():
    first, *others = segmentations()
    metric, elsewhere = measure([first]), measure(others)
    metric.distributed_available_fn = lambda: True
    metric.dist_sync_fn = lambda state, group: [state, elsewhere.pixels]
    assert_same(metric.compute(), reference(segmentations()))


@pytest.mark.parametrize(("predicted", "annotated"), [(0, CLASSES), (0, 254), (CLASSES, 0), (-1, 0), (0, -1)])
def test_pixels_of_no_class_are_not_passed_over(predicted, annotated):
    metric = measure(segmentations())
    metric.update(torch.tensor([[predicted, 0]]), torch.tensor([[annotated, 0]]))
    with pytest.raises(InputError, match=r"1 pixels are of none of the classes 0\.\.6"):
        metric.compute()


def test_what_is_predicted_where_nothing_is_annotated_is_nothing():
    counts = count_pixels(torch.tensor([[CLASSES, 0]]), torch.tensor([[255, 0]]), CLASSES)
    assert counts.nonzero().tolist() == [[0]]


@pytest.mark.parametrize("classes", [0, 256])
def test_annotations_tell_255_classes_apart(classes):
    with pytest.raises(InputError, match=f"{classes} classes"):
        MeanIoU(classes)


def test_maps_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"predictions \[2, 2\] and annotations \[2, 3\]"):
        MeanIoU(2).update(torch.zeros(2, 2), torch.zeros(2, 3))


def test_areas_of_each_image():
    metric = MeanIoU(CLASSES)
    for index, (predicted, annotated) in enumerate(segmentations()):
        metric.update(predicted[None], annotated[None], torch.tensor([5 - index]))
    result = metric.compute()
    assert_same(result, reference(segmentations()))
    assert result.images.indices == list(range(6))
    for areas, maps in zip(result.images.areas.flip(0), segmentations(), strict=True):
        right, annotated, predicted = class_areas(count_pixels(*maps, CLASSES))
        assert torch.equal(areas, torch.stack([right, annotated, predicted]))
        known = maps[1] != 255
        assert right.tolist() == [((maps[0] == c) & (maps[1] == c)).sum() for c in range(CLASSES)]
        assert annotated.tolist() == [(maps[1] == c).sum() for c in range(CLASSES)]
        assert predicted.tolist() == [(maps[0][known] == c).sum() for c in range(CLASSES)]


def test_areas_of_images_are_forgotten_with_the_pixels():
    metric = MeanIoU(CLASSES)
    metric.update(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.tensor([5, 2]))
    assert metric.compute().images.indices == [2, 5]
    metric.reset()
    metric.update(torch.zeros(4, 4), torch.zeros(4, 4))
    assert metric.compute().images is None


def test_each_image_of_the_last_batch_by_itself():
    pairs = [(predicted[:5, :5], annotated[:5, :5]) for predicted, annotated in segmentations(seed=3)]
    pairs.append((pairs[0][0], torch.full((5, 5), 255, dtype=torch.uint8)))
    metric = MeanIoU(CLASSES)
    for start in (0, 2):
        batch = pairs[start:]
        metric.update(*(torch.stack(maps) for maps in zip(*batch, strict=True)), torch.arange(len(batch)))
    found = shares(metric.last_areas.float())["miou"]
    expected = [reference([pair])[0] for pair in pairs[2:-1]]
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-6)
    assert found[-1].isnan()
