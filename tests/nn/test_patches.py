"""The grid of a sequence of patches, and subsets of it, for which GAug is the whole grid's, indexed."""

import math

import pytest
import timm
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from torch.testing import assert_close

import locat_lightning.backbones.registry  # noqa: F401 (registers the models)
from locat_lightning.backbones.locate import add_locat
from locat_lightning.nn import (
    GaussianAugmentation,
    GaussianMixture,
    PatchGrid,
    PatchSelection,
    attention,
    chunked_attention,
    gaussian_attention,
    gaussian_kernel,
    patch_selection,
)
from locat_lightning.nn.attention import gaussian_augmented_attention
from locat_lightning.nn.patches import note_grid

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


def random_subsets(images, patches, n, seed=0):
    """Subsets [B, n] in random order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, patches, generator=generator).argsort(1)[:, :n]


def gaug_of(variant, d, built_for):
    torch.manual_seed(0)
    mixture = variant == {"mixture": 3}
    gaug = GaussianMixture(3, built_for) if mixture else GaussianAugmentation(d, **variant)
    for parameter in gaug.parameters():
        torch.nn.init.normal_(parameter)
    return gaug


def of_the_grid(gaug, q, grid, built_for, kept, prefix):
    """S among the kept patches [B, h, n, n], out of the kernel of the whole grid."""
    kept = kept.expand(len(q), -1)
    everywhere = q.new_zeros(*q.shape[:2], prefix + math.prod(grid), q.shape[-1])
    at = (kept + prefix)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
    kernels = gaug(everywhere.scatter(2, at, q[:, :, prefix:]), grid, built_for)
    s = kernels if isinstance(kernels, torch.Tensor) else gaussian_kernel(kernels)
    s = s.expand(len(q), -1, -1, -1)
    return torch.stack([of_image[:, of][:, :, of] for of_image, of in zip(s, kept, strict=True)])


@pytest.mark.parametrize("common", [True, False], ids=["one subset", "by image"])
@pytest.mark.parametrize(
    ("variant", "path"),
    [
        ({}, "chunks"),
        ({}, "chunks of one head and 3 queries"),
        ({}, "one expression"),
        ({"rotated": True}, "one expression"),
        ({"mixture": 3}, "one expression"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("n", "prefix", "d", "grid", "built_for"),
    [
        (7, 1, 8, (4, 5), (4, 5)),
        (1, 0, 8, (4, 5), (4, 4)),
        (20, 2, 4, (5, 4), (3, 3)),  # all, in another order, capped; more than 4 d
    ],
)
def test_a_subset_is_the_whole_grid_indexed(
    monkeypatch, common, path, variant, n, prefix, d, grid, built_for
):
    kept = random_subsets(1 if common else 3, math.prod(grid), n)
    kept = kept[0] if common else kept
    gaug = gaug_of(variant, d, built_for)
    generator = torch.Generator().manual_seed(1)
    q, k, v, weight = (torch.randn(3, 2, prefix + n, d, generator=generator) for _ in range(4))
    inputs = [*(each.requires_grad_() for each in (q, k, v)), *gaug.parameters()]
    expected = gaussian_augmented_attention(q, k, v, of_the_grid(gaug, q, grid, built_for, kept, prefix))
    if path == "one expression":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(attention, "chunked_attention", None)
    else:
        monkeypatch.setattr(attention, "gaussian_kernel", None)
        if path != "chunks":
            monkeypatch.setattr(chunked_attention, "_chunk_size", lambda q: (1, 3))
    found = gaussian_attention(q, k, v, gaug(q, grid, built_for, kept=kept))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_subset_in_half_precision():
    kept = random_subsets(2, 16, 9)
    gaug = gaug_of({}, 8, (4, 4))
    q, k, v = (torch.randn(2, 2, 10, 8).bfloat16().float().requires_grad_() for _ in range(3))
    expected = gaussian_attention(q, k, v, gaug(q, (4, 4), (4, 4), kept=kept))
    half = [each.detach().bfloat16().requires_grad_() for each in (q, k, v)]
    found = gaussian_attention(*half, gaug(half[0], (4, 4), (4, 4), kept=kept))
    gradients = torch.autograd.grad(found.float().square().sum(), half)
    for ours, theirs in zip(
        [found, *gradients],
        [expected, *torch.autograd.grad(expected.square().sum(), (q, k, v))],
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).abs().max() <= 0.05 * theirs.abs().max()


FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 1.0}),
    "mean": ("vit_base_patch16_siglip_gap_224", {}),
    "rope": ("vit_small_patch16_rope_224", {}),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "jumbo": ("jumbo_tiny", {}),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def build(family, gaug=True, **options):
    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | arguments | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return add_locat(model.train(), gaug=gaug, prr=False), torch.randn(3, 3, 32, 32)


@FAMILY
def test_all_patches_in_another_order_are_the_same_image(family):
    """Where GAug took neighbours in the sequence for neighbours in the image, this would differ."""
    model, images = build(family)
    expected = model.forward_features(images)
    kept = random_subsets(3, 16, 16)
    patch_selection(model).keep(kept)
    found = model.forward_features(images)
    prefix = model.num_prefix_tokens
    assert_close(found[:, :prefix], expected[:, :prefix], rtol=1e-4, atol=1e-5)
    back = found[:, prefix:].take_along_dim(kept.argsort(1).unsqueeze(-1), 1)
    assert_close(back, expected[:, prefix:], rtol=1e-4, atol=1e-5)
    assert_close(model.forward_features(images), expected)  # the next images come whole


@FAMILY
@pytest.mark.parametrize("gaug", [True, False])
def test_patch_dropout_is_timms(family, gaug):
    """The same random numbers keep the same patches; without a kernel, the tokens are timm's."""
    with_kernel, images = build(family, gaug, patch_drop_rate=0.4)
    for name, parameter in with_kernel.named_parameters():
        if "gaug.log_alpha.bias" in name:
            torch.nn.init.constant_(parameter, -1e4)
    name, arguments = FAMILIES[family]
    plain = timm.create_model(name, **(SMALL | arguments), patch_drop_rate=0.4).train()
    plain.load_state_dict({k: v for k, v in with_kernel.state_dict().items() if ".gaug." not in k})
    outputs = []
    for model in (with_kernel, plain):
        torch.manual_seed(3)
        outputs.append(model.forward_features(images))
    assert outputs[0].shape[1] == plain.num_prefix_tokens + 9
    assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert isinstance(with_kernel.patch_drop, PatchSelection) == gaug
    assert with_kernel.eval().forward_features(images).shape[1] == plain.num_prefix_tokens + 16


