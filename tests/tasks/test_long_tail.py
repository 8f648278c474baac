"""Losses for classes of unequal size, against plain sums, and the prior that they assume."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.tasks.long_tail import effective_number_weights
from tests.tasks.test_classification import Batches, Taken, built, fit, task, trainer

COUNTS = [50, 20, 5, 4, 2, 1]
PLAIN = {"mixup": 0, "cutmix": 0}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


class Tail(Batches):
    """Batches of a data set whose classes have these training images."""

    sampling = "plain"

    def __init__(self, counts=COUNTS, shares=None, **options):
        super().__init__(**options)
        self.class_counts = None if counts is None else np.array(counts)
        self.class_shares = None if shares is None else np.array(shares)


def agreed(data=None, steps=100, step=100, **options):
    """A classifier that knows the classes' sizes, at a step of its run."""
    module = task(num_classes=6, **options)
    module._trainer = SimpleNamespace(datamodule=data or Tail(), global_step=step, checkpoint_callbacks=[])
    module.steps = steps
    module.__class__ = type("At", (type(module),), {"step": property(lambda self: step)})
    module.agree_on_class_counts({}, training=True)
    return module


def by_hand(logits, targets, prior=None, tau=1.0, weights=None, smoothing=0.0):
    """The loss in loops: targets are shares of the classes, smoothed as those of equal classes would be."""
    total, classes = 0.0, logits.shape[1]
    own = [1.0] * classes if prior is None else [p**tau for p in prior]
    weights = weights or [1.0] * classes
    for row, shares in zip(logits.tolist(), targets.tolist(), strict=True):
        row = [z + math.log(p) for z, p in zip(row, own, strict=True)]
        log_sum = math.log(sum(math.exp(z) for z in row))
        for label, share in enumerate(shares):
            spread = [smoothing / classes * p / own[label] for p in own]
            spread[label] += 1 - smoothing
            total += weights[label] * share * sum(t * (log_sum - z) for t, z in zip(spread, row, strict=True))
    return total / len(logits)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 6, generator=generator), torch.randint(6, (8,), generator=generator)


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("soft", [False, True])
def test_logits_are_adjusted_by_the_logarithm_of_the_prior(batch, tau, soft):
    logits, labels = batch
    prior = [n / sum(COUNTS) for n in COUNTS]
    shares = 0.7 * F.one_hot(labels, 6) + 0.3 * F.one_hot(labels.flip(0), 6)
    found = agreed(logit_adjustment=tau).cross_entropy(logits, shares if soft else labels, 0.1)
    targets = shares if soft else F.one_hot(labels, 6).float()
    assert float(found) == pytest.approx(by_hand(logits, targets, prior, tau, smoothing=0.1), rel=1e-5)


def test_a_class_without_images_has_the_smallest_prior_there_is():
    module = agreed(Tail([10, 5, 0, 4, 2, 1]), logit_adjustment=1.0)
    assert module._adjustment[2] == module._adjustment[5]
    module = agreed(Tail([10, 5, 0, 4, 2, 1], [0.3, 0.3, 0, 0.2, 0.15, 0.05]), logit_adjustment=1.0)
    torch.testing.assert_close(module._adjustment.exp(), torch.tensor([0.3, 0.3, 0.05, 0.2, 0.15, 0.05]))


def minimiser(module, joint, smoothing):
    """The softmax of the logits [X, 6] where the loss is least, if inputs and labels occur this often."""
    logits = torch.zeros(joint.shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = len(joint) * module.cross_entropy(logits, joint, smoothing)  # a sum weighted by frequency
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("options", [{"logit_adjustment": 1.0}, {"reweighting": 1.0}])
def test_the_minimiser_is_that_of_balanced_classes(options, smoothing):
    """Of inputs that may be of any class, and of those of one class alone."""
    densities = torch.rand(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    prior = torch.tensor([5000, 1796, 645, 232, 83, 50]).double()  # as in a long-tailed CIFAR
    prior /= prior.sum()
    module = agreed(Tail((prior * 7806).round().long().tolist()), **options)
    for given in (densities / densities.sum(0), torch.eye(6, dtype=torch.float64)):
        balanced = given / given.sum(1, keepdim=True)
        expected = (1 - smoothing) * balanced + smoothing / 6
        found = minimiser(module, given * prior, smoothing)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1.0])
def test_weights_follow_the_effective_number(beta):
    prior = torch.tensor(COUNTS).double() / sum(COUNTS)
    found = effective_number_weights(torch.tensor(COUNTS), beta, prior)
    effective = [sum(beta**k for k in range(n)) for n in COUNTS]  # the series itself
    mean = sum(p / e for p, e in zip(prior.tolist(), effective, strict=True))
    assert found.tolist() == pytest.approx([1 / e / mean for e in effective], rel=1e-6)
    assert float((prior * found).sum()) == pytest.approx(1)


@pytest.mark.parametrize("soft", [False, True])
def test_weights_count_from_their_share_of_the_run_on(batch, soft):
    logits, labels = batch
    shares = 0.7 * F.one_hot(labels, 6) + 0.3 * F.one_hot(labels.flip(0), 6)
    targets = shares if soft else F.one_hot(labels, 6).float()
    options = {"reweighting": 0.9, "reweight_from": 0.8}
    for step in (0, 79, 80, 99):
        module = agreed(step=step, **options)
        weights = module._class_weights.tolist() if step >= 80 else None
        found = module.cross_entropy(logits, shares if soft else labels, 0.1)
        assert float(found) == pytest.approx(
            by_hand(logits, targets, weights=weights, smoothing=0.1), rel=1e-5
        )
    module = agreed(step=99, **options)
    found = module.cross_entropy(logits, targets, reweighted=False)
    assert float(found) == pytest.approx(by_hand(logits, targets), rel=1e-5)


