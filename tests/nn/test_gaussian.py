"""GAug's kernel against its definition written as loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from locat_lightning.nn import GaussianAugmentation, GaussianMixture, gaussian_kernel
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


@pytest.mark.parametrize("keys", [-1, -2])
def test_the_kernel_is_the_product_of_its_two_factors(keys):
    q = queries(2, 3, 1 + 15, 8)
    gaussians = augmentation(8)(q, (5, 3), (5, 3)).compute()
    slope, alpha = gaussians.slope[..., 1:], gaussians.alpha[..., 1:]
    y, x = factors(slope, distances((5, 3), gaussians.cap, q.device, keys=keys), keys=keys)
    assert y.is_contiguous()
    assert x.is_contiguous()
    assert y.dtype == x.dtype == torch.float32
    if keys == -2:
        y, x = y.mT, x.mT
    assert y.shape == (2, 3, 15, 5)
    assert x.shape == (2, 3, 15, 3)
    product = torch.einsum("bhpi,bhpj->bhpij", alpha.unsqueeze(-1) * y, x).flatten(-2)
    assert_close(gaussian_kernel(gaussians), product, rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (7, 11)])
def test_distances_are_those_of_the_grid_squared_and_capped(grid):
    cpu = torch.device("cpu")
    patches = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    for of_patches, side, n in zip(distances(grid, 3, cpu), (0, 1), grid, strict=True):
        assert of_patches.dtype == torch.float32
        assert of_patches.tolist() == [[min((p[side] - at) ** 2, 3) for at in range(n)] for p in patches]
    for kept, of_keys, of_tokens in zip(
        distances(grid, 3, cpu),
        distances(grid, 3, cpu, keys=-2),
        distances(grid, 3, cpu, prefix=5, keys=-2),
        strict=True,
    ):
        assert_close(of_keys, kept.mT, rtol=0, atol=0)
        assert of_keys.is_contiguous()
        assert of_tokens.shape[-1] == 5 + len(patches)
        assert of_tokens.isfinite().all()
        assert_close(of_tokens[..., 5:], kept.mT, rtol=0, atol=0)


def test_zero_maps_give_a_variance_of_one_patch_scaled_with_the_grid():
    gaug = GaussianAugmentation(8)
    for parameter in gaug.parameters():
        torch.nn.init.zeros_(parameter)
    q = queries(1, 2, 1 + 16, 8)

    var, alpha = gaug.variance_and_alpha(q, (4, 4), (4, 4))
    assert_close(var, torch.ones(2, 1, 2, 1 + 16))
    assert_close(alpha, torch.full((1, 2, 1 + 16), math.log(2)))

    var, _ = gaug.variance_and_alpha(queries(1, 2, 1 + 48, 8), (6, 8), (4, 4))
    assert_close(var, torch.full((2, 1, 2, 1 + 48), 1.5))


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
        half = gaug(q, (5, 4), (5, 4)).compute()
    full = gaug(q.float(), (5, 4), (5, 4)).compute()

    for a, b in zip(half[:2], full[:2], strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, rtol=0, atol=0)


# Variants


def test_a_fixed_kernel_does_not_hear_the_query():
    gaug = GaussianAugmentation(8, query_dependent=False)
    with torch.no_grad():
        for parameter in gaug.parameters():
            parameter.normal_()
    a, b = (gaussian_kernel(gaug(queries(1, 2, 16, 8, seed=seed), (4, 4), (4, 4))) for seed in (1, 2))
    assert torch.equal(a, b)
    assert {name for name, _ in gaug.named_parameters()} == {"log_var.bias", "log_alpha.bias"}
    assert set(gaug.state_dict()) == set(GaussianAugmentation(8).state_dict())


def test_an_isotropic_kernel_is_as_high_as_it_is_wide():
    gaug = GaussianAugmentation(8, isotropic=True)
    slope = gaug(queries(2, 3, 16, 8), (4, 4), (4, 4)).compute().slope
    assert slope.shape == (2, 2, 3, 16)
    assert torch.equal(slope[0], slope[1])


def test_a_strength_that_is_not_learned_is_1():
    gaug = GaussianAugmentation(8, learned_alpha=False)
    alpha = gaug(queries(2, 3, 16, 8), (4, 4), (4, 4)).compute().alpha
    assert_close(alpha, torch.ones(2, 3, 16))
    assert {name for name, _ in gaug.named_parameters()} == {"log_var.weight", "log_var.bias"}


@pytest.mark.parametrize("learned_alpha", [True, False])
def test_kernels_begin_as_wide_and_as_strong_as_asked(learned_alpha):
    options = {"query_dependent": False, "learned_alpha": learned_alpha}
    gaug = GaussianAugmentation(8, initial_variance=4.0, initial_alpha=0.05, **options)
    var, alpha = gaug.variance_and_alpha(queries(1, 2, 64 * 64, 8), (64, 64), (64, 64))
    assert_close(var, torch.full_like(var, 4.0), rtol=2e-3, atol=0)  # the grid has 4,096 patches
    assert_close(alpha, torch.full_like(alpha, 0.05))
    assert ("log_alpha.bias" in dict(gaug.named_parameters())) == learned_alpha
    with pytest.raises(ValueError, match=r"must be greater than 0; got 1\.0 and 0"):
        GaussianAugmentation(8, initial_alpha=0)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("grid", "built_for"), [((3, 4), (3, 4)), ((5, 4), (3, 3))])
def test_a_rotated_kernel_is_the_gaussian_of_its_covariance(grid, built_for, prefix):
    torch.manual_seed(0)
    gaug = GaussianAugmentation(8, rotated=True)
    with torch.no_grad():
        for parameter in gaug.parameters():
            parameter.normal_(std=0.3)  # with a correlation near 1, rounding decides
    q = queries(1, 2, prefix + grid[0] * grid[1], 8)
    of_patches = q[:, :, prefix:]
    var, alpha = gaug.variance_and_alpha(of_patches, grid, built_for)
    r = torch.tanh(gaug.correlation(of_patches)).squeeze(-1)
    reach = max(built_for) - 1
    places = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    kernel = gaussian_kernel(gaug(q, grid, built_for))
    for h in range(2):
        for p, (i, j) in enumerate(places):
            y, x = (var[axis, 0, h, p].item() + 0.1 for axis in (0, 1))
            c = r[0, h, p].item() * math.sqrt(y * x)
            inverse = torch.linalg.inv(torch.tensor([[y, c], [c, x]], dtype=torch.float64))
            for t, (k, m) in enumerate(places):
                d = torch.tensor([i - k, j - m], dtype=torch.float64).clamp(-reach, reach)
                expected = alpha[0, h, p].item() * math.exp(-0.5 * (d @ inverse @ d).item())
                assert kernel[0, h, p, t].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_without_correlation_a_rotated_kernel_is_the_usual_one():
    rotated, usual = GaussianAugmentation(8, rotated=True), augmentation(8)
    rotated.load_state_dict(usual.state_dict(), strict=False)
    with torch.no_grad():
        rotated.correlation.weight.zero_()
    q = queries(2, 3, 12, 8)
    kernels = [gaussian_kernel(gaug(q, (3, 4), (4, 4))) for gaug in (rotated, usual)]
    assert_close(kernels[0], kernels[1], rtol=1e-5, atol=1e-6)


def test_a_gate_begins_nearly_shut():
    gaug = GaussianAugmentation(8, gated=True)
    kernel = gaussian_kernel(gaug(queries(2, 3, 16, 8), (4, 4), (4, 4)))
    assert 0 < kernel.max() < 2e-6


def test_a_mixture_is_its_sum_of_gaussians():
    mixture = GaussianMixture(3, (4, 4))
    with torch.no_grad():
        mixture.alpha.normal_()
    s = mixture(torch.randn(2, 3, 12, 8), (3, 4), (4, 4))
    assert s.shape == (1, 1, 12, 12)
    var = mixture.log_var.exp() * 3 / 4
    for p in range(12):
        for t in range(12):
            squared = (p // 4 - t // 4) ** 2 + (p % 4 - t % 4) ** 2
            expected = (mixture.alpha * torch.exp(-0.5 * squared / var)).sum()
            assert_close(s[0, 0, p, t], expected, rtol=1e-5, atol=1e-6)
    assert_close(mixture.log_var.exp()[[0, 2]], torch.tensor([1.0, 16.0]))
