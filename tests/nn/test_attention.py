"""Gaussian-augmented attention against its definition written as loops, on all of its paths."""

import copy
import math

import pytest
import torch
from timm.layers import Attention
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locat_lightning.nn import (
    GaussianAugmentation,
    PatchGrid,
    attention,
    chunked_attention,
    gaussian_attention,
)
from locat_lightning.nn.gaussian import GATE_GAIN
from locat_lightning.nn.layers import add_gaussians


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def augmentation(head_dim, **variant):
    gaug = GaussianAugmentation(head_dim, **variant)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gaug.parameters():
            parameter.normal_()
    return gaug


def force(monkeypatch, path):
    """Take one path, and fail where another one would be taken.

    "one expression", "chunks" as they would be, or ("short" or "flash", heads, queries) of a chunk.
    """
    if path == "one expression":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(attention, "chunked_attention", None)
    else:
        monkeypatch.setattr(attention, "gaussian_kernel", None)
        if path != "chunks":
            kind, heads, queries = path
            other = {"short": "_flash_attention", "flash": "_short_attention"}[kind]
            monkeypatch.setattr(chunked_attention, other, None)
            monkeypatch.setattr(chunked_attention, "_is_short", lambda *_: kind == "short")
            monkeypatch.setattr(
                chunked_attention, "_chunk_size", lambda q: (min(heads, len(q)), min(queries, q.shape[-2]))
            )
            monkeypatch.setattr(chunked_attention, "_flash_chunk_size", lambda *_: (heads, 2, queries))


def attention_by_loops(q, k, v, gaug, grid, built_for):
    """method.md, section 1: token after token, for all images and heads at once; differentiable."""
    height, width = grid
    tokens, d = q.shape[2:]
    prefix = tokens - height * width
    largest = max(built_for) ** 2
    shift = math.log(largest - 1) if largest > 2 else 0.0
    scale = 1.0 if grid == built_for else min(grid) / min(built_for)
    cap = min((max(built_for) - 1) ** 2, 13100)
    epsilon = 0.2 if max(built_for) == 32 else 0.1

    rows = []
    for p in range(tokens):
        z = (gaug.log_var.weight * q[:, :, p, None]).sum(-1) + gaug.log_var.bias
        a = (gaug.log_alpha.weight * q[:, :, p, None]).sum(-1) + gaug.log_alpha.bias
        var = largest / (1 + torch.exp(shift - z)) * scale + epsilon
        alpha = torch.log1p(a[..., 0].exp())
        logits = []
        for t in range(tokens):
            logit = (q[:, :, p] * k[:, :, t]).sum(-1) / math.sqrt(d)
            if p >= prefix and t >= prefix:
                i, j = divmod(p - prefix, width)
                i_, j_ = divmod(t - prefix, width)
                d_y, d_x = min((i - i_) ** 2, cap), min((j - j_) ** 2, cap)
                logit = logit + alpha * torch.exp(-0.5 * (d_y / var[..., 0] + d_x / var[..., 1]))
            logits.append(logit)
        weights = torch.stack(logits, -1).softmax(-1)
        rows.append((weights.unsqueeze(-1) * v).sum(-2))
    return torch.stack(rows, 2)


def value_and_gradients(function, gaug, shape, dtype):
    """`function` of q, k, v and `gaug` in `dtype`: its value and the gradients of a random projection."""
    gaug = copy.deepcopy(gaug).to(dtype)
    qkv = [normal(*shape, seed=seed).to(dtype).requires_grad_() for seed in (1, 2, 3)]
    out = function(*qkv, gaug)
    loss = (out * normal(*shape, seed=4).to(dtype)).sum()
    names = ["q", "k", "v", *dict(gaug.named_parameters())]
    gradients = torch.autograd.grad(loss, [*qkv, *gaug.parameters()])
    return {"value": out, **dict(zip(names, gradients, strict=True))}


def assert_same(ours, reference, tolerance=2e-5):
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert ours[name].dtype == torch.float32, name
        worst, largest = (ours[name] - expected).abs().max(), expected.abs().max()
        assert worst <= tolerance * largest, f"{name}: {worst:.1e} beside {largest:.1e}"


# grid of the images, grid that the model was built for, prefix tokens
CASES = [
    ((4, 4), (4, 4), 1),
    ((5, 3), (5, 3), 5),
    ((3, 5), (5, 3), 0),
    ((3, 4), (2, 2), 1),  # capped
    ((1, 7), (1, 7), 1),
    ((6, 1), (4, 4), 0),
    ((3, 2), (1, 1), 1),
    ((3, 3), (14, 14), 5),
    ((4, 3), (32, 32), 1),
]


