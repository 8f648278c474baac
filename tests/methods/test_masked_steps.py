"""Eight optimizer steps of iBOT and of DINOv2 are those of a plain loop; DINOv2's step is the original's."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from locat_lightning.methods.ibot import Tokens
from tests.methods.runs import fit, random_batch, small, trainer

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(FOLDER / "dinov2_losses.safetensors")


@pytest.mark.parametrize("kind", ["sk_sep", "center_sep"])
def test_loss_and_gradients_of_a_step_are_those_of_dinov2(kind):
    centering = {"sk_sep": "sinkhorn_knopp", "center_sep": "centering"}[kind]
    options = {
        "out_dim": 20,
        "hidden_dim": 16,
        "bottleneck_dim": 8,
        "shared_head": False,
        "patch_out_dim": 14,
    }
    options |= {"teacher_temp": 0.06, "teacher_patch_temp": 0.06, "koleo_weight": 0.1, "centering": centering}
    task = small("Dinov2", backbone_args={"embed_dim": 12, "num_heads": 2, "depth": 1}, **options)
    for role in ("student", "teacher"):
        for ours, theirs in (("head", "dino_head"), ("patch_head", "ibot_head")):
            prefix = f"step.sep.{role}.{theirs}."
            names = (key for key in GOLDEN if key.startswith(prefix))
            state = {key.removeprefix(prefix).replace("mlp.", "layers."): GOLDEN[key] for key in names}
            getattr(getattr(task, role), ours).load_state_dict(state)
    task.trainer, task.steps, task._temperature_warmup = trainer(), 1, 0
    inputs = {
        name: GOLDEN[f"step.in.{name}"].clone().requires_grad_()
        for name in ("student_cls_global", "student_patch", "student_cls_local")
    }
    seen = Tokens(inputs["student_cls_global"], inputs["student_patch"])
    taught = Tokens(GOLDEN["step.in.teacher_cls"], GOLDEN["step.in.teacher_patch"])
    masks = GOLDEN["step.in.masks"].bool()
    with torch.no_grad():
        task.losses(taught, seen, [], masks, masks.flatten().nonzero().flatten())  # also without local views
    loss, scalars = task.losses(
        taught, seen, [inputs["student_cls_local"]], masks, masks.flatten().nonzero().flatten()
    )
    for weight, term in task.further_terms(None, seen).values():
        loss = loss + weight * term
    of_cls = GOLDEN[f"step.{kind}.dino_global_crops_loss"] + GOLDEN[f"step.{kind}.dino_local_crops_loss"]
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(scalars["cls_loss"], of_cls, **close)
    torch.testing.assert_close(loss, GOLDEN[f"step.{kind}.total"], **close)
    loss.backward()
    for name, tokens in inputs.items():
        expected = GOLDEN[f"step.{kind}.grad.{name}"]
        torch.testing.assert_close(tokens.grad, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
    for ours, theirs in (("head", "dino_head"), ("patch_head", "ibot_head")):
        for name, parameter in getattr(task.student, ours).named_parameters():
            key = f"step.{kind}.gradnorm.{theirs}.{name.replace('layers.', 'mlp.')}"
            torch.testing.assert_close(parameter.grad.norm(), GOLDEN[key], atol=1e-6, rtol=1e-5)


def plain_tokens(network, images, masks=None):
    """[CLS] and patches by the parts of timm's model, with the token written over masked patches."""
    backbone = network.backbone
    x = backbone.patch_embed(images).clone()
    if masks is not None:
        x.flatten(1, 2)[masks] = network.mask_token.token
    x = backbone.norm(backbone.blocks(backbone.norm_pre(backbone._pos_embed(x))))
    return backbone.forward_head(x, pre_logits=True), x[:, 1:]


def plain_head(head, x):
    x = F.normalize(head.layers(x), dim=-1)
    last = head.last_layer
    return x @ (last.weight_g * last.weight_v / last.weight_v.norm(dim=1, keepdim=True)).T


