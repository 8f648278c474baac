import shutil
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count
from threading import current_thread, main_thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from locat_lightning.data import ImageData, MultiViewData, SegmentationData, stores, streams
from locat_lightning.data.dataset import Images
from locat_lightning.data.sampling import TrainOrder
from locat_lightning.data.shards import INDEX, Index, Meaning
from locat_lightning.data.views import MultiCrop
from locat_lightning.errors import InputError
from tests.data.conftest import pack_all

VIEWS = MultiCrop(global_size=16, local_size=8, local_views=1)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(stores, "PAUSES", (0.01, 0.01))


@pytest.fixture
def stream(web, shards, tmp_path):
    """Options of the shards on a web server."""
    return {"stream": f"{web.url}/shards", "cache": str(tmp_path / "cache"), "num_workers": 0}


def of_process(data, rank, processes):
    """Have a data module be that of one of several processes."""
    data.trainer = SimpleNamespace(
        world_size=processes, global_rank=rank, num_devices=1, accelerator=None, train_dataloader=None
    )
    return data


def name_of(source, index, root):
    return source.path(index)[len(str(root)) :]


def test_shards_hold_the_images_and_labels_of_the_folder(images, shards, stream):
    for options in (stream, {"stream": str(shards)}):
        data, folder = ImageData(**options), ImageData(root=str(images))
        data.setup()
        assert data.class_names == folder.class_names
        for split in ("train", "val", "test", "predict"):
            source, original = data.source(split), folder.source(split)
            places = {name_of(original, i, images): i for i in range(len(original))}
            assert len(source) == len(places)
            for index in range(len(source)):
                place = places[name_of(source, index, options["stream"])]
                (image, label), (expected, of_folder) = source.read(index), original.read(place)
                assert (image.tobytes(), label) == (expected.tobytes(), of_folder)
                assert split == "train" or place == index


def test_a_run_that_is_interrupted_says_what_is_to_be_typed_of_what_is_fetched(shards, stream):
    told = {"--data.stream": stream["stream"], "--data.cache": stream["cache"]}
    assert ImageData(**stream).typed_again == told
    del stream["cache"], told["--data.cache"]
    assert ImageData(**stream).typed_again == told
    assert ImageData(stream=str(shards)).typed_again == ImageData(root=str(shards)).typed_again == {}
    assert ImageData(dataset="hfds/some/one").typed_again == {"--data.dataset": "hfds/some/one"}
    assert ImageData(dataset="torch/cifar10").typed_again == {}