@pytest.fixture(scope="module")
def by_loops():
    """The reference of each case, computed once."""
    results = {}

    def reference(grid, built_for, prefix, shape):
        key = grid, built_for, prefix, shape
        if key not in results:
            results[key] = value_and_gradients(
                lambda q, k, v, gaug: attention_by_loops(q, k, v, gaug, grid, built_for),
                augmentation(shape[-1]),
                shape,
                torch.float64,
            )
        return results[key]

    return reference


@pytest.mark.parametrize(
    "path",
    [
        "chunks",
        ("short", 4, 999),
        ("short", 1, 5),
        ("flash", 1, 5),
        ("flash", 2, 5),
        ("flash", 4, 999),
        "one expression",
    ],
    ids=str,
)
@pytest.mark.parametrize(("grid", "built_for", "prefix"), CASES)
def test_values_and_gradients_are_the_definitions(monkeypatch, by_loops, path, grid, built_for, prefix):
    shape = (3, 3, prefix + math.prod(grid), 4)
    expected = by_loops(grid, built_for, prefix, shape)
    force(monkeypatch, path)

    def ours(q, k, v, gaug):
        out = gaussian_attention(q, k, v, gaug(q, grid, built_for))
        with torch.inference_mode():  # where nothing is kept for a backward pass
            alone = gaussian_attention(q.detach(), k.detach(), v.detach(), gaug(q, grid, built_for))
        assert_close(alone, out)
        return out

    assert_same(value_and_gradients(ours, augmentation(4), shape, torch.float32), expected)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(
    ("heads", "tokens"), [(1, 5), (24, 17), (15, 197), (14, 257), (18, 160), (5, 700), (3, 1100)]
)
def test_the_chunks_are_every_query_of_every_head_once(monkeypatch, threads, heads, tokens):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen = torch.zeros(heads, 1, tokens, dtype=torch.int)
    begun = torch.zeros(heads, dtype=torch.int)
    size = chunked_attention._chunk_size(torch.empty(heads, tokens, 1))
    for first, queries, whole in chunked_attention._chunks((seen,), (begun,), size):
        queries += 1
        whole += first
        assert queries.shape[0] <= size[0]
        assert queries.shape[2] <= size[1]
        assert queries.numel() * tokens <= max(2, threads) * 2 * 2**18
    assert (seen == 1).all()
    assert (begun == 1).all()


@pytest.mark.parametrize(
    ("threads", "tokens", "size"),
    [
        (1, 197, (6, 197)),
        (2, 197, (12, 197)),
        (8, 197, (24, 197)),  # all there are
        (1, 577, (1, 577)),
        (2, 577, (2, 577)),
        (8, 577, (8, 577)),
        (1, 1025, (2, 342)),
        (2, 1025, (2, 342)),
        (8, 1025, (8, 342)),
    ],
)
def test_each_thread_has_heads_of_its_own(monkeypatch, threads, tokens, size):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert chunked_attention._chunk_size(torch.empty(24, tokens, 1)) == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [4, 40])
def test_no_images_are_no_mistake(side, dtype):
    shape = 0, 3, 1 + side * side, 8
    q, k, v = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    out = gaussian_attention(q, k, v, augmentation(8)(q, (side, side), (side, side)))
    out.sum().backward()
    assert out.shape == q.grad.shape == shape


@pytest.mark.parametrize("d", [8, 64])
def test_chunks_of_the_real_size_agree_with_one_expression(monkeypatch, d):
    """197 tokens and 10 heads in all: two chunks of five. Of 64 numbers a head, the weights are kept."""
    shape, grid = (2, 5, 197, d), (14, 14)

    def ours(q, k, v, gaug):
        return gaussian_attention(q, k, v, gaug(q, grid, grid))

    q = torch.empty(10, 197, d)
    sizes = [
        len(queries)
        for _, queries in chunked_attention._chunks((q.mT,), (), chunked_attention._chunk_size(q))
    ]
    assert sizes == [5, 5]
    chunked = value_and_gradients(ours, augmentation(d), shape, torch.float32)
    force(monkeypatch, "one expression")
    assert_same(chunked, value_and_gradients(ours, augmentation(d), shape, torch.float32))


