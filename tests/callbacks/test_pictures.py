"""Pictures: the numbers behind them, their shape, and training as without them."""

import math

import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.data import DataLoader

from locat_lightning.backbones import registry  # noqa: F401 - names the models
from locat_lightning.callbacks.pictures import (
    AttentionPictures,
    cls_attention,
    draw,
    gaussian_kernels,
    inferno,
    patch_features,
    spaced_items,
)
from locat_lightning.data import MultiCropData
from locat_lightning.data.classification import ImageData
from locat_lightning.data.dataset import Failure
from locat_lightning.errors import InputError
from locat_lightning.methods import Dino

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",  # Lightning, of torch 2.15
    "ignore:.*does not have many workers:UserWarning",
)

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}


def vit(name="locatvit_tiny", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | options))
    for part, weight in model.named_parameters():
        if "gaug" in part or "qkv" in part:
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("name", ["locatvit_tiny", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_patch_features_are_the_last_tokens_before_the_norm(name):
    backbone, images = vit(name, reg_tokens=2, dynamic_img_size=True).eval(), torch.randn(2, 3, 12, 20)
    tokens = backbone.blocks(backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images))))
    features = patch_features(backbone, images)
    assert features.shape == (2, 24, 3, 5)
    torch.testing.assert_close(features.flatten(2).mT, tokens[:, 3:])


def test_patch_features_of_other_models():
    images = torch.randn(1, 3, 64, 64)
    assert patch_features(timm.create_model("resnet10t", num_classes=2), images).shape == (1, 512, 2, 2)
    assert patch_features(torch.nn.Conv2d(3, 4, 1), images) is None


def test_heat_goes_from_black_to_pale_yellow():
    first, between, last = (255 * inferno(torch.tensor([[0, 0.5 / 9, 1]]))[0]).tolist()
    assert first == pytest.approx([0, 0, 4])
    assert between == pytest.approx([13.5, 6, 35])
    assert last == pytest.approx([252, 255, 164])


def picture(size=(16, 16), side=56, **parts):
    return draw(torch.rand(2, 3, *size), [1, -1], ["ant", "bee"], side=side, **parts)


def test_a_column_for_each_thing_given():
    gap, header = 4, 56 // 13 + 56 // 18 + 8
    everything = {
        "kernels": [torch.rand(2, 16, 4, 4)] * 5,
        "attention": torch.rand(2, 3, 4, 4),
        "student_attention": torch.rand(2, 3, 4, 4),
        "features": torch.rand(2, 8, 4, 4),
        "probabilities": torch.tensor([[0.1, 0.9], [0.5, 0.5]]),
    }
    full = picture(**everything)
    assert full.dtype == torch.uint8
    assert full.shape[2] == gap + 8 * (56 + gap)
    assert abs(full.shape[1] - (header + 2 * (56 + gap))) <= 1
    for left_out, columns in ((name, 5 if name == "kernels" else 7) for name in everything):
        parts = {name: part for name, part in everything.items() if name != left_out}
        assert picture(**parts).shape[2] == gap + columns * (56 + gap)
    assert picture(kernels=everything["kernels"][:1]).shape[2] == gap + 2 * (56 + gap)
    assert picture(size=(16, 32)).shape[2] == gap + 112 + gap
    assert picture(size=(112, 56)).shape[1] == full.shape[1] + 2 * 56


def test_an_image_is_shown_as_it_is_and_a_kernel_where_it_is():
    images = torch.rand(1, 3, 16, 16)
    kernel = torch.zeros(1, 16, 4, 4)
    kernel[0, 2 * 4 + 2, 2, 2] = 3.0  # the middle patch sees only itself
    drawn = draw(images, [0], kernels=[kernel], side=64).float() / 255
    gap, bottom = 4, drawn.shape[1] - 4
    shown = drawn[:, bottom - 64 : bottom, gap : gap + 64]
    torch.testing.assert_close(shown[:, 2::4, 2::4], images[0], atol=1.5 / 255, rtol=0)
    tile = drawn[:, bottom - 64 : bottom, 2 * gap + 64 :][:, :, :64]
    assert tile[0, 40, 40] > 0.9  # yellow
    assert tile[:, 8, 56].max() < 0.5


