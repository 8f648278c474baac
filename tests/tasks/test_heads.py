"""The heads of a segmentation, and several trained at once, each against one that is trained alone."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.nn.decoder import LinearDecoder
from locat_lightning.tasks.heads import BEST, HeadGrid
from tests.tasks.test_segmentation import Batches, fit, saved, state, task, trainer, weights_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),
]
RATES = [1e-3, 0.05, 1e-5]
HEADS = {
    "linear, two layers": {"head": "linear", "layers": 2},
    "pyramid": {"head": "pyramid"},
    "pyramid, whole": {"head": "pyramid", "train_backbone": True},
}


@pytest.fixture
def weights(tmp_path):
    return weights_in(tmp_path)


@pytest.mark.parametrize("options", HEADS.values(), ids=list(HEADS))
def test_a_head_learns_and_is_measured_again(tmp_path, weights, options):
    module = task(weights, lr=0.03, **options)
    checkpoint = saved(fit(tmp_path, module, max_epochs=10, check_val_every_n_epoch=10), tmp_path / "a.ckpt")
    assert module.iou.miou > 0.5  # 0.2 to begin with
    assert {key: checkpoint["hyper_parameters"][key] for key in options} == options
    again = task(str(tmp_path / "a.ckpt"), **options)
    trainer(tmp_path).validate(again, datamodule=Batches(), verbose=False)
    assert torch.equal(again.iou.confusion, module.iou.confusion)


def test_the_linear_head_is_that_of_normed_features(tmp_path, weights):
    module = task(weights, head="linear", layers=2)
    fit(tmp_path, module)
    module.eval()
    images = torch.randn(2, 3, 18, 13)
    with torch.no_grad():
        tokens = module.backbone.forward_intermediates(
            F.pad(images, (0, 3, 0, 2)), norm=True, intermediates_only=True
        )
        plain = F.interpolate(module.decoder(torch.cat(tokens, 1)), (20, 16), mode="bilinear")
        torch.testing.assert_close(module(images), plain[..., :18, :13])


def test_the_linear_head_drops_whole_features_in_training_alone(tmp_path, weights):
    """DINOv3's: features of an image are 0 before BatchNorm, and the rate falls to 0 along a cosine."""
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = task(weights, head="linear", dropout=0.5, decay="cosine", warmup=0.25, lr=0.04)
    fit(tmp_path, module, callbacks=[Rates()], max_epochs=4)
    warmup = round(len(rates) / 4)
    falling = range(len(rates) - warmup)
    plain = [0.02 * (1 + math.cos(math.pi * step / len(falling))) for step in falling]
    rising = [0.04 * step / max(1, warmup - 1) for step in range(warmup)]
    assert rates == pytest.approx(rising + plain)
    features = torch.rand(2, module.decoder[0].num_features, 3, 3) + 1
    module.eval()
    assert torch.equal(module.decoder(features), module.decoder[1](module.decoder[0](features)))
    module.decoder.train()
    seen = []
    module.decoder[0].register_forward_pre_hook(lambda norm, given: seen.append(given[0].flatten(2)))
    module.decoder(features)
    dropped = seen[0] == 0
    assert torch.equal(dropped.all(2), dropped.any(2))
    assert 0 < dropped.float().mean() < 1
    assert set(module.decoder.state_dict()) == set(LinearDecoder(4, 2).state_dict())


def test_a_trained_backbone_learns_its_norm_where_the_head_reads_it(tmp_path, weights):
    module = task(weights, head="linear", train_backbone=True)
    fit(tmp_path, module, max_epochs=1)
    assert all(parameter.requires_grad for parameter in module.backbone.parameters())
    given = torch.load(weights, weights_only=True)["state_dict"]
    assert not torch.equal(module.backbone.norm.bias, given["backbone.norm.bias"])


def test_a_checkpoint_from_before_there_were_heads(tmp_path, weights):
    module = task(weights)
    checkpoint = saved(fit(tmp_path, module), tmp_path / "a.ckpt")
    for option in ("head", "layers", "lrs", "scales", "flip"):
        del checkpoint["hyper_parameters"][option]
    assert [name for name in checkpoint["state_dict"] if name.startswith("decoder.")] == [
        f"decoder.{number}.{kind}" for number in (0, 1, 3) for kind in ("weight", "bias")
    ]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    again = task(str(tmp_path / "old.ckpt"))
    trainer(tmp_path).validate(again, datamodule=Batches(), verbose=False)
    assert torch.equal(again.iou.confusion, module.iou.confusion)


def test_another_head_is_refused(tmp_path, weights):
    saved(fit(tmp_path, task(weights, head="linear"), max_epochs=1), tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"or is another head \(.*\); train a decoder with locat fit"):
        trainer(tmp_path).validate(task(str(tmp_path / "a.ckpt")), datamodule=Batches())


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_every_head_of_a_grid_is_the_one_trained_alone(tmp_path, weights, head):
    grid = task(weights, head=head, lrs=RATES)
    run = fit(tmp_path, grid)
    alone = []
    for number, rate in enumerate(RATES):
        alone.append(task(weights, head=head, lr=rate))
        fit(tmp_path, alone[-1])
        for name, value in alone[-1].decoder.state_dict().items():
            torch.testing.assert_close(grid.decoder.heads[number].state_dict()[name], value)
        logged = float(run.callback_metrics[f"val/miou_lr_{rate:g}"])
        assert logged == pytest.approx(float(alone[-1].iou.miou), abs=0.01)
    by_rate = [float(each.iou.miou) for each in alone]
    assert grid.best == by_rate.index(max(by_rate)) == 1
    assert float(run.callback_metrics["val/miou"]) == float(run.callback_metrics["val/miou_lr_0.05"])
    assert grid.summary().endswith("best of 3 learning rates")
    assert torch.equal(grid.iou.confusion, alone[1].iou.confusion)


