"""Backbones are checked without being built."""

import pytest
import torch

from locat_lightning.backbones.create import check_arguments, create_backbone, load_backbone
from locat_lightning.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"nonsense": 1}, "do not fit locatvit_tiny: .*unexpected keyword argument 'nonsense'"),
        ({"embed_dim": 25}, "do not fit locatvit_tiny: dim should be divisible by num_heads"),
        ({"global_pool": "avg"}, "global_pool='avg' would replace PRR's pooling"),
        ({"depth": -1}, "do not fit locatvit_tiny: number of steps must be non-negative"),
        ({"patch_size": 0}, r"do not fit locatvit_tiny: ZeroDivisionError.* of {'patch_size': 0}"),
        ({"norm_layer": "nope"}, r"do not fit locatvit_tiny: KeyError\('nope'\) of "),
        ({"pretrained": True}, "model.backbone_args.pretrained: use --weights"),
        ({"checkpoint_path": "a.pth"}, "model.backbone_args.checkpoint_path: use --weights"),
    ],
)
def test_arguments_are_refused(arguments, expected):
    with pytest.raises(InputError, match=expected):
        check_arguments("locatvit_tiny", arguments)


@pytest.mark.parametrize("name", ["locatvit_base", "vit_base_patch16_224", "resnet50"])
def test_what_fits_takes_neither_memory_nor_random_numbers(name, monkeypatch):
    built = []
    monkeypatch.setattr(
        "locat_lightning.backbones.create.create_backbone",
        lambda *arguments, **options: built.append(create_backbone(*arguments, **options)),
    )
    before = torch.get_rng_state()
    check_arguments(name, {"drop_path_rate": 0.1, "pretrained": False})
    assert {parameter.device.type for parameter in built[0].parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, RuntimeError])
def test_a_model_that_needs_memory_to_be_built_is_not_refused(error, monkeypatch):
    def create_model(*_, **__):
        if torch.get_default_device().type == "meta":
            raise error("can't convert meta device type tensor to numpy")

    monkeypatch.setattr("timm.create_model", create_model)
    check_arguments("locatvit_tiny", None)


def test_locat_is_added_once():
    """Also by the name under which timm builds what an export of such a model says."""
    small, locat = {"depth": 1, "embed_dim": 24}, {"locat": {"start": "identity"}}
    named = create_backbone("vit_tiny_patch16_224", small | locat, 0)
    located = create_backbone("located", {"backbone": "vit_tiny_patch16_224"} | small | locat, 0)
    assert named.state_dict().keys() == located.state_dict().keys()
    assert "blocks.0.attn.gaug.gate" in named.state_dict()


def test_random_weights_do_not_say_of_which_model_they_are():
    with pytest.raises(InputError, match=r"add --backbone .* \(--model.backbone for fit"):
        load_backbone("random")


def test_a_model_that_timm_does_not_know():
    with pytest.raises(InputError, match="timm knows no model 'locatvit_huge'; did you mean "):
        check_arguments("locatvit_huge", None)
