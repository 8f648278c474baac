"""What a model costs, counted by hand beside the counters."""

import pytest
import timm
import torch
from torch import nn

from locat_lightning.evaluation.cost import (
    activation_bytes,
    count_parameters,
    images_per_second,
    multiply_adds,
)

D, N, DEPTH, HEADS = 24, 17, 2, 2
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
IMAGE = torch.zeros(1, 3, 32, 32)


def vit(name="locatvit_tiny", **arguments):
    return timm.create_model(name, **VIT | arguments)


def test_the_share_of_gaug():
    with torch.device("meta"):
        base, plain = (timm.create_model(n) for n in ("locatvit_base", "vit_base_patch16_224"))
    total, of_gaug = count_parameters(base)
    assert of_gaug == 2340
    assert total == count_parameters(plain)[0] + 2340
    assert count_parameters(plain)[1] == 0


def by_hand(gaug, prr):
    patches = (N - 1) * D * 3 * 8 * 8
    block = N * D * 12 * D + 2 * N * N * D
    of_gaug = N * D * 3 if gaug else 0  # three numbers for each head's query
    return patches + DEPTH * (block + of_gaug) + (2 * N * D if prr else 0) + 5 * D


@pytest.mark.parametrize("gaug", [True, False])
@pytest.mark.parametrize("prr", [True, False])
def test_multiply_adds(gaug, prr):
    model = vit(gaug=gaug, prr=prr).train()
    assert multiply_adds(model, IMAGE) == by_hand(gaug, prr)
    assert multiply_adds(model, IMAGE.expand(3, -1, -1, -1)) == 3 * by_hand(gaug, prr)
    assert model.training


def test_multiply_adds_of_every_way_to_compute_gaug(monkeypatch):
    model = vit()
    chunks = multiply_adds(model, IMAGE)
    monkeypatch.setattr("locat_lightning.nn.chunked_attention._is_short", lambda *_: False)  # flash
    assert multiply_adds(model, IMAGE) == chunks
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # one expression
    assert multiply_adds(model, IMAGE) == chunks


def test_activations_are_what_autograd_keeps():
    first, second = nn.Linear(4, 6), nn.Linear(6, 2)
    model = nn.Sequential(first, nn.Sigmoid(), second)
    images = torch.zeros(3, 4)
    assert activation_bytes(model, images) == 4 * 3 * (4 + 6)  # sigmoid and second keep the same tensor


def test_activations_grow_with_the_batch_and_leave_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = (activation_bytes(model, torch.randn(n, 3, 8, 8)) for n in (1, 2))
    assert one < two < 2 * one + 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    with torch.no_grad():
        assert activation_bytes(model, torch.randn(1, 3, 8, 8)) == one


def test_a_forward_pass_is_timed(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr("locat_lightning.evaluation.cost.perf_counter", lambda: next(seconds))
    model = vit().train()
    assert images_per_second(model, IMAGE.expand(4, -1, -1, -1), seconds=2) == 4  # a second each
    assert next(seconds) == 6
    assert model.training