def plain_targets(logits, center, temperature, centering):
    if centering == "centering":
        return ((logits - center) / temperature).softmax(-1)
    p = (logits / temperature).exp()
    for _ in range(3):
        p = p / p.sum(0, keepdim=True)
        p = p / p.sum(1, keepdim=True)
    return p


def plain_koleo(x):
    x = F.normalize(x, dim=-1, eps=1e-8)
    total = 0.0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        nearest = max(others, key=lambda j: (x[i] @ x[j]).item())
        total = total - ((x[i] - x[nearest] + 1e-8).norm() + 1e-8).log()
    return total / len(x)


def plain_loss(task, batch, centers, temperature):
    """The loss of a batch, and the logits whose means move the centres."""
    hp, crops = task.hp, batch.views[0].crops
    views, images = crops.shape[:2]
    masks = batch.masks.flatten(0, 1).flatten(1)
    with torch.no_grad():
        taught, taught_patches = plain_tokens(task.teacher, crops.flatten(0, 1))
        taught, all_patches = (
            plain_head(task.teacher.head, taught),
            plain_head(task.teacher.heads[-1], taught_patches),
        )
    seen, patches = plain_tokens(task.student, crops.flatten(0, 1), masks)
    of_locals = task.student.backbone(batch.views[1].crops.flatten(0, 1))
    learnt = plain_head(task.student.head, torch.cat([seen, of_locals])).unflatten(0, (-1, images)) / 0.1
    targets = plain_targets(taught, centers[0], temperature, hp.centering).unflatten(0, (views, images))
    pairs = [(t, s) for t in range(views) for s in range(len(learnt)) if t != s]
    cls_loss = sum(-(targets[t] * learnt[s].log_softmax(-1)).sum(-1).mean() for t, s in pairs) / len(pairs)

    of_masked = plain_targets(all_patches[masks], centers[1], temperature, hp.centering)
    patch_loss, row = 0.0, 0
    for crop, mask in enumerate(masks):
        own = 0.0
        for place in mask.nonzero().flatten().tolist():
            logits = plain_head(task.student.heads[-1], patches[crop, place]) / 0.1
            own = own - (of_masked[row] * logits.log_softmax(-1)).sum()
            row += 1
        patch_loss = patch_loss + own / max(1, mask.sum().item())
    loss = cls_loss + patch_loss / len(masks)
    if hp.get("koleo_weight"):
        loss = loss + hp.koleo_weight * sum(plain_koleo(view) for view in seen.unflatten(0, (views, images)))
    of_patches = all_patches.flatten(0, 1) if hp.patch_center_of == "all" else all_patches[masks]
    return loss, (taught.mean(0), of_patches.mean(0))