def test_the_students_attention_is_left_of_the_teachers_and_the_features_right():
    hot, colours = torch.eye(4).view(1, 1, 4, 4), torch.zeros(1, 3, 4, 4)
    colours[0, :, 0, 3] = 1.0  # a bright patch in the upper right corner
    drawn = draw(
        torch.zeros(1, 3, 8, 8), [0], attention=hot, student_attention=hot.flip(-1), features=colours, side=64
    )
    tops = drawn.shape[1] - 68
    student, teacher, features = (drawn[:, tops:-4, 4 + 68 * i :][..., :64].float() / 255 for i in (1, 2, 3))
    assert student[0, 8, 56] > 0.8 > 0.2 > student[0, 8, 8]
    assert teacher[0, 8, 8] > 0.8 > 0.2 > teacher[0, 8, 56]
    assert features[0, :16, 48:].min() == 1
    assert features[0, 16:].max() == features[0, :, :48].max() == 0


def test_titles_do_not_run_into_each_other():
    for side in (48, 224):
        part = torch.rand(1, 3, 4, 4)
        parts = {"kernels": [torch.rand(1, 16, 4, 4)] * 12, "attention": part, "student_attention": part}
        drawn = draw(torch.rand(1, 3, 8, 8), [0], **parts, features=part, side=side)
        gap = max(4, side // 20)
        header = drawn[:, : drawn.shape[1] - side - gap]
        for column in range(8):
            between = header[..., column * (side + gap) :][..., :gap]
            assert (between == 255).all(), column


def test_a_model_that_has_diverged_is_drawn_all_the_same():
    nan = torch.full((1, 3, 4, 4), math.nan)
    kernels = [torch.full((1, 16, 4, 4), math.nan), torch.zeros(1, 16, 4, 4)]
    probabilities = torch.full((1, 5), math.nan)
    parts = {"attention": torch.zeros(1, 3, 4, 4), "student_attention": nan, "features": nan}
    drawn = picture_of_one(kernels=kernels, probabilities=probabilities, **parts)
    assert drawn.shape[2] == 4 + 7 * 60


def picture_of_one(**parts):
    return draw(torch.rand(1, 3, 16, 16), [1], side=56, **parts)


@pytest.mark.parametrize("predicted", [0, 1])
def test_the_prediction_is_green_where_true_and_red_where_false(predicted):
    probabilities = F.one_hot(torch.tensor([predicted]), 2).float()
    panel = draw(torch.zeros(1, 3, 8, 8), [1], ["a", "b"], probabilities=probabilities)[:, -228:-11, -234:-11]
    colours = {tuple(colour) for colour in panel.flatten(1).T.unique(dim=0).tolist()}
    green, red = (0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)
    assert (red in colours) == (predicted == 0)
    assert green in colours


def test_long_missing_and_many_names():
    probabilities = torch.eye(3)
    drawn = draw(torch.rand(3, 3, 8, 8), [0, 2, -1], ["n" * 200], probabilities=probabilities)
    assert drawn.shape[2] == 11 + 2 * (224 + 11)


class Classifier(LightningModule):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.class_names = list("0123456789")

    def training_step(self, batch, _):
        return F.cross_entropy(self.backbone(batch.images), batch.labels)

    def validation_step(self, batch, _):
        self.backbone(batch.images)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, callbacks=(), logger=True):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=1,
        limit_val_batches=2,
        logger=logger and TensorBoardLogger(folder, name="", version=""),
        log_every_n_steps=1,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def digits():
    return ImageData(dataset="digits", img_size=16, batch_size=8, num_workers=0)


def drawn_in(folder):
    events = EventAccumulator(str(folder)).Reload()
    return events.Images("pictures/validation") if events.Tags()["images"] else []