def test_without_options_the_loss_is_the_plain_one(batch):
    logits, labels = batch
    module = built(**PLAIN)
    images = torch.randn(6, 3, 16, 16)
    found, seen, _ = module._compare(images, torch.arange(6), None)
    assert torch.equal(found, F.cross_entropy(seen, torch.arange(6), label_smoothing=0.1))
    assert torch.equal(
        module.cross_entropy(logits, labels, 0.1), F.cross_entropy(logits, labels, label_smoothing=0.1)
    )


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (Tail(None), {"logit_adjustment": 1.0}, "logit_adjustment: the data do not tell how many"),
        (Tail(None), {"reweighting": 0.9}, "reweighting: the data do not tell how many"),
        (Tail(shares=[1 / 6] * 6), {"logit_adjustment": 1.0}, "logit_adjustment with data.sampling"),
        (Tail(shares=[0.3, *[0.14] * 5]), {"reweighting": 0.9}, "reweighting with data.sampling"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, data, options, expected):
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, task(**options), data)


@pytest.mark.parametrize(
    ("counts", "figure", "expected"),
    [
        ([30, 29, 28, 27, 26, 25], "balanced", "with 25 to 30 images: take val/top1$"),
        (None, "balanced", "with unknown numbers of images: take val/top1$"),
        (
            [200, 90, 80, 70, 60, 50],
            "few",
            "50 to 200 images: take val/top1 or val/balanced or val/many or val/m",
        ),
    ],
)
def test_a_figure_that_is_not_measured_is_not_waited_for(tmp_path, counts, figure, expected):
    waiting = ModelCheckpoint(tmp_path, monitor=f"val/{figure}")
    options = {"enable_checkpointing": True, "callbacks": [waiting], "max_epochs": 1}
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, task(), Tail(counts, batches=1), **options)
    waiting.monitor = "val/top1"
    fit(tmp_path, task(), Tail(counts, batches=1), **options)
    assert waiting.best_model_score is not None


class Steps(Taken):
    """Notes the loss of each batch, and what it would be without class weights."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def test_a_run_trains_with_the_adjusted_loss_and_with_weights_when_it_is_time(tmp_path):
    runs = []
    for options in ({}, {"logit_adjustment": 1.0}, {"reweighting": 1.0, "reweight_from": 0.5}):
        runs.append(task(Steps, **PLAIN, **options))
        fit(tmp_path, runs[-1], Tail(batches=2), max_epochs=2, limit_val_batches=0)
    plain, adjusted, weighted = runs
    assert plain.losses[0] != pytest.approx(adjusted.losses[0])
    assert plain.losses[:2] == weighted.losses[:2]
    assert plain.losses[2] != pytest.approx(weighted.losses[2])
    assert not any(name.startswith(("_adj", "_class")) for name in adjusted.state_dict())


def test_groups_are_logged_and_recorded_where_classes_differ_in_size(tmp_path):
    data = Tail([200, 60, 30, 25, 10, 3], batches=1)  # whose images have positions of their own
    run = fit(tmp_path, module := task(), data)
    logged = {name for name in run.callback_metrics if name.startswith("val/")}
    assert logged == {f"val/{each}" for each in ("loss", "top1", "top5", "balanced", "many", "medium", "few")}
    labels = torch.cat([batch.labels for batch in data.items])
    module.eval()
    with torch.no_grad():
        hits = torch.cat([module(batch.images).argmax(1) for batch in data.items]) == labels
    for name, classes in {"many": [0], "medium": [1, 2, 3], "few": [4, 5]}.items():
        expected = np.mean([float(hits[labels == each].float().mean()) for each in classes])
        assert float(run.callback_metrics[f"val/{name}"]) == pytest.approx(expected)
    run.save_checkpoint(tmp_path / "c.ckpt")
    assert torch.load(tmp_path / "c.ckpt", weights_only=True)["class_counts"] == [200, 60, 30, 25, 10, 3]
    for damaged in ([1, 2, 3, 4, 5, -6], [1, 2, 3, 4, 5, 2**70], {"a": 1}, ["1"] * 6):
        contents = torch.load(tmp_path / "c.ckpt", weights_only=True) | {"class_counts": damaged}
        torch.save(contents, tmp_path / "d.ckpt")
        with pytest.raises(InputError, match=r"d\.ckpt: class_counts is not a list of numbers of images"):
            trainer(tmp_path).validate(task(weights=str(tmp_path / "d.ckpt")), datamodule=data, verbose=False)
    measuring = task(weights=str(tmp_path / "c.ckpt"))
    other = trainer(tmp_path).validate(measuring, datamodule=Batches(batches=1), verbose=False)
    assert other[0]["val/few"] == pytest.approx(float(run.callback_metrics["val/few"]))
    assert measuring.results.shots.tolist() == torch.tensor([200, 60, 30, 25, 10, 3])[labels].tolist()


@pytest.mark.parametrize("counts", [None, [30] * 6])
def test_groups_are_not_told_apart_otherwise(tmp_path, counts):
    run = fit(tmp_path, module := task(), Tail(counts, batches=1))
    assert {name for name in run.callback_metrics if name.startswith("val/")} == {
        *("val/loss", "val/top1", "val/top5")
    }
    assert module.results.shots is None
