"""The pictures of each task: which columns, and of which network."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from locat_lightning.data.views import ViewBatch, Views
from locat_lightning.evaluation.iou import count_pixels, iou
from locat_lightning.inspection import cls_attention
from locat_lightning.methods import Dino
from locat_lightning.tasks import Classification, Segmentation

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
DATA = SimpleNamespace(
    normalisation={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    colours=np.array([[250, 0, 0], [0, 250, 0]], np.uint8),
)
KERNELS = ["kernels, block 0", "kernels, block 1"]
ATTENTION, FEATURES = "attention of [CLS]", "PCA of patch features"


def samples(side=16):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, side, side, generator=generator), label, label) for label in (0, 1)]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "columns"),
    [
        ("locatvit_tiny", SMALL | {"num_classes": 2}, [*KERNELS, ATTENTION, FEATURES, "prediction"]),
        ("locatvit_tiny", SMALL | {"num_classes": 0}, [*KERNELS, ATTENTION, FEATURES]),
        ("vit_tiny_patch16_224", SMALL | {"num_classes": 2}, [ATTENTION, FEATURES, "prediction"]),
        ("resnet10t", {"num_classes": 2}, [FEATURES, "prediction"]),
    ],
)
def test_classification_shows_what_its_model_has(name, options, columns):
    module = Classification(name, class_names=["ant", "bee"])
    module.backbone = timm.create_model(name, **options).eval()
    [(kind, figure)] = module.pictures(samples(), DATA, 32).items()
    assert kind == "validation"
    assert titles(figure) == ["input", *columns]
    shown = (samples()[0][0] * 0.5 + 0.5).clamp(0, 1).movedim(0, -1)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), shown, atol=1e-6)
    if "prediction" in columns:
        texts = {text.get_text() for text in figure.axes[-1].texts}
        assert {"ant", "bee", "true: ant", "true: bee"} <= texts


@torch.no_grad()
def test_dino_shows_student_and_teacher_and_its_crops():
    module = Dino("locatvit_tiny", backbone_args=SMALL, out_dim=32, hidden_dim=16, bottleneck_dim=8)
    module.configure_model()
    module.eval()
    for part, weight in module.named_parameters():
        if "qkv" in part:  # alike at the beginning
            torch.nn.init.normal_(weight)
    figure = module.pictures(samples(), DATA, 32)["validation"]
    assert titles(figure) == ["input", *KERNELS, ATTENTION, ATTENTION, FEATURES]
    images = torch.stack([image for image, *_ in samples()])
    networks = {"student": module.student.backbone, "teacher": module.teacher.backbone}
    for axes, (name, backbone) in zip(figure.axes[3:5], networks.items(), strict=True):
        assert axes.texts[0].get_text().startswith(name)
        heat = cls_attention(backbone, images)[0].mean(0)
        np.testing.assert_allclose(axes.images[1].get_array(), heat / heat.max(), atol=1e-6)

    views = [Views(torch.randn(count, 6, 3, side, side), None) for count, side in ((2, 16), (3, 8))]
    batch = ViewBatch(views, torch.zeros(6), torch.arange(6))
    [(name, figure)] = module.input_pictures(batch, 32).items()
    assert name == "crops"
    assert titles(figure) == ["global 1", "global 2", "local 1", "local 2", "local 3"]
    assert [len(axes.images) for axes in figure.axes] == [4] * 5


@torch.no_grad()
def test_segmentation_shows_annotation_and_prediction_and_what_it_measured():
    module = Segmentation("locatvit_tiny", weights="random", class_names=["sky", "road"])
    module.backbone = timm.create_model("locatvit_tiny", dynamic_img_size=True, num_classes=0, **SMALL).eval()
    module.predicted = lambda images, masks: torch.ones(1, *masks.shape, dtype=torch.int64)
    items = [(image, torch.zeros(20, 20, dtype=torch.uint8), 0) for image, *_ in samples(18)]
    figure = module.pictures(items, DATA, 32)["validation"]
    assert titles(figure) == ["input", "annotation", "prediction", *KERNELS]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sky", "road"]

    assert module.result_pictures(DATA) == {}
    module.iou = iou(count_pixels(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]]), 2))
    figures = module.result_pictures(DATA)
    assert list(figures) == ["iou", "confusion"]
    assert figures["iou"].get_suptitle() == "mIoU 0.5000   whole image"