def test_a_run_is_drawn_and_trains_as_without(tmp_path):
    weights = []
    for name, callbacks in (("with", [AttentionPictures(images=3, side=48)]), ("without", [])):
        module = Classifier(vit(drop_path_rate=0.2))
        torch.manual_seed(1)
        trainer(tmp_path / name, callbacks).fit(module, digits())
        weights.append(list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    first, second = drawn_in(tmp_path / "with")
    assert (first.step, second.step) == (0, 1)
    assert (first.width, second.width) == (4 + 7 * 52,) * 2
    assert drawn_in(tmp_path / "without") == []


@pytest.mark.parametrize(("name", "columns"), [("vit_tiny_patch16_224", 4), ("resnet10t", 3)])
def test_other_models_every_second_epoch(tmp_path, name, columns):
    backbone = timm.create_model(name, num_classes=10) if name == "resnet10t" else vit(name)
    callback = AttentionPictures(images=2, side=48, every_n_epochs=2)
    trainer(tmp_path, [callback]).fit(Classifier(backbone), digits())
    [drawn] = drawn_in(tmp_path)
    assert (drawn.step, drawn.width) == (1, 4 + columns * 52)


def test_a_backbone_without_classes_and_a_validation_by_itself(tmp_path):
    callback = AttentionPictures(images=2, side=48, every_n_epochs=100)
    trainer(tmp_path, [callback]).validate(Classifier(vit(num_classes=0)), digits(), verbose=False)
    [drawn] = drawn_in(tmp_path)
    assert drawn.width == 4 + 6 * 52


def test_dino_is_drawn_with_its_student_and_trains_as_without(tmp_path):
    backbone_args = {name: SMALL[name] for name in SMALL if name != "num_classes"} | {"drop_path_rate": 0.2}
    head = {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8}
    callback = AttentionPictures(images=2, side=48)
    weights = []
    for name, callbacks in (("without", []), ("with", [callback])):
        torch.manual_seed(0)
        module = Dino("locatvit_tiny", backbone_args=backbone_args, lr=1e-2, warmup_epochs=0, **head)
        data = MultiCropData(
            dataset="digits", global_size=16, local_size=8, local_views=2, batch_size=8, num_workers=0
        )
        trainer(tmp_path / name, callbacks).fit(module, data)
        weights.append(module.state_dict())
    without, with_pictures = weights
    assert all(torch.equal(with_pictures[key], without[key]) for key in without)
    first, second = drawn_in(tmp_path / "with")
    assert (first.step, second.step) == (0, 1)
    assert first.width == 4 + 7 * 52  # input, 3 kernels, student, teacher, features

    for part, weight in module.named_parameters():
        if "qkv" in part:  # student and teacher are still too much alike to be told apart in a picture
            torch.nn.init.normal_(weight)
    student, teacher = module.student.backbone, module.teacher.backbone
    mean, std = (torch.tensor(data.normalisation[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = draw(
        callback.inputs * std + mean,
        callback.labels,
        kernels=gaussian_kernels(teacher, callback.inputs),
        student_attention=cls_attention(student, callback.inputs),
        attention=cls_attention(teacher, callback.inputs),
        features=patch_features(teacher, callback.inputs),
        side=48,
    )
    assert torch.equal(callback._picture(data, module), expected)
    assert not torch.equal(cls_attention(student, callback.inputs), cls_attention(teacher, callback.inputs))


def test_the_images_are_spread_over_the_validation_set(tmp_path):
    callback, data = AttentionPictures(images=4), digits()
    trainer(tmp_path, [callback]).validate(Classifier(vit()), data, verbose=False)
    images = data.val_dataloader().dataset
    assert callback.labels == [images[place][1] for place in (0, 120, 239, 359)]
    assert torch.equal(callback.inputs[3], images[359][0])


def test_an_image_that_cannot_be_read_is_left_out():
    items = [0, Failure("1.png", "it is truncated"), 2, 3]
    assert spaced_items(DataLoader(items), 9) == [0, 2, 3]
    assert spaced_items(DataLoader(items), 2) == [0, 3]


def test_without_tensorboard_nothing_is_done(tmp_path):
    callback = AttentionPictures()
    trainer(tmp_path, [callback], logger=False).validate(Classifier(vit()), digits(), verbose=False)
    assert not hasattr(callback, "inputs")


@pytest.mark.parametrize(("name", "least"), [("images", 1), ("every_n_epochs", 0), ("side", 1)])
def test_arguments_out_of_range(name, least):
    with pytest.raises(InputError, match=rf"pictures: {name} \({least - 1}\) must be at least {least}"):
        AttentionPictures(**{name: least - 1})


def test_never(tmp_path):
    callback = AttentionPictures(every_n_epochs=0)
    trainer(tmp_path, [callback]).validate(Classifier(vit()), digits(), verbose=False)
    assert not hasattr(callback, "inputs")
    assert not drawn_in(tmp_path)


def test_other_data(tmp_path):
    loader = DataLoader([torch.zeros(3, 16, 16)])
    with pytest.raises(InputError, match="AttentionPictures draws images of ImageData, not of NoneType"):
        trainer(tmp_path, [AttentionPictures()]).validate(Classifier(vit()), loader)
