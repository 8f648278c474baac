"""GAug's kernel against its definition written as loops, and the grid that the layers share."""

import math

import pytest
import torch
from torch.testing import assert_close

from locat_lightning.nn import GaussianAugmentation, PatchGrid, gaussian_kernel
from locat_lightning.nn.gaussian import distances, factors

# grid of the images, grid that the model was built for
GRIDS = [
    ((4, 4), (4, 4)),
    ((5, 3), (5, 3)),  # odd, not square
    ((3, 7), (7, 3)),  # as many patches as built for, the other way round
    ((6, 4), (4, 4)),
    ((3, 3), (14, 14)),
    ((5, 5), (2, 2)),  # distances capped at (2 - 1)²
    ((1, 9), (1, 9)),
    ((9, 1), (4, 4)),
    ((3, 2), (1, 1)),  # C = 1: no shift, and every distance capped at 0
    ((4, 5), (32, 32)),  # ε = 0.2
    ((1, 120), (2, 120)),  # ε = 0.8, distances capped at 13100
]


def augmentation(head_dim, seed=0):
    gaug = GaussianAugmentation(head_dim)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in gaug.parameters():
            parameter.normal_()
    return gaug


def queries(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernel_by_loops(gaug, q, grid, built_for):
    """method.md, section 1: entry after entry, in Python's floats. Returns [B, h, H·W, H·W]."""
    height, width = grid
    patches = height * width
    largest = max(built_for) ** 2
    epsilon = 0.1
    while 0.5 * (max(built_for) - 1) ** 2 / epsilon**2 > 32500:
        epsilon *= 2
    cap = min((max(built_for) - 1) ** 2, 13100)
    rows = [*gaug.log_var.weight.tolist(), *gaug.log_alpha.weight.tolist()]
    biases = [*gaug.log_var.bias.tolist(), *gaug.log_alpha.bias.tolist()]

    kernel = torch.zeros(*q.shape[:2], patches, patches, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for p, query in enumerate(q[b, h, q.shape[2] - patches :].tolist()):
                z_y, z_x, a = (
                    sum(x * w for x, w in zip(query, row, strict=True)) + bias
                    for row, bias in zip(rows, biases, strict=True)
                )
                var = []
                for z in (z_y, z_x):
                    shift = math.log(largest - 1) if largest > 2 else 0.0
                    value = largest / (1 + math.exp(-(z - shift)))
                    if grid != built_for:
                        value *= min(grid) / min(built_for)
                    var.append(value)
                alpha = math.log1p(math.exp(a))
                for t in range(patches):
                    d_y = min((p // width - t // width) ** 2, cap)
                    d_x = min((p % width - t % width) ** 2, cap)
                    exponent = d_y / (var[0] + epsilon) + d_x / (var[1] + epsilon)
                    kernel[b, h, p, t] = alpha * math.exp(-0.5 * exponent)
    return kernel


@pytest.mark.parametrize(("grid", "built_for"), GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_kernel_is_the_definition(grid, built_for, prefix):
    gaug = augmentation(4)
    images = 2
    if max(grid) > 100:
        images = 1
        with torch.no_grad():
            gaug.log_var.bias.add_(9)  # so wide that the capped distances count
    q = queries(images, images, prefix + math.prod(grid), 4)

    kernel = gaussian_kernel(gaug(q, grid, built_for))

    assert kernel.dtype == torch.float32
    expected = kernel_by_loops(gaug, q, grid, built_for)
    assert_close(kernel, expected.float(), rtol=2e-5, atol=1e-6)


def test_the_kernel_is_the_product_of_its_two_factors():
    q = queries(2, 3, 1 + 15, 8)
    gaussians = augmentation(8)(q, (5, 3), (5, 3))
    y, x = factors(gaussians, distances((5, 3), 1, gaussians.cap, q.device))
    assert y.shape == (2, 3, 1 + 15, 5)
    assert x.shape == (2, 3, 1 + 15, 3)
    assert y.dtype == x.dtype == torch.float32
    assert (y[:, :, 0] == 0).all()  # the prefix token has no kernel
    product = torch.einsum("bhpi,bhpj->bhpij", y[:, :, 1:], x[:, :, 1:]).flatten(-2)
    assert_close(gaussian_kernel(gaussians), product, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", [0, 2])
def test_distances_are_those_of_the_grid_squared_and_capped(prefix):
    table = distances((2, 3), prefix, 3, torch.device("cpu"))
    assert len(table) == prefix + 6
    for p in range(6):
        i, j = divmod(p, 3)
        squares = [(i - row) ** 2 for row in range(2)] + [(j - column) ** 2 for column in range(3)]
        assert table[prefix + p].tolist() == [min(each, 3) for each in squares]


def test_zero_maps_give_a_variance_of_one_patch_scaled_with_the_grid():
    gaug = GaussianAugmentation(8)
    for parameter in gaug.parameters():
        torch.nn.init.zeros_(parameter)
    q = queries(1, 2, 1 + 16, 8)

    var, alpha = gaug.variance_and_alpha(q, (4, 4), (4, 4))
    assert_close(var, torch.ones(2, 1, 2, 16))
    assert_close(alpha, torch.full((1, 2, 16), math.log(2)))

    var, _ = gaug.variance_and_alpha(queries(1, 2, 1 + 48, 8), (6, 8), (4, 4))
    assert_close(var, torch.full((2, 1, 2, 48), 1.5))


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_extreme_queries_stay_finite_with_their_gradients(bias):
    gaug = augmentation(8)
    with torch.no_grad():
        gaug.log_var.bias.fill_(bias)
        gaug.log_alpha.bias.fill_(bias)
    q = queries(1, 2, 1 + 25, 8).requires_grad_()

    kernel = gaussian_kernel(gaug(q, (5, 5), (5, 5)))
    kernel.sum().backward()

    assert kernel.isfinite().all()
    assert kernel.max() < 1e-30 if bias < 0 else kernel.max() > 9e3
    assert all(t.grad.isfinite().all() for t in [q, *gaug.parameters()])


def test_no_entry_is_a_denormal_number():
    gaug = augmentation(8)
    with torch.no_grad():
        gaug.log_var.bias.fill_(-4.0)
    kernel = gaussian_kernel(gaug(queries(1, 2, 14 * 14, 8), (14, 14), (14, 14)))
    assert torch.finfo(torch.float32).tiny < kernel.min() < 1e-15


def test_under_autocast_the_factors_are_those_of_float32():
    gaug = augmentation(8)
    q = queries(2, 2, 1 + 20, 8).bfloat16()

    with torch.autocast("cpu", torch.bfloat16):
        half = gaug(q, (5, 4), (5, 4))
    full = gaug(q.float(), (5, 4), (5, 4))

    for a, b in zip(half[:2], full[:2], strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, rtol=0, atol=0)


def test_the_grid_of_each_sequence_length_is_remembered():
    grid = PatchGrid((4, 4))
    assert grid.of(16) == (4, 4)

    dynamic = torch.nn.Module()  # a dynamic embedding gives [B, H, W, D]
    grid(dynamic, (), torch.zeros(2, 3, 5, 8))
    grid(dynamic, (), torch.zeros(1, 2, 6, 8))
    assert grid.of(15) == (3, 5)
    assert grid.of(12) == (2, 6)
    grid(dynamic, (), torch.zeros(1, 4, 3, 8))
    assert grid.of(12) == (4, 3)  # the latest images of that length
    assert grid.of(16) == (4, 4)

    fixed = torch.nn.Module()  # a fixed one gives [B, H·W, D] and knows its grid
    fixed.grid_size = (7, 2)
    grid(fixed, (), torch.zeros(2, 14, 8))
    assert grid.of(14) == (7, 2)
    assert grid.built_for == (4, 4)


def test_an_unknown_number_of_patches_is_an_error_that_names_it():
    grid = PatchGrid((4, 4))
    with pytest.raises(ValueError, match=r"no image with 13 patches .*grids seen: \[\(4, 4\)\]"):
        grid.of(13)