def test_a_checkpoint_of_a_grid_is_measured_and_predicts_by_its_best_head(tmp_path, weights):
    module = task(weights, head="linear", lrs=RATES)
    run = fit(tmp_path, module)
    assert saved(run, tmp_path / "a.ckpt")[BEST] == 1
    again = task(str(tmp_path / "a.ckpt"), head="linear", lrs=RATES)
    trainer(tmp_path).test(again, datamodule=Batches(), verbose=False)
    assert not isinstance(again.decoder, HeadGrid)
    assert torch.equal(again.iou.confusion, module.iou.confusion)
    best = state(module.decoder.heads[1])
    assert all(torch.equal(value, best[name]) for name, value in again.decoder.state_dict().items())
    [(_, maps), *_] = trainer(tmp_path).predict(again, datamodule=Batches())
    [(_, same), *_] = run.predict(module, datamodule=Batches())
    assert torch.equal(maps, same)


def test_a_test_does_not_choose_the_rate(tmp_path, weights):
    module = task(weights, lrs=RATES)
    run = fit(tmp_path, module)
    module.best = 2
    [metrics] = run.test(module, datamodule=Batches(), verbose=False)
    assert module.best == 2
    assert metrics["test/miou"] == metrics["test/miou_lr_1e-05"] < metrics["test/miou_lr_0.05"]


def test_a_grid_goes_on_as_if_uninterrupted(tmp_path, weights):
    whole = task(weights, lrs=RATES)
    fit(tmp_path, whole, max_epochs=3)
    begun, run = task(weights, lrs=RATES), trainer(tmp_path, max_epochs=3)
    begun.on_train_epoch_end = lambda: setattr(run, "should_stop", run.current_epoch == 1)
    run.fit(begun, datamodule=Batches())
    resumed = task(None, lrs=RATES)
    resumed.resume(saved(run, tmp_path / "cut.ckpt"))
    fit(tmp_path, resumed, max_epochs=3, ckpt_path=tmp_path / "cut.ckpt")
    for name, value in state(whole).items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    wrong = torch.load(tmp_path / "cut.ckpt", weights_only=True) | {BEST: 3}
    torch.save(wrong, tmp_path / "cut.ckpt")
    with pytest.raises(InputError, match="says that head 3 of 3 is best"):
        fit(tmp_path, resumed, max_epochs=3, ckpt_path=tmp_path / "cut.ckpt")


def test_a_grid_begins_with_the_head_in_the_weights(tmp_path, weights):
    saved(fit(tmp_path, task(weights)), tmp_path / "a.ckpt")
    module = task(str(tmp_path / "a.ckpt"), lrs=[0.0, 0.0])
    fit(tmp_path, module, max_epochs=1)
    given = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    for head in module.decoder.heads:
        assert torch.equal(head[0].weight, given["decoder.0.weight"])


def test_scales_and_the_mirror_image_in_evaluation(tmp_path, weights):
    module = task(weights, layers=[0], scales=[0.5, 1.0], flip=True, protocol="slide", window=8, stride=5)
    fit(tmp_path, module, max_epochs=1)
    expected = (
        "windows of 8 px every 5 px, image resized to fit 18 × 18, scales 0.5, 1, with its mirror image"
    )
    assert module.summary() == f"{expected}, layers [0]"
    images = torch.randn(1, 3, 18, 18)
    with torch.no_grad():
        found = module(images)
        module.hp.scales, module.hp.flip = None, False
        parts = []
        for given in (F.interpolate(images, (9, 9), mode="bilinear", antialias=True), images):
            parts += [module(given), module(given.flip(-1)).flip(-1)]
    parts = [F.interpolate(part, (18, 18), mode="bilinear").softmax(1) for part in parts]
    torch.testing.assert_close(found, torch.stack(parts).mean(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "pyramid", "layers": [0, 1]}, "pyramid takes 1 or 4 layers: model.layers gives 2"),
        ({"layers": 3}, "layers is 3, but VisionTransformer has 1 to 2"),
        ({"lrs": []}, r"model.lrs \(\[\]\) needs one rate or more"),
        ({"lrs": [0.1], "train_backbone": True}, "a backbone that stays frozen"),
    ],
)
def test_mistakes(tmp_path, weights, options, message):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, task(weights, **options))


def test_the_heads_of_a_grid_are_not_clipped_together(tmp_path, weights):
    with pytest.raises(InputError, match="gradient_clip_val clips by the norm of all heads"):
        task(weights, lrs=RATES).check(trainer(tmp_path, gradient_clip_val=1.0), training=True)


def test_a_pyramid_needs_more_than_one_image(tmp_path, weights):
    with pytest.raises(InputError, match=r"needs batches of several images: set data\.batch_size to 2"):
        fit(tmp_path, task(weights, head="pyramid"), Batches(size=1))
