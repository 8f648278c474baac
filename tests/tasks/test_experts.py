"""Experts' weight averaging, against plain loops over tokens and weights."""

import copy

import pytest
import timm
import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.nn import functional as F

from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.weights import load_weights
from locat_lightning.errors import InputError
from locat_lightning.nn.experts import Experts
from locat_lightning.tasks.experts import add_experts, share
from tests.tasks.test_classification import BACKBONE, Batches, Taken, fit, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
PLAIN = {"mixup": 0, "cutmix": 0, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}
LOCAT, SHARE = "locatvit_tiny", 0.4


class Seen(Taken):
    """Notes the weights before the first step, and the seed of each."""

    def on_train_start(self):
        super().on_train_start()
        self.start, self.seeds = copy.deepcopy(self.backbone.state_dict()), []

    def training_step(self, batch, batch_idx):
        self.seeds.append(torch.initial_seed())
        return super().training_step(batch, batch_idx)


class OneByOne(nn.Module):
    """Sends each token through its expert, one after the other."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        tokens, found = x.flatten(0, -2), {}
        parts = torch.randperm(len(tokens)).tensor_split(len(self.experts))
        for expert, part in zip(self.experts, parts, strict=True):
            found |= {int(place): expert(tokens[place]) for place in part}
        return torch.stack([found[place] for place in range(len(tokens))]).view(x.shape)


def test_steps_are_those_of_plain_loops(tmp_path):
    data = Batches(batches=4)
    module = task(Seen, experts=3, expert_share=SHARE, **PLAIN)
    fit(tmp_path, module, data)

    model = timm.create_model(LOCAT, num_classes=6, **BACKBONE)
    model.blocks[1].mlp = OneByOne(nn.ModuleList(copy.deepcopy(model.blocks[1].mlp) for _ in range(3)))
    model.load_state_dict(module.start)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)
    for step, (images, labels, _) in enumerate(data.items * 2):
        torch.manual_seed(module.seeds[step])
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels, label_smoothing=0.1).backward()
        optimizer.param_groups[0]["lr"] = module.rates[step]
        optimizer.step()
        rate = SHARE * (step + 1) / 8
        experts = [dict(each.named_parameters()) for each in model.blocks[1].mlp.experts]
        before = [{name: each.detach().clone() for name, each in expert.items()} for expert in experts]
        for one, expert in enumerate(experts):
            for name, weight in expert.items():
                others = [before[other][name] for other in range(3) if other != one]
                weight.data = (1 - rate) * before[one][name] + rate * sum(others) / 2
    torch.testing.assert_close(module.backbone.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-6)
    first, second = (each.fc1.weight for each in list(module.backbone.blocks[1].mlp.experts)[:2])
    assert not torch.equal(first, second)


def test_all_experts_are_alike_after_a_full_share():
    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = Experts(nn.Linear(3, 3), 4)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    mean = sum(each.weight for each in model.mlp.experts).detach() / 4
    share(model, 3 / 4)
    for each in model.mlp.experts:
        torch.testing.assert_close(each.weight.data, mean)


def test_a_checkpoint_is_read_as_a_model_without_experts(tmp_path):
    module = task(Seen, experts=2, **PLAIN)
    run = fit(tmp_path, module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    images = Batches().items[0].images
    expected = module.eval()(images)
    model = load_backbone(str(tmp_path / "a.ckpt"), LOCAT, BACKBONE, classifier=True)
    assert not any(isinstance(each, Experts) for each in model.modules())
    torch.testing.assert_close(model.eval()(images), expected)

    of_experts = task(Seen, experts=2, weights=str(tmp_path / "a.ckpt"), **PLAIN)
    fit(tmp_path, of_experts, max_steps=1)
    mean = model.state_dict()["blocks.1.mlp.fc1.weight"]
    for number in (0, 1):
        assert torch.equal(of_experts.start[f"blocks.1.mlp.experts.{number}.fc1.weight"], mean)


def test_experts_of_different_shapes_are_one_line(tmp_path):
    weights = {f"blocks.1.mlp.experts.{n}.fc1.weight": torch.zeros(n + 1) for n in (0, 1)}
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a.pt: its experts have no mean: stack expects"):
        load_weights(timm.create_model(LOCAT, **BACKBONE), str(tmp_path / "a.pt"))


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 4

    options = {"experts": 3} | PLAIN
    whole = task(Seen, **options)
    fit(tmp_path, whole)
    part = task(Seen, **options)
    run = trainer(tmp_path, callbacks=[Stop()])
    run.fit(part, datamodule=Batches())
    run.save_checkpoint(tmp_path / "a.ckpt")
    rest = task(Seen, **options)
    trainer(tmp_path).fit(rest, datamodule=Batches(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(rest.backbone.state_dict()[name], value), name


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_they_go_with_sharpness_average_and_checkpointing(tmp_path):
    def trained(**options):
        module = task(Seen, experts=2, lr=0.01, **{"sam": 0.05, "ema": 0.5} | options)
        fit(tmp_path, module)
        return module.backbone.state_dict()

    plain = trained()
    torch.testing.assert_close(trained(checkpoint_blocks=True), plain, rtol=1e-5, atol=1e-6)
    name = "blocks.1.mlp.experts.0.fc1.weight"
    for without in ({"sam": None}, {"ema": None}):
        assert not torch.allclose(trained(**without)[name], plain[name], atol=1e-6)


def test_an_mlp_of_a_position_bias_is_none():
    model = timm.create_model("vit_relpos_small_patch16_224", img_size=32, embed_dim=24, depth=4, num_heads=2)
    add_experts(model, 2)
    assert [isinstance(block.mlp, Experts) for block in model.blocks] == [False, True] * 2
    assert sum(isinstance(each, Experts) for each in model.modules()) == 2


def test_every_second_feed_forward_network_of_any_model():
    arguments = {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 12,
        "depths": (2, 2, 2, 2),
        "num_heads": (1,) * 4,
    }
    model = timm.create_model("swin_tiny_patch4_window7_224", **arguments)
    add_experts(model, 2)
    for stage in model.layers:
        assert [isinstance(block.mlp, Experts) for block in stage.blocks] == [False, True]
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"experts": 1, "backbone_args": BACKBONE},
            "model.experts: one has no others to learn from: set 2 or more, or null",
        ),
        (
            {"experts": 2, "backbone": "resnet10t"},
            "model.experts: ResNet has no two blocks with a feed-forward",
        ),
        (
            {"experts": 2, "backbone": "convnext_atto"},
            "model.experts: ConvNeXt has no two blocks with a feed-",
        ),
    ],
)
def test_mistakes(tmp_path, options, expected):
    seed_everything(0)
    module = Seen(**({"backbone": LOCAT, "warmup_epochs": 0} | options))
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, module)
    if options["experts"] == 1:  # found by a command before anything is read
        with pytest.raises(InputError, match=expected):
            module.check(trainer(tmp_path), training=True)
