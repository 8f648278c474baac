"""Weights, outputs and gradients of the authors' released code, on both paths of the attention."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import locat_lightning.backbones.registry  # noqa: F401 (registers the models)
from locat_lightning.nn import attention

GOLDEN = Path(__file__).parents[1] / "golden"

MODELS = {"ropevit": "locatvit_tiny_rope_mixed", "swin": "locatswin_tiny", "jumbo": "locatjumbo_tiny"}
CASES = [
    ("locat_vit", 0),
    ("locat_vit", 1),  # another grid than the model was built for
    ("gaug_only_vit", 0),
    ("prr_only_vit", 0),
    ("locat_vit_no_pos", 0),
    ("locat_regvit", 0),
    ("locat_vit_layerscale_qknorm", 0),
    ("locat_ropevit", 0),
    ("locat_swin", 0),
    ("locat_jumbo", 0),
]


def read(name):
    """The tensors of a golden file, and the arguments that its model takes here."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        kwargs = json.loads(file.metadata()["kwargs"])
    for theirs_alone in ("store_metrics", "rope_mixed_mode", "locat", "no_embed_class"):
        kwargs.pop(theirs_alone, None)
    if kwargs.pop("no_pos_emb", False):
        kwargs["pos_embed"] = "none"
    if "J" in kwargs:
        kwargs["jumbo_multiplier"] = kwargs.pop("J")
    return tensors, kwargs


def beneath(tensors, prefix):
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def assert_relative(ours, golden, tolerance, name):
    assert ours.shape == golden.shape, name
    worst, largest = (ours - golden).abs().max(), golden.abs().max()
    assert worst <= tolerance * largest, f"{name}: {worst:.1e} beside {largest:.1e}"


@pytest.mark.parametrize("path", ["chunks", "one expression"])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_agrees_with_the_authors(monkeypatch, path, name, number):
    tensors, kwargs = read(name)
    model = timm.create_model(MODELS.get(name.removeprefix("locat_"), "locatvit_tiny"), **kwargs)
    model.load_state_dict(beneath(tensors, "state."), strict=True)
    model.eval()
    image = tensors[f"input.{number}"]
    if path == "one expression":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(attention, "chunked_attention", None)
    elif name != "locat_swin":  # whose windows are one expression
        monkeypatch.setattr(attention, "gaussian_kernel", None)

    tokens, patch_maps = model.forward_intermediates(image, indices=1)
    logits = model(image)
    logits.square().sum().backward()

    assert_relative(logits, tensors[f"logits.{number}"], 1e-5, "logits")
    assert_relative(model.forward_features(image), tensors[f"tokens.{number}"], 1e-5, "tokens")
    assert_relative(tokens, tensors[f"tokens.{number}"], 1e-5, "tokens beside the patch map")
    if name != "locat_swin":  # whose map is no part of the reference
        assert_relative(patch_maps[-1], tensors[f"patch_map.{number}"], 1e-5, "patch map")

    golden = beneath(tensors, f"grad.{number}.")
    gradients = {key: p.grad for key, p in model.named_parameters() if ".gaug." in key}
    assert gradients.keys() == golden.keys()
    layers = sum(kwargs["depths"]) if "depths" in kwargs else kwargs["depth"]
    assert len(golden) == (0 if name == "prr_only_vit" else 4 * layers)
    for key, expected in golden.items():
        if name == "locat_swin" and key.endswith("bias"):
            # A bias beside its weight: one is a sum of which nearly nothing is left (4.6e-4 of terms beside
            # 0.15), in which the reference itself is 1.4e-4 away from its own value in float64.
            weight = key.replace("bias", "weight")
            expected = torch.cat([expected, golden[weight].flatten()])
            gradients[key] = torch.cat([gradients[key], gradients[weight].flatten()])
        assert_relative(gradients[key], expected, 5e-5, key)