@pytest.mark.parametrize("family", ["vit", "rope", "jumbo"])
def test_a_checkpointed_block_is_recomputed_for_its_own_patches(family):
    model, images = build(family, patch_drop_rate=0.5)
    gradients = []
    for _ in range(2):
        torch.manual_seed(3)
        loss = model.forward_features(images).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        model.set_grad_checkpointing()
    assert_close(*gradients)


def test_two_subsets_before_a_backward_pass_are_an_error_where_blocks_are_recomputed():
    model, images = build("vit", patch_drop_rate=0.5)
    sum(model(images).sum() for _ in range(2)).backward()
    model.set_grad_checkpointing()
    losses = [model(images).sum() for _ in range(2)]
    with pytest.raises(ValueError, match="two subsets of 8 patches before a backward pass: activation check"):
        sum(losses).backward()


def test_other_images_between_the_passes_of_a_subset():
    """Of another size, they leave it alone; with as many patches, they are an error."""
    model, images = build("vit", patch_drop_rate=0.75, dynamic_img_size=True)
    model.set_grad_checkpointing()
    loss = model(images).sum()
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 16, 48))
    loss.backward()
    loss = model.train()(images).sum()
    model.eval()(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="two subsets of 4 patches"):
        loss.backward()


def test_the_grid_of_each_sequence_length_is_remembered():
    dynamic, fixed = torch.nn.Identity(), torch.nn.Identity()
    grid = dynamic.patch_grid = fixed.patch_grid = PatchGrid((4, 4))
    assert grid.of(16) == (4, 4)

    dynamic.register_forward_hook(note_grid)  # a dynamic embedding gives [B, H, W, D]
    dynamic(torch.zeros(2, 3, 5, 8))
    dynamic(torch.zeros(1, 2, 6, 8))
    assert grid.of(15) == (3, 5)
    assert grid.of(12) == (2, 6)
    dynamic(torch.zeros(1, 4, 3, 8))
    assert grid.of(12) == (4, 3)  # the latest images of that length
    assert grid.of(16) == (4, 4)

    fixed.register_forward_hook(note_grid)  # a fixed one gives [B, H·W, D] and knows its grid
    fixed.grid_size = (7, 2)
    fixed(torch.zeros(2, 14, 8))
    assert grid.of(14) == (7, 2)
    assert grid.built_for == (4, 4)


