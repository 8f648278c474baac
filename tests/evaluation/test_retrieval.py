"""Dense retrieval against its description written as NumPy loops; its memory and its choice of patches."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import padded_size, patch_features
from locat_lightning.evaluation.iou import MeanIoU
from locat_lightning.evaluation.retrieval import (
    Memory,
    Retrieval,
    build_memories,
    compare_retrievals,
    patch_histograms,
    retrieve,
    sample_patches,
    segment_by_retrieval,
)

CLASSES, PATCH = 5, 8


class Batch(NamedTuple):
    images: Tensor
    masks: Tensor
    indices: Tensor


class Scenes(Dataset):
    """Noisy images of bands in the colours of their classes; `places` are the images that there are."""

    def __init__(self, length, size=(32, 32), mask_size=None, ignored=0.1, places=None):
        self.length, self.size, self.mask_size, self.ignored = length, size, mask_size or size, ignored
        self.places = list(range(length)) if places is None else places

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        rng = np.random.default_rng([self.length, row])
        bands, across = rng.integers(0, CLASSES, 4), rng.random() < 0.5
        colours = np.random.default_rng(0).normal(size=(CLASSES, 3))

        def drawn(height, width):
            lines = bands[np.arange(width if across else height) * 4 // (width if across else height)]
            return np.broadcast_to(lines if across else lines[:, None], (height, width))

        image = colours[drawn(*self.size)] + 0.3 * rng.normal(size=(*self.size, 3))
        mask = np.where(rng.random(self.mask_size) < self.ignored, 255, drawn(*self.mask_size))
        if row == 1:
            mask[: len(mask) // 2] = 255
        return Batch(torch.from_numpy(image.transpose(2, 0, 1)).float(), torch.from_numpy(mask).byte(), row)


def build_memory(backbone, loader, device, settings, **options):
    (memory,) = build_memories(backbone, [loader], device, [settings], **options)
    return memory


def loader(scenes, batch_size=2):
    return DataLoader(scenes, batch_size, sampler=scenes.places)


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(
            "locatvit_tiny", img_size=32, patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, num_classes=0,
            dynamic_img_size=True,
        ).eval()  # fmt: skip


def remembered(scenes, **options):
    settings = Retrieval(**options)
    return build_memory(build(), loader(scenes), "cpu", settings, num_classes=CLASSES, progress=False)


def segmented(train, val, batch_size=2, **options):
    parts = loader(train, batch_size), loader(val, batch_size)
    settings = Retrieval(**options)
    return segment_by_retrieval(build(), *parts, "cpu", settings, num_classes=CLASSES, progress=False)


@torch.no_grad()
def patches(model, image):
    """Patch features [H, W, D]; test_dense says that they are right."""
    return patch_features(model, image[None])[0].permute(1, 2, 0).double().numpy()


def reference_memory(model, scenes):
    rows = []
    for i in range(len(scenes)):
        features, mask = patches(model, scenes[i].images), scenes[i].masks.numpy()
        for y in range(features.shape[0]):
            for x in range(features.shape[1]):
                pixels = mask[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                histogram = np.array([(pixels == c).sum() for c in range(CLASSES)])
                if histogram.sum():
                    rows.append((features[y, x] / np.linalg.norm(features[y, x]), histogram))
    return rows


def reference_scores(memory, features, neighbours, temperature):
    scores = np.zeros((*features.shape[:2], CLASSES))
    for y, x in np.ndindex(features.shape[:2]):
        query = features[y, x] / np.linalg.norm(features[y, x])
        nearest = sorted(((query @ feature, i) for i, (feature, _) in enumerate(memory)), reverse=True)
        nearest = nearest[:neighbours]
        weights = [math.exp((cosine - nearest[0][0]) / temperature) for cosine, _ in nearest]
        for weight, (_, i) in zip(weights, nearest, strict=True):
            scores[y, x] += weight / sum(weights) * memory[i][1] / memory[i][1].sum()
    return scores


def bilinear(table, height, width):
    """align_corners=False: pixel centres are at halves, and beyond the outermost nothing changes."""
    result = np.zeros((height, width, table.shape[2]))
    for y, x in np.ndindex(height, width):
        at = [(y + 0.5) * len(table) / height - 0.5, (x + 0.5) * table.shape[1] / width - 0.5]
        at = [max(0.0, place) for place in at]
        for dy in (0, 1):
            for dx in (0, 1):
                row, column = int(at[0]) + dy, int(at[1]) + dx
                weight = (1 - abs(at[0] - row)) * (1 - abs(at[1] - column))
                result[y, x] += weight * table[min(row, len(table) - 1), min(column, table.shape[1] - 1)]
    return result


def reference(model, train, val, neighbours, temperature):
    """IoU of each class."""
    memory = reference_memory(model, train)
    confusion = np.zeros((CLASSES, CLASSES))
    for i in range(len(val)):
        image, mask = val[i].images, val[i].masks.numpy()
        scores = reference_scores(memory, patches(model, image), neighbours, temperature)
        if (padded := padded_size(model, val.size)) != val.size:
            scores = bilinear(scores, *padded)[: val.size[0], : val.size[1]]
        predicted = bilinear(scores, *mask.shape).argmax(2)
        for y, x in np.ndindex(mask.shape):
            if mask[y, x] != 255:
                confusion[mask[y, x], predicted[y, x]] += 1
    return np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))


@pytest.mark.parametrize(
    ("size", "mask_size", "neighbours", "temperature"),
    [((32, 32), (32, 32), 30, 0.02), ((32, 48), (40, 36), 3, 0.1), ((30, 27), (44, 38), 1000, 0.5)],
)
def test_equals_the_description_written_as_loops(size, mask_size, neighbours, temperature):
    model, train, val = build(), Scenes(5, size), Scenes(3, size, mask_size)
    expected = reference(model, train, val, neighbours, temperature)
    result = segmented(train, val, neighbours=neighbours, temperature=temperature)
    np.testing.assert_allclose(result.per_class, expected, rtol=1e-6)
    assert result.miou == pytest.approx(np.nanmean(expected))
    assert result.miou > 0.3  # colours tell the classes


def test_the_memory_has_all_annotated_patches_in_order():
    scenes = Scenes(5)
    memory, expected = remembered(scenes), reference_memory(build(), scenes)
    assert (memory.features.dtype, memory.histograms.dtype) == (torch.float32, torch.int16)
    np.testing.assert_allclose(memory.features, [feature for feature, _ in expected], atol=1e-6)
    np.testing.assert_array_equal(memory.histograms, [histogram for _, histogram in expected])
    assert len(expected) == 5 * 16 - 8
    memory.features.add_(1)  # an ordinary tensor


def random_memory(size=50, dim=6):
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(size, dim, generator=generator))
    histograms = torch.randint(0, 9, (size, CLASSES), generator=generator).short()
    histograms[:, 0] += 1
    return Memory(features, histograms), 4 * torch.randn(2, dim, 3, 5, generator=generator)


@pytest.mark.parametrize("votes", [1, 500, 2**24])
@pytest.mark.parametrize("neighbours", [1, 7, 50, 1000])
def test_retrieval_in_chunks(monkeypatch, votes, neighbours):
    monkeypatch.setattr("locat_lightning.evaluation.retrieval.VOTES", votes)
    memory, features = random_memory()
    scores = retrieve(memory, features, Retrieval(neighbours=neighbours))
    rows = list(zip(memory.features.double().numpy(), memory.histograms.numpy(), strict=True))
    for one, feature in zip(scores, features.permute(0, 2, 3, 1).double().numpy(), strict=True):
        expected = reference_scores(rows, feature, neighbours, 0.02)
        np.testing.assert_allclose(one.permute(1, 2, 0), expected, atol=1e-5)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 3, 5))


@pytest.mark.parametrize("neighbours", [1, 30, 1000])
def test_faiss_finds_the_same(neighbours):
    pytest.importorskip("faiss")
    memory, features = random_memory()
    ours, faiss = (Retrieval(neighbours=neighbours, search=search) for search in ("torch", "faiss"))
    torch.testing.assert_close(retrieve(memory, features, faiss), retrieve(memory, features, ours))
    with pytest.raises(InputError, match="query features are not finite"):
        retrieve(memory, features * torch.inf, faiss)


def test_histograms_count_pixels_of_all_patches():
    mask = torch.tensor([[0, 0, 1, 1, 4], [0, 255, 1, 2, 255], [3, 3, 255, 255, 0]], dtype=torch.uint8)
    counts = patch_histograms(mask[None], (2, 3), (2, 2), CLASSES)
    expected = [[3, 0, 0, 0, 0], [0, 3, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 2, 0], [0] * 5, [1, 0, 0, 0, 0]]
    assert counts.tolist() == [expected]
    with pytest.raises(InputError, match=r"pixel of class 4, which is none of 0\.\.3"):
        patch_histograms(mask[None], (2, 3), (2, 2), 4)
    large = patch_histograms(torch.zeros(1, 64, 64, dtype=torch.uint8), (1, 1), (64, 64), 1)
    assert large.tolist() == [[[64 * 64]]]


@pytest.mark.parametrize("memory_size", [1, 2, 4, 5, 7, 23, 40])
def test_a_limited_memory_is_full_and_shared_by_the_images(memory_size):
    memory, everything = remembered(Scenes(5), memory_size=memory_size), remembered(Scenes(5))
    assert len(memory.features) == memory_size
    of_image = torch.repeat_interleave(torch.arange(5), torch.tensor([16, 8, 16, 16, 16]))
    nearest = (memory.features @ everything.features.T).argmax(1)
    assert torch.equal(memory.features, everything.features[nearest])
    assert torch.equal(memory.histograms, everything.histograms[nearest])
    shares = of_image[nearest].bincount(minlength=5)
    assert shares.max() - shares.min() <= 1


def test_a_memory_larger_than_the_images_takes_all():
    assert len(remembered(Scenes(5), memory_size=10_000).features) == 72


def test_the_choice_follows_from_seed_and_image_alone():
    once = remembered(Scenes(5), memory_size=20)
    mixed = Scenes(5, places=[4, 2, 0, 1, 3, 2])
    torch.testing.assert_close(remembered(mixed, memory_size=20).features, once.features)
    assert not torch.equal(remembered(Scenes(5), memory_size=20, seed=1).histograms, once.histograms)


def test_rare_classes_are_kept():
    histograms = torch.zeros(100, CLASSES, dtype=torch.int16)
    histograms[:, 0] = 64
    histograms[17] = torch.tensor([0, 0, 0, 64, 0])
    histograms[40:90] = 0  # not annotated
    chosen = [sample_patches(histograms, 10, (seed, 0)) for seed in range(100)]
    assert all(len(rows.unique()) == 10 and not ((rows >= 40) & (rows < 90)).any() for rows in chosen)
    assert all(torch.equal(rows, rows.sort().values) for rows in chosen)
    assert sum(17 in rows for rows in chosen) > 95
    others = torch.cat(chosen).bincount(minlength=100)
    others = others[(histograms[:, 0] > 0)]
    assert others.min() > 5  # the others by chance


@pytest.mark.parametrize("fraction", [2, 4])
def test_a_few_shot_split_is_a_data_set_of_its_own(fraction):
    """Its memory is that of a run in which no other images exist, and shares a limited size among them."""
    settings = Retrieval(fraction=fraction, seed=42, memory_size=12)
    chosen = settings.split(range(8))
    assert len(chosen) == 8 // fraction
    found = remembered(Scenes(8), fraction=fraction, seed=42, memory_size=12)
    alone = build_memory(
        build(),
        loader(Scenes(8, places=chosen)),
        "cpu",
        Retrieval(seed=42, memory_size=12),
        num_classes=CLASSES,
        places=chosen,
        progress=False,
    )
    assert len(found.features) == 12
    torch.testing.assert_close(found, alone)


def test_splits_have_the_published_sizes_and_contain_each_other():
    for images, sizes in ((10_582, {8: 1320, 64: 160, 128: 80}), (20_210, {8: 2550, 64: 300, 128: 150})):
        splits = {n: Retrieval(fraction=n, seed=400).split(range(images)) for n in sizes}
        assert {n: len(split) for n, split in splits.items()} == sizes
        assert set(splits[128]) < set(splits[64]) < set(splits[8])
        assert all(list(split) == sorted(set(split)) for split in splits.values())
    assert len(Retrieval(fraction=16).split(range(367))) == 23  # others are rounded
    assert Retrieval(fraction=8, seed=42).split(range(99)) != Retrieval(fraction=8, seed=400).split(range(99))
    assert set(Retrieval(fraction=2).split([3, 5, 8, 9])) < {3, 5, 8, 9}
    with pytest.raises(InputError, match="1/128 of 50 training images is less than one image"):
        Retrieval(fraction=128).split(range(50))


def test_variants_together_are_what_each_is_alone(monkeypatch):
    train, val = Scenes(6), Scenes(3, mask_size=(40, 36))
    given = [
        {"memory_size": 20, "seed": 3},
        {},
        {"fraction": 2, "seed": 42},
        {"fraction": 3, "neighbours": 2},
    ]
    expected = [segmented(train, val, **each) for each in given]
    seen = []

    def counted(backbone, images, **options):
        seen.append(len(images))
        return patch_features(backbone, images, **options)

    monkeypatch.setattr("locat_lightning.evaluation.retrieval.patch_features", counted)
    variants = [Retrieval(**each) for each in given]
    parts = [loader(train)], loader(val)
    found = compare_retrievals(build(), *parts, "cpu", variants, num_classes=CLASSES, progress=False)
    assert sum(seen) == 6 + 3  # every image once, for all of them
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(known(one), known(other))
    assert len({float(each.miou) for each in found}) == 4


def test_passes_fill_the_memory_together():
    first, second = Scenes(5), Scenes(6, places=range(5))  # which draws others
    parts, options = [loader(first), loader(second)], {"num_classes": CLASSES, "progress": False}
    everything, some = build_memories(
        build(), parts, "cpu", [Retrieval(), Retrieval(memory_size=31)], **options
    )
    alone = [remembered(each) for each in (first, second)]
    torch.testing.assert_close(everything, Memory(*map(torch.cat, zip(*alone, strict=True))))
    nearest = (some.features @ everything.features.T).argmax(1)
    assert torch.equal(some.histograms, everything.histograms[nearest])
    of_pass = (nearest >= len(alone[0].features)).sum()
    assert (len(nearest), int(of_pass)) == (31, 16)


def test_the_training_around_it_is_untouched():
    model = build().train()
    model.blocks[0].eval()
    state = torch.get_rng_state()
    parts = loader(Scenes(3)), loader(Scenes(2))
    with torch.inference_mode():
        result = segment_by_retrieval(model, *parts, "cpu", Retrieval(), num_classes=CLASSES, progress=False)
    assert (model.training, model.blocks[0].training, model.blocks[1].training) == (True, False, True)
    assert torch.equal(state, torch.get_rng_state())
    assert not result.per_class.is_inference()


def known(result):
    """All that a result says, as plain tensors."""
    return vars(result) | {"images": list(result.images)}


def counted(images):
    """What `MeanIoU` counts of some images, all of which are predicted to be of class 1."""
    metric = MeanIoU(CLASSES)
    for index in images:
        masks = Scenes(3)[index].masks[None]
        metric.update(torch.ones_like(masks), masks, torch.tensor([index]))
    return metric.compute()


def process(rank, out):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        train = Scenes(5, places=[[4, 0, 1], [2, 1, 3, 3]][rank])
        nothing_here = Scenes(5, places=[[], [0, 1, 2, 3, 4]][rank])
        val = Scenes(3, mask_size=(40, 40), places=[[2, 0], [1, 0]][rank])
        results = [
            list(remembered(train, memory_size=20)),
            list(remembered(train, fraction=2, seed=42)),
            list(remembered(nothing_here)),
            known(segmented(train, val)),
            known(counted([[], range(3)][rank])),
        ]
        torch.save(results, f"{out}{rank}")
    finally:
        dist.destroy_process_group()


def test_two_processes_with_unequal_parts_both_get_the_whole(two_processes, tmp_path):
    two_processes(process, tmp_path / "out")
    alone = [
        list(remembered(Scenes(5), memory_size=20)),
        list(remembered(Scenes(5), fraction=2, seed=42)),
        list(remembered(Scenes(5))),
        known(segmented(Scenes(5), Scenes(3, mask_size=(40, 40)))),
        known(counted(range(3))),
    ]
    for rank in range(2):
        for found, expected in zip(torch.load(tmp_path / f"out{rank}"), alone, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("train", "val", "options", "message"),
    [
        (Scenes(3, ignored=1), Scenes(2), {}, "no patch of the training images is annotated"),
        (Scenes(3, places=[]), Scenes(2), {}, "no patch of the training images is annotated"),
        (Scenes(3), Scenes(2, ignored=1), {}, "no pixel of the validation images is annotated"),
        (Scenes(3), Scenes(2, places=[]), {}, "no pixel of the validation images is annotated"),
        (Scenes(3, mask_size=(40, 32)), Scenes(2), {}, "masks of 40 × 32 pixels for training images of 32"),
        (Scenes(3), Scenes(2), {"memory_size": 0}, "memory_size is 0"),
        (Scenes(3), Scenes(2), {"neighbours": 0}, "retrieval from 0 neighbours"),
        (Scenes(3), Scenes(2), {"fraction": 0}, "fraction is 0"),
        (Scenes(3), Scenes(2), {"fraction": 8}, "1/8 of 3 training images is less than one image"),
        (Scenes(3), Scenes(2), {"temperature": 0.0}, "temperature 0.0"),
    ],
)
def test_mistakes(train, val, options, message):
    with pytest.raises(InputError, match=message):
        segmented(train, val, **options)


def test_classes_that_masks_do_not_know_are_mistakes():
    parts = loader(Scenes(3)), loader(Scenes(2))
    for classes, message in ((2, r"none of 0\.\.1"), (0, "0 classes"), (256, "256 classes")):
        with pytest.raises(InputError, match=message):
            segment_by_retrieval(build(), *parts, "cpu", Retrieval(), num_classes=classes, progress=False)


def test_faiss_has_to_be_installed_before_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("locat_lightning.evaluation.retrieval.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"locat-lightning\[retrieval\]"):
        segmented(Scenes(3), Scenes(2), search="faiss")
