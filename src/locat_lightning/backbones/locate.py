"""Add LocAt to a built timm model: GAug to its self-attention, PRR before its pooling."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from timm.layers import AttentionPoolPrr, PatchDropout, PatchDropoutWithIndices
from timm.models import get_model_args
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from locat_lightning.backbones.distilled import TOKENS, Distilled
from locat_lightning.nn.gaussian import GaussianAugmentation, GaussianMixture
from locat_lightning.nn.layers import (
    ATTENTIONS,
    GaussianSelfAttention,
    GaussianWindowAttention,
    add_gaussians,
)
from locat_lightning.nn.patches import PatchGrid, note_grid, patch_selection
from locat_lightning.nn.refinement import PatchRefinement

Model = TypeVar("Model", bound=nn.Module)
Kernel = GaussianAugmentation | GaussianMixture
# Arguments of a kernel.
VARIANTS = {"query_dependent", "isotropic", "learned_alpha", "rotated", "mixture"}
VARIANTS |= {"initial_variance", "initial_alpha"}
LOCATED = "located"  # registered name of a model to which LocAt was added (see `registry`)


def add_locat(
    model: Model,
    *,
    gaug: bool | Mapping[str, Any] = True,
    prr: bool = True,
    start: Literal["paper", "identity"] = "paper",
) -> Model:
    """Add LocAt to a timm model in place; the model keeps its weights.

    Supports the attention of timm's ViT (so DeiT, AugReg, DINO, DINOv2, CLIP and SigLIP, with registers or
    without), RoPE-ViT, EVA, DINOv3 and Swin. After an error the model is as it was.

    Args:
        model: From `timm.create_model`.
        gaug: Whether to add Gaussian kernels to its attention; arguments of `GaussianAugmentation` make a
            variant, and `{"mixture": m}` is Gaussian mixture mask attention with m components instead.
        prr: Whether to refine its final tokens before they are pooled (and before `fc_norm`, if it has that).
        start: "paper" starts like a model that is trained from scratch. "identity", for trained models,
            starts with the outputs of the model as it is: every kernel's strength, and the refinement, are
            behind a learned gate that is (nearly) closed.

    Returns:
        The model.

    Raises:
        ValueError: LocAt does not support the model's attention or pooling.
        TypeError: `model` is not a model, `gaug` is of another type, or there is no such variant.

    Source: "Locality-Attending Vision Transformer" (ICLR 2026); `start="identity"` is ours.
    """
    if start not in ("paper", "identity"):
        raise ValueError(f"start must be 'paper' or 'identity', not {start!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module that timm.create_model returned, not {model!r}")
    if not isinstance(gaug, bool | Mapping):
        raise TypeError(f"gaug must be true, false, or arguments of a kernel, not {gaug!r}")
    gated = start == "identity"
    options = {} if isinstance(gaug, bool) else dict(gaug)
    kernels = {} if gaug is False else _kernels(model, options, gated)
    if prr:
        _add_prr(model, gated)
    if kernels:
        _add_gaug(model, kernels)
    _note(model, {"gaug": gaug if isinstance(gaug, bool) else options, "prr": prr, "start": start})
    return model


def architecture_of(model: nn.Module) -> str:
    """Return timm's name of a built model, and what was added to it of LocAt, or left out."""
    of_timm: Any = model
    name: str = of_timm.pretrained_cfg["architecture"]
    if name == LOCATED:
        return f"{get_model_args(of_timm)['backbone']} with LocAt"
    return name + lack(name, model)


def lack(name: str, model: nn.Module) -> str:
    """Return " without GAug and PRR" for a model that has LocAt in its name but not those, "" for others."""
    parts = {"GAug": GaussianAugmentation | GaussianMixture, "PRR": PatchRefinement}
    lacking = [part for part, of in parts.items() if not any(isinstance(m, of) for m in model.modules())]
    return f" without {' and '.join(lacking)}" if lacking and name.startswith("locat") else ""


