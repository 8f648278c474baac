"""What layers do: a plain reference, attention that is the model's own, known cases, nothing left behind."""

import math

import pytest
import timm
import torch
import torch.distributed as dist
from torch.nn import functional as F

from locat_lightning.backbones import registry  # noqa: F401 - names the models
from locat_lightning.errors import InputError
from locat_lightning.evaluation import layers
from locat_lightning.evaluation.layers import MEASURES, measure_layers, watched
from locat_lightning.nn import gaussian_kernel
from tests.evaluation.test_features import loader

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


def vit(name="locatvit_tiny", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | options)).eval()
    for part, weight in model.named_parameters():
        if "gaug" in part or "qkv" in part or "_proj" in part:
            torch.nn.init.normal_(weight)
    return model


def plainly(model, image, grid, patch):
    """Every figure of one image [1, 3, H, W], with loops over queries and keys."""
    found, P = {}, model.num_prefix_tokens

    def note(layer, tokens, attention):
        patches = tokens[0, P:]
        n = len(patches)
        if attention is not None:
            far, pixels, entropy, prefix = [], [], [], []
            for head in attention[0]:
                for i in range(n):
                    row, here = head[P + i], divmod(i, grid[1])
                    places = [divmod(j, grid[1]) for j in range(n)]
                    dy, dx = zip(*((abs(y - here[0]), abs(x - here[1])) for y, x in places), strict=True)
                    among = row[P:] / row[P:].sum()
                    far.append(sum(a * math.hypot(*d) for a, *d in zip(among, dy, dx, strict=True)))
                    pixels.append(
                        sum(
                            a * math.hypot(y * patch[0], x * patch[1])
                            for a, y, x in zip(among, dy, dx, strict=True)
                        )
                    )
                    entropy.append(-sum(a * a.log() for a in row if a > 0))
                    prefix.append(row[:P].sum())
            for name, each in zip(
                ("distance", "distance_px", "entropy", "prefix_share"),
                (far, pixels, entropy, prefix),
                strict=True,
            ):
                found[name, layer] = sum(each) / len(each)
            for head in range(len(attention[0])):
                found["distance", layer, f"head_{head:02}"] = sum(far[head * n : head * n + n]) / n
        pairs = [
            F.cosine_similarity(a, b, dim=0)
            for i, a in enumerate(patches)
            for j, b in enumerate(patches)
            if i != j
        ]
        found["patch_cosine", layer] = sum(pairs) / len(pairs)
        if model.cls_token is not None:
            found["patch_cls_cosine", layer] = F.cosine_similarity(patches, tokens[0, :1]).mean()
        if layer.startswith("block"):
            norms = patches.norm(dim=1)
            found["outlying_share", layer] = (norms > 3 * norms.median()).float().mean()

    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    for number, block in enumerate(model.blocks):
        attn, y = block.attn, block.norm1(x)
        q, k, _ = attn.qkv(y).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = q @ k.mT / math.sqrt(8)
        if hasattr(attn, "gaug"):
            s = attn.gaug(q, attn.grid.of(y.shape[1] - P), attn.grid.built_for)
            s = s if isinstance(s, torch.Tensor) else gaussian_kernel(s)
            logits = logits + F.pad(s, (P, 0, P, 0))
        x = block(x)
        note(f"block_{number:02}", x, logits.softmax(-1))
    if model.cls_token is not None:  # without it the mean of the patches is normed, not they
        x = model.norm(x)
        note("norm", x, None)
    if getattr(model, "attn_pool", None) is not None:
        heads = x.unflatten(-1, (3, 8)).transpose(1, 2)
        attention = (heads @ heads.mT / math.sqrt(8)).softmax(-1)
        note("prr", (attention @ heads).transpose(1, 2).flatten(2), attention)
    return found


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("locatvit_tiny", {}, (16, 16)),
        ("locatvit_tiny", {"reg_tokens": 2, "qk_norm": True, "dynamic_img_size": True}, (12, 20)),
        ("locatvit_tiny", {"gaug": {"rotated": True}}, (16, 16)),
        ("locatvit_tiny", {"gaug": {"mixture": 2}, "prr": False}, (16, 16)),
        (
            "locatvit_tiny",
            {"class_token": False, "reg_tokens": 1, "global_pool": "avg", "prr": False},
            (16, 16),
        ),
        ("vit_tiny_patch16_224", {"patch_size": (2, 4), "img_size": (8, 12)}, (8, 12)),
    ],
)
@torch.no_grad()
def test_every_figure_by_hand(name, options, size):
    model, images = vit(name, **options), torch.randn(2, 3, *size)
    patch = model.patch_embed.patch_size
    grid = size[0] // patch[0], size[1] // patch[1]
    with watched(model, images) as found:
        model(images)
    each = [plainly(model, image[None], grid, patch) for image in images]
    assert found.keys() == each[0].keys()
    for key, values in found.items():
        assert values.shape == (2,)
        expected = torch.stack([torch.as_tensor(of_image[key]) for of_image in each])
        torch.testing.assert_close(values, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("locatvit_tiny_rope_mixed", {}),
        ("vit_tiny_patch16_rope_mixed_224", {"num_reg_tokens": 1}),
        ("locatchannelvit_tiny", {"in_chans": 2}),
    ],
)
@torch.no_grad()
def test_it_is_the_attention_that_the_model_computes(name, options, monkeypatch):
    """Its product with the values, projected, is what the layer returns; also for rotary embeddings."""
    model = vit(name, **options)
    seen, calls = [], {}
    look = layers._figures

    def note(attention, *rest):
        seen.append(attention)
        return look(attention, *rest)

    monkeypatch.setattr(layers, "_figures", note)
    for number, block in enumerate(model.blocks):
        block.attn.register_forward_hook(
            lambda layer, inputs, out, number=number: calls.update({number: (layer, inputs[0], out)})
        )
    images = torch.randn(2, options.get("in_chans", 3), 16, 16)
    with watched(model, images) as found:
        model(images)
    assert {layer for _, layer, *_ in found} >= {"block_00", "block_01"}
    for number, (layer, x, out) in calls.items():
        v = layer.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)[2]
        attention = torch.cat(seen[2 * number : 2 * number + 2])
        torch.testing.assert_close(
            layer.proj((attention @ v).transpose(1, 2).flatten(2)), out, rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_known_cases():
    """Attention to all alike, and attention to one's own place alone."""
    between = torch.stack([layers._distances((2, 3), (1, 1)), layers._distances((2, 3), (4, 8))])
    everywhere = layers._figures(torch.full((1, 1, 7, 7), 1 / 7), 1, between)
    assert everywhere["entropy",].item() == pytest.approx(math.log(7))
    assert everywhere["prefix_share",].item() == pytest.approx(1 / 7)
    places = [(y, x) for y in range(2) for x in range(3)]
    mean = sum(math.dist(a, b) for a in places for b in places) / 36
    assert everywhere["distance",].item() == pytest.approx(mean)
    own = layers._figures(torch.eye(7)[None, None], 1, between)
    assert {name: value.item() for name, value in own.items()} == dict.fromkeys(everywhere, 0)
    # All attention to [CLS]: no patch is reached, and nothing is not a number.
    to_cls = layers._figures(F.one_hot(torch.zeros(1, 1, 7, dtype=torch.int64), 7).float(), 1, between)
    assert to_cls["prefix_share",].item() == 1
    assert to_cls["distance",].item() == 0
    # Of grids of two channels, the same place of the other channel is no step away.
    swapped = torch.eye(13)[:, [0, *range(7, 13), *range(1, 7)]]
    assert layers._figures(swapped[None, None], 1, between)["distance",].item() == 0


def small(images=4):
    return vit(img_size=2, patch_size=1, depth=1), loader(range(images), 3)


def test_means_over_images_and_what_is_left_behind():
    model, batches = small()
    model.train()
    model.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    found = measure_layers(model, batches, "cpu", progress=False)
    assert found.images == 4
    assert list(found.by_layer) == list(MEASURES)
    assert list(found.by_layer["distance"]) == ["block_00", "prr"]
    assert list(found.by_layer["patch_cls_cosine"]) == ["block_00", "norm", "prr"]
    assert found.heads.keys() == {"block_00", "prr"}
    for layer, heads in found.heads.items():
        assert sum(heads) / 3 == pytest.approx(found.by_layer["distance"][layer])
    each = [measure_layers(model, loader([i]), "cpu", progress=False).by_layer for i in range(4)]
    for measure, of_layer in found.by_layer.items():
        for layer, value in of_layer.items():
            assert value == pytest.approx(sum(one[measure][layer] for one in each) / 4, abs=1e-6)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.blocks.modules())
    half = measure_layers(model, batches, "cpu", autocast_dtype=torch.bfloat16, progress=False)
    assert half.by_layer["distance"]["block_00"] == pytest.approx(
        found.by_layer["distance"]["block_00"], rel=0.05
    )


def test_mistakes():
    for model in ("resnet10t", "swin_tiny_patch4_window7_224"):
        with pytest.raises(
            InputError, match="does not have blocks in which all patches attend to each other"
        ):
            measure_layers(timm.create_model(model), loader([0]), "cpu", progress=False)
    model, _ = small()
    with pytest.raises(InputError, match="no images to look at"):
        measure_layers(model, [], "cpu", progress=False)
    with pytest.raises(AssertionError), watched(model, images := torch.zeros(1, 3, 5, 5)):
        model(images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.blocks.modules())


def process(rank, out):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model, _ = small()
        found = measure_layers(model, loader([[3, 0, 1], [1, 2]][rank]), "cpu", progress=False)
        torch.save([dict(found.by_layer), found.images], f"{out}{rank}")
    finally:
        dist.destroy_process_group()


def test_an_image_of_two_processes_counts_once(two_processes, tmp_path):
    two_processes(process, tmp_path / "out")
    alone = measure_layers(*small(), "cpu", progress=False)
    for rank in range(2):
        by_layer, images = torch.load(tmp_path / f"out{rank}")
        assert images == 4
        for measure, of_layer in alone.by_layer.items():
            assert by_layer[measure] == pytest.approx(of_layer, abs=1e-6)