def test_an_unknown_number_of_patches_is_an_error_that_names_it():
    grid = PatchGrid((4, 4))
    with pytest.raises(ValueError, match=r"no image with 13 patches .*grids seen: \[\(4, 4\)\]"):
        grid.of(13)


def test_the_grid_of_a_subset_is_that_of_its_images():
    grid = PatchGrid((4, 4))
    kept = torch.arange(6)
    grid.note(3, 5)
    grid.note_kept(kept)
    assert (grid.of(6), grid.kept_of(6)) == ((3, 5), kept)
    assert (grid.of(15), grid.kept_of(15)) == ((3, 5), None)
    grid.note(2, 3)  # whole images with as many patches
    assert (grid.of(6), grid.kept_of(6)) == ((2, 3), None)
    grid.keep(kept)
    grid.note(4, 4)
    assert (grid.of(6), grid.kept_of(6)) == ((4, 4), kept)


def test_lightlys_masked_vision_transformer():
    """It selects tokens itself, and counts [CLS] among them."""
    model, images = build("vit")
    masked = MaskedVisionTransformerTIMM(model, weight_initialization="skip", pos_embed_initialization="skip")
    with pytest.raises(
        ValueError, match=r"no image with 7 patches .*GAug has to know which patches are kept"
    ):
        masked.encode(images, idx_keep=torch.arange(8).expand(3, -1))
    kept = random_subsets(3, 16, 7)
    patch_selection(model).keep(kept)
    expected = model.forward_features(images)
    model.patch_embed.patch_grid.keep(kept)
    found = masked.encode(images, idx_keep=torch.cat([torch.zeros(3, 1, dtype=torch.long), kept + 1], 1))
    assert_close(found, expected)


def test_refinement_and_gradients_of_a_subset():
    """PRR has no positions: it refines the tokens that are there."""
    model, images = build("vit")
    add_locat(model, gaug=False)
    patch_selection(model).keep(random_subsets(3, 16, 5))
    tokens = model.forward_features(images)
    pooled = model.forward_head(tokens)
    heads = tokens.unflatten(-1, (2, 12)).transpose(1, 2)
    weights = (heads[:, :, :1] @ heads.mT / math.sqrt(12)).softmax(-1)
    assert_close(pooled, (weights @ heads).transpose(1, 2).flatten(1), rtol=1e-4, atol=1e-5)
    pooled.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "gaug" in name)


def test_windows_cannot_leave_patches_out():
    with pytest.raises(ValueError, match="SwinTransformer is no Vision Transformer"):
        patch_selection(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=12))


@pytest.mark.compilers
def test_subsets_compile():
    model, images = build("vit", depth=1)
    selection = patch_selection(model)

    def encode(images, kept):
        selection.keep(kept)
        return model.forward_features(images)

    compiled = torch.compile(encode, backend="eager", fullgraph=True)
    for seed in range(2):
        kept = random_subsets(3, 16, 5, seed)
        assert_close(compiled(images, kept), encode(images, kept))
