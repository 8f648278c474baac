"""PRR against its definition written as loops, and against timm's module, which refines every row."""

import math

import pytest
import torch
from timm.layers import AttentionPoolPrr
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from locat_lightning.nn import PatchRefinement


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def refine_by_loops(x, heads, pool):
    """method.md, section 2: row after row, in Python's floats. Returns [B, D]."""
    out = torch.zeros(x.shape[0], x.shape[2], dtype=torch.float64)
    d = x.shape[2] // heads
    for b in range(x.shape[0]):
        for h in range(heads):
            rows = x[b, :, h * d : (h + 1) * d].tolist()
            refined = []
            for query in rows:
                weights = [
                    math.exp(sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(d))
                    for key in rows
                ]
                total = sum(weights)
                refined.append(
                    [sum(w * row[c] for w, row in zip(weights, rows, strict=True)) / total for c in range(d)]
                )
            mean = [sum(column) / len(rows) for column in zip(*refined, strict=True)]
            out[b, h * d : (h + 1) * d] = torch.tensor(refined[0] if pool == "token" else mean)
    return out


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 4), (7, 2, 3), (17, 3, 8)])
def test_prr_is_the_definition(pool, n, heads, d):
    x = tokens(2, n, heads * d)
    pooled = PatchRefinement(heads * d, num_heads=heads, pool_type=pool)(x)
    assert_close(pooled, refine_by_loops(x, heads, pool).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norms", [{}, {"pre_norm": True, "post_norm": True}])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_values_and_gradients_are_timms(pool, norms):
    results = []
    for cls in (AttentionPoolPrr, PatchRefinement):
        torch.manual_seed(1)
        module = cls(24, num_heads=3, pool_type=pool, **norms)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        x = tokens(2, 26, 24).requires_grad_()
        pooled = module(x)
        gradients = torch.autograd.grad((pooled * tokens(2, 24, seed=2)).sum(), [x, *module.parameters()])
        assert not (gradients[0] == 0).all(-1).any()  # every token has its share
        results.append([pooled, *gradients])
    for theirs, ours in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_of_all_rows_only_cls_is_computed():
    x = tokens(2, 197, 24)
    flops = {}
    for cls in (AttentionPoolPrr, PatchRefinement):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            cls(24, num_heads=3)(x.requires_grad_()).sum().backward()
        flops[cls] = counter.get_total_flops()
    assert flops[AttentionPoolPrr] >= 6 * 2 * 2 * 197**2 * 24  # the counter does see the attention
    assert 0 < flops[PatchRefinement] <= flops[AttentionPoolPrr] / 10


def test_bfloat16_under_autocast():
    x = tokens(2, 17, 24)
    module = PatchRefinement(24, num_heads=3)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = module(x.bfloat16())
    assert pooled.dtype == torch.bfloat16
    assert_close(pooled.float(), module(x), rtol=3e-2, atol=3e-2)