@pytest.mark.parametrize(("tokens", "rows"), [(785, 784), (1601, 800), (4101, 820)])
def test_flash_attention_takes_its_rows_alike_and_by_blocks_of_256(tokens, rows):
    assert chunked_attention._flash_chunk_size(torch.empty(2, 3, tokens, 8), prefix=1) == (2, 1, rows)
    assert chunked_attention._flash_chunk_size(torch.empty(1, 3, tokens, 8), prefix=1) == (1, 2, rows)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_flash_attention_of_the_real_size_agrees_with_one_expression(monkeypatch, prefix):
    """1,600 patches of 2 images and 3 heads: the rows are taken in two parts."""
    shape, grid = (2, 3, prefix + 1600, 4), (32, 50)
    q, k, v = (normal(*shape, seed=seed) for seed in (1, 2, 3))
    gaussians = augmentation(4)(q, grid, grid)
    chunked = gaussian_attention(q, k, v, gaussians)
    force(monkeypatch, "one expression")
    torch.testing.assert_close(chunked, gaussian_attention(q, k, v, gaussians), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", [-0.5, -1e-6, 0.0, 1e-6, 2.0])
def test_any_gate_agrees_with_one_expression(monkeypatch, gate):
    """Training moves it across 0, where it goes on to learn."""
    gaug = augmentation(8, gated=True)
    torch.nn.init.constant_(gaug.gate, gate / GATE_GAIN)

    def ours(q, k, v, gaug):
        return gaussian_attention(q, k, v, gaug(q, (4, 4), (4, 4)))

    chunked = value_and_gradients(ours, gaug, (2, 3, 17, 8), torch.float32)
    assert chunked["gate"].abs() > 0
    force(monkeypatch, "one expression")
    assert_same(chunked, value_and_gradients(ours, gaug, (2, 3, 17, 8), torch.float32))


def test_dropout_drops_attention_weights():
    """As in timm: PyTorch's own dropout, so that one seed gives one result."""
    q, k, v = (normal(2, 2, 17, 8, seed=seed) for seed in (1, 2, 3))
    gaug = augmentation(8)
    s = gaug(q, (4, 4), (4, 4))
    kernel = torch.zeros(2, 2, 17, 17)
    kernel[..., 1:, 1:] = attention.gaussian_kernel(s)

    torch.manual_seed(5)
    ours = gaussian_attention(q, k, v, s, dropout=0.5)
    torch.manual_seed(5)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=kernel, dropout_p=0.5)

    assert_close(ours, expected)
    assert (ours - gaussian_attention(q, k, v, s)).abs().max() > 0.1


