"""Weights from every kind of file, and what becomes of those that do not fit."""

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from locat_lightning.backbones import registry  # noqa: F401 - names the models
from locat_lightning.backbones.weights import check_source, load_weights, read_checkpoint
from locat_lightning.errors import InputError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def model(seed=0, **options):
    torch.manual_seed(seed)
    made = timm.create_model("locatvit_tiny", **(SMALL | options))
    torch.nn.init.normal_(made.head.weight)
    return made


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def plain(state, path):
    torch.save(state, path)


def lightning(state, path):
    metrics = {"val_loss.mean_value": torch.zeros(())}
    torch.save({"state_dict": prefixed(state, "backbone.") | metrics, "epoch": 3, "callbacks": {}}, path)


def timm_style(state, path):
    torch.save({"state_dict": prefixed(state, "module."), "optimizer": {"state": {}}}, path)


def averaged(state, path):
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict": other, "state_dict_ema": state}, path)


def with_command_line(state, path):
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, data="/d")}, path)


def dino(state, path):
    student = {name: value + 1 for name, value in state.items()}
    head = {"module.head.mlp.0.weight": torch.zeros(3, 24)}
    torch.save(
        {
            "student": prefixed(student, "module.backbone.") | head,
            "teacher": prefixed(state, "module.backbone.") | head,
            "args": argparse.Namespace(arch="vit_small"),
        },
        path,
    )


def dino_of_ours(state, path):
    student = {name: value + 1 for name, value in state.items()}
    both = prefixed(student, "student.backbone.") | prefixed(state, "teacher.backbone.")
    torch.save({"state_dict": both}, path)


@pytest.mark.parametrize(
    "write", [plain, lightning, timm_style, averaged, with_command_line, dino, dino_of_ours]
)
def test_every_kind_of_checkpoint_is_read(tmp_path, write):
    trained, fresh = model(1), model(2)
    write(trained.state_dict(), tmp_path / "weights.pth")
    load_weights(fresh, str(tmp_path / "weights.pth"))
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_safetensors_and_a_directory_of_timm_s(tmp_path):
    trained = model(1)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    save_for_hf(trained, tmp_path / "hub", model_args=SMALL, safe_serialization=True)
    for source in (str(tmp_path / "weights.safetensors"), f"local-dir:{tmp_path / 'hub'}"):
        fresh = model(2)
        load_weights(fresh, source)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), trained.parameters(), strict=True))


def test_a_head_of_another_size_stays_as_it_is_at_a_warm_start(tmp_path, caplog):
    trained, fresh = model(1), model(2, num_classes=7)
    head = fresh.head.weight.clone()
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"do not fit \(head.bias, head.weight\).*of another shape"):
        load_weights(fresh, str(tmp_path / "a.pth"))
    assert not torch.equal(fresh.cls_token, trained.cls_token)

    caplog.set_level("INFO")
    load_weights(fresh, str(tmp_path / "a.pth"), new_head=True)
    assert torch.equal(fresh.head.weight, head)
    assert torch.equal(fresh.cls_token, trained.cls_token)
    total = len(fresh.state_dict())
    assert f"{total - 2} of the model's {total} tensors matched, 2 of another shape (head" in caplog.text


def test_missing_and_unexpected_tensors_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    state = model(1).state_dict()
    torch.save({k: v for k, v in state.items() if "head" not in k} | {"a": torch.ones(1)}, tmp_path / "a.pth")
    load_weights(model(2), str(tmp_path / "a.pth"), new_head=True)
    assert "2 missing (head.bias, head.weight), 1 unexpected (a)" in caplog.text
    del state["norm.weight"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"do not fit \(norm.weight\)"):
        load_weights(model(2), str(tmp_path / "b.pth"), new_head=True)


def test_positions_are_resampled_to_another_resolution(tmp_path):
    trained, larger = model(1), model(2, img_size=48)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    load_weights(larger, str(tmp_path / "a.pth"))
    old, new = trained.pos_embed, larger.pos_embed
    assert (old.shape[1], new.shape[1]) == (17, 37)
    assert torch.equal(new[:, 0], old[:, 0])
    grid = old[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(new[:, 1:], resampled.flatten(2).transpose(1, 2))


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"too poor a match: .*0 of the model's .* another model"):
        load_weights(model(), str(tmp_path / "a.pth"), new_head=True)
    torch.save(model(embed_dim=48).state_dict(), tmp_path / "b.pth")
    with pytest.raises(InputError, match="of another shape"):
        load_weights(model(), str(tmp_path / "b.pth"), new_head=True)


def test_random_weights_are_warned_of():
    chosen = model(3)
    before = chosen.head.weight.clone()
    with pytest.warns(UserWarning, match="has not been trained"):
        load_weights(chosen, "random")
    assert torch.equal(chosen.head.weight, before)


def test_sources_are_checked_without_reading_them(tmp_path):
    (tmp_path / "a.pth").touch()
    for source in ("random", str(tmp_path / "a.pth"), "vit_tiny_patch16_224", "local-dir:x", "hf-hub:a/b"):
        check_source(source)
    with pytest.raises(InputError, match=r"no such file: .*nowhere.pth; timm knows no such model"):
        check_source("nowhere.pth")
    with pytest.raises(InputError, match="timm cannot load locatvit_tiny"):
        load_weights(model(), "locatvit_tiny")


class Exploit:
    def __reduce__(self):
        return pytest.fail, ("code of a checkpoint was executed",)


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, 2))])
def test_nothing_is_executed(tmp_path, save):
    save({"state_dict": {"a": Exploit()}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="could execute code"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pth", b"", "a.pth cannot be read .*: it is empty"),
        ("a.pth", b"just text", "a.pth (cannot be read|is not a checkpoint)"),
        ("a.safetensors", b"just text", "a.safetensors cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        read_checkpoint(tmp_path / name)


def test_half_a_file_and_no_checkpoint_are_refused(tmp_path):
    torch.save(model().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"half.pth cannot be read") as refused:
        read_checkpoint(tmp_path / "half.pth")
    assert "\n" not in str(refused.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list, not a checkpoint"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "nowhere.pth")
