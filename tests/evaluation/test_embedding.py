"""Features batch by batch: what rows are, their order, and the time that is spent waiting."""

import numpy as np
import pytest
import timm
import torch
from torch.utils.data import DataLoader

from locat_lightning.backbones import registry  # noqa: F401 - names the models
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.embedding import Waiting, embed, embed_images
from locat_lightning.evaluation.features import image_features
from tests.evaluation.test_features import Backbone, expected, loader

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


def test_what_rows_are():
    torch.manual_seed(0)
    model = timm.create_model("locatvit_tiny", dynamic_img_size=True, **SMALL).eval()
    images = torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        cls, patches, mean = (embed(model, images, what) for what in ("cls", "patches", "patch_mean"))
        maps = patch_features(model, images)
        torch.testing.assert_close(cls, image_features(model, images))
    assert patches.shape == (2, 3, 5, 24)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                assert torch.equal(patches[b, i, j], maps[b, :, i, j])
    torch.testing.assert_close(mean, torch.tensor(np.mean(patches.numpy(), (1, 2))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_batch_is_handed_on_in_order(dtype):
    found = []
    model = Backbone().train()
    embed_images(
        model,
        loader(range(7)),
        "cpu",
        lambda batch, rows: found.append((batch.indices, rows)),
        dtype=dtype,
        progress=False,
    )
    assert model.training
    assert [len(rows) for _, rows in found] == [3, 3, 1]
    assert torch.equal(torch.cat([indices for indices, _ in found]), torch.arange(7))
    assert torch.equal(torch.cat([rows for _, rows in found]), expected(range(7))[0].to(dtype))


def test_at_most_two_batches_are_held():
    alive, most = [], []

    class Slow(Backbone):
        def forward(self, images):
            alive.append(len(images))
            most.append(len(alive))
            return super().forward(images)

    embed_images(Slow(), loader(range(30)), "cpu", lambda *_: alive.pop(0), progress=False)
    assert alive == []
    assert max(most) == 2


def test_no_images():
    clock = embed_images(Backbone(), DataLoader([]), "cpu", lambda *_: pytest.fail("none"), progress=False)
    assert clock.seconds == 0


def test_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("locat_lightning.evaluation.embedding.perf_counter", lambda: now[0])

    def items():
        for _ in range(3):
            now[0] += 2
            yield

    clock = Waiting()
    for _ in clock(items()):
        now[0] += 5
    assert (clock.seconds, clock.waited) == (21, 6)