def test_images_and_masks_of_shards_are_those_of_the_folder(scenes, tmp_path):
    options = {"classes": ["ground", "a", "b"], "num_workers": 0}
    folder = SegmentationData(root=str(scenes("folder")), **options)
    to = pack_all(folder, tmp_path / "shards")
    shards = SegmentationData(stream=str(to), num_workers=0)  # which know their classes
    for data in (folder, shards):
        data.setup("fit")
    assert shards.class_names == folder.class_names
    assert np.array_equal(shards.colours, folder.colours)
    for one, other in zip(shards.val_dataloader(), folder.val_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    batch = next(iter(shards.train_dataloader()))
    assert batch.masks.shape == (6, 512, 512)
    image = next(iter(shards.predict_dataloader()))
    assert (image.masks == 255).all()


@pytest.mark.parametrize("dataset", ["ade20k", "cityscapes"])
def test_shards_know_what_the_values_of_their_masks_mean(dataset, scenes, tmp_path):
    folder = SegmentationData(root=str(scenes(dataset)), dataset=dataset)
    shards = SegmentationData(stream=str(pack_all(folder, tmp_path / "shards")))
    shards.setup("fit")
    assert shards.class_names == folder.class_names
    for index in range(3):
        assert np.array_equal(shards.source("val").read(index)[1], folder.source("val").read(index)[1])


def test_classes_of_validation_are_those_of_training(images, shards, tmp_path):
    for split in ("train", "val"):
        (images / split / "bee").rename(images / split / "bug")
    other = pack_all(ImageData(root=str(images)), tmp_path / "renamed")
    shutil.rmtree(shards / "val")
    shutil.copytree(other / "val", shards / "val")
    with pytest.raises(
        InputError, match=r"the classes in \S+/val are not those in \S+/train: bug; pack both"
    ):
        ImageData(stream=str(shards)).setup("fit")
    index = Index.load((shards / "val" / INDEX).read_bytes(), INDEX)
    replace(index, meaning=Meaning(), labels=index.labels + 2).save(shards / "val" / INDEX)
    with pytest.raises(InputError, match=r"a label in \S+/val is 3, but there are 3 classes: pack train and"):
        ImageData(stream=str(shards)).setup("fit")


def test_classes_of_masks_of_validation_are_those_of_training(scenes, tmp_path):
    to = pack_all(SegmentationData(root=str(scenes("folder")), classes=["a", "b", "c"]), tmp_path / "shards")
    index = Index.load((to / "val" / INDEX).read_bytes(), INDEX)
    masks = index.meaning.masks | {"ignore_index": 1}  # masks of Cityscapes may differ from split to split
    replace(index, meaning=replace(index.meaning, masks=masks)).save(to / "val" / INDEX)
    data = SegmentationData(stream=str(to))
    assert [data.source(split).values.ignore_index for split in ("train", "val")] == [255, 1]
    replace(index, meaning=replace(index.meaning, classes=["a", "c", "b"])).save(to / "val" / INDEX)
    with pytest.raises(InputError, match=r"val are not those in .*/train: their number or order differs"):
        SegmentationData(stream=str(to)).setup("fit")


def test_shards_without_masks_cannot_be_segmented(shards):
    with pytest.raises(InputError, match="shards/train have no masks"):
        SegmentationData(stream=str(shards), classes=["a", "b"]).setup("fit")


@pytest.mark.parametrize("kind", [ImageData, MultiViewData])
def test_an_epoch_is_every_image_once_over_three_processes_of_two_workers(kind, stream):
    options = {"views": VIEWS} if kind is MultiViewData else {"img_size": 8}
    seen, size = [], 7
    for rank in range(3):
        data = of_process(kind(**stream | options | {"num_workers": 2, "batch_size": size}), rank, 3)
        batches = list(data.train_dataloader())
        assert [len(batch.indices) for batch in batches] == [size] * 4
        seen += [index for batch in batches for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(84))
    evaluated = [of_process(ImageData(**stream, img_size=8), rank, 3).val_dataloader() for rank in range(3)]
    found = [index for loader in evaluated for batch in loader for index in batch.indices.tolist()]
    assert sorted(found) == list(range(10))


def batches_of(source, processes, size, seen=0, seed=0, epoch=1):
    """The batches of all processes, each step's images together."""
    shares = []
    for rank in range(processes):
        order = TrainOrder(Images(source, lambda image: image), processes, rank, batch_size=size, seed=seed)
        order.set_epoch(epoch)
        order.seen = seen
        shares.append([item - epoch * len(source) for item in order])
    steps = range(0, len(shares[0]), size)
    return [{index for share in shares for index in share[step : step + size]} for step in steps]


def test_a_run_killed_at_any_step_has_the_same_images_before_it(shards):
    source = ImageData(stream=str(shards), shards_at_once=4).source("train")
    whole = batches_of(source, processes=3, size=4)
    assert sorted(index for step in whole for index in step) == list(range(84))
    for killed in range(len(whole)):
        seen = killed * 12
        assert batches_of(source, 3, 4, seen) == whole[killed:]
        assert batches_of(source, 1, 12, seen) == whole[killed:]  # another number of processes
        rest = [index for step in batches_of(source, 2, 3, seen) for index in step]
        assert sorted(rest) == sorted(index for step in whole[killed:] for index in step)
    assert batches_of(source, 3, 4, seed=1) != whole
    assert batches_of(source, 3, 4, epoch=2) != whole


def test_views_follow_from_seed_epoch_and_image_alone(stream, shards):
    one, other = (
        MultiViewData(**options, views=VIEWS, batch_size=6)
        for options in (stream, {"stream": str(shards), "num_workers": 1})
    )
    loaders = one.train_dataloader(), other.train_dataloader()
    for loader in loaders:
        loader.sampler.set_epoch(3)
        loader.sampler.seen = 60
    for a, b in zip(*loaders, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert all(torch.equal(x.crops, y.crops) for x, y in zip(a.views, b.views, strict=True))


def test_nobody_waits_for_a_slow_store_after_the_first_shards(stream, web, monkeypatch):
    """Each shard is asked for once, and by the thread that fetches ahead."""
    web.delay = 0.02
    fetched, by_readers, fetch = count(), [], stores.Store._fetch

    def noted(self, shard, file):
        if current_thread() is main_thread():
            by_readers.append(shard.name)
        next(fetched)
        fetch(self, shard, file)

    monkeypatch.setattr(stores.Store, "_fetch", noted)
    data = ImageData(**stream, img_size=8, batch_size=4, shards_at_once=2)
    for _ in data.train_dataloader():
        time.sleep(0.03)  # a step
    assert next(fetched) == 7
    assert len(by_readers) <= 2
    assert sorted(web.requests[1:]) == [f"shards/train/{number:06}.tar" for number in range(7)]


def test_an_epoch_fits_into_the_least_cache_that_is_accepted(stream, web, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"cache_size \(100KB\) is too small .*/train .*: set it to at least"
    ) as error:
        ImageData(**stream, cache_size=100_000, shards_at_once=2, img_size=8).train_dataloader()
    least = str(error.value).partition("at least ")[2].partition(",")[0]
    data = ImageData(**stream, cache_size=least, shards_at_once=2, img_size=8, batch_size=7)
    seen = list[int]()
    for batch in data.train_dataloader():
        seen += batch.indices.tolist()
        sizes = []
        for path in (tmp_path / "cache").iterdir():
            with suppress(FileNotFoundError):  # a part that has become a shard, or a shard that made room
                sizes.append(path.stat().st_size)
        assert sum(sizes) <= stores.in_bytes("", least)
    assert sorted(seen) == list(range(84))
    assert len(web.requests) == len(set(web.requests)) + 1  # the index twice, no shard
    with pytest.raises(InputError, match=r"cache_size \(50KB\) is too small .* at least \S+$"):
        ImageData(**stream, cache_size="50KB").setup("fit")


def test_no_more_is_fetched_ahead_than_the_cache_holds(stream, monkeypatch):
    asked = []
    monkeypatch.setattr(streams.Ahead, "__init__", lambda self, *arguments: asked.append(arguments[-1]))
    monkeypatch.setattr(streams.Ahead, "close", lambda self: None)
    source = ImageData(**stream, cache_size=3 * 40_960).source("train")
    with source.following(source.shuffled(0, 0)):  # seven shards at once
        assert asked == [3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [ImageData, MultiViewData])
def test_a_shard_that_is_missing_stops_the_run_whatever_may_be_unreadable(kind, workers, stream, shards):
    (shards / "train" / "000003.tar").unlink()
    options = {"views": VIEWS} if kind is MultiViewData else {"img_size": 8}
    data = kind(**stream | options | {"num_workers": workers}, max_unreadable=1000)
    with pytest.raises(InputError, match=r"^shard http\S+/train/000003\.tar is missing: restore it"):
        list(data.train_dataloader())


def test_a_shard_of_a_folder_that_has_changed_is_named_at_the_start(shards):
    file = shards / "train" / "000001.tar"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"^shard \S+/000001\.tar has \d+ bytes, not \d+ as in index"):
        ImageData(stream=str(shards)).setup("fit")
    file.unlink()
    with pytest.raises(InputError, match=r"^shard \S+/000001\.tar is missing"):
        ImageData(stream=str(shards)).setup("fit")


def test_a_mask_in_a_missing_shard_is_told_as_the_shard(scenes, tmp_path, monkeypatch):
    to = pack_all(SegmentationData(root=str(scenes("folder")), classes=["a", "b", "c"]), tmp_path / "shards")
    data = SegmentationData(stream=str(to))
    source = data.source("train")
    (to / "train" / "000000.tar").unlink()
    with pytest.raises(InputError, match=r"^shard \S+/000000\.tar is missing"):
        source.mask(0)


def test_a_picture_that_is_broken_is_named_by_its_path_in_the_folder(images, tmp_path):
    (images / "val" / "bee" / "1.png").write_bytes(b"rubbish")
    to = pack_all(ImageData(root=str(images)), tmp_path / "shards")
    with pytest.raises(InputError, match=r"cannot read image \S+/shards/val/bee/1\.png \(not an image"):
        list(ImageData(stream=str(to), num_workers=0).val_dataloader())


def test_a_stream_without_shards_is_refused_in_a_line(tmp_path, web):
    for stream in (str(tmp_path), web.url):
        for kind in (ImageData, MultiViewData, SegmentationData):
            with pytest.raises(
                InputError, match=f"no train/{INDEX} or {INDEX} in {stream}: set --data.stream"
            ):
                kind(stream=stream).setup("fit")


def test_shards_without_validation_are_for_pretraining_alone(shards):
    for path in (shards / "val").iterdir():
        path.unlink()
    data = MultiViewData(stream=f"file://{shards}/")
    data.setup("fit")
    assert data.source("val") is data.source("train")
    assert data.stream == str(shards)
    with pytest.raises(InputError, match=f"no val/{INDEX} or validation/{INDEX} or test/{INDEX} in {shards}"):
        ImageData(stream=str(shards)).setup("fit")
