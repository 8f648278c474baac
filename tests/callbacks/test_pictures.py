"""When pictures are drawn, of which samples and for which loggers; and training as without them."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.data import DataLoader

from locat_lightning.callbacks.pictures import Pictures, spaced_items
from locat_lightning.data.classification import ImageData
from locat_lightning.data.dataset import Failure
from locat_lightning.errors import InputError
from locat_lightning.tasks.average import WeightAverage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]


class Classifier(LightningModule):
    """A user's own module, which has no pictures."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.LazyLinear(10), torch.nn.Dropout(0.5)
        )

    def training_step(self, batch, _):
        return F.cross_entropy(self.backbone(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.backbone(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Drawer(Classifier):
    """Draws everything, with random numbers, and notes what it was asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def _figures(self, method, what):
        assert not torch.is_grad_enabled()
        assert not any(part.training for part in self.modules())
        torch.rand(3), np.random.rand(3)  # noqa: NPY002
        self.asked.append((method, what))
        return {method: Figure(figsize=(1, 1))}

    def pictures(self, samples, data, side):
        return self._figures("validation", ([label for _, label, *_ in samples], data, side))

    def result_pictures(self, data):
        return self._figures("results", data)

    def input_pictures(self, batch, side):
        return self._figures("inputs", (batch, side))


class WithoutValidation(Drawer):
    validation_step = LightningModule.validation_step


def trainer(folder, *callbacks, logger=None, **options):
    plain = {"max_epochs": 2, "limit_train_batches": 1, "limit_val_batches": 2, "accelerator": "cpu"}
    return Trainer(
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version="") if logger is None else logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(plain | options),
    )


def digits():
    return ImageData(dataset="digits", img_size=8, batch_size=8, num_workers=0)


def steps_in(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {name: [each.step for each in events.Images(name)] for name in events.Tags()["images"]}


def names(module):
    return [name for name, _ in module.asked]


def test_a_run_is_drawn_and_trains_as_without(tmp_path):
    weights, data = [], digits()
    for name, callbacks in (("with", [Pictures(images=4, side=48)]), ("without", [])):
        module = Drawer()
        torch.manual_seed(1)
        trainer(tmp_path / name, *callbacks).fit(module, data)
        weights.append(list(module.parameters()))
        if callbacks:
            assert names(module) == ["inputs", "validation", "results", "validation", "results"]
            images = data.val_dataloader().dataset
            labels = [images[place][1] for place in (0, 120, 239, 359)]
            assert module.asked[1][1] == module.asked[3][1] == (labels, data, 48)
            assert module.asked[2][1] is data
            batch, side = module.asked[0][1]
            assert (len(batch.images), side) == (8, 48)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert steps_in(tmp_path / "with") == {
        "pictures/inputs": [0],
        "pictures/validation": [0, 1],
        "pictures/results": [0, 1],
    }
    assert steps_in(tmp_path / "without") == {}


def test_every_second_epoch_and_a_validation_by_itself(tmp_path):
    module, callback = Drawer(), Pictures(images=2, every_n_epochs=2)
    trainer(tmp_path / "fit", callback, max_epochs=3).fit(module, digits())
    assert steps_in(tmp_path / "fit")["pictures/validation"] == [1]
    trainer(tmp_path / "validate", callback).validate(module, digits(), verbose=False)
    assert steps_in(tmp_path / "validate") == {"pictures/validation": [0], "pictures/results": [0]}


class Judge(Drawer):
    """The digits of odd label are hard, the larger the harder; notes the weight of each picture."""

    def __init__(self):
        super().__init__()
        self.backbone[1] = torch.nn.Linear(192, 10)
        self.weights, self.trained = [], []

    def validation_step(self, batch, _):
        return batch.labels

    def hardness(self, outputs, batch):
        return torch.where(outputs % 2 == 1, outputs.float(), 0) + batch.indices / 1000

    def on_validation_end(self):
        self.trained.append(self.backbone[1].bias.detach().clone())

    def pictures(self, samples, data, side):
        self.weights.append(self.backbone[1].bias.detach().clone())
        return super().pictures(samples, data, side)


class Easy(Judge):
    def hardness(self, outputs, batch):
        return torch.where(batch.indices == 3, 1.0, torch.tensor([0.0]))


def test_the_hardest_images_of_each_validation_are_drawn_hardest_first(tmp_path):
    module, data = Judge(), digits()
    trainer(tmp_path, Pictures(images=3), limit_val_batches=4).fit(module, data)
    images = data.val_dataloader().dataset
    labels = [images[index][1] for index in range(32)]
    hardest = sorted(range(32), key=lambda i: -(labels[i] % 2 * labels[i] + i / 1000))[:3]
    drawn = [what[0] for name, what in module.asked if name == "validation"]
    assert drawn[1] == drawn[3] == [labels[i] for i in hardest]
    assert drawn[0] == drawn[2] != drawn[1]
    steps = steps_in(tmp_path)
    assert steps["pictures/hard"] == steps["pictures/validation"] == [0, 1]


def test_batches_that_do_not_say_which_images_they_hold_have_no_hard_ones(tmp_path, monkeypatch):
    class Plain(Judge):
        def validation_step(self, batch, _):
            return batch[1]

    module, data = Plain(), digits()
    monkeypatch.setattr(data, "on_after_batch_transfer", lambda batch, _: list(batch))
    trainer(tmp_path, Pictures(images=3)).validate(module, data, verbose=False)
    assert [name for name, _ in module.asked if name == "validation"] == ["validation"]


def test_only_hard_images_are_drawn(tmp_path):
    module = Easy()
    trainer(tmp_path, Pictures(images=3)).validate(module, digits(), verbose=False)
    assert [len(what[0]) for name, what in module.asked if name == "validation"] == [3, 1]


def test_the_hardest_are_drawn_by_averaged_weights_too(tmp_path):
    """Which are gone when the validation has ended."""
    module = Judge()
    trainer(tmp_path, Pictures(images=2), WeightAverage(0.5), limit_train_batches=5).fit(module, digits())
    assert len(module.weights) == 4
    *_, trained = module.trained  # the first are of the sanity check
    watched, hard = module.weights[2:]
    assert torch.equal(watched, hard)
    assert not torch.equal(hard, trained)


@pytest.mark.parametrize("split", ["val", "train"])
def test_without_validation_at_the_end_of_the_epoch(tmp_path, monkeypatch, split):
    module, data = WithoutValidation(), digits()
    loader = data.eval_dataloader

    def has_one_split(name):
        if name != split:
            raise InputError("there is no such split")
        return loader(name)

    monkeypatch.setattr(data, "eval_dataloader", has_one_split)
    trainer(tmp_path, Pictures(images=2), limit_val_batches=0).fit(module, data)
    assert names(module) == ["inputs", "validation", "validation"]
    images = loader(split).dataset
    assert module.asked[1][1][0] == [images[0][1], images[len(images) - 1][1]]
    assert steps_in(tmp_path)["pictures/validation"] == [0, 1]


def test_a_resumed_run_does_not_draw_its_inputs_again(tmp_path):
    module = Drawer()
    first = trainer(tmp_path, Pictures())
    first.fit(module, digits())
    first.save_checkpoint(tmp_path / "last.ckpt")
    module.asked.clear()
    trainer(tmp_path, Pictures(), max_epochs=3).fit(module, digits(), ckpt_path=tmp_path / "last.ckpt")
    assert names(module) == ["validation", "results"]


def test_a_failure_is_one_line_and_the_end_of_the_pictures(tmp_path, monkeypatch):
    module = Drawer()
    monkeypatch.setattr(module, "pictures", lambda *_: {}["kernels"])
    with pytest.warns(UserWarning, match="no more pictures in this run: KeyError: 'kernels'"):
        trainer(tmp_path, Pictures()).fit(module, digits())
    assert names(module) == ["inputs"]


def test_a_users_own_module_goes_without(tmp_path, caplog):
    trainer(tmp_path, Pictures()).fit(Classifier(), digits())
    assert "no pictures: Classifier has no method pictures(samples, data, side)" in caplog.text
    assert steps_in(tmp_path) == {}


class OwnData(LightningDataModule):
    """Knows nothing but Lightning."""

    def train_dataloader(self):
        return DataLoader([(torch.rand(3, 8, 8), 1)] * 4)

    val_dataloader = train_dataloader


def test_a_users_own_data_are_drawn_where_they_have_validation_samples(tmp_path):
    module = Drawer()
    trainer(tmp_path / "module", Pictures(images=3)).fit(module, OwnData())
    loaders = Drawer()
    trainer(tmp_path / "loaders", Pictures(images=3)).fit(loaders, *[OwnData().train_dataloader()] * 2)
    for each in (module, loaders):
        assert each.asked[1][1][0] == [1, 1, 1]
    without = WithoutValidation()
    trainer(tmp_path / "without", Pictures()).fit(without, OwnData())
    assert names(without) == ["inputs"]


def test_an_item_that_cannot_be_read_is_left_out():
    items = [0, Failure("1.png", "it is truncated"), 2, 3]
    assert spaced_items(DataLoader(items), 9) == [0, 2, 3]
    assert spaced_items(DataLoader(items), 2) == [0, 3]


class LoggerOfImages(CSVLogger):
    """Takes images as Lightning's logger of Weights & Biases does."""

    def log_image(self, key, images, step=None):
        self.images = [*getattr(self, "images", []), (key, step, *images)]


def test_every_logger_that_takes_images_has_them(tmp_path, monkeypatch):
    logged = []
    mlflow = MLFlowLogger.__new__(MLFlowLogger)
    client = type("Client", (), {"log_figure": lambda _, *arguments: logged.append(arguments)})()
    for name, value in {"experiment": client, "run_id": "abc", "log_metrics": lambda *_, **__: None}.items():
        monkeypatch.setattr(MLFlowLogger, name, value)
    monkeypatch.setattr(MLFlowLogger, "log_dir", str(tmp_path), raising=False)
    wandb = LoggerOfImages(tmp_path, "w")
    callback = Pictures(images=1)
    fit = trainer(tmp_path, callback, logger=[CSVLogger(tmp_path, "c"), wandb])
    fit.fit(Drawer(), digits())
    assert [(name, step) for name, step, _ in wandb.images[:2]] == [
        ("pictures/inputs", 0),
        ("pictures/validation", 0),
    ]
    assert all(isinstance(image, Figure) for *_, image in wandb.images)
    callback._loggers = [mlflow]
    callback._log(fit, "result_pictures", None)
    [(run, figure, file)] = logged
    assert (run, file) == ("abc", "pictures/results/00000001.png")
    assert isinstance(figure, Figure)


@pytest.mark.parametrize("options", [{"logger": False}, {"every_n_epochs": 0}])
def test_nothing_is_drawn_for_nobody(tmp_path, options):
    module = Drawer()
    callback = Pictures(every_n_epochs=options.pop("every_n_epochs", 1))
    trainer(tmp_path, callback, **options).fit(module, digits())
    assert module.asked == []


@pytest.mark.parametrize(("name", "least"), [("images", 1), ("every_n_epochs", 0), ("side", 1)])
def test_arguments_out_of_range(name, least):
    with pytest.raises(InputError, match=rf"pictures.{name} \({least - 1}\) must be at least {least}"):
        Pictures(**{name: least - 1})


@pytest.mark.parametrize("options", [{"images": 100_000}, {"side": 100_000}, {"images": 20, "side": 500}])
def test_pictures_that_would_take_minutes_are_refused(options):
    with pytest.raises(InputError, match=r"images · side² must be at most 4,000,000"):
        Pictures(**options)
    Pictures(images=16, side=500)
