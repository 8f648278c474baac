"""The task of depth: its protocol against plain expressions, what checkpoints hold, and what is written."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from locat_lightning.backbones.weights import DECODER_OF
from locat_lightning.data.depth import DepthData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.depth import eigen_crop
from locat_lightning.nn.depth import gradient_loss, scale_invariant_loss
from locat_lightning.tasks import Depth
from tests.tasks.test_segmentation import saved, trainer, weights_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),  # a frozen backbone's
]


@pytest.fixture
def weights(tmp_path):
    return weights_in(tmp_path)


def data(nyu, **options):
    return DepthData(root=str(nyu), num_workers=0, batch_size=2, crop_size=(18, 22), **options)


def fit(tmp_path, nyu, module, **options):
    run = trainer(tmp_path, **({"max_epochs": 1} | options))
    run.fit(module, datamodule=data(nyu))
    return run


def test_features_are_those_of_the_patches_and_of_cls(tmp_path, nyu, weights):
    module = Depth(weights=weights, layers=2)
    fit(tmp_path, nyu, module, max_steps=1, max_epochs=-1)
    images = torch.randn(2, 3, 16, 20)
    backbone = module.backbone.eval()
    found = backbone.forward_intermediates(
        images, indices=[0, 1], norm=False, return_prefix_tokens=True, intermediates_only=True
    )
    parts = [
        part for patches, cls in found for part in (patches, cls[:, 0, :, None, None].expand_as(patches))
    ]
    torch.testing.assert_close(module.features(images), torch.cat(parts, 1))
    assert module.decoder.conv.weight.shape == (256, 2 * 2 * 24, 1, 1)
    with pytest.raises(InputError, match=r"has no \[CLS\] token"):
        patch_features(torch.nn.Identity(), images, with_cls=True)


def test_predictions_have_the_size_of_the_depths(tmp_path, nyu, weights):
    """With the mirror image, padded to whole patches, and upsampled."""
    module = Depth(weights=weights)
    fit(tmp_path, nyu, module, max_steps=1, max_epochs=-1)
    module.eval()
    images = torch.randn(1, 3, 18, 21)  # no whole number of patches
    with torch.no_grad():
        found = module.predicted(images, (40, 45))

        def plain(images):
            padded = F.pad(images, (0, 3, 0, 2))
            small = module.decoder(patch_features(module.backbone, padded, with_cls=True))
            return F.interpolate(small[:, None], (20, 24), mode="bilinear")[..., :18, :21]

        both = (plain(images) + plain(images.flip(-1)).flip(-1)) / 2
        expected = F.interpolate(both, (40, 45), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, expected)
    assert 0 < found.min() < found.max() < 10


def test_the_loss_leaves_out_the_variance_at_first(tmp_path, nyu, weights):
    seen = []

    class Watched(Depth):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            predicted, first = self(batch.images).detach(), self.global_step < 2
            expected = scale_invariant_loss(predicted, batch.depths, with_variance=not first)
            expected = expected + 0.25 * gradient_loss(predicted, batch.depths)
            seen.append((loss.item(), expected.item()))
            return loss

    fit(tmp_path, nyu, Watched(weights=weights, steps_without_variance=2, gradient_weight=0.25), max_epochs=2)
    assert len(seen) == 4
    assert [loss for loss, _ in seen] == pytest.approx([expected for _, expected in seen], rel=1e-4)


def test_a_head_learns_and_is_measured(tmp_path, nyu, weights):
    module = Depth(weights=weights, lr=0.05, layers=2, flip=False)
    run = fit(tmp_path, nyu, module, max_epochs=8)
    module.eval()
    errors = []
    for batch in data(nyu).val_dataloader():
        with torch.no_grad():
            predicted = module.predicted(batch.images, batch.depths.shape[1:])[0]
        valid = (batch.depths[0] > 0) & (batch.depths[0] <= 10) & eigen_crop(batch.depths)
        errors.append(((predicted - batch.depths[0])[valid] ** 2).mean().sqrt())
    assert run.callback_metrics["val/rmse"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert module.errors["rmse"] < 1  # of depths from 1 to 8 m; those of the untrained head are 2 m wrong
    assert set(run.callback_metrics) >= {"val/abs_rel", "val/delta1", "val/log10", "train/loss"}
    assert module.summary() == "Eigen's crop, up to 10 m"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bfloat16_depths_are_predicted_in_float32(precision, tmp_path, nyu, weights):
    module = Depth(weights=weights)
    run = fit(tmp_path, nyu, module, precision=precision)
    assert module.decoder.conv.weight.dtype == (torch.bfloat16 if "true" in precision else torch.float32)
    assert run.callback_metrics["val/rmse"].dtype == torch.float32
    found = module.results.scores["rmse"]
    assert not torch.equal(found, found.bfloat16().float())


def test_errors_are_kept_by_image(tmp_path, nyu, weights):
    """Each image once, also if two processes have seen it; those without a measured pixel do not count."""
    Image.fromarray(np.zeros((32, 40), np.uint16)).save(nyu / "test/room_1/sync_depth_00001.png")
    module = Depth(weights=weights)
    run = fit(tmp_path, nyu, module)
    assert module.results.indices.tolist() == [0, 1]  # room_0 has two of the three images
    assert module.results.names == ["room_0/rgb_00000.jpg", "room_0/rgb_00002.jpg"]
    assert min(module.results.labels.tolist()) > 500  # measured pixels
    for name, scores in module.results.scores.items():
        assert run.callback_metrics[f"val/{name}"].item() == pytest.approx(scores.mean().item())
    once, batches = module.results.scores["rmse"], list(data(nyu).val_dataloader())
    again = trainer(tmp_path)
    again.validate(module, DataLoader([batches[1], *batches], batch_size=None), verbose=False)
    torch.testing.assert_close(module.results.scores["rmse"], once)
    assert again.callback_metrics["val/rmse"].item() == pytest.approx(once.mean().item())


def test_a_checkpoint_says_where_the_backbone_is(tmp_path, nyu, weights):
    module = Depth(weights=weights)
    checkpoint = saved(fit(tmp_path, nyu, module), tmp_path / "a.ckpt")
    assert sorted(checkpoint["state_dict"]) == ["decoder.conv.bias", "decoder.conv.weight"]
    assert checkpoint[DECODER_OF]["weights"] == weights
    again = Depth(weights=str(tmp_path / "a.ckpt"))
    trainer(tmp_path).validate(again, datamodule=data(nyu), verbose=False)
    torch.testing.assert_close(again.errors, module.errors)


def test_depths_are_written_in_millimetres(tmp_path, nyu, weights):
    module = Depth(weights=weights)
    fit(tmp_path, nyu, module)
    module.eval()
    found = data(nyu)
    [batch] = list(found.predict_dataloader())[:1]
    with torch.no_grad():
        prediction = module.predict_step(batch, 0)
    module.write_predictions(prediction, found, tmp_path / "out")
    assert module.finish_predictions(found, tmp_path / "out").endswith("predictions")
    with Image.open(tmp_path / "out/predictions/room_0/rgb_00000.png") as image:
        values = np.asarray(image)
    np.testing.assert_allclose(values / 1000, prediction[1][0], atol=6e-4)
    assert values.shape == (32, 40)


def test_pictures(tmp_path, nyu, weights):
    module = Depth(weights=weights)
    fit(tmp_path, nyu, module)
    module.eval()
    found = data(nyu)
    samples = [found.val_dataloader().dataset[index] for index in range(2)]
    with torch.no_grad():
        figure = module.pictures(samples, found, 48)["validation"]
    assert {"input", "depth", "prediction"} <= {text.get_text() for text in figure.findobj(Text)}


def test_images_without_any_depth_are_a_mistake(tmp_path, nyu, weights):
    for path in nyu.glob("test/*/*.png"):
        Image.fromarray(np.zeros((32, 40), np.uint16)).save(path)
    with pytest.raises(InputError, match="no pixel of the images has a depth"):
        fit(tmp_path, nyu, Depth(weights=weights))


def test_options_out_of_range():
    with pytest.raises(InputError, match=r"model\.nearest \(10\) must be less than model\.farthest \(5\)"):
        Depth(weights="random", backbone="locatvit_tiny", nearest=10.0, farthest=5.0)
