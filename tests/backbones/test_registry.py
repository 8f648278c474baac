"""The registered models: timm's abilities, their sizes, and what training asks of them."""

import copy
import io

import pytest
import timm
import torch
from timm.layers import Attention, AttentionPoolPrr
from timm.models import vision_transformer
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locat_lightning.backbones import registry
from locat_lightning.nn import GaussianAttention, PatchRefinement, PatchSelection

NAMES = ["locatvit_tiny", "locatvit_small", "locatvit_base"]


def build(name="locatvit_tiny", **kwargs):
    """A small model for 32 px whose weights, GAug's too, are large enough to matter."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
    torch.manual_seed(0)
    model = timm.create_model(name, **(small | kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def small(name):
    """Arguments that make a registered model small, of two blocks or stages."""
    if "swin" in name:
        return {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2)}
    return {"embed_dim": 48, "depth": 2, "num_heads": 4}


def images(height=32, width=32, batch=2, channels=3):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, channels, height, width, generator=generator)


def gradients(model, *outputs):
    """Of all parameters, by name; the model's own are cleared."""
    model.zero_grad()
    sum(out.square().sum() for out in outputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(ours, expected, tolerance=1e-5):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        worst, largest = (ours[name] - tensor).abs().max(), tensor.abs().max()
        assert worst <= tolerance * largest, f"{name}: {worst:.1e} beside {largest:.1e}"


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# Sizes and names


@pytest.mark.parametrize(
    ("name", "timms", "count"),
    [
        ("locatvit_tiny", "vit_tiny_patch16_224", 5_719_756),
        ("locatvit_small", "vit_small_patch16_224", None),
        ("locatvit_base", "vit_base_patch16_224", 86_569_996),
    ],
)
def test_parameter_counts(name, timms, count):
    ours, theirs = timm.create_model(name, device="meta"), timm.create_model(timms, device="meta")
    assert parameters(ours) == parameters(theirs) + 12 * 3 * (64 + 1)  # 2,340
    assert count in (None, parameters(ours))
    added = ours.state_dict().keys() - theirs.state_dict().keys()
    assert added == {
        f"blocks.{i}.attn.gaug.{linear}.{tensor}"
        for i in range(12)
        for linear in ("log_var", "log_alpha")
        for tensor in ("weight", "bias")
    }
    assert theirs.state_dict().keys() <= ours.state_dict().keys()


def test_without_gaug_and_prr_it_is_timms_model():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    ours = timm.create_model("locatvit_tiny", img_size=32, depth=2, num_classes=10, gaug=False, prr=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(images()), theirs(images()))
    assert type(ours.blocks[0].attn) is Attention


def test_gaug_and_prr_are_switched_one_by_one():
    outputs = []
    for gaug in (True, False):
        for prr in (True, False):
            model = build(gaug=gaug, prr=prr)
            assert isinstance(model.blocks[0].attn, GaussianAttention) == gaug
            assert isinstance(model.attn_pool, PatchRefinement) == prr
            model.load_state_dict(build(gaug=True).state_dict(), strict=False)
            outputs.append(model(images()))
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-3


def test_without_gaug_it_is_timms_prr_model():
    ours, theirs = build(gaug=False), build("vit_tiny_patch16_224", global_pool="prr")
    assert type(theirs.attn_pool) is AttentionPoolPrr
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_close(ours(images()), theirs(images()))


def test_the_models_are_listed_with_their_preprocessing():
    sizes = ("tiny", "small", "base")
    families = ("locatvit_{}", "locatvit_{}_rope_mixed", "locatswin_{}", "jumbo_{}", "locatjumbo_{}")
    families += ("channelvit_{}", "locatchannelvit_{}", "locatvit_{}_distilled")
    published = {family.format(size) for family in (*families, "nopos_vit_{}_patch16_224") for size in sizes}
    assert set(registry.MODELS) == published | {"vit_tiny_patch16_rope_mixed_224"}
    assert set(timm.list_models()) >= published
    for name in registry.MODELS:
        config = timm.get_pretrained_cfg(name)
        assert config.input_size == (3, 224, 224)
        assert config.first_conv == "patch_embed.proj"
        two = ("head", "head_dist") if "distilled" in name else "head"
        assert config.classifier == ("head.fc" if "swin" in name else two)


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("locatvit_small_rope_mixed", "vit_small_patch16_rope_mixed_224"),
        ("locatvit_base_rope_mixed", "vit_base_patch16_rope_mixed_224"),
        ("locatswin_tiny", "swin_tiny_patch4_window7_224"),
        ("locatswin_small", "swin_small_patch4_window7_224"),
        ("locatswin_base", "swin_base_patch4_window7_224"),
        ("nopos_vit_base_patch16_224", "vit_base_patch16_224"),
    ],
)
def test_without_locat_a_model_is_its_counterpart_of_timm(name, timms):
    ours = timm.create_model(name, gaug=False, prr=False, device="meta")
    theirs = timm.create_model(timms, device="meta").state_dict()
    theirs.pop("pos_embed" if "nopos" in name else "", None)
    assert {key: t.shape for key, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.items()}
    located = timm.create_model(name, gaug=True, device="meta")
    added = located.state_dict().keys() - theirs.keys()
    assert added
    assert all(".gaug." in key for key in added)


