"""The paper's backbones under their published names, for `timm.create_model`."""

from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from locat_lightning.nn import GaussianAttention, PatchGrid, PatchRefinement

_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

default_cfgs = generate_default_cfgs(
    {
        f"locatvit_{size}": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
        for size in _SIZES
    }
)


def _vision_transformer(
    *, gaug: bool, prr: bool, global_pool: str = "token", **kwargs: Any
) -> VisionTransformer:
    """Timm's `VisionTransformer` with LocAt plugged into its own arguments."""
    if prr:
        if global_pool not in ("token", "prr", ""):
            raise ValueError(
                f"global_pool='{global_pool}' would replace PRR's pooling: pass prr=False with it, "
                "or global_pool='token' with PRR"
            )
        global_pool = "prr"
    if gaug and kwargs.get("patch_drop_rate", 0.0) > 0:
        raise ValueError("patch_drop_rate has to be 0 with gaug=True: the Gaussian kernel needs every patch")
    model = VisionTransformer(
        global_pool=global_pool, attn_layer=GaussianAttention if gaug else Attention, **kwargs
    )
    if gaug:
        _share_patch_grid(model)
    if prr:
        pool = model.attn_pool
        model.attn_pool = PatchRefinement(pool.out_features, num_heads=pool.num_heads, pool_type=pool.pool)
    return model


def _share_patch_grid(model: VisionTransformer) -> None:
    """Let every GAug layer know the grid of the images under way."""
    layers = [module for module in model.modules() if isinstance(module, GaussianAttention)]
    if not layers:
        block = type(model.blocks[0]).__name__ if len(model.blocks) else "no block"
        raise ValueError(
            f"gaug=True needs blocks with the attention of attn_layer, which {block} does not have: pass "
            "gaug=False with it, or another block_fn"
        )
    grid = PatchGrid(tuple(model.patch_embed.grid_size))
    model.patch_embed.register_forward_hook(grid)
    for layer in layers:
        layer.grid = grid
        layer.num_prefix_tokens = model.num_prefix_tokens


def _create(
    name: str, pretrained: bool, gaug: bool, prr: bool, size: dict[str, int], **kwargs: Any
) -> VisionTransformer:
    return build_model_with_cfg(
        partial(_vision_transformer, gaug=gaug, prr=prr),
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **(size | kwargs),
    )


@register_model
def locatvit_tiny(
    pretrained: bool = False, *, gaug: bool = True, prr: bool = True, **kwargs: Any
) -> VisionTransformer:
    """LocAtViT-Tiny (5.7 M parameters): `VisionTransformer`'s arguments, and GAug and PRR to be switched."""
    return _create("locatvit_tiny", pretrained, gaug, prr, _SIZES["tiny"], **kwargs)


@register_model
def locatvit_small(
    pretrained: bool = False, *, gaug: bool = True, prr: bool = True, **kwargs: Any
) -> VisionTransformer:
    """LocAtViT-Small (22 M parameters): `VisionTransformer`'s arguments, and GAug and PRR to be switched."""
    return _create("locatvit_small", pretrained, gaug, prr, _SIZES["small"], **kwargs)


@register_model
def locatvit_base(
    pretrained: bool = False, *, gaug: bool = True, prr: bool = True, **kwargs: Any
) -> VisionTransformer:
    """LocAtViT-Base (86.6 M parameters): `VisionTransformer`'s arguments, and GAug and PRR to be switched."""
    return _create("locatvit_base", pretrained, gaug, prr, _SIZES["base"], **kwargs)
