"""MAE against its definition written as loops, and against tensors of its authors' code where they are."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from torch.testing import assert_close

from locat_lightning.backbones.create import load_backbone
from locat_lightning.errors import InputError
from locat_lightning.methods import Mae
from locat_lightning.methods.mae import patch_loss
from locat_lightning.methods.pixels import image_noise
from tests.methods.runs import BACKBONE, fit, random_batch, same, small, trainer

# A folder with mae.safetensors, which is not ours to give away.
GOLDEN = Path(os.environ.get("LOCAT_GOLDEN", "")) / "mae.safetensors"
SWIN = {"backbone_args": {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}}
PLAIN = {"gaug": False, "prr": False}
# The published names of the decoder, by ours.
NAMES = {
    "backbone.": "",
    "decoder.mask_token": "mask_token",
    "decoder.pos_embed": "decoder_pos_embed",
    "decoder.blocks.": "decoder_blocks.",
    "decoder.norm.": "decoder_norm.",
}


def published(state):
    """A state dict of `Mae` under the names of the original code."""
    renamed = {}
    for name, value in state.items():
        own = next((own for own in NAMES if name.startswith(own)), "")
        renamed[NAMES.get(own, "") + name.removeprefix(own)] = value
    return renamed


def block(x, weights, name, heads):
    """A block of a Vision Transformer on the tokens of one image [N, D]."""

    def linear(x, part):
        return x @ weights[f"{name}.{part}.weight"].T + weights[f"{name}.{part}.bias"]

    def norm(x, part):
        weight, bias = (weights[f"{name}.{part}.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)

    d = x.shape[1] // heads
    q, k, v = linear(norm(x, "norm1"), "attn.qkv").split(x.shape[1], dim=1)
    parts = [slice(h * d, (h + 1) * d) for h in range(heads)]
    attended = [(q[:, p] @ k[:, p].T / d**0.5).softmax(-1) @ v[:, p] for p in parts]
    x = x + linear(torch.cat(attended, 1), "attn.proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


def mae_by_loops(weights, images, noise, *, ratio, normalise, heads, decoder_heads):
    """Loss, and predicted patches [B, L, 3 p²], by the published names of the weights; image after image."""
    p = weights["patch_embed.proj.weight"].shape[-1]
    side = images.shape[-1] // p
    depth, decoder_depth = (
        len({name.split(".")[1] for name in weights if name.startswith(prefix)})
        for prefix in ("blocks.", "decoder_blocks.")
    )
    errors, predictions = [], []
    for image, of_image in zip(images, noise, strict=True):
        corners = [(i * p, j * p) for i in range(side) for j in range(side)]
        crops = [image[:, i : i + p, j : j + p] for i, j in corners]
        order = sorted(range(side**2), key=of_image.tolist().__getitem__)
        visible = order[: int(side**2 * (1 - ratio))]
        tokens = [weights["cls_token"][0, 0] + weights["pos_embed"][0, 0]]
        for patch in visible:
            embedded = (weights["patch_embed.proj.weight"] * crops[patch]).sum((1, 2, 3))
            tokens.append(embedded + weights["patch_embed.proj.bias"] + weights["pos_embed"][0, 1 + patch])
        x = torch.stack(tokens)
        for number in range(depth):
            x = block(x, weights, f"blocks.{number}", heads)
        x = F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-6)
        x = x @ weights["decoder_embed.weight"].T + weights["decoder_embed.bias"]
        shown = [
            x[1 + visible.index(patch)] if patch in visible else weights["mask_token"][0, 0]
            for patch in range(side**2)
        ]
        x = torch.stack([x[0], *shown]) + weights["decoder_pos_embed"][0]
        for number in range(decoder_depth):
            x = block(x, weights, f"decoder_blocks.{number}", decoder_heads)
        x = F.layer_norm(x, x.shape[-1:], weights["decoder_norm.weight"], weights["decoder_norm.bias"], 1e-6)
        predicted = (x @ weights["decoder_pred.weight"].T + weights["decoder_pred.bias"])[1:]
        predictions.append(predicted)
        for patch in set(range(side**2)) - set(visible):
            target = crops[patch].movedim(0, -1).flatten()  # row, column, channel
            if normalise:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            errors.append((predicted[patch] - target).square().mean())
    return torch.stack(errors).mean(), torch.stack(predictions)


@pytest.mark.parametrize(("normalise", "ratio"), [(True, 0.75), (False, 0.4)])
def test_loss_and_gradients_are_the_definitions(normalise, ratio):
    task = small("Mae", backbone_args=PLAIN, normalise_pixels=normalise, mask_ratio=ratio)
    batch = random_batch(1)
    found = task.compute_loss(batch).loss
    images, noise = task.images_and_noise(batch)
    weights = {
        name: value.detach().double().requires_grad_() for name, value in published(task.state_dict()).items()
    }
    options = {"ratio": ratio, "normalise": normalise, "heads": 3, "decoder_heads": 2}
    expected, _ = mae_by_loops(weights, images.double(), noise, **options)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    expected.backward()
    for name, parameter in published(dict(task.named_parameters())).items():
        if parameter.requires_grad:
            gradient = weights[name].grad.float()
            assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-8)


def test_eight_steps_are_those_of_a_plain_loop():
    options = {"lr": 1e-2, "min_lr": 0.0, "clip_grad": None, "betas": (0.9, 0.95), "weight_decay": 0.05}
    task = small("Mae", backbone_args=PLAIN, weight_decay_end=0.05, **options)
    weights = {name: value.detach().clone() for name, value in published(task.state_dict()).items()}
    batches = [random_batch(2, seed) for seed in range(8)]
    record = fit(task, batches)

    trained = [value.requires_grad_() for name, value in weights.items() if "pos_embed" not in name]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, batch in enumerate(batches):
        noise = torch.cat([image_noise(batch.indices, 16, 0, 0, view) for view in range(2)])
        images = batch.views[0].crops.flatten(0, 1)
        loss, _ = mae_by_loops(weights, images, noise, ratio=0.75, normalise=True, heads=3, decoder_heads=2)
        for group in optimizer.param_groups:
            group["lr"] = record.steps[step][0][0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert record.losses[step] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in published(task.state_dict()).items():
        if not name.endswith("qkv.bias"):  # whose gradient is 0 for keys: AdamW makes a step of rounding
            assert_close(value, weights[name].detach(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("run", ["pix", "normpix"])
def test_the_authors_tensors(run):
    if not GOLDEN.is_file():
        pytest.skip("needs LOCAT_GOLDEN, a folder with mae.safetensors")
    with safe_open(GOLDEN, "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
        size = json.loads(file.metadata()["meta"])["cfg"]
    normalise = run == "normpix"
    arguments = {"img_size": size["img"], "patch_size": size["patch"], "embed_dim": size["dim"]}
    arguments |= {"depth": size["depth"], "num_heads": size["heads"]}
    decoder = {"decoder_dim": size["dec_dim"], "decoder_depth": size["dec_depth"]}
    task = Mae(
        "vit_tiny_patch16_224",
        backbone_args=arguments,
        normalise_pixels=normalise,
        decoder_heads=size["dec_heads"],
        **decoder,
    )
    task.configure_model()
    initial = published(task.state_dict())
    given = {name.removeprefix("sd."): value for name, value in golden.items() if name.startswith("sd.")}
    for positions in ("pos_embed", "decoder_pos_embed"):
        assert_close(initial[positions], given[positions])
    own = dict(zip(published(task.state_dict()), task.state_dict(), strict=True))
    task.load_state_dict({own[name]: value for name, value in given.items()})
    task.double()
    images = golden["imgs"].double().requires_grad_()
    predicted, hidden, tokens = task.predict(images, golden["noise"].double())
    target = task.target(images)[0].double()
    loss = patch_loss(predicted, target, hidden)
    assert torch.equal(hidden, golden[f"{run}.mask"].bool())
    assert_close(predicted, golden[f"{run}.pred"].double(), rtol=1e-6, atol=1e-6)
    assert_close(tokens, golden[f"{run}.latent"].double(), rtol=1e-6, atol=1e-6)
    assert loss.item() == pytest.approx(golden[f"{run}.loss"].item(), rel=1e-6)
    loss.backward()
    assert_close(images.grad, golden[f"{run}.grad_imgs"].double(), rtol=1e-5, atol=1e-9)
    for name, parameter in published(dict(task.named_parameters())).items():
        if parameter.requires_grad:
            norm = golden[f"{run}.gradnorm.{name}"].item()
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-9), name
    by_loops, _ = mae_by_loops(
        {name: value.double() for name, value in given.items()},
        images.detach(),
        golden["noise"],
        ratio=0.75,
        normalise=normalise,
        heads=size["heads"],
        decoder_heads=size["dec_heads"],
    )
    assert by_loops.item() == pytest.approx(golden[f"{run}.loss"].item(), rel=1e-6)


def test_the_backbone_sees_the_visible_patches_alone():
    task = small("Mae")
    seen = []
    for each in task.backbone.blocks:
        each.register_forward_hook(lambda block, inputs, output: seen.append(output.shape))
    task.compute_loss(random_batch(3))
    assert seen == [(6, 1 + 4, 24)] * 2
    assert task.backbone(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    assert seen[2:] == [(2, 1 + 16, 24)] * 2


@pytest.mark.parametrize("heads", [True, False], ids=["with decoder", "backbone alone"])
def test_published_weights_are_read(tmp_path, heads):
    """The names of the original code; its checkpoints hold the backbone alone, or the decoder, too."""
    task = small("Mae", seed=1, backbone_args=PLAIN)
    state = published(task.state_dict())
    if not heads:
        state = {name: value for name, value in state.items() if not name.startswith(("decoder", "mask"))}
    torch.save({"model": state}, tmp_path / "mae.pth")
    loaded = load_backbone(str(tmp_path / "mae.pth"), "vit_tiny_patch16_224", BACKBONE)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, task.backbone.state_dict()[name]), name
    options = {"backbone_args": PLAIN, "weights": str(tmp_path / "mae.pth"), "heads": True}
    if not heads:
        with pytest.raises(InputError, match=r"no heads that fit: decoder_embed\.weight is missing"):
            small("Mae", **options)
        return
    again = small("Mae", **options)
    assert same(again.state_dict(), task.state_dict())
    torch.save({"state_dict": task.state_dict()}, tmp_path / "mae.pth")  # our names
    assert same(small("Mae", **options).state_dict(), task.state_dict())
    alone = small("Mae", **options | {"heads": False})
    assert torch.equal(alone.backbone.cls_token, task.backbone.cls_token)
    assert not torch.equal(alone.decoder.mask_token, task.decoder.mask_token)
    with pytest.raises(InputError, match="heads: --weights says where the heads are"):
        Mae(heads=True).check(trainer(max_epochs=20), training=True)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, r"model\.backbone: SwinTransformer is no Vision Transformer"),
        ("vit_tiny_patch16_224", {"decoder_dim": 18}, r"decoder_dim \(18\) has to be a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_an_error(backbone, options, message):
    with pytest.raises(InputError, match=message):
        Mae(backbone, **options).configure_model()


@pytest.mark.parametrize("backbone", ["vit_small_patch16_rope_224", "jumbo_tiny"])
def test_other_vision_transformers(backbone):
    options = {"locat": {"prr": False}, "decoder_dim": 16, "warmup_epochs": 0}
    task = Mae(backbone, backbone_args=BACKBONE | {"num_heads": 2}, **options)
    losses = fit(task, [random_batch(2)] * 2, max_epochs=1).losses
    assert losses[1] != losses[0] > 0