def kernel_widening(state: Mapping[str, Tensor], model: Any) -> dict[str, float]:
    """Return what is to be added to the biases of a model's variances for weights of another grid, by name.

    - Images of another size: ln of the ratio of the grids' shorter sides, the factor that images of another
      grid have anyway; that holds as long as a variance is small beside the square of the grid.
    - Patches of another size: what makes σ² in pixels the same, and its upper bound (see `patch_widening`).

    The grid of weights is known from position embeddings or Swin's bias tables, their patches from the patch
    embedding; without the first, images are taken to have the same size. Swin's windows count in patches.
    """
    found = {}
    finer = _ratio_of_patches(state, model)
    for name, layer in model.named_modules():
        if isinstance(layer, GaussianSelfAttention):
            grid: tuple[int, int] = layer.grid.built_for
            positions, ratio = state.get("pos_embed"), finer
            prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
            before = 0.0 if positions is None else math.sqrt(max(0, positions.shape[1] - prefix))
        elif isinstance(layer, GaussianWindowAttention):
            grid, ratio = layer.built_for, 1.0
            table = state.get(f"{name}.relative_position_bias_table")
            before = 0.0 if table is None else (math.sqrt(len(table)) + 1) / 2
        else:
            continue
        if before > 0 and before.is_integer():
            larger, longest = min(grid) / (before * ratio), before
        else:
            larger, longest = 1.0, max(grid) / ratio
        bias = f"{name}.gaug.log_var" + (".bias" if f"{name}.gaug.log_var.bias" in state else "")
        if bias in state and (larger, ratio) != (1, 1):
            found[bias] = math.log(larger) + layer.gaug.patch_widening(longest, longest * ratio)
    return found


def _ratio_of_patches(state: Mapping[str, Tensor], model: Any) -> float:
    """Return by how much the patches of weights are wider than a model's; 1 where that is not known."""
    before = state.get("patch_embed.proj.weight")
    now = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return 1.0 if before is None or before.ndim < 4 or now is None else before.shape[-1] / now[-1]