@pytest.fixture
def float64(monkeypatch):
    """All arithmetic in float64: AdamW would make a whole step of a gradient that is only rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


IBOT = {"warmup_teacher_patch_temp": 0.07, "freeze_last_layer_epochs": 1}
DINOV2 = {"koleo_weight": 0.1, "warmup_teacher_temp_epochs": 2, "freeze_last_layer_epochs": 1}
DINOV2 |= {"shared_head": False, "patch_out_dim": 32, "layer_decay": 0.8}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Ibot", IBOT),
        ("Dinov2", DINOV2 | {"centering": "sinkhorn_knopp"}),
        ("Dinov2", DINOV2 | {"clip_grad": 0.5}),
    ],
)
def test_eight_steps_are_those_of_a_plain_loop(name, options, float64):
    batches = [random_batch(3, seed) for seed in range(4)]
    task = small(name, **options)
    record = fit(task, batches, max_epochs=2)

    other = small(name, **options)
    hp, depth = other.hp, len(other.student.backbone.blocks)

    def scale(key):
        """The factor of a parameter's learning rate."""
        if name == "Ibot":
            return 1.0
        if key.startswith("backbone.blocks."):
            return 0.8 ** (depth - int(key.split(".")[2]))
        if key.startswith("backbone.patch_embed."):
            return 0.2 * 0.8 ** (depth + 1)
        return 0.8 ** (depth + 1) if key.endswith(("token", "pos_embed")) else 1.0

    named = [(key, p) for key, p in other.student.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p]} for _, p in named], lr=1e-3)
    centers = [torch.zeros(64), torch.zeros(other.patch_targets.center.numel())]
    losses = []
    for step in range(8):
        temperature = 0.07 if name == "Ibot" else 0.04 + 0.03 * min(step, 7) / 7
        loss, means = plain_loss(other, batches[step % 4], centers, temperature)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if name == "Ibot":
            parts = [[p] for _, p in named]
        else:
            parts = [
                [p for key, p in named if key.startswith(prefixes)]
                for prefixes in (("backbone.", "mask_token"), ("head.",), ("patch_head.",))
            ]
        for part in parts:
            nn.utils.clip_grad_norm_([p for p in part if p.grad is not None], hp.clip_grad)
        rate = 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * step / 8))
        decay = hp.weight_decay_end + 0.5 * (0.04 - hp.weight_decay_end) * (1 + math.cos(math.pi * step / 8))
        for (key, p), group in zip(named, optimizer.param_groups, strict=True):
            frozen = step < 4 and "last_layer" in key
            group["lr"] = 0.0 if frozen and name == "Dinov2" else rate * scale(key)
            group["weight_decay"] = decay if p.ndim > 1 else 0.0
            if frozen and name == "Ibot":
                p.grad = None
        optimizer.step()
        keep = 1 - (1 - hp.momentum) * 0.5 * (1 + math.cos(math.pi * step / 8))
        for own, learnt in zip(other.teacher.parameters(), other.student.parameters(), strict=True):
            own.data.mul_(keep).add_(learnt.data, alpha=1 - keep)
        centers = [0.9 * center + 0.1 * mean for center, mean in zip(centers, means, strict=True)]

    close = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(torch.tensor(record.losses), torch.tensor(losses), **close)
    for key, value in task.teacher.state_dict().items():
        torch.testing.assert_close(value, other.teacher.state_dict()[key], **close, msg=key)
    if hp.centering == "centering":
        torch.testing.assert_close(task.cls_targets.center, centers[0], **close)
        torch.testing.assert_close(task.patch_targets.center, centers[1], **close)


def test_only_masked_patches_go_through_the_prototypes():
    """The largest tensor that the patch head makes has a row for each masked patch, and no more."""
    rows = []
    task, batch = small("Ibot", shared_head=False), random_batch(4)
    for network in (task.student, task.teacher):
        network.patch_head.last_layer.register_forward_hook(lambda layer, inputs, out: rows.append(len(out)))
    fit(task, [batch])
    masked = int(batch.masks.sum())
    assert 0 < masked < batch.masks.numel() / 2
    assert rows == [masked, masked, 1]  # the last is for the centre: the sum of what the prototypes see


def test_a_batch_without_masked_patches_trains():
    batch = random_batch(2)
    batch = batch._replace(masks=torch.zeros_like(batch.masks))
    for name in ("Ibot", "Dinov2"):
        for centering in ("centering", "sinkhorn_knopp"):
            record = fit(small(name, centering=centering), [batch] * 2)
            assert all(math.isfinite(loss) for loss in record.losses)
            assert record.metrics[-1]["train/patch_loss"] == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("Ibot", {"patch_targets": "refined"}), ("Dinov2", {"koleo_weight": 0.1, "gram_weight": 1.0})],
)
def test_mixed_precision_keeps_heads_and_losses_in_float32(name, options):
    batches = [random_batch(4, seed) for seed in range(2)]
    plain, mixed = (
        fit(small(name, **options), batches, precision=precision) for precision in ("32-true", "bf16-mixed")
    )
    assert mixed.losses == pytest.approx(plain.losses, rel=0.02)
    assert mixed.losses != plain.losses