@pytest.mark.parametrize("path", ["chunks", "one expression"])
@pytest.mark.parametrize("qk", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32 from q-norm"])
def test_mixed_precision(monkeypatch, path, qk):
    """Layer norm under autocast on a GPU gives float32 queries and keys beside bfloat16 values."""
    gaug = augmentation(8)
    q, k, v = (normal(3, 3, 17, 8, seed=seed) for seed in (1, 2, 3))
    expected = [t.bfloat16().float().requires_grad_() for t in (q, k, v)]
    value = gaussian_attention(*expected, gaug(expected[0], (4, 4), (4, 4)))
    gradients = torch.autograd.grad(value.square().sum(), expected)

    force(monkeypatch, path)
    half = [
        t.detach().to(dtype).requires_grad_()
        for t, dtype in zip((q, k, v), (qk, qk, torch.bfloat16), strict=True)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        ours = gaussian_attention(*half, gaug(half[0], (4, 4), (4, 4)))
    assert ours.dtype == torch.bfloat16
    ours_gradients = torch.autograd.grad(ours.float().square().sum(), half)

    for a, b, like in zip([ours, *ours_gradients], [value, *gradients], [ours, *half], strict=True):
        assert a.dtype == like.dtype
        assert (a.float() - b).abs().max() <= 0.05 * b.abs().max()


def layer(**kwargs):
    torch.manual_seed(0)
    attention = Attention(24, num_heads=3, norm_layer=torch.nn.LayerNorm, **kwargs)
    add_gaussians(attention, GaussianAugmentation(attention.head_dim))
    attention.grid, attention.num_prefix_tokens = PatchGrid((4, 4)), 1
    return attention


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"qkv_bias": True, "qk_norm": True},
        {"gated": True, "scale_norm": True},
        {"attn_head_dim": 5, "dim_out": 7},
    ],
    ids=str,
)
def test_without_a_kernel_the_layer_is_timms(kwargs):
    """alpha = 0: all else of timm's layer, gate and norms too, is where it was."""
    ours, theirs = layer(**kwargs), Attention(24, num_heads=3, norm_layer=torch.nn.LayerNorm, **kwargs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = normal(2, 17, 24, seed=1)
        with_kernel = ours(x)
        ours.gaug.log_alpha.bias.fill_(-1e4)
        keys = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert not keys.missing_keys
        assert all(key.startswith("gaug.") for key in keys.unexpected_keys)
        assert_close(ours(x), theirs(x))
        assert (with_kernel - theirs(x)).abs().max() > 1e-3


@pytest.mark.parametrize("kwargs", [{"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}], ids=list)
def test_a_mask_is_an_error(kwargs):
    with pytest.raises(ValueError, match="takes no attn_mask"):
        layer()(normal(1, 17, 24, seed=1), **kwargs)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest output of any operation had, in memory of its own."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def largest_tensor(images, heads, side):
    tokens, d = 1 + side * side, 8
    gaug = augmentation(d)
    q, k, v = (normal(images, heads, tokens, d, seed=seed).requires_grad_() for seed in (1, 2, 3))
    with LargestTensor() as largest:
        gaussian_attention(q, k, v, gaug(q, (side, side), (side, side))).sum().backward()
    assert q.grad is not None
    return largest.numel


def test_memory_is_a_chunk_and_the_factors():
    """The matrices of three heads at a time (2**18 numbers): nothing that grows as B·h·N²."""
    one_chunk, factors = 3 * 257**2, 8 * 3 * 257 * (16 + 16)
    assert one_chunk <= largest_tensor(images=8, heads=3, side=16) <= max(one_chunk, factors)


def test_one_expression_has_the_kernel_and_nothing_larger(monkeypatch):
    force(monkeypatch, "one expression")
    assert largest_tensor(images=8, heads=3, side=16) == 8 * 3 * 257**2


def kept_for_backward(side, dim, *, prefix=0, of="qkv"):
    """Numbers of the largest tensor that the backward pass of 2 images' 3 heads takes."""
    shape = 2, 3, prefix + side * side, dim
    qkv = {name: normal(*shape, seed=1).requires_grad_(name in of) for name in "qkv"}
    gaug = augmentation(dim).requires_grad_("g" in of)
    gaussians = gaug(qkv["q"], (side, side), (side, side))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        gaussian_attention(**qkv, gaussians=gaussians).sum().backward()
    return max(sizes)


@pytest.mark.parametrize("of", ["qkv", "q", "k", "v", "g"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_the_weights_of_at_most_4_d_patches_are_kept(prefix, of):
    heads, tokens = 2 * 3, prefix + 36
    assert kept_for_backward(side=6, dim=9, prefix=prefix, of=of) == heads * tokens**2
    assert kept_for_backward(side=6, dim=8, prefix=prefix, of=of) == heads * tokens * 8


def test_kept_weights_are_not_computed_again(monkeypatch):
    q, k, v = (normal(2, 3, 17, 8, seed=seed).requires_grad_() for seed in (1, 2, 3))
    out = gaussian_attention(q, k, v, augmentation(8)(q, (4, 4), (4, 4)))
    monkeypatch.setattr(chunked_attention, "_weights", None)
    out.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("dim", [4, 2], ids=["kept", "computed again"])
def test_a_backward_pass_leaves_all_for_another(dim):
    q, k, v = (normal(2, 3, 17, dim, seed=seed).requires_grad_() for seed in (1, 2, 3))
    gaug = augmentation(dim)
    loss = gaussian_attention(q, k, v, gaug(q, (4, 4), (4, 4))).square().sum()
    inputs = q, k, v, *gaug.parameters()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(once, again)


def test_a_short_forward_pass_without_gradients_has_one_chunk_of_the_logits():
    q = normal(4, 3, 257, 64, seed=1)
    gaussians = augmentation(64)(q, (16, 16), (16, 16))
    with torch.inference_mode(), LargestTensor() as largest:
        gaussian_attention(q, q, q, gaussians)
    assert q.numel() < largest.numel == 3 * 257**2


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("side", [6, 40])
def test_a_gpu_agrees_with_a_cpu(gpu, side):
    shape, grid = (2, 3, 1 + side * side, 16), (side, side)

    def on(device):
        def function(q, k, v, gaug):
            q, k, v = (t.to(device) for t in (q, k, v))
            return gaussian_attention(q, k, v, gaug.to(device)(q, grid, grid)).cpu()

        ours = value_and_gradients(function, augmentation(16), shape, torch.float32)
        return {name: t.cpu() for name, t in ours.items()}

    assert_same(on(gpu), on("cpu"), tolerance=1e-4)


@pytest.mark.gpu
def test_neither_pass_waits_for_a_gpu(gpu):
    q, k, v = (normal(2, 3, 37, 16, seed=seed).to(gpu).requires_grad_() for seed in (1, 2, 3))
    gaug = augmentation(16).to(gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gaussian_attention(q, k, v, gaug(q, (6, 6), (6, 6))).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
