import pickle
import random
import re
import shutil
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from timm.data.auto_augment import RandAugment

from locat_lightning.data.classification import ImageData, timm_augmentation
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.errors import InputError


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (value, value, value)).save(path)


@pytest.fixture
def root(tmp_path):
    """12 images in 3 classes to train on, of 20 · label + number; 5 in 2 classes to validate on."""
    for label, name in enumerate(["ant", "bee", "cat"]):
        for number in range(4):
            write(tmp_path / "train" / name / f"{number}.png", 20 * label + number)
    for name, count in (("cat", 3), ("ant", 2)):
        for number in range(count):
            write(tmp_path / "val" / name / f"{number}.jpg", 200)
    return tmp_path


def data(root, **options):
    plain = {"img_size": 16, "batch_size": 4, "num_workers": 0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    return ImageData(root=str(root), **(plain | options))


def error_of(stage="fit", **options):
    with pytest.raises(InputError) as error:
        data(**options).setup(stage)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_classes_are_those_of_train_by_name(root):
    images = data(root)
    assert images.class_names == ["ant", "bee", "cat"]
    assert images.num_classes == 3
    images.setup("fit")
    batch, last = images.val_dataloader()
    assert isinstance(batch, ImageBatch)
    assert batch.labels.tolist() + last.labels.tolist() == [0, 0, 2, 2, 2]
    assert last.indices.tolist() == [4]


def test_evaluation_is_resized_and_normalised(root):
    images = data(root, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    batch = next(iter(images.eval_dataloader("train")))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    for number in range(4):
        expected = (number / 255 - 0.5) / torch.tensor([0.25, 0.5, 1.0])
        torch.testing.assert_close(batch.images[number].mean((1, 2)), expected)


def test_training_batches_are_whole_where_there_are_enough(root):
    sizes = {
        size: [len(b.images) for b in data(root, batch_size=size).train_dataloader()] for size in (5, 12, 20)
    }
    assert sizes == {5: [5, 5], 12: [12], 20: [12]}


def test_the_recipes_augmentation_does_not_depend_on_the_workers(root):
    def batches(**options):
        return [torch.cat(part) for part in zip(*data(root, **options).train_dataloader(), strict=True)]

    here, there, other = batches(), batches(num_workers=2), batches(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert here[2].tolist() != other[2].tolist()
    assert here[1].tolist() == (here[2] // 4).tolist()


@pytest.mark.parametrize("folder", ["val", "validation", "test"])
def test_names_of_the_validation_folder(root, folder):
    (root / "val").rename(root / folder)
    images = data(root)
    images.setup("fit")
    images.setup("test")
    assert len(images.val_dataloader().dataset) == len(images.test_dataloader().dataset) == 5


def test_test_has_a_folder_of_its_own(root):
    write(root / "test" / "bee" / "x.png")
    images = data(root)
    [batch] = images.test_dataloader()
    assert batch.labels.tolist() == [1]
    assert len(images.val_dataloader().dataset) == 5


def test_other_files_and_hidden_ones_are_left_out(root):
    (root / "train" / "ant" / "notes.txt").touch()
    (root / "train" / "ant" / "._0.png").touch()
    (root / "train" / ".cache").mkdir()
    write(root / "train" / "ant" / "more" / "UPPER.PNG")
    images = data(root)
    assert images.num_classes == 3
    assert len(images.train_dataloader().dataset) == 13


@pytest.mark.parametrize(
    "litter", [".ipynb_checkpoints", ".thumbnails", ".Trash-1000", "@eaDir", "__MACOSX", "more/.hidden"]
)
def test_what_other_tools_leave_in_a_class_is_not_read(root, litter):
    for split in ("train", "val"):
        write(root / split / "ant" / litter / "copy.png")
    if "/" not in litter:
        write(root / "train" / litter / "copy.png")
    images = data(root)
    assert images.num_classes == 3
    assert len(images.train_dataloader().dataset) == 12
    assert len(images.val_dataloader().dataset) == 5


def test_links_are_followed_but_no_folder_is_read_twice_or_from_above(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "one.png")
    (root / "train" / "ant" / "linked").symlink_to(elsewhere)  # data that lie on another disk
    (root / "train" / "ant" / "file.png").symlink_to(elsewhere / "one.png")
    (root / "train" / "ant" / "all").symlink_to(root / "train")  # else dogs would be cats
    (root / "train" / "ant" / "other").symlink_to(root / "train" / "bee")
    (root / "train" / "bee" / "back").symlink_to(root / "train" / "ant")
    (root / "train" / "loop").symlink_to(root)
    for one, two in (("a", "b"), ("b", "a")):
        (root / "train" / "cat" / one).mkdir()
        (root / "train" / "cat" / one / "to").symlink_to(root / "train" / "cat" / two)
    images = data(root)
    assert images.class_names == ["ant", "bee", "cat"]
    source = images.source("train")
    assert [source.labels.count(label) for label in range(3)] == [6, 4, 4]


def test_a_class_is_one_however_unicode_writes_its_name(root):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for number, (split, name) in enumerate([("train", composed), ("train", decomposed), ("val", decomposed)]):
        write(root / split / name / f"{number}.png")
    images = data(root)
    assert images.class_names == ["ant", "bee", "caf\u00e9", "cat"]
    assert images.source("train").labels.count(2) == 2
    assert images.source("val").labels.count(2) == 1


def test_a_class_without_validation_images_is_named(root, caplog):
    with caplog.at_level("INFO"):
        data(root).source("val")
    assert f"{root / 'val'} has no image of 1 of 3 classes: bee" in caplog.text


def test_predict_reads_every_image_beneath_a_root_without_splits(tmp_path):
    write(tmp_path / "b.png", 1)
    write(tmp_path / "deep" / "er" / "a.jpg", 2)
    images = data(tmp_path)
    images.setup("predict")
    assert images.class_names == []
    [batch] = images.predict_dataloader()
    assert [images.predict_paths[index] for index in batch.indices] == [
        str(tmp_path / "b.png"),
        str(tmp_path / "deep" / "er" / "a.jpg"),
    ]
    assert batch.labels.tolist() == [-1, -1]


@pytest.mark.parametrize("name", ["test", "val", "train"])
def test_predict_reads_a_plain_folder_in_which_one_is_called_like_a_split(tmp_path, name):
    write(tmp_path / "a.png")
    write(tmp_path / name / "0.png")
    images = data(tmp_path)
    images.setup("predict")
    assert images.class_names == []
    assert sorted(images.predict_paths) == sorted([f"{tmp_path}/a.png", f"{tmp_path}/{name}/0.png"])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("folder", ["val", "validation", "test"])
def test_measuring_and_predicting_need_no_train(root, stage, folder):
    shutil.rmtree(root / "train")
    (root / "val").rename(root / folder)
    images = data(root)
    images.setup(stage)
    assert images.class_names == ["ant", "cat"]
    split = stage.removesuffix("idate")
    assert images.source(split).labels == [0, 0, 1, 1, 1]


def test_without_train_the_classes_are_those_of_val(root):
    shutil.rmtree(root / "train")
    write(root / "test" / "bee" / "x.png")
    assert error_of("test", root=root) == (
        f"{root}/test has classes that val lacks: bee; remove or rename them"
    )


def test_predict_reads_the_validation_images_of_a_root_with_splits(root):
    images = data(root)
    images.setup("predict")
    assert images.predict_paths[0] == str(root / "val" / "ant" / "0.jpg")
    assert len(images.predict_paths) == 5


def test_setup_reads_the_folders_once(root):
    images = data(root)
    images.setup("fit")
    source = images.source("train")
    write(root / "train" / "ant" / "new.png")
    images.setup("fit")
    assert images.source("train") is source
    assert len(source) == 12


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_reads_its_share(root, rank):
    images = data(root, num_workers=None)
    images.trainer = SimpleNamespace(world_size=2, global_rank=rank, num_devices=2, accelerator=None)
    assert [index for b in images.val_dataloader() for index in b.indices.tolist()] == list(range(rank, 5, 2))
    loader = images.train_dataloader()
    assert len(loader.sampler) == 4  # of its 6, a whole batch
    assert len(loader) == 1
    assert loader.num_workers >= 1
    assert not loader.pin_memory


def test_digits_need_no_root():
    images = ImageData(dataset="digits", img_size=32, batch_size=360, num_workers=0, root="/nowhere")
    images.setup("fit")
    assert images.class_names == list("0123456789")
    [batch] = images.val_dataloader()
    assert batch.images.shape == (360, 3, 32, 32)
    assert torch.bincount(batch.labels).min() >= 35


def test_hyper_parameters_load_with_weights_only(root, tmp_path):
    torch.save(dict(data(root).hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["scale"] == (0.08, 1.0)


def test_a_loader_s_images_can_go_to_a_spawned_worker(root):
    images = data(root).train_dataloader().dataset
    assert torch.equal(pickle.loads(pickle.dumps(images))[3][0], images[3][0])


class Recorder(LightningModule):
    """Notes which images it sees; learns nothing."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, batch.indices.tolist()))
        return self.weight * batch.images.mean()

    def validation_step(self, batch, _):
        pass

    def predict_step(self, batch, _):
        return batch.indices

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def with_a_trainer(test):
    """Lightning warns of few workers where cores abound, and uses a name that torch 2.15 deprecates."""
    test = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")(test)
    return pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")(test)


@with_a_trainer
def test_a_trainer_goes_through_every_image_in_each_epoch_in_another_order(root, trainer):
    module = Recorder()
    images = data(root)
    trainer.fit(module, images)
    epochs = [[i for epoch, indices in module.seen if epoch == number for i in indices] for number in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]
    order = data(root).train_dataloader().sampler
    for number in (0, 1):
        order.set_epoch(number)
        assert [item - 12 * number for item in order] == epochs[number]


@with_a_trainer
def test_a_trainer_predicts_each_image_once_and_skips_what_it_cannot_read(root, trainer, caplog):
    (root / "val" / "cat" / "1.jpg").write_bytes(b"nothing like a picture")
    images = data(root)
    predicted = trainer.predict(Recorder(), images)
    assert torch.cat(predicted).tolist() == [0, 1, 2, 4]
    assert "1 image could not be read and was skipped (1 in all):" in caplog.text
    with pytest.raises(InputError, match=r"cannot read image .*1\.jpg"):
        list(images.val_dataloader())
    assert f"{root}/val/cat/1.jpg: not an image, or of an unknown format" in caplog.text


@with_a_trainer
@pytest.mark.parametrize("workers", [0, 1])
def test_a_trainer_stops_at_an_image_that_has_vanished(root, trainer, workers):
    images = data(root, num_workers=workers)
    images.setup("fit")
    gone = root / "train" / "bee" / "2.png"
    gone.unlink()
    with pytest.raises(
        InputError, match=re.escape(f"cannot read image {gone} (No such file or directory): ")
    ):
        trainer.fit(Recorder(), images)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_no_such_folder(tmp_path, stage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    holds = "a folder of images" if stage == "predict" else "the folder that holds train/ and val/"
    assert (
        error_of(stage, root="missing") == f"no such folder: {tmp_path}/missing; set --data.root to {holds}"
    )
    assert error_of(stage, root="data") == (
        f"data.root is not given, and there is no folder {tmp_path}/data: set --data.root to {holds}"
    )


def test_a_file_for_a_folder(root):
    assert error_of(root=root / "train/ant/0.png").startswith(
        f"not a folder: {root}/train/ant/0.png; set --data.root"
    )


def test_no_train(root):
    (root / "train").rename(root / "training")
    assert error_of(root=root) == f"no train/ in {root}: it should hold a folder per class, with its images"


def test_no_validation(root):
    (root / "val").rename(root / "valid")
    assert error_of(root=root).startswith(f"no val/ or validation/ or test/ in {root}: ")


@pytest.mark.parametrize("options", [{"img_size": 100_000}, {"crop_pct": 1e-9}])
def test_images_larger_than_any_that_is_read(root, options):
    assert re.match(
        r"data.img_size and crop_pct: squares of [\d,]+ pixels a side", error_of(root=root, **options)
    )


def test_no_class_folders(tmp_path):
    write(tmp_path / "train" / "0.png")
    assert error_of(root=tmp_path).startswith(
        f"no class folders in {tmp_path}/train: the images of each class"
    )


def test_no_images(tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    kinds = "files ending in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp count; "
    kinds += "with --data.stats (locat stats), also .npy, .dcm and TIFF of any channels"
    assert error_of(root=tmp_path) == f"no images in the class folders of {tmp_path}/train: {kinds}"


def test_no_images_to_predict(tmp_path):
    assert error_of("predict", root=tmp_path).startswith(
        f"no images beneath {tmp_path}: files ending in .jpg, "
    )


def test_an_empty_class_folder(root):
    (root / "train" / "dog").mkdir()
    (root / "train" / "elk").mkdir()
    found = error_of(root=root)
    assert found.startswith(f"class folders without an image in {root}/train: dog, elk; files ending in .jpg")


def test_classes_that_train_lacks(root):
    for number in range(12):
        write(root / "val" / f"zoo{number:02}" / "x.png")
    assert error_of(root=root) == (
        f"{root}/val has classes that train lacks: zoo00, zoo01, zoo02, zoo03, zoo04, zoo05, zoo06, zoo07,"
        " zoo08, zoo09 and 2 more; remove or rename them"
    )


def test_an_augmentation_that_timm_does_not_know(root):
    assert error_of(root=root, auto_augment="rnd-m9").startswith(
        "timm cannot make an augmentation of data.auto_augment 'rnd-m9' and data.interpolation 'random': "
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_pct": 1.5}, "data.crop_pct (1.5) must be above 0 and at most 1"),
        ({"scale": (2, 0.1)}, "data.scale (2, 0.1) must be two numbers, 0 < low <= high <= 1"),
        ({"ratio": (2, 0.5)}, "data.ratio (2, 0.5) must be two numbers, 0 < low <= high"),
        ({"std": (1, 0, 1)}, "data.std (1, 0, 1) must be three numbers above 0"),
        ({"mean": (0, inf, 0)}, "data.mean (0, inf, 0) must be finite numbers"),
        ({"color_jitter": inf}, "data.color_jitter (inf) must be a finite number"),
    ],
)
def test_arguments_out_of_range(root, options, message):
    assert error_of(root=root, **options) == message


@pytest.mark.parametrize(
    "option",
    [
        *("batch_size=0", "num_workers=-1", "img_size=0", "classes=0", "max_unreadable=-1", "seed=-1"),
        *("hflip=3", "random_erasing=-1", "color_jitter=-1", "eval_interpolation=random", "batchsize=1"),
    ],
)
def test_the_parser_checks_the_options(option, parsed):
    with pytest.raises(ArgumentError, match=option.partition("=")[0]):
        parsed(ImageData, f"--data.{option}")


def test_all_arguments_are_options_and_kept(parsed):
    options = {"root": "here", "img_size": 32, "hflip": 0.1, "batch_size": 3, "crop_pct": 1.0, "seed": 5}
    made = parsed(ImageData, *[f"--data.{name}={value}" for name, value in options.items()])
    assert options.items() <= made.hparams.items()
    assert made.hparams.keys() == ImageData(**options).hparams.keys()
    assert len(made.hparams) == 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "unknown data set 'cifar10': use folder, digits, or a name of timm's (torch/…, hfds/…)"),
        ("torch/cifar11", "data set 'torch/cifar11', train, in {root}: Unknown torchvision dataset cifar11"),
        ("torch/cifar10", "data set 'torch/cifar10', train, in {root}: Dataset not found or corrupted."),
        (
            "hfds/nobody/nothing",
            "data set 'hfds/nobody/nothing' needs a package that is missing: pip install datasets",
        ),
        (
            "wds/nothing",
            "data set 'wds/nothing' is read front to back: pass the folder or URL of its",
        ),
        (
            "tfds/nothing",
            "data set 'tfds/nothing' is read front to back: write its images to a folder,",
        ),
    ],
)
def test_a_data_set_that_timm_cannot_make(root, name, message):
    assert error_of(root=root, dataset=name).startswith(message.format(root=root))


def test_a_data_set_of_torchvision(tmp_path, monkeypatch):
    class Tiny:
        classes = ("no", "yes")

        def __init__(self, root, train, download):
            self.labels = [0, 1, 1] if train else [1]

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            return Image.fromarray(np.full((8, 8), 100, np.uint8)), self.labels[index]

    monkeypatch.setitem(__import__("timm").data.dataset_factory._TORCH_BASIC_DS, "tiny", Tiny)
    images = data(tmp_path, dataset="torch/tiny")
    images.setup("fit")
    assert images.class_names == ["no", "yes"]
    [batch] = images.eval_dataloader("train")
    assert batch.labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(batch.images, torch.full((3, 3, 16, 16), 100 / 255))
    images.setup("predict")
    assert images.predict_paths == ["torch/tiny/test/0"]
    balanced = data(tmp_path, dataset="torch/tiny", sampling="balanced", imbalance=2)
    balanced.setup("fit")
    assert balanced.class_names == ["no", "yes"]
    assert balanced.class_counts.tolist() == [1, 1]
    monkeypatch.setattr(Tiny, "__len__", lambda self: 5)  # the labels are of something else
    assert data(tmp_path, dataset="torch/tiny").class_counts is None


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m0-n9", "v0", "augmix-m10"])
def test_every_policy_runs_to_its_last_operation(policy):
    random.seed(0)
    transform = timm_augmentation(8, auto_augment=policy)
    image = Image.linear_gradient("L").resize((9, 9)).convert("RGB")
    for _ in range(150):
        assert transform(image).shape == (3, 8, 8)


def test_posterizing_to_no_bits_gives_black_and_to_some_what_timm_gives():
    transform = timm_augmentation(8, auto_augment="rand-m10-inc1")
    [augment] = [step for step in transform.transforms if isinstance(step, RandAugment)]
    [operation] = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    image = Image.new("RGB", (2, 2), (255, 130, 10))
    assert operation.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
    assert operation.aug_fn(image, 1).getpixel((0, 0)) == (128, 128, 0)
