"""What the layers of a Vision Transformer do: how far attention reaches, and how alike tokens become.

A patch of the last layers of a model that is trained to classify may hold more of the whole image than of its
own place. It shows as attention that reaches far, as patches that resemble [CLS] and each other, and as
patches of outlying norms.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import measuring
from locat_lightning.evaluation.features import autocast
from locat_lightning.evaluation.gather import gather_rows
from locat_lightning.evaluation.rank import cosines_to, outlying_share, patch_cosines
from locat_lightning.nn.gaussian import LazyGaussians, gaussian_kernel
from locat_lightning.nn.layers import GaussianSelfAttention, rotate_patches
from locat_lightning.nn.refinement import PatchRefinement

# What is measured of a layer, and how it is called in tables and charts.
MEASURES = {
    "distance": "distance in patches",
    "distance_px": "distance in px",
    "entropy": "entropy in nats",
    "prefix_share": "share of [CLS]",
    "patch_cls_cosine": "cosine to [CLS]",
    "patch_cosine": "cosine of pairs",
    "outlying_share": "outlying norms",
}
GROUP = "layers"  # of metrics: layers/MEASURE/LAYER, and layers/distance/LAYER/HEAD
NORM, PRR = "norm", "prr"  # the layers after the blocks, by name
KINDS = (Attention, AttentionRope, EvaAttention)  # of attention, with GAug or without

ByLayer = Mapping[str, Mapping[str, float]]  # a measure and a layer


class Layers(NamedTuple):
    """What was measured of each layer: means over images.

    The layers are the blocks, `block_00` and so on, then `norm`, the model's final norm, and `prr`.
    """

    by_layer: ByLayer  # a measure (of `MEASURES`) and a layer, where the layer has that
    heads: Mapping[str, list[float]]  # attention distance in patches of each head, by layer
    images: int


def measure_layers(
    backbone: nn.Module,
    loader: DataLoader,
    device: torch.device | str,
    *,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Layers:
    """Run every image of `ImageBatch`es once through a frozen backbone on `device`, and measure its layers.

    Attention is that of the patches, as the model computes it, with the kernels of GAug:

    - `distance` (in patches) and `distance_px` (in pixels): from a patch to the patches that it attends to,
      weighted by its attention to these; mean over patches and heads.
    - `entropy`: of a patch's attention to all tokens, in nats; mean over patches and heads.
    - `prefix_share`: the part of a patch's attention that goes to [CLS] and registers.

    Of the tokens after a layer, those of blocks before any norm:

    - `patch_cls_cosine`: mean cosine of a patch and [CLS]; only of models that have [CLS].
    - `patch_cosine`: mean cosine of two patches of an image, near 1 where all are alike.
    - `outlying_share`: part of the patches whose norm is more than three times the median of their image
      (see `evaluation.rank`); only of blocks.

    PRR counts as one more layer that refines all tokens, though only [CLS] of it may reach the head.
    With `torch.distributed` initialised, each process brings its part of the images and all get the whole.

    Source: "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR 2021), appendix D.7, for distances. What
    a patch attends to besides patches, which is not said there, is left out of the weights.

    Raises:
        InputError: the model is no Vision Transformer of timm's usual kind, or there are no images.
    """
    _blocks(backbone)  # a mistake shows before anything is read
    device = torch.device(device)
    tables, names = list[tuple[Tensor, Tensor]](), list[tuple[str, ...]]()
    with measuring(backbone, loader, "Looking at layers", progress) as batches:
        for batch in batches:
            images = batch.images.to(device, non_blocking=True)
            with watched(backbone, images) as found, autocast(device, autocast_dtype):
                backbone(images)
            names = list(found)
            tables.append((batch.indices, torch.stack([*found.values()], 1).cpu()))
    with torch.inference_mode(False):
        none = torch.empty(0, dtype=torch.int64), torch.empty(0, 0)
        indices, values = (torch.cat(parts) for parts in zip(*tables or [none], strict=True))
        [table] = gather_rows(indices, values, device=device)
    if not len(table):
        raise InputError("no images to look at: the loader is empty (check root and split)")
    means: dict[str, dict[str, float]] = {measure: {} for measure in MEASURES}
    heads: dict[str, list[float]] = {}
    for (measure, layer, *head), value in zip(names, table.double().mean(0).tolist(), strict=True):
        if head:
            heads.setdefault(layer, []).append(value)
        else:
            means[measure][layer] = value
    return Layers({measure: each for measure, each in means.items() if each}, heads, len(table))


def by_layer(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return what the metrics of a run say of its layers, by measure and layer; {} if nothing."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        match name.split("/"):
            case [group, measure, layer] if group == GROUP:
                found.setdefault(measure, {})[layer] = value
    return found


@contextmanager
def watched(model: Any, images: Tensor) -> Iterator[dict[tuple[str, ...], Tensor]]:
    """Measure the layers of a model while it is given images [B, C, H, W], by hooks that are taken off again.

    Yields:
        For each measure and layer, and for the distance of each head (measure, layer, head), a value for
        each image [B] float32; empty until the model has run, without `torch.compile` if it is compiled.
    """
    blocks = _blocks(model)
    found: dict[tuple[str, ...], Tensor] = {}
    prefix, grid = model.num_prefix_tokens, model.patch_embed.dynamic_feat_size(images.shape[-2:])
    cell = [side / cells for side, cells in zip(images.shape[-2:], grid, strict=True)]
    between = torch.stack([_distances(grid, (1, 1)), _distances(grid, cell)]).to(images.device)

    def note_tokens(layer: str, tokens: Tensor) -> None:
        patches = tokens[:, prefix:]
        if model.cls_token is not None:
            found["patch_cls_cosine", layer] = cosines_to(tokens[:, 0], patches)
        found["patch_cosine", layer] = patch_cosines(patches)
        if layer not in (NORM, PRR):
            found["outlying_share", layer] = torch.stack([outlying_share(each) for each in patches.split(1)])

    def note_attention(layer: str, attention: Iterable[Tensor]) -> None:
        figures = [_figures(each, prefix, between) for each in attention]
        for measure, *head in figures[0]:
            found[measure, layer, *head] = torch.cat([each[measure, *head] for each in figures])

    def note_refinement(refinement: PatchRefinement, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].float()
        heads = refinement.by_head(refinement.pre_norm(tokens))
        note_attention(PRR, _rows_of_softmax(heads, heads))
        note_tokens(PRR, refinement.refine(tokens, slice(None)))

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, block in blocks.items():
            for hook in _hooks(block.attn, prefix, partial(note_attention, name)):
                stack.callback(hook.remove)
        norm = getattr(model, "norm", nn.Identity())
        normed = {} if isinstance(norm, nn.Identity) else {NORM: norm}
        for name, layer in (blocks | normed).items():
            hook = layer.register_forward_hook(lambda _, __, tokens, name=name: note_tokens(name, tokens))
            stack.callback(hook.remove)
        if isinstance(refinement := getattr(model, "attn_pool", None), PatchRefinement):
            stack.callback(refinement.register_forward_pre_hook(note_refinement).remove)
        yield found


def _blocks(model: Any) -> dict[str, Any]:
    """Return the blocks of a Vision Transformer by name: `InputError` if it is something else."""
    blocks = {f"block_{number:02}": block for number, block in enumerate(getattr(model, "blocks", ()))}
    known = all(isinstance(getattr(each, "attn", None), KINDS) for each in blocks.values())
    if not (blocks and known and hasattr(model, "patch_embed")):
        raise InputError(
            f"{type(model).__name__} does not have blocks in which all patches attend to each other: only "
            "Vision Transformers have layers to measure"
        )
    return blocks


def _hooks(layer: Any, prefix: int, note: Callable[[Iterable[Tensor]], None]) -> Iterator[RemovableHandle]:
    """Yield hooks that note a layer's attention, image by image, each time that it is computed."""
    seen: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        seen[name] = value

    def begin(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.clear()
        keep("rope", options.get("rope"))

    def end(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, rope = seen["q"], seen["k"], seen["rope"]
        if rope is not None:
            half = getattr(layer, "rotate_half", False)
            q, k = (rotate_patches(t, rope, prefix, half=half) for t in (q, k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # of grouped queries
        note(_rows_of_softmax(q, k, seen.get("kernels")))

    yield layer.register_forward_pre_hook(begin, with_kwargs=True)
    yield layer.q_norm.register_forward_hook(lambda _, __, q: keep("q", q))
    yield layer.k_norm.register_forward_hook(lambda _, __, k: keep("k", k))
    if isinstance(layer, GaussianSelfAttention):
        yield layer.gaug.register_forward_hook(lambda _, __, found: keep("kernels", found))
    yield layer.register_forward_hook(end)


def _rows_of_softmax(q: Tensor, k: Tensor, kernels: LazyGaussians | Tensor | None = None) -> Iterator[Tensor]:
    """Yield softmax(q kᵀ / √d + S) [1, h, N, N] float32 of each image, so that memory is that of one."""
    for image in range(len(q)):
        here = slice(image, image + 1)
        with autocast(q.device, None):
            logits = q[here].float() * q.shape[-1] ** -0.5 @ k[here].float().mT
            if kernels is not None:
                s = kernels
                if isinstance(s, LazyGaussians):
                    s = gaussian_kernel(s._replace(q=s.q[here]))
                before = logits.shape[-1] - s.shape[-1]
                logits = logits + F.pad(s, (before, 0, before, 0))
            yield logits.softmax(-1)


def _figures(attention: Tensor, prefix: int, between: Tensor) -> dict[tuple[str, ...], Tensor]:
    """Measure attention [1, h, N, N], with distances [2, n, n] in patches and pixels: values [1] by name."""
    rows = attention[:, :, prefix:]
    of_patches = rows[..., prefix:]
    # Patches of several grids, one for each channel, are at the same places.
    between = between.repeat(1, *(of_patches.shape[-1] // between.shape[-1],) * 2)
    to_patches = of_patches.sum(-1)
    weights = of_patches / to_patches.clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(-1)
    in_patches, in_pixels = ((weights * each).sum(-1).mean(-1) for each in between)
    return {
        ("distance",): in_patches.mean(1),
        ("distance_px",): in_pixels.mean(1),
        ("entropy",): torch.special.entr(rows).sum(-1).mean((1, 2)),
        ("prefix_share",): 1 - to_patches.mean((1, 2)),
        **{("distance", f"head_{head:02}"): each for head, each in enumerate(in_patches.unbind(1))},
    }


def _distances(grid: tuple[int, int], cell: Sequence[float]) -> Tensor:
    """Return the distances [n, n] of the centres of a grid's cells (height, width), row by row."""
    rows, columns = (torch.arange(cells) * side for cells, side in zip(grid, cell, strict=True))
    points = torch.cartesian_prod(rows, columns)
    between: Tensor = (points.unsqueeze(0) - points.unsqueeze(1)).float().norm(dim=-1)
    return between