def test_located_is_a_model_with_locat_and_its_preprocessing():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model(
        "located", backbone="vit_tiny_patch16_224", backbone_args=sizes, locat={"prr": False}, num_classes=3
    )
    assert model(images()).shape == (2, 3)
    assert isinstance(model.blocks[0].attn, GaussianAttention)
    assert model.pretrained_cfg["mean"] == timm.get_pretrained_cfg("vit_tiny_patch16_224").mean
    with pytest.raises(TypeError, match="backbone"):
        timm.create_model("located")


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_model_gives_a_pyramid_of_features(name):
    model = timm.create_model(name, img_size=64, features_only=True, out_indices=(0, 1), **small(name))
    model.eval()
    maps = model(images(64, 64))
    assert [each.shape[0] for each in maps] == [2, 2]
    assert [each.shape[3 if "swin" in name else 1] for each in maps] == model.feature_info.channels()
    assert all(each.isfinite().all() for each in maps)


# Training


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=10, **small(name))
    if "jumbo" in name:  # whose head begins with weights of 0
        torch.nn.init.normal_(model.head.weight)
    # Without PRR, Jumbo's classifier reads no patches, which the last block changes by these.
    unread = ("blocks.1.norm2", "blocks.1.mlp", "blocks.1.ls2") if name.startswith("jumbo") else ()
    for key, gradient in gradients(model, model(images(64, 64))).items():
        if key.startswith(unread):
            assert not gradient.any(), key
            continue
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_works_after_inference_mode(dynamic):
    """Lightning's sanity check comes first: nothing made there may be left for training."""
    model, fresh = build(dynamic_img_size=dynamic), build(dynamic_img_size=dynamic)
    with torch.inference_mode():
        model(images())
        if dynamic:
            model(images(24, 40))
    sizes = [(32, 32), (24, 40)] if dynamic else [(32, 32)]
    ours = gradients(model, *(model(images(*size)) for size in sizes))
    assert_same(ours, gradients(fresh, *(fresh(images(*size)) for size in sizes)))


def test_checkpointing_with_two_sizes_under_way():
    """DINO's crops: the blocks of the first size are recomputed after the second size went through."""
    model = build(dynamic_img_size=True).train()
    sizes = [(32, 32), (24, 16), (16, 40)]
    expected = gradients(model, *(model(images(*size)) for size in sizes))
    model.set_grad_checkpointing()
    assert_same(gradients(model, *(model(images(*size)) for size in sizes)), expected)


def test_drop_path_in_training_only():
    model, without = build(drop_path_rate=0.9), build()
    assert_close(model.eval()(images()), without.eval()(images()))
    torch.manual_seed(1)
    assert (model.train()(images()) - without(images())).abs().max() > 1e-3


