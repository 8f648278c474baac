"""What the attention of a layer moves on a GPU, counted without one: operators and bytes.

Fake tensors pass through the layer's code as on a GPU; of the Triton kernels the launches are recorded. Every
operator or kernel reads the tensors that it is given once, and writes its results once (views are free).
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # no public name yet
from torch.utils._python_dispatch import TorchDispatchMode  # as above
from torch.utils._pytree import tree_leaves  # as above

from locat_lightning.nn import GaussianAugmentation, fused_attention, gaussian_attention, triton_attention

VIEWS = {
    *("view", "_unsafe_view", "transpose", "t", "permute", "expand", "slice", "select", "split", "unbind"),
    *("split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "_reshape_alias"),
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
}
OURS = {
    torch.ops.locat.gaussian_attention.default: fused_attention.gaussian_attention,
    torch.ops.locat.gaussian_attention_backward.default: fused_attention.gaussian_attention_backward,
}


def nbytes(t: Tensor) -> int:
    """Bytes of a tensor's own elements; dimensions that are expanded are read once."""
    count = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else 1
    return count


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators and launches (`count`) and the bytes that they move (`moved`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.moved = 0

    def add(self, *tensors: Any) -> None:
        """Count a kernel that reads or writes each of these tensors once."""
        self.count += 1
        self.moved += sum(nbytes(t) for t in {id(t): t for t in tensors if isinstance(t, Tensor)}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OURS:
            with self:
                return OURS[func]._init_fn(*args)  # the function behind the operator has no public name
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] not in VIEWS and any(
            isinstance(t, Tensor) for t in tree_leaves(out)
        ):
            self.add(*tree_leaves((args, kwargs, out)))
        return out


class Launch:
    """In the place of a kernel: counts its launches."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **_: self.traffic.add(*args)


def count(images: int, heads: int, grid: tuple[int, int], d: int = 64, *, fused: bool = True) -> Traffic:
    """Count the forward and backward pass, from a packed q, k, v in bfloat16 to their gradient."""
    shape = images, 1 + grid[0] * grid[1], 3, heads, d
    gaug, traffic = GaussianAugmentation(d), Traffic()
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(fused_attention, "INTERPRETED", True):
        qkv = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        with (
            traffic,
            mock.patch.object(triton_attention, "forward", Launch(traffic)),
            mock.patch.object(triton_attention, "d_queries", Launch(traffic)),
            mock.patch.object(triton_attention, "d_keys_values", Launch(traffic)),
        ):
            q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
            if fused:
                out = gaussian_attention(q, k, v, gaug(q, grid, grid))
            else:
                out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
            torch.autograd.backward(out, torch.empty_like(out))
    return traffic


def main() -> None:
    cases = (256, 3, 14), (256, 6, 14), (256, 12, 14), (32, 6, 32), (32, 6, 40), (8, 6, 64)
    for images, heads, side in cases:
        plain, ours = (count(images, heads, (side, side), fused=fused) for fused in (False, True))
        print(f"{images:3} images, {heads:2} heads, {1 + side * side:4} tokens", end="")
        for name, found in (("flash attention", plain), ("GAug", ours)):
            print(f"   {name}: {found.count} kernels, {found.moved / 1e9:.2f} GB", end="")
        print()


if __name__ == "__main__":
    main()