def _kernels(model: Any, options: dict[str, Any], gated: bool) -> dict[Any, Kernel]:
    """Make the kernels of a model, by layer; the model is not changed."""
    if any(isinstance(layer, GaussianSelfAttention | GaussianWindowAttention) for layer in model.modules()):
        raise ValueError(f"gaug=True: this {type(model).__name__} has it already: pass gaug=False")
    if not VARIANTS.issuperset(options) or ("mixture" in options and len(options) > 1):
        known = ", ".join(sorted(VARIANTS - {"mixture"}))
        raise TypeError(f"gaug takes {known}, or mixture alone, not {', '.join(options)}")
    layers = [layer for layer in model.modules() if type(layer) in ATTENTIONS]
    others = {
        _full_name(type(layer))
        for name, layer in model.named_modules()
        if name.endswith("attn") and type(layer) not in ATTENTIONS
    }
    if not others and not isinstance(model, VisionTransformer | Eva | SwinTransformer):
        others = {_full_name(type(model))}  # whose tokens may be anything, whatever its attention
    if others or not layers:
        blocks = {_full_name(type(block)) for block in getattr(model, "blocks", [])}
        known = ", ".join(each.__name__ for each in ATTENTIONS)
        raise ValueError(
            f"gaug=True needs attention that takes Gaussian kernels (timm's {known}), which "
            f"{', '.join(sorted(others or blocks))} is not: pass gaug=False with it"
        )

    options = dict(options)
    mixture = options.pop("mixture", None)
    kernels: dict[Any, Kernel] = {}
    for layer in layers:
        common = options | {"gated": gated} | _place(layer)
        if mixture is None:
            kernels[layer] = GaussianAugmentation(layer.proj.in_features // layer.num_heads, **common)
        else:
            grid = getattr(layer, "window_size", None) or tuple(model.patch_embed.grid_size)
            kernels[layer] = GaussianMixture(mixture, grid, **common)
    return kernels


def _full_name(of: type) -> str:
    """Return the name with its module: timm has several classes of one name."""
    return f"{of.__module__}.{of.__name__}"


def _add_gaug(model: Any, kernels: dict[Any, Kernel]) -> None:
    windowed = isinstance(model, SwinTransformer)
    if not windowed:
        grid = model.patch_embed.patch_grid = PatchGrid(tuple(model.patch_embed.grid_size))
        model.patch_embed.register_forward_hook(note_grid)
        if isinstance(model.patch_drop, PatchDropout | PatchDropoutWithIndices):
            patch_selection(model)
    for layer, kernel in kernels.items():
        add_gaussians(layer, kernel)
        if windowed:
            layer.built_for = layer.window_size
        else:
            layer.grid, layer.num_prefix_tokens = grid, model.num_prefix_tokens


def _add_prr(model: Any, gated: bool) -> None:
    if any(isinstance(module, PatchRefinement) for module in model.modules()):
        raise ValueError(f"prr=True: this {type(model).__name__} has it already: pass prr=False")
    refinement: Callable[..., PatchRefinement] = partial(PatchRefinement, gated=gated, **_place(model))
    if isinstance(model, SwinTransformer):
        heads = model.layers[-1].blocks[-1].attn.num_heads
        _refine_before(model.head.global_pool, refinement(model.num_features, heads, ""))
        return
    if isinstance(model, Distilled):
        heads = model.blocks[-1].attn.num_heads
        model.attn_pool = refinement(model.embed_dim, heads, "token", TOKENS).train(model.training)
        return
    pool: Any = getattr(model, "attn_pool", None)
    if isinstance(pool, AttentionPoolPrr):
        model.attn_pool = refinement(model.embed_dim, pool.num_heads, pool.pool).train(model.training)
        return
    pooling = getattr(model, "global_pool", None)
    attention: Any = getattr(next(reversed(getattr(model, "blocks", [])), None), "attn", None)
    # The heads of timm's distilled DeiT and of Jumbo take more than one token, and no pooling.
    width = getattr(model, "embed_dim", 0)
    several = hasattr(model, "dist_token") or getattr(model, "head_hidden_size", 0) != width
    if attention is None or pooling not in ("token", "avg", "map") or several:
        raise ValueError(
            f"prr=True: {type(model).__name__} with global_pool={pooling!r} pools no tokens that could be "
            "refined before: pass prr=False"
        )
    if pooling == "map":
        _refine_before(pool, refinement(width, attention.num_heads, ""))
        return
    includes_prefix = pooling == "token" or getattr(model, "pool_include_prefix", False)
    prefix = None if includes_prefix else model.num_prefix_tokens
    model.attn_pool = refinement(width, attention.num_heads, pooling, prefix).train(model.training)
    if isinstance(model, VisionTransformer):
        model.global_pool, model.pool_include_prefix = "prr", True


def _refine_before(pool: Any, refinement: PatchRefinement) -> None:
    """Make a pooling module refine its input first."""
    pool.refinement = refinement
    pool.register_forward_pre_hook(_refined)


def _refined(pool: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return pool.refinement(inputs[0]), *inputs[1:]


def _note(model: Any, locat: dict[str, Any]) -> None:
    """Record LocAt where timm records how to build a model again."""
    if hasattr(model, "pretrained_cfg"):
        # `get_model_args` is public, but there is no public way to set them.
        made_by = {"backbone": model.pretrained_cfg["architecture"], "backbone_args": model._model_args}
        model._model_args = made_by | {"locat": locat}
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | {"architecture": LOCATED}


def _place(module: nn.Module) -> dict[str, Any]:
    weight = next(module.parameters())
    return {"device": weight.device, "dtype": weight.dtype}
