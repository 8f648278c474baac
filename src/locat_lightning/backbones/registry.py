"""The paper's backbones under their published names, for `timm.create_model`.

All take `gaug` and `prr`, which choose the parts of LocAt (see `add_locat`), and the arguments of the timm
model that they are based on. RegViT is `reg_tokens=4`; a ViT without position embedding is
`pos_embed="none"`. `located` is any other model with LocAt in it.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import timm
from timm.models import build_model_with_cfg, eva, generate_default_cfgs, register_model
from timm.models import swin_transformer as swin
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from locat_lightning.backbones.channelvit import ChannelViT
from locat_lightning.backbones.distilled import Distilled
from locat_lightning.backbones.jumbo import Jumbo
from locat_lightning.backbones.locate import LOCATED, add_locat, kernel_widening

Gaug = bool | Mapping[str, Any]

_VIT = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
_SWIN = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
_ROPE_MIXED: dict[str, Any] = {
    "attn_type": "rope",
    "init_values": 1e-5,
    "class_token": True,
    "global_pool": "token",
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "mixed",
    "rope_grid_indexing": "xy",
    "rope_temperature": 10.0,
}


def _with_locat(model: type[nn.Module], *, gaug: Gaug, prr: bool, **kwargs: Any) -> nn.Module:
    if prr and issubclass(model, vit.VisionTransformer) and model is not Distilled:
        if (pooling := kwargs.get("global_pool", "token")) not in ("token", "prr", ""):
            raise ValueError(
                f"global_pool='{pooling}' would replace PRR's pooling: pass prr=False with it, "
                "or global_pool='token' with PRR"
            )
        kwargs["global_pool"] = "prr"
    return add_locat(model(**kwargs), gaug=gaug, prr=prr)


_located_vit = partial(_with_locat, vit.VisionTransformer)
_located_rope = partial(_with_locat, eva.Eva)
_located_swin = partial(_with_locat, swin.SwinTransformer)
_located_channels = partial(_with_locat, ChannelViT)
_located_distilled = partial(_with_locat, Distilled)
# Name, model, sizes, further arguments, and whether LocAt is in it by default.
_FAMILIES: list[tuple[str, Callable[..., nn.Module], dict[str, dict[str, Any]], dict[str, Any], bool]] = [
    ("locatvit_{}", _located_vit, _VIT, {}, True),
    ("nopos_vit_{}_patch16_224", _located_vit, _VIT, {"pos_embed": "none"}, False),
    ("locatvit_{}_rope_mixed", _located_rope, _VIT, _ROPE_MIXED, True),
    ("vit_{}_patch16_rope_mixed_224", _located_rope, {"tiny": _VIT["tiny"]}, _ROPE_MIXED, False),
    ("locatswin_{}", _located_swin, _SWIN, {}, True),
    ("jumbo_{}", Jumbo, _VIT, {}, False),
    ("locatjumbo_{}", Jumbo, _VIT, {"norm_patches": True}, True),
    ("locatvit_{}_distilled", _located_distilled, _VIT, {}, True),
    ("channelvit_{}", _located_channels, _VIT, {}, False),
    ("locatchannelvit_{}", _located_channels, _VIT, {}, True),
]
MODELS = {
    name.format(size): (model, sizes | arguments, locat)
    for name, model, by_size, arguments, locat in _FAMILIES
    for size, sizes in by_size.items()
}

SUBSETS = {name for name, (model, *_) in MODELS.items() if model is _located_channels}  # of channels

# Images of 224 pixels, ImageNet's mean and deviation and 1,000 classes are what timm takes by default.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "pool_size": (7, 7) if "swin" in name else None,
            "crop_pct": 0.9,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc" if "swin" in name else "head",
            "license": "apache-2.0",
        }
        | ({"classifier": ("head", "head_dist")} if "distilled" in name else {})
        for name in MODELS
    }
)


def _register(name: str, model: Callable[..., nn.Module], defaults: dict[str, Any], locat: bool) -> None:
    """Register a model whose entry point does what timm's own do."""
    pyramid = "depths" in defaults
    features = {"flatten_sequential": True} if pyramid else {"feature_cls": "getter"}

    def entry_point(
        pretrained: bool = False, *, gaug: Gaug = locat, prr: bool = locat, **kwargs: Any
    ) -> nn.Module:
        indices = kwargs.pop("out_indices", (0, 1, 2, 3) if pyramid else 3)
        built: nn.Module = build_model_with_cfg(
            partial(model, gaug=gaug, prr=prr),
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=features | {"out_indices": indices},
            **(defaults | kwargs),
        )
        return built

    entry_point.__name__ = entry_point.__qualname__ = name
    register_model(entry_point)


for _name, _model in MODELS.items():
    _register(_name, *_model)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert weights as timm does for a model of this kind, and kernels to its grid."""
    widening = kernel_widening(state, model)
    for made_by in type(model).__mro__:
        if (filter_ := getattr(sys.modules[made_by.__module__], "checkpoint_filter_fn", None)) is not None:
            state = filter_(state, model)
            break
    return state | {name: state[name] + more for name, more in widening.items()}


@register_model
def located(
    pretrained: bool = False,
    *,
    backbone: str,
    backbone_args: Mapping[str, Any] | None = None,
    locat: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build another timm model with LocAt: how timm rebuilds what `add_locat` made, from its config.json.

    `backbone` is timm's name of the model, and `locat` holds the arguments of `add_locat`. All others are the
    model's own, where `kwargs` override `backbone_args`.
    """
    if kwargs.get("global_pool") == "prr":  # which LocAt made of the backbone's own
        del kwargs["global_pool"]

    arguments = dict(backbone_args or {}) | kwargs
    if arguments.get("pretrained_cfg") is None and (own := timm.get_pretrained_cfg(backbone)) is not None:
        arguments["pretrained_cfg"] = replace(own, architecture=LOCATED)

    def build(**arguments: Any) -> nn.Module:
        model: nn.Module = timm.create_model(backbone, **arguments)
        return add_locat(model, **(locat or {}))

    built: nn.Module = build_model_with_cfg(
        build,
        LOCATED,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter"},
        **arguments,
    )
    return built
