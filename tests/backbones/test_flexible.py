"""Patches of several sizes, against plain references and models that are built for each size."""

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.testing import assert_close

import locat_lightning.backbones.registry  # noqa: F401 (registers the models)
from locat_lightning.backbones.flexible import make_flexible, use_patches
from locat_lightning.backbones.weights import load_weights

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
NAMES = ["locatvit_tiny", "vit_tiny_patch16_224", "nopos_vit_tiny_patch16_224", "locatjumbo_tiny"]


def build(name="locatvit_tiny", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | {"dynamic_img_size": True} | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(height=32):
    return torch.randn(2, 3, height, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [16, 24])
def test_a_larger_patch_gives_the_token_that_it_was_resized_from(size):
    model = build(img_size=48)
    make_flexible(model, [8, size])
    patches = torch.randn(5, 3, 8, 8)
    resized = F.interpolate(patches, (size, size), mode="bicubic", antialias=True)
    expected = model.patch_embed.proj(patches)
    use_patches(model, size)
    assert_close(model.patch_embed.proj(resized), expected, rtol=1e-5, atol=1e-5)


def test_a_smaller_patch_is_least_squares():
    """pinv(Bᵀ) w, as numpy has it, of the matrix of timm's interpolation."""
    model = build()
    make_flexible(model, [4, 8])
    use_patches(model, 4)
    basis = torch.eye(64).view(64, 1, 8, 8)
    matrix = F.interpolate(basis, (4, 4), mode="bicubic", antialias=True).flatten(1).T.double().numpy()
    kernel = model.patch_embed.proj.weight.detach().flatten(2).double().numpy()
    expected = kernel @ np.linalg.pinv(matrix)
    found = model.patch_embed.proj(torch.eye(16).view(16, 1, 4, 4).expand(-1, 3, -1, -1)).flatten(1)
    bias = model.patch_embed.proj.bias.detach().numpy()
    np.testing.assert_allclose(found.detach().numpy().T, expected.sum(1) + bias[:, None], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_it_is_the_model_of_that_size_with_these_weights(tmp_path, name, size):
    square = {"img_size": 48}  # timm takes positions of weights to be square
    model = build(name, **square)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    fixed = timm.create_model(name, **SMALL | square | {"patch_size": size}).eval()
    load_weights(fixed, str(tmp_path / "a.pth"))
    names = list(model.state_dict())
    make_flexible(model, [4, 8, 16])
    assert list(model.state_dict()) == names
    use_patches(model, size)
    batch = images(height=48)
    assert_close(model.forward_intermediates(batch), fixed.forward_intermediates(batch), rtol=1e-4, atol=1e-4)
    assert_close(model(batch), fixed(batch), rtol=1e-4, atol=1e-4)
    assert model.feature_info[-1]["reduction"] == size
    use_patches(model, 8)
    assert_close(model(batch), build(name, **square)(batch), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [{}, {"rotated": True}, {"mixture": 2}, {"isotropic": True}], ids=str)
def test_the_width_of_kernels_in_pixels_stays(tmp_path, kernel):
    model = build(gaug=kernel or True)
    gaug, q = model.blocks[0].attn.gaug, torch.randn(1, 3, 96, 8)
    grid = model.patch_embed.patch_grid

    def pixels(size):
        use_patches(model, size)
        if "mixture" in kernel:  # the kernel itself, of the first patch, at distances of 8 pixels
            s = gaug(q, grid.built_for, grid.built_for)[0, 0, 0].unflatten(-1, grid.built_for)
            return s[:: 8 // size, :: 8 // size]
        return gaug.variance_and_alpha(q, grid.built_for, grid.built_for)[0] * size**2

    make_flexible(model, [4, 2, 8])
    expected = pixels(8)
    for size in (4, 2):
        assert_close(pixels(size), expected)


@pytest.mark.parametrize("size", [4, 16])
def test_gradients_reach_the_kernel_and_the_widths(size):
    model = build().train()
    make_flexible(model, [4, 8, 16])
    use_patches(model, size)
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.patch_embed.proj.weight.grad.abs().max() > 0
    assert model.blocks[0].attn.gaug.log_var.bias.grad.abs().max() > 0


def test_recomputed_blocks_have_the_same_gradients():
    def gradients(checkpointed):
        model = build().train()
        make_flexible(model, [4, 8])
        model.set_grad_checkpointing(checkpointed)
        for size in (4, 8, 4):
            use_patches(model, size)
            model(images()).square().sum().backward()
        return {name: each.grad for name, each in model.named_parameters()}

    assert_close(gradients(True), gradients(False))


@pytest.mark.compilers
def test_each_size_is_compiled_once():
    model = build(depth=1)
    make_flexible(model, [4, 8, 16])
    counted = CompileCounterWithBackend("eager")
    model.compile(backend=counted, dynamic=False)
    for size in (4, 8, 16, 4, 8, 16):
        use_patches(model, size)
        model(images())
    assert counted.frame_count == 3


@pytest.mark.compilers
def test_more_sizes_than_torch_would_compile():
    torch.compiler.reset()
    sizes = [60, 30, 20, 15, 12, 10, 6, 5, 4, 3]
    model = build(depth=1, img_size=60, patch_size=12)
    make_flexible(model, sizes)
    counted = CompileCounterWithBackend("eager")
    model.compile(backend=counted, dynamic=False)
    for size in sizes:
        use_patches(model, size)
        model(torch.randn(1, 3, 60, 60))
    assert counted.frame_count == 10


def test_mixed_precision_resizes_in_float32():
    model = build()
    make_flexible(model, [4, 8])
    use_patches(model, 4)
    expected = model.patch_embed.proj(images())
    with torch.autocast("cpu", torch.bfloat16):
        found = model.patch_embed.proj(images())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float64, 1e-5)])
def test_weights_of_another_type_are_resized_no_less_exactly(dtype, tolerance):
    model = build()
    make_flexible(model, [4, 8])
    use_patches(model, 4)
    basis = torch.eye(16).view(16, 1, 4, 4).expand(-1, 3, -1, -1)
    matrix = model.patch_embed.proj.to_4.clone()
    expected = model.patch_embed.proj(basis)
    model.to(dtype)
    assert torch.equal(model.patch_embed.proj.to_4, matrix)
    assert model.patch_embed.proj.to_4.dtype == torch.float32
    found = model.patch_embed.proj(basis.to(dtype))
    assert found.dtype == dtype
    assert_close(found.float(), expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize(
    ("name", "options", "sizes", "expected"),
    [
        ("locatvit_tiny", {}, [5, 8], "images of 32 × 48 pixels have no whole patches of all of 5, 8"),
        ("locatvit_tiny", {"dynamic_img_size": False}, [4], "dynamic_img_size=True"),
        ("locatvit_tiny_rope_mixed", {"num_heads": 2}, [4], "Eva is no plain Vision Transformer"),
        ("channelvit_tiny", {}, [4], "ChannelViT is no plain Vision Transformer"),
    ],
)
def test_what_cannot_be_flexible(name, options, sizes, expected):
    with pytest.raises(ValueError, match=expected):
        make_flexible(build(name, **options), iter(sizes))