def test_attention_dropout_trains():
    model = build(attn_drop_rate=0.5).train()
    torch.manual_seed(1)
    trained = model(images())
    assert all(g.isfinite().all() for g in gradients(model, trained).values())
    assert_close(model.eval()(images()), build().eval()(images()))


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_has_a_grid_of_its_own(copied):
    """A DINO teacher is a copy of the student, and the two see other crops."""
    model = build(dynamic_img_size=True).eval()
    wide, tall = images(16, 32), images(32, 16)  # as many patches
    expected = model(wide)
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)

    other_grid, grid = other.blocks[0].attn.grid, model.blocks[0].attn.grid
    assert other_grid is not grid
    assert all(block.attn.grid is other_grid for block in other.blocks)
    assert_close(other(wide), expected)
    assert_close(other(tall), model(tall))

    model(wide)
    other(tall)
    assert (grid.of(8), other_grid.of(8)) == ((2, 4), (4, 2))
    with torch.no_grad():
        other.blocks[0].attn.gaug.log_alpha.bias.add_(1)
    assert_close(model(wide), expected)


@pytest.mark.parametrize("block", [vision_transformer.ResPostBlock, vision_transformer.ParallelThingsBlock])
def test_other_blocks_of_timm_have_gaug_wherever_they_attend(block):
    model = build(block_fn=block, dynamic_img_size=True)
    layers = [module for module in model.modules() if isinstance(module, GaussianAttention)]
    assert len(layers) == 2 * (2 if block is vision_transformer.ParallelThingsBlock else 1)
    assert all(layer.grid is layers[0].grid and layer.num_prefix_tokens == 1 for layer in layers)
    assert model(images(24, 40)).isfinite().all()


def test_blocks_that_take_no_attention_layer_are_an_error():
    block = vision_transformer.ParallelScalingBlock
    with pytest.raises(ValueError, match=r"gaug=True .*\.ParallelScalingBlock is not: pass gaug=False"):
        build(block_fn=block)
    assert build(block_fn=block, gaug=False)(images()).isfinite().all()


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}], ids=str)
def test_bfloat16_autocast(kwargs):
    model = build(**kwargs)
    expected = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
    assert logits.dtype == torch.bfloat16
    assert logits.shape == (2, 10)
    assert (logits.float() - expected).abs().max() <= 0.05 * expected.abs().max()
    for name, gradient in gradients(model, logits.float()).items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_type_trains(dtype):
    model = build(qk_norm=True).to(dtype)
    logits = model(images().to(dtype))
    assert logits.dtype == dtype
    for name, gradient in gradients(model, logits).items():
        assert gradient.dtype == dtype, name
        assert gradient.isfinite().all(), name
    expected = build(qk_norm=True)(images())
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert_same({"logits": logits.float()}, {"logits": expected}, tolerance)


# timm's abilities


