"""A segmentation from its checkpoint alone, against the task that wrote it."""

import pytest
import torch

from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import autocast
from locat_lightning.tasks.segmenter import holds_segmentation, load_segmenter
from tests.tasks.test_segmentation import fit, saved, task, weights_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),
]
HEADS = {
    "mlp": {},
    "linear, two layers": {"head": "linear", "layers": 2},
    "pyramid, with its backbone": {"head": "pyramid", "train_backbone": True},
    "the best of two": {"lrs": [1e-6, 0.03]},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=list(HEADS))
def test_logits_are_those_of_the_task(tmp_path, options):
    module = task(weights_in(tmp_path), **options)
    saved(fit(tmp_path, module, max_epochs=1), tmp_path / "a.ckpt")
    images = torch.randn(2, 3, 18, 13)
    model = load_segmenter(str(tmp_path / "a.ckpt"), any_size=True).eval()
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), module(images), rtol=0, atol=0)
        plain = model(images)
        with autocast(images.device, torch.bfloat16):
            half = model(images)
        assert half.dtype == torch.float32
        assert not torch.equal(half, plain)
        torch.testing.assert_close(half, plain, rtol=0.1, atol=0.1)
    assert model.num_classes == 3


def test_what_is_no_segmentation_is_refused(tmp_path):
    weights = weights_in(tmp_path)
    run = fit(tmp_path, task(weights), max_epochs=1)
    good, bad = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    kept = saved(run, good)
    assert holds_segmentation(kept)
    assert not holds_segmentation(None)
    for file in (weights, str(tmp_path / "nothing.ckpt"), "random"):
        with pytest.raises(InputError, match="is not the checkpoint of a segmentation"):
            load_segmenter(file)
    for option, value, said in (
        ("head", "os.system", "does not describe its decoder: there is no head 'os.system'"),
        ("num_classes", 10**9, "1000000000 classes: give 1 to 255"),
        ("num_classes", 4, "its decoder has other features or classes"),
        ("hidden_dim", 10**12, "its decoder has other features or classes"),  # for which there is no memory
        ("hidden_dim", "wide", "does not describe its decoder"),
        ("layers", [[0]], "does not describe its decoder"),
        ("layers", 9, "layers is 9"),
    ):
        torch.save(kept | {"hyper_parameters": kept["hyper_parameters"] | {option: value}}, bad)
        with pytest.raises(InputError, match=said):
            load_segmenter(str(bad))
    other = torch.load(weights, weights_only=True)
    other["state_dict"]["backbone.cls_token"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"is not the backbone that the decoder in .* was trained on"):
        load_segmenter(str(good), moved=str(tmp_path / "other.pt"))
    (tmp_path / "backbone.pt").rename(tmp_path / "elsewhere.pt")
    with pytest.raises(InputError, match="which are not on this machine"):
        load_segmenter(str(good))
    assert load_segmenter(str(good), moved=str(tmp_path / "elsewhere.pt")).num_classes == 3
