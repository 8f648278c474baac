import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torchvision.transforms.v2.functional import resize, to_image

from locat_lightning.data import SegmentationData
from locat_lightning.data.class_lists import distinct_colours
from locat_lightning.data.segmentation import MaskBatch
from locat_lightning.errors import InputError


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pair(root, split, number, size=(24, 20), values=3, folders=("images", "annotations")):
    """An image and a mask whose values are 0 up to `values`, in columns."""
    rng = np.random.default_rng(number)
    write(root / folders[0] / split / f"{number}.png", rng.integers(256, size=(*size, 3), dtype=np.uint8))
    mask = np.broadcast_to(np.arange(size[1]) * values // size[1], size).astype(np.uint8)
    write(root / folders[1] / split / f"{number}.png", mask)


@pytest.fixture
def root(tmp_path):
    """9 images to train on and 3 to validate on, of 20 x 24 pixels, with the values 0, 1, 2."""
    for number in range(12):
        pair(tmp_path, "train" if number < 9 else "val", number)
    return tmp_path


def data(root, **options):
    plain = {"classes": ["sky", "tree", "road"], "crop_size": 16, "scale": (24, 20), "batch_size": 4}
    plain |= {"num_workers": 0, "cat_max_ratio": 0.9}
    return SegmentationData(root=str(root), **(plain | options))


def error_of(stage="fit", **options):
    with pytest.raises(InputError) as error:
        data(**options).setup(stage)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_batches_of_training(root):
    masks = data(root)
    masks.setup("fit")
    batches = list(masks.train_dataloader())
    assert [len(batch.images) for batch in batches] == [4, 4]
    assert isinstance(batches[0], MaskBatch)
    assert (batches[0].images.shape, batches[0].images.dtype) == ((4, 3, 16, 16), torch.float32)
    assert (batches[0].masks.shape, batches[0].masks.dtype) == ((4, 16, 16), torch.uint8)
    assert batches[0].indices.dtype == torch.int64
    assert len({index for batch in batches for index in batch.indices.tolist()}) == 8
    assert masks.class_names == ["sky", "tree", "road"]
    assert masks.num_classes == 3
    assert (masks.colours.shape, masks.colours.dtype) == ((3, 3), np.uint8)


def test_evaluation_takes_whole_images_and_masks_of_their_own_size(root):
    masks = data(root, scale=(48, 12), mean=(0, 0, 0), std=(1, 1, 1))
    masks.setup("fit")
    for loader in (masks.val_dataloader(), masks.test_dataloader(), masks.eval_dataloader("val")):
        batches = list(loader)
        assert [batch.indices.tolist() for batch in batches] == [[0], [1], [2]]
        assert batches[0].images.shape == (1, 3, 14, 12)
        assert batches[0].masks.shape == (1, 24, 20)
        assert batches[0].masks[0, 0].unique().tolist() == [0, 1, 2]
        with Image.open(masks.source("val").path(0)) as image:
            expected = resize(to_image(image), [14, 12]) / 255
        np.testing.assert_allclose(batches[0].images[0], expected, atol=1e-6)
    assert len(masks.eval_dataloader("train")) == 9


@pytest.mark.parametrize("workers", [0, 1])
def test_larger_batches_of_evaluation_need_one_size(root, workers):
    options = {"eval_batch_size": 2, "num_workers": workers}
    assert [len(batch.images) for batch in data(root, **options).val_dataloader()] == [2, 1]
    pair(root, "val", 10, size=(24, 24))
    with pytest.raises(InputError) as error:
        list(data(root, **options).val_dataloader())
    assert str(error.value) == (
        "images of 20 x 20 and 20 x 24 pixels cannot be in one batch: set --data.eval_batch_size 1"
    )


def test_what_an_epoch_sees_follows_from_seed_epoch_and_index(root):
    loader = data(root, seed=7).train_dataloader()
    loader.sampler.set_epoch(3)
    batch = next(iter(loader))
    index = int(batch.indices[2])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    image, mask, same = data(root, seed=7).train_dataloader().dataset[3 * 9 + index]
    assert torch.equal(batch.images[2], image)
    assert torch.equal(batch.masks[2], mask)
    assert same == index
    assert torch.equal(torch.get_rng_state(), state)
    for seed, epoch in ((7, 4), (8, 3)):
        other, _, _ = data(root, seed=seed).train_dataloader().dataset[epoch * 9 + index]
        assert not torch.equal(other, image)


def test_workers_change_nothing_but_the_seed_does(root):
    def batches(**options):
        return [torch.cat(part) for part in zip(*data(root, **options).train_dataloader(), strict=True)]

    here, there, other = batches(), batches(num_workers=2), batches(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert here[2].tolist() != other[2].tolist()


def test_a_value_can_mean_no_class(root):
    masks = data(root, classes=["sky", "tree"], ignore_index=2)
    assert next(iter(masks.val_dataloader())).masks.unique().tolist() == [0, 1, 255]


def test_label_zero_can_mean_no_class(root):
    masks = data(root, classes=["tree", "road"], reduce_zero_label=True)
    assert next(iter(masks.val_dataloader())).masks.unique().tolist() == [0, 1, 255]


def test_classes_in_a_file(root, monkeypatch):
    (root / "classes.csv").write_text("sky,1,2,3\ntree,4,5,6\nroad,7,8,9\n")
    for name in ("classes.csv", str(root / "classes.csv")):
        masks = data(root, classes=name)
        assert masks.class_names == ["sky", "tree", "road"]
        assert masks.colours.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("dataset", "folders", "splits", "count"),
    [
        ("ade20k", ("images", "annotations"), ("training", "validation"), 150),
        ("coco_stuff", ("images", "annotations"), ("train2017", "val2017"), 171),
        ("pascal_context", ("JPEGImages", "SegmentationClassContext"), ("", ""), 59),
    ],
)
def test_known_data_sets(tmp_path, dataset, folders, splits, count):
    for number, split in enumerate(splits):
        pair(tmp_path, split, number, values=4, folders=folders)
        mask = tmp_path / folders[1] / split / f"{number}.png"
        if dataset == "coco_stuff":
            mask.rename(mask.with_name(f"{number}_labelTrainIds.png"))
        if dataset == "pascal_context":
            lists = tmp_path / "ImageSets" / "SegmentationContext"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{('train', 'val')[number]}.txt").write_text(f"{number}\n")
    masks = data(tmp_path, dataset=dataset, classes=None, batch_size=1)
    masks.setup()
    assert masks.num_classes == count
    assert masks.colours.shape == (count, 3)
    [batch] = masks.val_dataloader()
    reduced = dataset != "coco_stuff"
    assert batch.masks.unique().tolist() == ([0, 1, 2, 255] if reduced else [0, 1, 2, 3])
    assert len(list(masks.train_dataloader())) == 1


def test_pascal_voc_in_colours(tmp_path):
    palette = [*np.concatenate([[[0, 0, 0]], distinct_colours(255)]).ravel().tolist()]
    values = np.zeros((24, 20), np.uint8)
    values[4:12, 4:12], values[3, 4:12] = 20, 255  # a television with its boundary
    for split, name in (("train", "2007_1"), ("val", "2007_9"), ("trainaug", "2008_2")):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", np.zeros((24, 20, 3), np.uint8))
        mask = Image.fromarray(values)
        if split != "trainaug":  # the augmented set's are grey levels
            mask.putpalette(palette)
        file = tmp_path / f"SegmentationClass{'Aug' * (split == 'trainaug')}" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        mask.save(file)
        lists = tmp_path / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(f"{name}\n")
    for dataset in ("pascal_voc", "pascal_voc_aug"):
        masks = data(tmp_path, dataset=dataset, classes=None, batch_size=1)
        masks.setup()
        assert masks.class_names[20] == "tvmonitor"
        for split in ("train", "val"):
            _, classes = masks.source(split).read(0)
            assert np.array_equal(classes, values)
        assert [batch.masks.unique().tolist() for batch in masks.val_dataloader()] == [[0, 20, 255]]


@pytest.mark.parametrize("ending", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, ending):
    road, license_plate = (7, 255) if ending == "labelIds" else (0, 255)
    for split in ("train", "val"):
        values = np.full((20, 40), road, np.uint8)
        values[:5], values[5:9] = license_plate, {"labelIds": 33, "labelTrainIds": 18}[ending]
        values[9:10] = {"labelIds": 29, "labelTrainIds": 255}[ending]  # a caravan counts as nothing
        write(tmp_path / f"leftImg8bit/{split}/bonn/bonn_1_leftImg8bit.png", np.zeros((20, 40, 3), np.uint8))
        write(tmp_path / f"gtFine/{split}/bonn/bonn_1_gtFine_{ending}.png", values)
    masks = data(tmp_path, dataset="cityscapes", classes=None, batch_size=1)
    masks.setup()
    [batch] = masks.val_dataloader()
    assert batch.masks[0, :, 0].tolist() == [255] * 5 + [18] * 4 + [255] + [0] * 10
    assert masks.class_names[18] == "bicycle"
    assert len(list(masks.train_dataloader())) == 1


def test_digits_need_no_root():
    masks = SegmentationData(
        dataset="digits", crop_size=48, scale=(64, 64), eval_batch_size=50, num_workers=0, root="/nowhere"
    )
    masks.setup()
    assert masks.class_names == ["ground", *"0123456789"]
    assert next(iter(masks.train_dataloader())).masks.shape == (32, 48, 48)
    batch = next(iter(masks.val_dataloader()))
    assert batch.images.shape == (50, 3, 64, 64)
    assert batch.masks.unique().tolist() == list(range(11))
    assert (len(masks.source("train")), len(masks.source("val"))) == (1000, 200)
    masks.setup("predict")
    assert masks.predict_paths[3] == "scenes/val/3"
    assert (next(iter(masks.predict_dataloader())).masks == 255).all()


def test_predict_reads_the_validation_images_without_masks(root):
    masks = data(root, classes=None)
    for number in range(9, 12):
        (root / "annotations" / "val" / f"{number}.png").unlink()
    masks.setup("predict")
    assert masks.predict_paths[0] == str(root / "images" / "val" / "10.png")
    batches = list(masks.predict_dataloader())
    assert [batch.indices.tolist() for batch in batches] == [[0], [1], [2]]
    assert batches[0].masks.shape == (1, 24, 20)
    assert (batches[0].masks == 255).all()


@pytest.mark.parametrize("dataset", ["folder", "ade20k"])
def test_predict_reads_any_folder(tmp_path, dataset):
    write(tmp_path / "b.png", np.zeros((9, 12, 3), np.uint8))
    write(tmp_path / "deep" / "a.png", np.zeros((12, 9, 3), np.uint8))
    masks = data(tmp_path, dataset=dataset, classes=None)
    masks.setup("predict")
    assert masks.predict_paths == [str(tmp_path / "b.png"), str(tmp_path / "deep" / "a.png")]
    assert masks.num_classes == (0 if dataset == "folder" else 150)
    assert [batch.masks.shape for batch in masks.predict_dataloader()] == [(1, 9, 12), (1, 12, 9)]


def test_hyper_parameters_load_with_weights_only(root, tmp_path):
    torch.save(dict(data(root).hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["scale"] == (24, 20)


def test_images_can_go_to_a_spawned_worker(root):
    images = data(root).train_dataloader().dataset
    assert torch.equal(pickle.loads(pickle.dumps(images))[3][0], images[3][0])


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_reads_its_share(root, rank):
    masks = data(root)
    masks.trainer = SimpleNamespace(world_size=2, global_rank=rank, num_devices=2, accelerator=None)
    assert [int(batch.indices) for batch in masks.val_dataloader()] == list(range(rank, 3, 2))
    assert len(masks.train_dataloader().sampler) == 4  # of its 5, in batches of 4


def test_squares_of_some_images_and_augmented_passes(root):
    def squares(**options):
        return list(data(root, batch_size=5).square_dataloader("train", 32, **options))

    whole = torch.cat([batch.images for batch in squares()])
    [some] = squares(places=[1, 3, 4])
    assert some.indices.tolist() == [1, 3, 4]
    assert torch.equal(some.images, whole[[1, 3, 4]])
    [[one], [again], [other]] = (squares(places=[1, 3], augmented=number) for number in (1, 1, 2))
    assert one.indices.tolist() == other.indices.tolist() == [1, 3]
    assert one.images.shape[2:] == one.masks.shape[1:] == (32, 32)
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.images[0], whole[1])


class Recorder(LightningModule):
    """Notes what it sees and saves a checkpoint after 6 batches; learns nothing."""

    def __init__(self, checkpoint):
        super().__init__()
        self.checkpoint = checkpoint
        self.seen = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, _):
        self.seen.append((batch.indices.tolist(), batch.images.sum().item(), batch.masks.sum().item()))
        return self.weight * batch.images.mean()

    def on_train_batch_end(self, *_):
        if self.global_step == 6:
            self.trainer.save_checkpoint(self.checkpoint)

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_it_would_have_seen(root, tmp_path, workers):
    def fit(**options):
        module = Recorder(tmp_path / "6.ckpt")
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=10,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data(root, num_workers=workers, batch_size=2), **options)
        return module.seen

    whole = fit()
    assert len(whole) == 10
    assert fit(ckpt_path=tmp_path / "6.ckpt") == whole[6:]  # an epoch has 4 batches


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("size", "has 6 x 5 pixels, but its image"),
        ("value", "value 7 in mask {} is not a class (classes: 0 to 2, no class: 255): correct"),
        ("picture", "mask {} is a picture (RGB), not one class a pixel: write the index"),
    ],
)
def test_a_mistake_in_a_mask_stops_the_run_though_unreadable_images_are_allowed(root, kind, message, workers):
    file = root / "annotations" / "train" / "4.png"
    wrong = {
        "size": np.zeros((5, 6), np.uint8),
        "value": np.full((24, 20), 7, np.uint8),
        "picture": np.zeros((24, 20, 3), np.uint8),
    }
    write(file, wrong[kind])
    masks = data(root, max_unreadable=9, num_workers=workers, batch_size=9)
    masks.setup("fit")
    with pytest.raises(InputError) as error:
        list(masks.train_dataloader())
    assert message.format(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_images_and_masks_are_named_or_skipped(root, caplog):
    (root / "images" / "val" / "9.png").write_bytes(b"nothing")
    (root / "annotations" / "val" / "10.png").write_bytes(b"nothing")
    with pytest.raises(
        InputError, match=r"cannot read image .*/10\.png \(its mask .*annotations/val/10\.png: "
    ):
        list(data(root).val_dataloader())
    [batch] = data(root, max_unreadable=2).val_dataloader()
    assert batch.indices.tolist() == [1]
    assert f"{root}/images/val/9.png: not an image, or of an unknown format" in caplog.text


def test_setup_finds_mistakes(root, tmp_path):
    assert error_of(root=root, classes=None) == (
        f"the classes of {root} are not given: set --data.classes to their names in the order of their "
        "labels, or to a file with a name a line"
    )
    assert error_of(root=root, classes=["sky", "tree"]).startswith("value 2 in mask ")
    assert error_of(root=root, ignore_index=0, classes=["sky"], reduce_zero_label=True).startswith("value 2")
    assert error_of(root=root, classes="none.txt").startswith(f"cannot read classes from {root}/none.txt: ")
    assert error_of(root=root / "none").startswith(f"no such folder: {root}/none; ")
    assert error_of(root=root, dataset="coco_stuff").startswith(f"no images/train2017 in {root}: ")
    (root / "annotations" / "val" / "9.png").unlink()
    assert "1 of 3 images" in error_of("validate", root=root)
    for number in range(9):
        write(root / "annotations" / "train" / f"{number}.png", np.full((24, 20), 255, np.uint8))
    assert error_of(root=root).startswith("no pixel has a class in ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": (2, 0.5)}, "data.ratio (2, 0.5) must be two numbers, 0 < low <= high"),
        ({"cat_max_ratio": 0}, "data.cat_max_ratio (0) must be above 0 and at most 1"),
        ({"std": (1, 0, 1)}, "data.std (1, 0, 1) must be three numbers above 0"),
        ({"ignore_index": 256}, "data.ignore_index (256) must be from 0 to 255"),
        (
            {"images": "pictures"},
            "data.images ('pictures') or data.splits (None) must contain {split}, or train and val are equal",
        ),
    ],
)
def test_arguments_out_of_range(root, options, message):
    assert error_of(root=root, **options) == message


@pytest.mark.parametrize(
    "option",
    [
        *("dataset=ade", "crop_size=0", "eval_batch_size=0", "batch_size=0", "seed=-1", "scale=[0,512]"),
        *("hflip=1.5", "ignore_index=-1"),
    ],
)
def test_the_parser_checks_the_options(option, parsed):
    with pytest.raises(ArgumentError, match=option.partition("=")[0]):
        parsed(SegmentationData, f"--data.{option}")


def test_all_arguments_are_options_and_kept(parsed):
    made = parsed(SegmentationData, "--data.crop_size=32", "--data.seed=3", "--data.classes=[a,b]")
    assert made.hparams.keys() == SegmentationData().hparams.keys()
    assert (made.crop_size, made.seed, made.class_names, len(made.hparams)) == (32, 3, ["a", "b"], 31)
