"""SelfPatch: the original code's tensors, a plain loop of eight steps, and its published names."""

import argparse
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from locat_lightning.backbones.create import create_backbone, load_backbone
from locat_lightning.errors import InputError
from locat_lightning.methods import SelfPatch
from locat_lightning.methods.dino import Loss
from locat_lightning.methods.selfpatch import AggregationHead, SelfPatchNetwork, neighbours, patch_loss
from locat_lightning.methods.targets import Targets
from tests.methods.runs import BACKBONE, TINY, fit, random_batch, same, small

GOLDEN = Path(__file__).parents[1] / "golden" / "selfpatch.safetensors"
PAPERS = {"class_token": False, "global_pool": "avg", "final_norm": False}  # the paper's backbone


def ours(name):
    """Return our name of a weight of the original code's heads."""
    return (
        name.replace("c_head.", "head.")
        .replace("p_head.", "patch_head.")
        .replace("head.mlp.", "head.layers.")
    )


class Identity(nn.Module):
    """A backbone whose patch features are its images."""

    def forward_intermediates(self, images, **options):
        return images, [images]

    def forward_head(self, features, pre_logits):
        return features.mean((2, 3))


def as_map(features):
    """Features [4, P, D] of two views of two images as images [2, 2, D, H, W]."""
    side = round(features.shape[1] ** 0.5)
    return features.mT.unflatten(-1, (side, side)).unflatten(0, (2, 2))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def networks(golden):
    """Student and teacher with the golden weights, and patch features for a backbone."""
    heads = SelfPatch("vit_tiny_patch16_224", hidden_dim=16, bottleneck_dim=8, norm_last_layer=False)
    both = []
    for name in ("student", "teacher"):
        cls, patches = (heads.make_head(16, output_dim=out_dim) for out_dim in (24, 12))
        network = SelfPatchNetwork(Identity(), AggregationHead(16, 2, 4), cls, patches)
        prefix = f"w.{name}."
        weights = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
        network.load_state_dict({ours(k): v for k, v in weights.items()})
        both.append(network)
    return both


def test_the_golden_neighbours(golden, networks):
    for (side, size), name in {(14, 196): "global", (6, 36): "local"}.items():
        assert torch.equal(neighbours((side, side)).int(), golden[f"neigh_{size}"])
        chosen = networks[1].ca_head.choose(golden[f"teacher_feat_{name}"], (side, side))
        assert torch.equal(chosen.int(), golden[f"teacher_top_abs_{name}"])


def test_the_golden_loss_gradients_and_centres(golden, networks):
    student, teacher = networks
    views = {
        name: [
            golden[f"{name}_feat_{size}"].requires_grad_(name == "student") for size in ("global", "local")
        ]
        for name in ("student", "teacher")
    }
    with torch.no_grad():
        _, taught, taught_patches = teacher([as_map(each) for each in views["teacher"]], of_neighbours=True)
    _, learnt, learnt_patches = student([as_map(each) for each in views["student"]])
    for name, cls, patches in (("teacher", taught, taught_patches), ("student", learnt, learnt_patches)):
        for size, of_size in (("global", slice(2)), ("local", slice(2, 4))):
            close(cls[of_size].flatten(0, 1), golden[f"{name}_cls_logits_{size}"][:, 0], atol=1e-5)
            expected = golden[f"{name}_patch_logits_{size}"]
            close(torch.cat(patches[of_size])[: len(expected)], expected, atol=1e-5)

    of_cls, of_patches = Loss(24), Targets(12, "centering", 0.9)
    of_cls.center.copy_(golden["center0"])
    of_patches.center.copy_(golden["patch_center0"].flatten())
    cls_loss = of_cls(of_cls.teacher_probabilities(taught[:2], 0.05), learnt)
    of_cls.update_center(taught[2:])
    of_all, _ = patch_loss(of_patches, taught_patches, learnt_patches, 0.05, 0.1)
    loss = cls_loss + 0.1 * of_all
    for name, value in {"cls_loss": cls_loss, "patch_loss": of_all, "loss": loss}.items():
        torch.testing.assert_close(value, golden[name], atol=0, rtol=1e-6)
    of_cls.move_center()
    of_patches.move_center()
    close(of_cls.center, golden["center_after"])
    close(of_patches.center, golden["patch_center_after"].flatten())

    loss.backward()
    for features, size in zip(views["student"], ("global", "local"), strict=True):
        expected = golden[f"grad_student_feat_{size}"]
        close(features.grad, expected, atol=1e-5 * expected.abs().max())
    norms = {k.removeprefix("gradnorm."): v for k, v in golden.items() if k.startswith("gradnorm.")}
    for name, norm in norms.items():
        close(student.get_parameter(ours(name)).grad.norm(), norm, rtol=1e-5)
    student.zero_grad()


