import json
import re
from dataclasses import asdict

import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from locat_lightning.data import MultiViewData
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.data.views import MultiCrop
from locat_lightning.errors import InputError


def write(path, seed=0, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def data(root, **options):
    plain = {"views": MultiCrop(16, 8, 3), "batch_size": 4, "num_workers": 0}
    return MultiViewData(root=str(root), **(plain | options))


@pytest.fixture
def unlabelled(tmp_path):
    """9 images, some of them deeper."""
    for number in range(9):
        write(tmp_path / ("a/b" if number % 2 else "") / f"{number}.jpg", number)
    return tmp_path


@pytest.fixture
def labelled(tmp_path):
    """8 images in 2 classes to train on, 4 to validate on."""
    for number in range(8):
        write(tmp_path / "train" / ("ant" if number < 4 else "bee") / f"{number}.png", number)
    for number in range(4):
        write(tmp_path / "val" / ("ant" if number < 2 else "bee") / f"{number}.png", number)
    return tmp_path


def epoch_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_a_batch_has_the_views_of_each_size(unlabelled):
    images = data(unlabelled)
    images.setup("fit")
    batches = list(images.train_dataloader())
    assert len(batches) == 2
    large, little = batches[0].views
    assert large.crops.shape == (2, 4, 3, 16, 16)
    assert little.crops.shape == (3, 4, 3, 8, 8)
    assert large.crops.dtype == torch.uint8
    assert batches[0].labels.tolist() == [-1] * 4
    assert images.class_names == []
    assert len({index for batch in batches for index in batch.indices.tolist()}) == 8


def test_views_follow_from_seed_epoch_and_index(unlabelled):
    images = data(unlabelled, seed=7)
    [batch, _] = epoch_of(images.train_dataloader(), epoch=3)
    index = batch.indices[2].item()
    with Image.open(images.source("train").path(index)) as image:
        expected = MultiCrop(16, 8, 3)(image, np.random.default_rng([7, 3, index]))
    for views, wanted in zip(batch.views, expected, strict=True):
        assert torch.equal(views.crops[:, 2], wanted.crops)
        assert torch.equal(views.colour[:, 2], wanted.colour)


def test_workers_and_the_place_of_the_colours_change_nothing(unlabelled):
    here = data(unlabelled)
    batch = next(iter(here.train_dataloader()))
    [there, _] = list(data(unlabelled, num_workers=2).train_dataloader())
    on_worker = next(iter(data(unlabelled, views=MultiCrop(16, 8, 3, colour_on="worker")).train_dataloader()))
    finished = here.on_after_batch_transfer(batch, 0)
    for a, b, c, d in zip(batch.views, there.views, finished.views, on_worker.views, strict=True):
        assert torch.equal(a.crops, b.crops)
        assert c.colour is None
        torch.testing.assert_close(c.crops, d.crops)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_has_one_of_the_mixed_sizes(unlabelled, workers):
    mixed = {"mixed_sizes": [(16, 8, 1.0), (24, 12, 3.0)], "local_views": 1}
    images = data(unlabelled, views=MultiCrop(16, 8, **mixed), batch_size=2, num_workers=workers)
    images.setup("fit")
    loader = images.train_dataloader()

    def sizes(epoch):
        found = [tuple(v.crops.shape[-1] for v in batch.views) for batch in epoch_of(loader, epoch)]
        assert set(found) <= {(16, 8), (24, 12)}
        return found

    first = sizes(0)
    assert sizes(0) == first  # they follow from the images of the batch
    epochs = 1 if workers else 60
    share = np.mean([size == (24, 12) for epoch in range(epochs) for size in sizes(epoch)])
    assert workers or share == pytest.approx(0.75, abs=0.08)
    assert images.views.size == 16  # in evaluation


def test_epochs_differ(unlabelled):
    loader = data(unlabelled).train_dataloader()
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert first[0].indices.tolist() != second[0].indices.tolist()
    again = epoch_of(loader, 0)
    assert torch.equal(first[0].views[0].crops, again[0].views[0].crops)


def test_labels_are_kept_for_measuring(labelled):
    images = data(labelled)
    images.setup("fit")
    assert images.class_names == ["ant", "bee"]
    for batch in images.train_dataloader():
        assert batch.labels.tolist() == (batch.indices // 4).tolist()
    bank = list(images.eval_dataloader("train"))
    assert all(isinstance(batch, ImageBatch) for batch in bank)
    assert torch.cat([batch.labels for batch in bank]).tolist() == [0] * 4 + [1] * 4
    [measured] = images.eval_dataloader("val")
    assert measured.images.shape == (4, 3, 16, 16)
    assert measured.labels.tolist() == [0, 0, 1, 1]
    assert images.on_after_batch_transfer(measured, 0) is measured


def test_train_without_classes_is_unlabelled(labelled):
    write(labelled / "train" / "loose.png")
    images = data(labelled)
    images.setup("fit")
    assert images.class_names == []
    assert len(images.source("train")) == 9  # none of val
    assert images.source("val") is images.source("train")


@pytest.mark.parametrize("lacking", ["images of a class", "class folders of val"])
def test_training_needs_no_labels(labelled, caplog, lacking):
    if lacking == "images of a class":
        (labelled / "train" / "cat").mkdir()
        why = "class folders without an image in .*train: cat"
    else:
        for path in list((labelled / "val").rglob("*.png")):
            path.rename(labelled / "val" / path.name)
        for folder in ("ant", "bee"):
            (labelled / "val" / folder).rmdir()
        why = "no class folders in .*val"
    images = data(labelled)
    with caplog.at_level("INFO"):
        images.setup("fit")
    [line] = [record.getMessage() for record in caplog.records]
    assert re.match(f"training without labels: {why}", line)
    assert "\n" not in line
    assert images.class_names == []
    assert len(images.source("train")) == 8
    assert {label for batch in images.train_dataloader() for label in batch.labels.tolist()} == {-1}
    assert {label for batch in images.eval_dataloader("val") for label in batch.labels.tolist()} == {-1}


def test_digits_need_no_folder():
    images = MultiViewData(dataset="digits", views=MultiCrop(16, 8), batch_size=8, num_workers=0)
    images.setup("fit")
    assert next(iter(images.train_dataloader())).views[1].crops.shape == (8, 8, 3, 8, 8)
    assert len(images.class_names) == 10


def test_timms_data_sets(tmp_path, labelled):
    images = data(labelled, dataset="torch/image_folder")
    try:
        images.setup("fit")
    except InputError as error:
        pytest.skip(str(error))
    assert next(iter(images.train_dataloader())).views[0].crops.shape == (2, 4, 3, 16, 16)


def test_large_jpegs_are_decoded_small(tmp_path, monkeypatch):
    write(tmp_path / "large.jpg", size=(1600, 1200))
    decoded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    views, _, _ = data(tmp_path, views=MultiCrop(16, local_views=0)).train_dataloader().dataset[0]
    assert views[0].crops.shape == (2, 3, 16, 16)
    assert decoded[0] in ((200, 150), (400, 300))


def test_images_are_seen_as_a_viewer_shows_them(tmp_path):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.save(tmp_path / "transparent.png")
    views, _, _ = data(tmp_path).train_dataloader().dataset[0]
    assert (views[0].crops == 255).all()


def test_unreadable_images_are_named_or_skipped(unlabelled):
    whole = (unlabelled / "0.jpg").read_bytes()
    (unlabelled / "0.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"0\.jpg.*truncated"):
        list(data(unlabelled, batch_size=9).train_dataloader())
    [batch] = data(unlabelled, batch_size=9, max_unreadable=1).train_dataloader()
    assert len(batch.indices) == 9
    assert 8 in batch.indices
    assert len(set(batch.indices.tolist())) == 8


def test_a_bug_in_cutting_is_no_unreadable_image(unlabelled, monkeypatch):
    def cut(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("locat_lightning.data.views._cut", cut)
    with pytest.raises(ZeroDivisionError):
        list(data(unlabelled, max_unreadable=9).train_dataloader())


def test_views_are_a_class_in_the_config(parsed):
    config = {"class_path": "MultiCrop", "init_args": {"global_size": 32, "local_views": 2}}
    by_config = parsed(MultiViewData, f"--data.views={json.dumps(config)}", "--data.views.local_views=5")
    assert by_config.views == MultiCrop(32, local_views=5)
    assert by_config.img_size == by_config.views.size == 32
    assert parsed(MultiViewData, "--data.views.local_size=16").views == MultiCrop(local_size=16)
    assert parsed(MultiViewData).views == MultiViewData().views == MultiCrop()


def test_a_checkpoint_keeps_the_views_as_plain_values():
    expected = {"class_path": "locat_lightning.data.views.MultiCrop", "init_args": asdict(MultiCrop(32))}
    data = MultiViewData(views=MultiCrop(32))
    assert data.hparams["views"] == data.hparams_initial["views"] == expected
    assert isinstance(data.views, MultiCrop)


@pytest.mark.parametrize(
    "option",
    [
        *("views.global_size=0", "views.local_size=0", "views.local_views=-1", "views.hflip=3"),
        *("views.colour_on=gpu", "views.local_view=2", "batch_size=0", "seed=-1"),
        *("img_size=32", "hflip=0.5", "auto_augment=null"),  # of images, not of views
    ],
)
def test_the_parser_checks_the_options(option, parsed):
    with pytest.raises(jsonargparse.ArgumentError, match=option.partition("=")[0].split(".")[-1]):
        parsed(MultiViewData, f"--data.{option}")


def test_mistakes_are_named(tmp_path, labelled):
    for options, message in (({"root": tmp_path / "none"}, "no such folder"),):
        with pytest.raises(InputError, match=message):
            data(**options).setup("fit")
    with pytest.raises(InputError, match="views of RGB images have ImageNet's"):
        data(tmp_path, mean=(0.0, 0.0, 0.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images beneath"):
        data(tmp_path / "empty").setup("fit")
