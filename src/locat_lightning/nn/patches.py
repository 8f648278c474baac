"""Which patches the tokens of a sequence are: the grid of their images, and a subset of it.

A layer sees a sequence, and GAug needs positions. A mask token keeps the sequence whole.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.layers import PatchDropout, patch_dropout_forward, register_notrace_module
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class PatchGrid:
    """The patch grid (rows, columns) of each sequence length, shared by all layers of one model.

    `note_grid` records it as images pass the patch embedding; a checkpointed block that is recomputed in the
    backward pass, after images of another size, then still finds the grid of its own tokens. Only grids with
    equally many patches (4×9 and 6×6) are mistaken for each other, if one passes between the forward and the
    backward pass of a checkpointed block of the other.

    Of a subset of the patches, `note_kept` records which they are. Here such a mistake is an error.
    """

    def __init__(self, built_for: tuple[int, int]) -> None:
        self.built_for = built_for
        self._by_patches = {math.prod(built_for): built_for}
        self._latest = built_for
        self._by_channel = False  # whether the images under way have a grid for each channel
        self._kept: dict[int, Tensor] = {}  # subsets by their number of patches
        self._next: Tensor | None = None  # of the images to come
        self._under_way: set[int] = set()  # numbers of patches of subsets that await a backward pass,
        self._replaced: set[int] = set()  # and of those that others have replaced before it

    def note(self, rows: int, columns: int) -> None:
        """Record the grid of images that are under way."""
        patches = rows * columns
        if self._by_patches.get(patches) != (rows, columns):  # `torch.compile` guards what is written
            self._by_patches[patches] = (rows, columns)
        self._latest, self._by_channel = (rows, columns), False
        if patches in self._kept:
            self._replace(patches)
            del self._kept[patches]
        if self._next is not None:
            kept, self._next = self._next, None
            self.note_kept(kept)

    def keep(self, kept: Tensor) -> None:
        """Announce which patches of the next images reach the layers: int64 [n], or [B, n] by image.

        This is for code that selects tokens itself, as lightly's `MaskedVisionTransformer` does. Patches are
        counted row by row, without prefix tokens, and come in the order of the tokens.
        """
        self._next = kept

    def note_channels(self, channels: int, device: torch.device) -> None:
        """Record that the images under way have a token at each place of their grid for each channel."""
        places = math.prod(self._latest)
        self.note_kept(torch.arange(places, device=device).repeat(channels))
        self._by_channel = True

    def note_kept(self, kept: Tensor, tokens: Tensor | None = None) -> None:
        """Record which patches of the images under way are kept: [n] or [B, n] (see `keep`).

        `tokens` are those that go on to the layers; a subset is under way until their gradient is known.
        """
        patches = kept.shape[-1]
        if self._by_channel:
            kept = kept % math.prod(self._latest)  # the places are the same in each channel
        self._by_patches[patches] = self._latest
        self._replace(patches)
        self._kept[patches] = kept
        if tokens is not None and tokens.requires_grad and not torch.compiler.is_compiling():
            self._under_way.add(patches)
            tokens.register_hook(partial(self._end, patches))

    def of(self, patches: int) -> tuple[int, int]:
        """Return rows and columns of the grid that a sequence of patches is of.

        Raises:
            ValueError: no such image or subset was seen, or a checkpointed block is recomputed for a subset
                that another of as many patches has replaced.
        """
        if patches not in self._by_patches:
            raise ValueError(
                f"no image with {patches} patches went through the patch embedding (grids seen: "
                f"{sorted(set(self._by_patches.values()))}): GAug has to know which patches are kept "
                "(PatchGrid.keep)"
            )
        # Private, but torch's own checkpointing asks the same: whether this is a backward pass.
        if (
            patches in self._replaced
            and not torch.compiler.is_compiling()
            and torch._C._current_graph_task_id() != -1
        ):
            raise ValueError(
                f"two subsets of {patches} patches before a backward pass: activation checkpointing would "
                "mix them up; run the backward pass of one first, or leave checkpointing out"
            )
        return self._by_patches[patches]

    def kept_of(self, patches: int) -> Tensor | None:
        """Return which patches of its grid a sequence holds, [n] or [B, n]; None if all, in order."""
        return self._kept.get(patches)

    def _replace(self, patches: int) -> None:
        if patches in self._under_way:
            self._replaced.add(patches)

    def _end(self, patches: int, gradient: Tensor) -> None:
        self._under_way.discard(patches)
        self._replaced.discard(patches)


def note_grid(patch_embed: Any, inputs: tuple[Tensor, ...], patches: Any) -> None:
    """Record the grid of `patches` [B, H, W, D] or [B, H·W, D]: a forward hook of the patch embedding.

    Of patches of each channel [B, C, H, W, D], every channel's token is at its place in the same grid.
    """
    if not isinstance(patches, torch.fx.Proxy):  # a traced graph keeps the grid of `built_for`
        rows, columns = patch_embed.grid_size if patches.ndim == 3 else patches.shape[-3:-1]
        patch_embed.patch_grid.note(rows, columns)
        if patches.ndim == 5:
            patch_embed.patch_grid.note_channels(patches.shape[1], patches.device)


@register_notrace_module
class PatchSelection(PatchDropout):
    """timm's patch dropout, which also keeps patches that are given, and says which to the layers with GAug.

    It takes the place of `patch_drop` in a timm model: behind the position embedding, before the blocks.

    Args:
        prob: Share of the patches that is dropped in training; 0 for none.
        num_prefix_tokens: P, which are always kept.
        ordered: Whether the kept patches keep their order.
        grid: Of the model's layers with GAug, if it has any.
        with_indices: Whether to return the kept patches beside the tokens, as models with rotary embeddings
            expect.
    """

    def __init__(
        self,
        prob: float = 0.0,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        *,
        grid: PatchGrid | None = None,
        with_indices: bool = False,
    ) -> None:
        super().__init__(prob, num_prefix_tokens, ordered)
        self.grid, self.with_indices = grid, with_indices
        self._next: Tensor | None = None

    def keep(self, kept: Tensor) -> None:
        """Keep these patches of the next images, in this order: int64 [B, n], counted row by row."""
        self._next = kept

    def forward(self, x: Tensor) -> Any:
        """Map tokens [B, P + H·W, D] to the kept ones [B, P + n, D]."""
        kept, self._next = self._next, None
        if kept is None:
            x, kept = patch_dropout_forward(x, self.prob, self.num_prefix_tokens, self.ordered, self.training)
        else:
            prefix, patches = x.split([self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens], dim=1)
            x = torch.cat([prefix, patches.take_along_dim(kept.unsqueeze(-1), dim=1)], dim=1)
        if kept is not None and self.grid is not None:
            self.grid.note_kept(kept, x)
        return (x, kept) if self.with_indices else x


def patch_selection(model: Any) -> PatchSelection:
    """Return the `PatchSelection` of a timm model, which takes the place of its patch dropout if need be.

    Raises:
        ValueError: the model is no Vision Transformer (with windows or convolutions, every patch is needed).
    """
    if not isinstance(model, VisionTransformer | Eva):
        raise ValueError(f"{type(model).__name__} is no Vision Transformer, of which patches can be left out")
    drop: nn.Module | None = model.patch_drop
    if isinstance(drop, PatchSelection):
        return drop
    selection = PatchSelection(
        getattr(drop, "prob", 0.0),
        model.num_prefix_tokens,
        getattr(drop, "ordered", False),
        grid=getattr(model.patch_embed, "patch_grid", None),
        with_indices=isinstance(model, Eva),
    )
    model.patch_drop = selection.train(model.training)
    return selection


class MaskToken(nn.Module):
    """A learned token [1, D] in the place of hidden patches: a forward hook of the patch embedding.

    `hidden` is bool, a value for each patch of the images under way; None hides nothing.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, dim))
        self.hidden: Tensor | None = None

    def forward(self, patch_embed: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        """Replace the hidden ones of patches [N, H, W, D] or [N, H·W, D]."""
        if self.hidden is None:
            return patches
        hidden = self.hidden.view(*patches.shape[:-1], 1)
        return self.token.to(patches.dtype).where(hidden, patches)
