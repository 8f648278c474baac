"""LocAt put into built timm models, of each family at a small size."""

import copy

import pytest
import timm
import torch
from torch.testing import assert_close

import locat_lightning.backbones.registry  # noqa: F401 (registers the models)
from locat_lightning.backbones.locate import add_locat, architecture_of
from locat_lightning.nn import GaussianAugmentation, GaussianMixture, PatchRefinement

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
EVA = SMALL | {"num_heads": 2}  # heads of 12: rotary embeddings want a multiple of 4
FAMILIES = {
    "augreg": ("vit_tiny_patch16_224", SMALL),
    "deit": ("deit_tiny_patch16_224", SMALL),
    "deit3": ("deit3_small_patch16_224", SMALL),
    "dino": ("vit_small_patch16_224.dino", SMALL),
    "dinov2": ("vit_small_patch14_dinov2", SMALL | {"init_values": 1.0}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"init_values": 1.0}),
    "clip": ("vit_base_patch16_clip_224", SMALL),
    "siglip": ("vit_base_patch16_siglip_224", SMALL),
    "mean": ("vit_base_patch16_siglip_gap_224", SMALL),
    "qk norm": ("vit_tiny_patch16_224", SMALL | {"qk_norm": True}),
    "rope": ("vit_small_patch16_rope_224", EVA),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", EVA),
    "rope registers": ("vit_medium_patch16_rope_reg1_gap_256", EVA),
    "eva": ("eva_giant_patch14_224", EVA),
    "eva02": ("eva02_tiny_patch14_224", EVA),
    "dinov3": ("vit_small_patch16_dinov3", EVA),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2)}
        | {"num_classes": 10},
    ),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def build(family, **kwargs):
    """A small model of random weights that are large enough to matter, and two images."""
    name, small = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **(small | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, 32, 32)