@pytest.mark.parametrize(
    "kwargs",
    [
        {"reg_tokens": 4},
        {"pos_embed": "none"},
        {"init_values": 1e-5},
        {"qk_norm": True},
        {"no_embed_class": True},
        {"class_token": False},
        {"class_token": False, "reg_tokens": 2},
        {"in_chans": 1},
        {"img_size": (24, 40)},
        {"img_size": (24, 40), "dynamic_img_size": True},
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_timms_arguments(kwargs):
    model = build(**kwargs)
    height, width = kwargs.get("img_size", (32, 32))
    batch = images(height, width, channels=kwargs.get("in_chans", 3))
    logits = model(batch)
    assert logits.shape == (2, kwargs.get("num_classes", 10) or 24)
    assert all(g is not None and g.isfinite().all() for g in gradients(model, logits).values())

    patches = (height // 8) * (width // 8)
    for block in model.blocks:
        assert block.attn.num_prefix_tokens == model.forward_features(batch).shape[1] - patches
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.blocks:
            block.attn.gaug.log_alpha.bias.fill_(-1e4)
    distance = (other(batch) - logits).abs().max()
    assert distance > (1e-6 if "init_values" in kwargs else 1e-3)  # GAug takes part


@pytest.mark.parametrize("size", [(24, 24), (40, 24), (8, 56), (16, 16)])
@pytest.mark.parametrize("pos_embed", ["learn", "none"])
def test_any_size_equals_the_model_set_to_it(size, pos_embed):
    """Also odd and not square. `set_input_size` leaves the grid that GAug was built for."""
    model = build(dynamic_img_size=True, pos_embed=pos_embed).eval()
    fixed = build(pos_embed=pos_embed).eval()
    fixed.load_state_dict(model.state_dict())
    logits = model(images(*size))
    features = model.forward_intermediates(images(*size), indices=1, intermediates_only=True)[0]

    fixed.set_input_size(size)
    assert_same({"logits": fixed(images(*size))}, {"logits": logits})
    assert features.shape == (2, 24, size[0] // 8, size[1] // 8)
    assert fixed.blocks[0].attn.grid.built_for == (4, 4)


def test_a_padded_image_has_the_padded_grid():
    model = build(dynamic_img_size=True, dynamic_img_pad=True)
    padded = torch.nn.functional.pad(images(25, 33), (0, 7, 0, 7))
    assert_close(model(images(25, 33)), model(padded))


def test_forward_intermediates_and_features_only():
    model = build(reg_tokens=2).eval()
    final, maps = model.forward_intermediates(images())
    assert_close(final, model.forward_features(images()))
    assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 2

    features = build(features_only=True, out_indices=(0, 1), reg_tokens=2).eval()
    assert features.feature_info.channels() == [24, 24]
    keys = features.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    assert not keys.missing_keys
    for ours, expected in zip(features(images()), maps, strict=True):
        assert_close(ours, expected)


def test_reset_classifier():
    model = build()
    tokens, pooled = (
        model.forward_features(images()),
        model.forward_head(model.forward_features(images()), pre_logits=True),
    )
    model.reset_classifier(5)
    assert model(images()).shape == (2, 5)
    model.reset_classifier(0)
    assert_close(model(images()), pooled)  # PRR stays
    model.reset_classifier(0, "")
    assert_close(model(images()), tokens)


@pytest.mark.compilers
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(dynamic):
    """Without a graph break; another size is another graph."""
    torch._dynamo.reset()
    model = build(dynamic_img_size=dynamic, depth=1)
    compiled = torch.compile(model, backend="eager" if dynamic else "aot_eager", fullgraph=True)
    for size in [(32, 32), (24, 40), (40, 16)] if dynamic else [(32, 32)]:
        logits, expected = compiled(images(*size)), model(images(*size))
        assert_same({"logits": logits}, {"logits": expected})
        assert_same(gradients(model, logits), gradients(model, expected))
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_equals_eager(dynamic):
    model = build(dynamic_img_size=dynamic, depth=1).eval()
    exported = torch.export.export(model, (images(),)).module()
    other = images(batch=2) + 1
    assert_same({"logits": exported(other)}, {"logits": model(other)})


# Mistakes


def test_patch_dropout():
    model = build(patch_drop_rate=0.5).train()
    assert model(images()).shape == (2, 10)
    assert isinstance(model.patch_drop, PatchSelection)


@pytest.mark.parametrize("pool", ["avg", "map", "max"])
def test_another_pooling_with_prr_is_an_error(pool):
    with pytest.raises(ValueError, match=f"global_pool='{pool}' would replace PRR's pooling: pass prr=False"):
        build(global_pool=pool)
    assert build(global_pool=pool, prr=False)(images()).shape == (2, 10)


@pytest.mark.parametrize("kwargs", [{"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}], ids=list)
def test_an_attention_mask_is_an_error(kwargs):
    with pytest.raises(ValueError, match="takes no attn_mask"):
        build()(images(), **kwargs)


# Cost


class Watch(TorchDispatchMode):
    """Notes each operation's name, and how many elements its largest output has."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.operations = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.add(function.overloadpacket)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("attn_drop_rate", [0.0, 0.1], ids=["chunks", "one expression"])
def test_nothing_waits_for_the_device_and_no_tensor_is_larger_than_the_logits(attn_drop_rate):
    model = build(img_size=128, dynamic_img_size=True, depth=1, attn_drop_rate=attn_drop_rate).train()
    batch, tokens = 8, 1 + 16 * 16
    with Watch() as watch:
        model(images(128, 128, batch=batch)).sum().backward()

    aten = torch.ops.aten
    assert aten.addmm in watch.operations
    assert aten.native_layer_norm_backward in watch.operations
    waits = {aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal, aten.masked_select}
    assert not waits & watch.operations

    image, mlp, logits = batch * 3 * 128**2, batch * tokens * 4 * 24, batch * 3 * tokens**2
    if attn_drop_rate:
        assert watch.largest == logits
    else:
        assert mlp <= watch.largest <= max(mlp, image) < logits / 4
