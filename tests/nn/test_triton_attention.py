"""What can be said of the Triton kernels without a GPU, and what a GPU has to add."""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.nn import (
    GaussianAugmentation,
    GaussianMixture,
    attention,
    fused_attention,
    gaussian_attention,
)
from locat_lightning.nn.attention import implementation
from locat_lightning.nn.fused_attention import unsupported
from locat_lightning.nn.gaussian import gaussian_kernel

ROOT = Path(__file__).parents[2]


@pytest.mark.compilers
def test_the_kernels_in_an_interpreter():
    """In a process of its own, where Triton is told before its first import that it interprets."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/nn/interpreted_attention.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.compilers
@pytest.mark.parametrize("card", [90, 100])
@pytest.mark.parametrize(("name", "most"), [("forward", 18), ("d_queries", 23), ("d_keys_values", 20)])
def test_a_kernel_fits_into_the_registers_of_a_hopper_or_blackwell_gpu(
    name, most, card, tmp_path, monkeypatch
):
    """Compiled ahead of time. Without atomic additions, the sums have one order."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = runpy.run_path(str(ROOT / "benchmarks" / "kernels.py"))
    found = kernels["compiled"](kernels["Case"](name, card, 64))
    assert found.spills == 0
    assert 8 < found.instructions <= most
    assert not re.search(r"\b(atom|red)\.", found.ptx)


def test_a_layer_moves_at_most_a_quarter_more_than_flash_attention():
    pytest.importorskip("triton")
    count = runpy.run_path(str(ROOT / "benchmarks" / "traffic.py"))["count"]
    plain, ours = (count(256, 6, (14, 14), fused=fused) for fused in (False, True))
    q = 256 * 6 * 197 * 64 * 2
    assert 18 * q < plain.moved < 19 * q  # q, k, v, out; these, and 4 gradients; 6 where qkv is put together
    assert plain.moved < ours.moved <= 1.0e9


def lazy(dtype=torch.bfloat16, d=16, **variant):
    q = torch.randn(1, 2, 7, d, dtype=dtype)
    return q, GaussianAugmentation(d, **variant)(q, (2, 3), (2, 3))


def test_without_triton_a_reason_is_given(monkeypatch):
    assert unsupported(*lazy()) == "it needs an NVIDIA GPU"
    monkeypatch.setattr(fused_attention, "_unsupported_device", lambda device: "")
    assert unsupported(*lazy()) == unsupported(*lazy(torch.float16)) == ""
    assert "not float32" in unsupported(*lazy(torch.float32))
    assert "product" in unsupported(*lazy(rotated=True))
    assert "not 8" in unsupported(*lazy(d=8))


def test_the_choice(monkeypatch):
    q, gaussians = lazy()
    bias = torch.zeros(1, 2, 7, 7)
    mixture = GaussianMixture(2, (2, 3))(q, (2, 3), (2, 3))
    assert implementation(q, gaussians)[0] == "chunks"
    monkeypatch.setattr(attention, "unsupported", lambda *_: "")  # on a GPU
    assert implementation(q, gaussians) == ("Triton", "")
    assert implementation(q, gaussians, dropout=0.1) == ("plain", "attention weights are dropped")
    assert implementation(q, gaussians, bias=bias) == ("plain", "logits have a bias")
    assert implementation(q, gaussians.compute()) == ("chunks", "the kernels are given")
    assert implementation(q, mixture) == ("plain", "the kernels are given")

    monkeypatch.setattr(attention, "FORCED", "plain")
    assert implementation(q, gaussians) == ("plain", "LOCAT_ATTENTION=plain")
    monkeypatch.setattr(attention, "FORCED", "triton")
    assert implementation(q, gaussians) == ("Triton", "")
    with pytest.raises(InputError, match="LOCAT_ATTENTION=triton cannot be used: logits have a bias"):
        implementation(q, gaussians, bias=bias)
    monkeypatch.setattr(attention, "FORCED", "cuda")
    with pytest.raises(InputError, match="must be triton or plain, not 'cuda'"):
        implementation(q, gaussians)


def test_the_plain_expression_can_be_forced(monkeypatch):
    q, gaussians = lazy(torch.float32)
    expected = gaussian_attention(q, q, q, gaussians)
    monkeypatch.setattr(attention, "FORCED", "plain")
    monkeypatch.setattr(attention, "chunked_attention", None)
    torch.testing.assert_close(gaussian_attention(q, q, q, gaussians), expected)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


def reference(q, k, v, gaussians):
    """In float64, from the kernels in float32."""
    s = F.pad(gaussian_kernel(gaussians), (q.shape[2] - math.prod(gaussians.grid), 0) * 2)
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + s.double()
    return logits.softmax(-1) @ v


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("grid", "prefix", "d"),
    [
        ((14, 14), 1, 64),
        ((6, 6), 1, 64),
        ((32, 32), 5, 64),
        ((40, 40), 1, 32),
        ((9, 20), 0, 80),
        ((7, 3), 6, 128),
    ],
)
def test_on_a_gpu(gpu, dtype, grid, prefix, d, monkeypatch):
    """An error of some roundings beside float64, nothing that is left unwritten, and the same bits twice."""
    monkeypatch.setattr(attention, "FORCED", "triton")
    torch.manual_seed(0)
    gaug = GaussianAugmentation(d).to(gpu)
    for parameter in gaug.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    qkv = torch.randn(2, prefix + math.prod(grid), 3, 3, d, device=gpu, dtype=dtype)
    weight = torch.randn(2, 3, qkv.shape[1], d, device=gpu, dtype=dtype)

    def run(function, dtype):
        held = qkv.to(dtype, copy=True).requires_grad_()
        q, k, v = (t.transpose(1, 2) for t in held.unbind(2))
        source = q if dtype == qkv.dtype else q.to(torch.float32)
        out = function(q, k, v, gaug(source, grid, grid))
        return out, *torch.autograd.grad((out * weight).sum(), [held, *gaug.parameters()])

    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        first, again = run(gaussian_attention, dtype), run(gaussian_attention, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(first, again, run(reference, torch.float64), strict=True):
        assert torch.equal(a, b)
        assert (a.double() - c).abs().max() <= 8 * torch.finfo(dtype).eps * c.abs().max()


@pytest.mark.gpu
def test_a_compiled_layer_on_a_gpu(gpu, monkeypatch):
    from tests.nn.test_attention import layer

    monkeypatch.setattr(attention, "FORCED", "triton")
    module = layer(attn_head_dim=16).to(gpu)
    x = torch.randn(2, 17, 24, device=gpu)
    with torch.autocast("cuda", torch.bfloat16):
        eager = module(x)
        compiled = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)