@FAMILY
def test_identity_starts_with_the_outputs_of_the_model(family):
    model, images = build(family)
    expected = model(images)
    located = add_locat(model, start="identity")
    assert located is model
    assert_close(located(images), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@FAMILY
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_every_new_parameter_gets_a_gradient(family, start):
    model, images = build(family)
    own = {name for name, _ in model.named_parameters()}
    add_locat(model, start=start).train()(images).square().sum().backward()
    new = {name: p for name, p in model.named_parameters() if name not in own}
    maps = {name.split("gaug.")[-1] for name in new}
    expected = {f"log_{of}.{kind}" for of in ("var", "alpha") for kind in ("weight", "bias")}
    assert maps >= expected | ({"gate"} if start == "identity" else set())
    # While the refinement is shut, the last block's patches, where S is, do not reach [CLS].
    deaf = "blocks.1." if start == "identity" and model.global_pool in ("prr", "token") else "none"
    for name, parameter in new.items():
        if name.startswith(deaf):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@FAMILY
def test_paper_changes_the_outputs_by_gaug_and_by_prr(family):
    model, images = build(family)
    plain, gaug, prr = model(images), copy.deepcopy(model), copy.deepcopy(model)
    add_locat(gaug, prr=False)
    add_locat(prr, gaug=False)
    assert (gaug(images) - plain).abs().max() > 1e-4 * plain.abs().max()
    assert (prr(images) - plain).abs().max() > 1e-4 * plain.abs().max()
    tokens = model.forward_features(images)
    assert (gaug.forward_features(images) - tokens).abs().max() > 1e-4 * tokens.abs().max()
    assert_close(prr.forward_features(images), tokens)


def test_the_gate_opens_in_training():
    """A gate that is nearly shut gets the gradient of an open one: it is no dead end."""
    model, images = build("dino")
    add_locat(model, start="identity")
    gate = model.blocks[0].attn.gaug.gate
    before = gate.item()
    optimizer = torch.optim.SGD([gate], lr=1.0)
    target = torch.randn(2, 10)
    for _ in range(3):
        optimizer.zero_grad()
        (model(images) - target).square().mean().backward()
        optimizer.step()
    assert abs(gate.item() - before) > 1e-3


def test_a_copy_has_gates_of_its_own():
    model, images = build("siglip")
    located = add_locat(model, start="identity")
    twin = copy.deepcopy(located)
    with torch.no_grad():
        located.attn_pool.refinement.gate.fill_(1.0)
    assert twin.attn_pool.refinement.gate.item() == 0
    assert (located(images) - twin(images)).abs().max() > 1e-4


@FAMILY
def test_features_of_all_families(family):
    model, images = build(family)
    add_locat(model)
    maps = model.forward_intermediates(images, intermediates_only=True)
    assert all(each.shape[0] == 2 and each.isfinite().all() for each in maps)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert_close(model(images), pooled)  # PRR stays


@FAMILY
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_checkpointing_and_mixed_precision(family, start):
    model, images = build(family, drop_path_rate=0.0)
    add_locat(model, start=start).train()
    if start == "identity":  # in the midst of training
        for name, parameter in model.named_parameters():
            torch.nn.init.constant_(parameter, -0.5) if name.endswith("gaug.gate") else None
    expected = model(images)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()), allow_unused=True)
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(images).square().sum(), list(model.parameters()), allow_unused=True)
    assert_close(again, gradients)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    assert (half.float() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_state_goes_back_into_the_plain_model():
    model, images = build("dino")
    plain, expected = copy.deepcopy(model), model(images)
    located = add_locat(model, start="identity")
    keys = plain.load_state_dict(located.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all(".gaug." in key or key == "attn_pool.gate" for key in keys.unexpected_keys)
    assert_close(plain(images), expected)


@pytest.mark.parametrize(
    "gaug",
    [
        {"isotropic": True},
        {"query_dependent": False},
        {"learned_alpha": False},
        {"rotated": True},
        {"isotropic": True, "query_dependent": False, "learned_alpha": False},
        {"mixture": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["augreg", "rope mixed", "swin"])
def test_variants_of_the_kernel_train(family, gaug):
    model, images = build(family)
    plain = model(images)
    add_locat(model, gaug=gaug)
    kind = GaussianMixture if "mixture" in gaug else GaussianAugmentation
    layers = [each for each in model.modules() if isinstance(each, kind)]
    assert len(layers) == 4 if family == "swin" else 2
    assert (model(images) - plain).abs().max() > 1e-4
    model.train()(images).square().sum().backward()
    for layer in layers:
        assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_what_is_no_model_is_an_error():
    with pytest.raises(TypeError, match=r"must be a module .* not 'vit_tiny_patch16_224'"):
        add_locat("vit_tiny_patch16_224")


def test_models_without_such_attention_are_an_error():
    with pytest.raises(ValueError, match=r"gaug=True .* which timm\.models\.resnet\.ResNet is not"):
        add_locat(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match=r"prr=True: ResNet .* prr=False"):
        add_locat(timm.create_model("resnet18"), gaug=False)
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=3)
    with pytest.raises(ValueError, match=r"which timm\.models\.beit\.Attention is not: pass gaug=False"):
        add_locat(beit)


def test_a_head_of_two_tokens_takes_gaug_alone():
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL)
    with pytest.raises(ValueError, match=r"VisionTransformerDistilled .* prr=False"):
        add_locat(distilled, gaug=False)
    assert add_locat(distilled, prr=False)(torch.randn(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(ValueError, match=r"Jumbo .* prr=False"):
        add_locat(timm.create_model("jumbo_tiny", img_size=32), gaug=False)


@pytest.mark.parametrize("family", ["augreg", "siglip", "rope registers", "swin"])
def test_a_second_time_is_an_error(family):
    model, _ = build(family)
    add_locat(model)
    with pytest.raises(ValueError, match="has it already: pass gaug=False"):
        add_locat(model)
    with pytest.raises(ValueError, match="has it already: pass prr=False"):
        add_locat(model, gaug=False)


def test_an_error_leaves_the_model_as_it_was():
    model = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()
    images = torch.randn(1, 3, 32, 32)
    before, expected = repr(model), model(images)
    for wrong in ({}, {"gaug": {"no_such": 1}, "prr": False}, {"gaug": {"mixture": 2, "rotated": True}}):
        with pytest.raises((ValueError, TypeError)):
            add_locat(model, **wrong)
        assert repr(model) == before
        assert not model.patch_embed._forward_hooks
        assert torch.equal(model(images), expected)
    add_locat(model, prr=False)  # as the first of these errors has it


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "pit_ti_224"])
def test_a_model_whose_grid_is_elsewhere_is_an_error(name):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"gaug=True .* which [\w.]+ is not: pass gaug"),
    ):
        add_locat(timm.create_model(name))


@pytest.mark.parametrize(
    ("gaug", "message"),
    [
        ({"mixture": 0}, "mixture is the number of Gaussians, 1 or more; got 0"),
        ({"mixture": True}, "1 or more; got True"),
        ({"mixture": 2, "isotropic": True}, "mixture alone, not mixture, isotropic"),
        (None, "gaug must be true, false, or arguments of a kernel, not None"),
        ("rotated", "not 'rotated'"),
    ],
    ids=str,
)
def test_wrong_kernels_are_errors(gaug, message):
    with pytest.raises((ValueError, TypeError), match=message):
        add_locat(build("augreg")[0], gaug=gaug)


def test_a_model_knows_what_it_was():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert architecture_of(model) == "vit_tiny_patch16_224"
    other = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert architecture_of(add_locat(model)) == "vit_tiny_patch16_224 with LocAt"
    assert architecture_of(other) == "vit_tiny_patch16_224"
    assert architecture_of(timm.create_model("locatvit_tiny", depth=1)) == "locatvit_tiny"


def test_an_unknown_start_and_variant_are_errors():
    model, _ = build("augreg")
    with pytest.raises(ValueError, match="'paper' or 'identity', not 'zero'"):
        add_locat(model, start="zero")
    with pytest.raises(TypeError, match="no_such"):
        add_locat(build("augreg")[0], gaug={"no_such": True})


@pytest.mark.parametrize("family", ["mean", "rope registers"])
def test_a_mean_without_prefix_stays_without_it(family):
    model, _ = build(family)
    prefix = model.num_prefix_tokens
    add_locat(model, gaug=False)
    assert isinstance(model.attn_pool, PatchRefinement)
    assert model.attn_pool.rows == slice(prefix, None)
