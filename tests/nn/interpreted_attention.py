"""The Triton kernels in Triton's interpreter, on a CPU: `test_triton_attention.py` runs this file.

TRITON_INTERPRET=1 has to be set before anything imports Triton. The interpreter multiplies no matrices in
half precision, so that all is float32 here.
"""

import copy
import math
import os

import pytest
import torch
from timm.layers import Attention
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from locat_lightning.errors import InputError
from locat_lightning.nn import GaussianAugmentation, PatchGrid, attention, gaussian_attention
from locat_lightning.nn.layers import add_gaussians

assert os.environ["TRITON_INTERPRET"] == "1"
# NumPy says so, a GPU does not: exp of -z, and the weights of places where no key is, which are not used.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    """Forced, and with NaN in all memory that nothing was written to."""
    monkeypatch.setattr(attention, "FORCED", "triton")
    torch.use_deterministic_algorithms(True)  # which fills empty tensors
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def augmentation(d, **variant):
    gaug = GaussianAugmentation(d, **variant)
    torch.manual_seed(0)
    for parameter in gaug.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gaug


def definition(q, k, v, gaug, source, grid, built_for):
    """method.md, section 1, with all of S; in the type of its arguments."""
    patches = math.prod(grid)
    prefix = q.shape[2] - patches
    C = max(built_for) ** 2
    z = source @ gaug.log_var.weight.T + gaug.log_var.bias
    var = C * torch.sigmoid(z - (math.log(C - 1) if C > 2 else 0))
    if grid != built_for:
        var = var * min(grid) / min(built_for)
    var = var.expand(*z.shape[:-1], 2)[:, :, prefix:, None] + (0.2 if max(built_for) > 26 else 0.1)
    alpha = F.softplus((source @ gaug.log_alpha.weight.T + gaug.log_alpha.bias)[:, :, prefix:])
    if gaug.gate is not None:
        alpha = alpha * 50 * gaug.gate
    at = torch.stack([torch.arange(patches) // grid[1], torch.arange(patches) % grid[1]], -1)
    squares = (at[:, None] - at).square().clamp(max=(max(built_for) - 1) ** 2).to(q.dtype)
    s = alpha * torch.exp(-0.5 * (squares / var).sum(-1))
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + F.pad(s, (prefix, 0, prefix, 0))
    return logits.softmax(-1) @ v


def outputs(function, gaug, qkv, source=None, dtype=torch.float32):
    """`function` of q, k, v, views of a packed [B, N, 3, h, d], and of `source`; and its gradients."""
    gaug = copy.deepcopy(gaug).to(dtype)
    inputs = [t.to(dtype).requires_grad_() for t in (qkv, source) if t is not None]
    q, k, v = (t.transpose(1, 2) for t in inputs[0].unbind(2))
    out = function(q, k, v, gaug, q if source is None else inputs[1])
    loss = (out * normal(*out.shape, seed=9).to(dtype)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [*inputs, *gaug.parameters()])]


def assert_correct(gaug, qkv, grid, built_for, source=None, tolerance=5e-6):
    def ours(q, k, v, gaug, source):
        return gaussian_attention(q, k, v, gaug(source, grid, built_for))

    def reference(q, k, v, gaug, source):
        return definition(q, k, v, gaug, source, grid, built_for)

    found = outputs(ours, gaug, qkv, source)
    for a, b in zip(found, outputs(reference, gaug, qkv, source, torch.float64), strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=0.5)
    return found


# images and heads, grid, grid that the model was built for, prefix tokens, d
CASES = [
    ((2, 2), (4, 4), (4, 4), 1, 16),
    ((1, 1), (14, 14), (14, 14), 1, 64),
    ((1, 2), (5, 3), (5, 3), 5, 16),
    ((2, 1), (3, 5), (5, 3), 0, 32),
    ((1, 1), (3, 4), (2, 2), 1, 16),  # capped
    ((1, 2), (1, 7), (1, 7), 1, 16),
    ((1, 1), (7, 1), (4, 4), 6, 16),
    ((1, 1), (3, 2), (1, 1), 1, 24),
    ((1, 1), (1, 1), (2, 2), 0, 16),
    ((1, 1), (4, 3), (32, 32), 70, 16),  # more prefix tokens than a tile has keys
    ((1, 1), (8, 16), (8, 16), 0, 16),  # full tiles of 16 columns, and
    ((1, 1), (4, 16), (8, 16), 2, 16),  # another one for prefix tokens
    ((1, 1), (9, 20), (9, 20), 6, 16),  # several tiles in a row
    ((1, 1), (2, 70), (9, 40), 1, 128),
]


@pytest.mark.parametrize(("batch", "grid", "built_for", "prefix", "d"), CASES)
def test_outputs_and_gradients_are_the_definitions(batch, grid, built_for, prefix, d):
    images, heads = batch
    qkv = normal(images, prefix + math.prod(grid), 3, heads, d)
    assert_correct(augmentation(d), qkv, grid, built_for)


@pytest.mark.parametrize(
    "variant",
    [
        {"isotropic": True},
        {"learned_alpha": False},
        {"query_dependent": False},
        {"gated": True},
    ],
    ids=str,
)
def test_variants(variant):
    """Also with a gate that is negative, as training may make it."""
    gaug = augmentation(16, **variant)
    if gaug.gate is not None:
        torch.nn.init.constant_(gaug.gate, -0.04)
    assert_correct(gaug, normal(1, 16, 3, 2, 16), (3, 5), (3, 5))


def test_the_kernels_may_be_those_of_other_queries():
    """Those before their rotary embedding, and in another layout."""
    source = normal(2, 1, 16, 16, seed=3).mT.contiguous().mT
    assert_correct(augmentation(16), normal(2, 16, 3, 1, 16), (3, 5), (3, 5), source)


@pytest.mark.parametrize("of", ["log_var", "log_alpha"])
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_extreme_kernels(of, bias):
    gaug = augmentation(16)
    torch.nn.init.constant_(getattr(gaug, of).bias, bias)
    assert_correct(gaug, normal(1, 17, 3, 1, 16), (4, 4), (4, 4), tolerance=2e-3 if bias == 1e4 else 5e-6)


@pytest.mark.parametrize("sign", [-1, 1])
def test_places_without_a_token_get_no_weight(sign):
    """All logits are far from 0, which is the product of a query and a key that is not there."""
    qkv = normal(1, 1 + 3 * 5, 3, 1, 16)
    qkv[:, :, 0] = 20
    qkv[:, :, 1] = 10 * sign + 0.1 * qkv[:, :, 1]
    assert_correct(augmentation(16), qkv, (3, 5), (3, 5), tolerance=1e-3)


def test_nothing_beyond_the_tokens_is_read():
    held = torch.full((2, 40, 3, 2, 24), torch.nan)
    qkv = held[:, 5:31, :, :, :20]
    qkv.copy_(normal(*qkv.shape))
    gaug = augmentation(20)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    out = gaussian_attention(q, k, v, gaug(q, (5, 5), (5, 5)))
    assert_close(out, definition(q, k, v, gaug, q, (5, 5), (5, 5)))


def test_two_grids_in_turn():
    gaug = augmentation(16)
    for _ in range(2):
        for grid in ((4, 4), (2, 3)):
            assert_correct(gaug, normal(1, 1 + math.prod(grid), 3, 1, 16), grid, (4, 4))


def test_no_images():
    qkv = torch.empty(0, 17, 3, 2, 16, requires_grad=True)
    gaug = augmentation(16)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    out = gaussian_attention(q, k, v, gaug(q, (4, 4), (4, 4)))
    out.sum().backward()
    assert out.shape == (0, 2, 17, 16)
    assert qkv.grad.shape == qkv.shape
    assert all((p.grad == 0).all() for p in gaug.parameters())


def arguments(grid=(2, 3), source=False):
    q, k, v = (normal(1, 1, 1 + math.prod(grid), 16, seed=seed).requires_grad_() for seed in (1, 2, 3))
    gaug = augmentation(16)
    maps = gaug.maps(grid).detach().requires_grad_()
    return q, k, v, normal(*q.shape).requires_grad_() if source else None, maps, grid, (9.0, 0.1, 4.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("source", [False, True])
def test_the_operator_keeps_the_rules_of_torch(source):
    torch.library.opcheck(torch.ops.locat.gaussian_attention, arguments(source=source))


def layer(**kwargs):
    torch.manual_seed(0)
    attention = Attention(16, num_heads=1, **kwargs)
    add_gaussians(attention, augmentation(16))
    attention.grid, attention.num_prefix_tokens = PatchGrid((2, 3)), 1
    return attention


def gradients(function, layer, x):
    out = function(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])


def test_a_compiled_layer_calls_the_operator():
    attention, x = layer(), normal(1, 7, 16).requires_grad_()
    called = []

    def backend(graph, inputs):
        called.extend(node.args[3] for node in graph.graph.nodes if "gaussian_attention" in str(node.target))
        return aot_eager(graph, inputs)

    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    assert_close(gradients(compiled, attention, x), gradients(attention, attention, x))
    assert called == [None]  # once, with q as the source of the kernels


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant):
    attention, x = layer(), normal(1, 7, 16).requires_grad_()

    def saved(x):
        return checkpoint(attention, x, use_reentrant=reentrant)

    def run(function):
        for t in (x, *attention.parameters()):
            t.grad = None
        function(x).square().sum().backward()
        return [t.grad for t in (x, *attention.parameters())]

    assert_close(run(saved), run(attention), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_an_exported_layer_runs_without_it(monkeypatch):
    monkeypatch.setattr(attention, "FORCED", "")
    module, x = layer().eval(), normal(2, 7, 16)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "locat.gaussian_attention" not in str(program.graph)
    with torch.no_grad():
        assert_close(program.module()(x), module(x))
        traced = torch.jit.trace(module, x)
        assert "locat::" not in str(traced.inlined_graph)


def test_dropout_falls_back(monkeypatch):
    module, x = layer(attn_drop=0.1), normal(1, 7, 16)
    with pytest.raises(InputError, match="cannot be used: attention weights are dropped"):
        module(x)
    monkeypatch.setattr(attention, "FORCED", "")
    monkeypatch.setattr(attention, "fused_attention", None)
    module(x)


def test_flops_are_those_of_the_plain_expression_and_of_the_logits_again(monkeypatch):
    counts = []
    for forced in ("triton", "plain"):
        monkeypatch.setattr(attention, "FORCED", forced)
        module, x = layer(), normal(1, 7, 16).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            out = module(x)
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[:2] == [counts[2], counts[3] + 2 * 7 * 7 * 16]


def test_autocast_reads_bfloat16_and_gives_it():
    """Without the numbers, which the interpreter cannot compute."""
    module = layer(qk_norm=True, norm_layer=torch.nn.LayerNorm)
    seen = []
    with FakeTensorMode(allow_non_fake_inputs=True), Operators(seen), torch.autocast("cpu", torch.bfloat16):
        module(torch.empty(1, 7, 16)).float().sum().backward()
    forward, backward = (call for call in seen if call[0].startswith("locat"))
    assert {t.dtype for t in forward[1][:3]} == {torch.bfloat16}
    assert forward[1][4].dtype == torch.float32
    assert [t.dtype for t in backward[2]] == [torch.bfloat16] * 4 + [torch.float32]


class Operators(TorchDispatchMode):
    """Notes name, arguments and results of the operators."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen.append((function.name(), args, out))
        return out