def close(value, expected, *, atol=1e-6, rtol=1e-6):
    torch.testing.assert_close(value, expected, atol=float(atol), rtol=rtol)


def around(place, side):
    """The eight places around one in a grid, whose edges meet, without repetition."""
    row, column = divmod(place, side)
    steps = product((-1, 0, 1), repeat=2)
    return sorted({(row + i) % side * side + (column + j) % side for i, j in steps} - {place})


@pytest.mark.parametrize("side", [2, 3, 4, 7])
def test_neighbours_in_any_grid(side):
    assert neighbours((side, side)).tolist() == [around(place, side) for place in range(side**2)]


def test_neighbours_where_the_grid_is_not_square():
    assert neighbours((1, 3)).tolist() == [[1, 2], [0, 2], [0, 1]]
    assert [len(row) for row in neighbours((3, 5)).tolist()] == [8] * 15
    with pytest.raises(InputError, match="more than one patch"):
        neighbours((1, 1))


def aggregate(w, tokens):
    """Class attention of a learned query to tokens [N, T, 24] with three heads: [N, 24]."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"ca_head.{name}.weight"], w[f"ca_head.{name}.bias"], 1e-6)

    def linear(name, x):
        return F.linear(x, w[f"ca_head.{name}.weight"], w[f"ca_head.{name}.bias"])

    cls = w["ca_head.cls_token"][0].expand(len(tokens), 1, 24)
    for block in ("cls_blocks.0", "cls_blocks.1"):
        x = norm(f"{block}.norm1", torch.cat([cls, tokens], 1))
        q, k, v = (linear(f"{block}.attn.{each}", x).unflatten(-1, (3, 8)) for each in "qkv")
        weights = (torch.einsum("nhd,nthd->nht", q[:, 0], k) / 8**0.5).softmax(-1)
        cls = cls + linear(
            f"{block}.attn.proj", torch.einsum("nht,nthd->nhd", weights, v).flatten(1)[:, None]
        )
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", cls)))
        cls = cls + linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", cls[:, 0])


def project(w, head, x):
    """DINO's projection head."""
    for layer in (0, 2, 4):
        x = F.linear(x, w[f"{head}.layers.{layer}.weight"], w[f"{head}.layers.{layer}.bias"])
        x = F.gelu(x) if layer < 4 else x / x.norm(dim=-1, keepdim=True)
    v = w[f"{head}.last_layer.weight_v"]
    return x @ (w[f"{head}.last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)).T


def logits(network, images, *, of_neighbours):
    """Logits of [CLS] and of patches of images [N, 3, H, W], a patch at a time."""
    w, backbone = dict(network.named_parameters()), network.backbone
    tokens = backbone.forward_features(images)
    patches = tokens[:, backbone.num_prefix_tokens :]
    side = round(patches.shape[1] ** 0.5)
    own = [backbone.forward_head(tokens, pre_logits=True)[:, None]] if backbone.num_prefix_tokens else []
    found = []
    for place in range(side**2):
        if of_neighbours:
            cosine = [
                F.cosine_similarity(patches[:, place], patches[:, other]) for other in around(place, side)
            ]
            best = torch.stack(cosine).argsort(0, descending=True)[:4].T
            places = torch.tensor(around(place, side))[best]
            found.append(aggregate(w, torch.stack([x[at] for x, at in zip(patches, places, strict=True)])))
        else:
            weight, bias = w["ca_head.norm.weight"], w["ca_head.norm.bias"]
            found.append(F.layer_norm(patches[:, place], (24,), weight, bias, 1e-6))
    cls = aggregate(w, torch.cat([*own, patches], 1))
    return project(w, "head", cls), project(w, "patch_head", torch.stack(found, 1))


def by_view(of_sizes):
    """Logits of [CLS] and of patches of each view of two images."""
    return [view for cls, patches in of_sizes for view in zip(cls.split(2), patches.split(2), strict=True)]


def cross_entropy(teacher, student):
    return -((teacher / 0.08).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize(
    "backbone_args", [{}, PAPERS | {"gaug": False, "prr": False}], ids=["LocAt", "paper"]
)
def test_eight_steps_are_those_of_a_plain_loop(backbone_args):
    options = {"backbone_args": backbone_args, "momentum": 0.9, "clip_grad": 0.1}
    options |= {"teacher_temp": 0.08, "warmup_teacher_temp": 0.08}
    batches = [random_batch(2, seed) for seed in range(4)]
    task = small("SelfPatch", **options)
    record = fit(task, batches, max_epochs=2)

    plain = small("SelfPatch", **options)
    student, teacher = plain.student.train(), plain.teacher.train()
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [[p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    centre, patch_centre = torch.zeros(64), torch.zeros(48)
    for step in range(8):
        sizes = [each.crops for each in batches[step % 4].views]
        with torch.no_grad():
            taught = by_view(logits(teacher, each.flatten(0, 1), of_neighbours=True) for each in sizes)
        learnt = by_view(logits(student, each.flatten(0, 1), of_neighbours=False) for each in sizes)
        pairs = [(i, j) for i, j in product(range(2), range(5)) if i != j]
        cls_loss = sum(cross_entropy(taught[i][0] - centre, learnt[j][0]) for i, j in pairs) / 8
        patch_losses = zip(taught, learnt, strict=True)
        patch_loss = sum(cross_entropy(t - patch_centre, s) for (_, t), (_, s) in patch_losses) / 5
        loss = cls_loss + 0.1 * patch_loss
        close(record.losses[step], loss.item(), atol=1e-5)
        close(record.metrics[step]["train/patch_loss"], patch_loss.item(), atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_((0.1 / (parameter.grad.norm() + 1e-6)).clamp(max=1))
            if "last_layer" in name and step < 4:
                parameter.grad = None
        for group, (lr, weight_decay) in zip(optimizer.param_groups, record.steps[step], strict=True):
            group.update(lr=lr, weight_decay=weight_decay)
        optimizer.step()
        share = task.momentum(step)
        with torch.no_grad():
            for own, of_student in zip(teacher.parameters(), student.parameters(), strict=True):
                own.mul_(share).add_(of_student, alpha=1 - share)
        centre = 0.9 * centre + 0.1 * torch.cat([cls for cls, _ in taught]).mean(0)
        rows = torch.cat([patches.flatten(0, 1) for _, patches in taught])
        patch_centre = 0.9 * patch_centre + 0.1 * rows.mean(0)
    close(task.loss.center[0, 0], centre, atol=1e-5)
    close(task.patch_targets.center, patch_centre, atol=1e-5)
    for name, value in plain.teacher.state_dict().items():
        close(task.teacher.state_dict()[name], value, atol=1e-3)


@pytest.mark.parametrize(
    "backbone_args",
    [
        {"class_token": False},
        {"class_token": False, "gaug": False, "prr": False, "global_pool": "avg"},
        {"reg_tokens": 2, "prr": False},
        {"locat": {"start": "identity"}, "class_token": False, "global_pool": "avg"},
    ],
)
def test_every_parameter_that_is_trained_has_a_gradient(backbone_args):
    """Without one, several processes would wait for each other."""

    class Watch(Callback):
        def on_after_backward(self, trainer, module):
            idle.extend(
                name for name, p in module.student.named_parameters() if p.requires_grad and p.grad is None
            )

    name = "vit_tiny_patch16_224" if "locat" in backbone_args else "locatvit_tiny"
    task, idle = (
        SelfPatch(name, **TINY["SelfPatch"], warmup_epochs=0, backbone_args=BACKBONE | backbone_args),
        [],
    )
    task.configure_model()
    fit(task, [random_batch(2)], Watch())
    assert not idle


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_published_checkpoints_are_read(tmp_path, network):
    """The student's names are those in `DistributedDataParallel`, the teacher's are not."""
    arguments = BACKBONE | PAPERS
    backbones = {
        name: create_backbone("vit_tiny_patch16_224", arguments, 0) for name in ("teacher", "student")
    }
    heads = {"ca_head.cls_token": torch.zeros(1, 1, 24), "c_head.last_layer.weight_g": torch.ones(64, 1)}
    states = {
        name: {f"backbone.{key}": value for key, value in backbone.state_dict().items()} | heads
        for name, backbone in backbones.items()
    }
    states["student"] = {f"module.{key}": value for key, value in states["student"].items()}
    args = argparse.Namespace(arch="vit_tiny", patch_size=8)
    centres = {"center": torch.zeros(1, 1, 64), "patch_center": torch.zeros(1, 48)}
    torch.save({**states, "epoch": 200, "args": args, "dino_loss": centres}, tmp_path / "checkpoint.pth")
    read = load_backbone(str(tmp_path / "checkpoint.pth"), "vit_tiny_patch16_224", arguments, network=network)
    assert same(read.state_dict(), backbones[network].state_dict())


def test_a_run_starts_from_published_weights_and_keeps_their_names(tmp_path):
    source = small("SelfPatch", seed=1, backbone_args=PAPERS | {"prr": False})
    torch.save({"teacher": source.teacher.state_dict()}, tmp_path / "checkpoint.pth")
    weights = str(tmp_path / "checkpoint.pth")
    task = small("SelfPatch", seed=2, backbone_args=PAPERS | {"prr": False}, weights=weights)
    assert same(task.student.backbone.state_dict(), source.teacher.backbone.state_dict())
    heads = {name.partition(".")[0] for name in task.student.state_dict()}
    assert heads == {"backbone", "ca_head", "head", "patch_head"}


def test_without_local_views():
    batch = random_batch(2)
    del batch.views[1:]
    [metrics] = fit(small("SelfPatch"), [batch]).metrics
    assert metrics["train/loss"] == pytest.approx(
        metrics["train/cls_loss"] + 0.1 * metrics["train/patch_loss"]
    )
    assert metrics["train/teacher_entropy"] + metrics["train/kl"] == pytest.approx(metrics["train/cls_loss"])


def test_mixed_precision_keeps_heads_and_loss_in_float32():
    plain, mixed = (
        fit(small("SelfPatch"), [random_batch(4)] * 2, precision=precision)
        for precision in ("32-true", "bf16-mixed")
    )
    assert mixed.losses == pytest.approx(plain.losses, rel=0.02)
    assert mixed.losses != plain.losses


def test_a_backbone_whose_cls_is_wider_than_its_patches_is_an_error():
    with pytest.raises(InputError, match=r"\[CLS\] of jumbo_tiny is 144 wide and its patches are 24"):
        SelfPatch("jumbo_tiny", **TINY["SelfPatch"], backbone_args=BACKBONE).configure_model()
