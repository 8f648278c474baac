"""Means of weights, against numpy and a loop."""

import numpy as np
import pytest
import timm
import torch

from locat_lightning.backbones.soups import (
    Soup,
    first_difference,
    greedy_soup,
    similarity,
    uniform_soup,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}


def states(number, dtype=torch.float32):
    rng = np.random.default_rng(0)
    return [
        {
            "w": torch.from_numpy(rng.normal(size=(3, 4))).to(dtype),
            "b": torch.from_numpy(rng.normal(size=4)).to(dtype),
            "n": torch.tensor(each),
        }
        for each in range(number)
    ]


def test_the_mean_is_numpys_and_counters_are_the_firsts():
    given = states(5)
    soup = uniform_soup(given.__getitem__, 5)
    mean = soup.mean()
    for name in ("w", "b"):
        expected = np.mean([state[name].double().numpy() for state in given], axis=0).astype(np.float32)
        np.testing.assert_array_equal(mean[name].numpy(), expected)
        assert mean[name].dtype == torch.float32
    assert mean["n"] == 0
    assert mean["n"].dtype == torch.int64
    assert soup.number == 5


def test_half_precision_is_added_in_double():
    given = [{"w": torch.tensor([value], dtype=torch.float16)} for value in (2048.0, 1.0, 1.0, 1.0, 1.0)]
    mean = uniform_soup(given.__getitem__, 5).mean()["w"]
    assert mean.item() == torch.tensor(2052 / 5, dtype=torch.float16).item()  # 2048 + 1 is 2048 in float16


def test_a_soup_stays_as_it_is():
    first, second = states(2)
    soup = Soup().with_one_more(first)
    soup.with_one_more(second)
    assert soup.number == 1
    torch.testing.assert_close(soup.mean()["w"], first["w"], rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_the_papers_loop(seed):
    rng = np.random.default_rng(seed)
    values = [float(each) for each in rng.integers(-4, 5, size=7)]  # with ties
    target = float(rng.normal())

    def accuracy(value):
        return -round(abs(value - target), 1)

    order = sorted(range(7), key=lambda each: (-accuracy(values[each]), each))
    kept = [order[0]]
    best = accuracy(values[order[0]])
    for each in order[1:]:
        mean = sum(values[i] for i in [*kept, each]) / (len(kept) + 1)
        if accuracy(mean) >= best:
            kept.append(each)
            best = accuracy(mean)

    given = [{"w": torch.tensor([value], dtype=torch.float64)} for value in values]
    soup, found = greedy_soup(given.__getitem__, 7, lambda state: accuracy(state["w"].item()))
    assert list(found) == order
    assert [each for each, trial in found.items() if trial.kept] == kept
    assert soup.mean()["w"].item() == pytest.approx(sum(values[i] for i in kept) / len(kept))
    assert [trial.alone for trial in found.values()] == [accuracy(values[each]) for each in order]
    assert [trial.soup for trial in found.values() if trial.kept][-1] == best


def test_similarity_is_the_cosine_of_the_matrices():
    a, b = states(2)
    x, y = a["w"].double().numpy().ravel(), b["w"].double().numpy().ravel()
    assert similarity(a, b) == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)))
    assert similarity(a, a) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ""),
        ({"drop_path_rate": 0.2, "dynamic_img_size": True}, ""),  # which say nothing of the function
        ({"embed_dim": 48}, r"cls_token of shape [1, 1, 48], not [1, 1, 24]"),
        ({"num_classes": 4}, r"head.weight of shape [4, 24], not [3, 24]"),
        ({"num_heads": 3, "gaug": False}, "num_heads 3, not 2"),  # of the same shapes
        ({"depth": 2}, "blocks.1.attn.gaug.log_alpha.bias, which the first lacks"),
        ({"gaug": False}, "locatvit_tiny without GAug, not locatvit_tiny"),
    ],
)
def test_what_differs_first(change, expected):
    import locat_lightning  # noqa: F401 (registers the models)

    first = {key: value for key, value in change.items() if key == "gaug" and len(change) > 1}
    models = [timm.create_model("locatvit_tiny", **SMALL | own) for own in (first, change)]
    assert first_difference(*models) == expected


def test_another_architecture():
    pair = [timm.create_model(name, **SMALL) for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224")]
    assert first_difference(*pair) == "deit_tiny_patch16_224, not vit_tiny_patch16_224"
