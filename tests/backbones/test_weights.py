"""Weights from every kind of file, and what becomes of those that do not fit."""

import argparse
import json
import math
import pickle
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from timm.models import save_for_hf
from torch.testing import assert_close

from locat_lightning.backbones import registry  # noqa: F401 - names the models
from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.locate import add_locat
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


def authors(state, path):
    """As timm's training script, which is the authors', writes it."""
    of_model = {key: value for key, value in SMALL.items() if key != "num_classes"}
    args = argparse.Namespace(model="locatvit_tiny", num_classes=None, gp="token", model_kwargs=of_model)
    other = {name: value + 1 for name, value in state.items()}
    of_optimizer = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    checkpoint = {"epoch": 299, "arch": "locatvit_tiny", "state_dict": other, "optimizer": of_optimizer}
    checkpoint |= {"version": 2, "args": args, "amp_scaler": {"scale": 65536.0}, "state_dict_ema": state}
    torch.save(checkpoint | {"metric": 73.9}, path)


@pytest.mark.parametrize(
    "write", [plain, lightning, timm_style, averaged, with_command_line, authors, dino, dino_of_ours]
)
def test_every_kind_of_checkpoint_is_read(tmp_path, write):
    trained, fresh = model(1), model(2)
    write(trained.state_dict(), tmp_path / "weights.pth")
    load_weights(fresh, str(tmp_path / "weights.pth"))
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def chunked(name):
    """DINOv2's name of a weight where blocks are in chunks of one."""
    return re.sub(r"blocks\.(\d+)\.", r"blocks.\1.\1.", name)


def compiled(name):
    """The name of a weight where each block was compiled by itself."""
    return re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name)


@pytest.mark.parametrize("rename", [chunked, compiled, lambda name: f"_orig_mod.{compiled(name)}"])
@pytest.mark.parametrize(
    "container", [None, "state_dict", "model_state_dict", "net", "ema_state_dict", "model_ema", "teacher"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_names_of_other_scripts_are_read(tmp_path, rename, container, prefix):
    source, target = model(1), model(2)
    state = {prefix + rename(name): value for name, value in source.state_dict().items()}
    assert state.keys().isdisjoint(k for k in source.state_dict() if k.startswith("blocks."))
    plain(state if container is None else {container: state, "epoch": 3}, tmp_path / "a.pth")
    load_weights(target, str(tmp_path / "a.pth"))
    assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_a_block_of_a_chunk_is_the_block_of_its_own_number(tmp_path):
    """DINOv2's second number counts through all chunks: blocks.0.0, blocks.0.1, blocks.1.2, blocks.1.3."""
    source, target = (timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32) for _ in range(2))
    chunks = {
        re.sub(r"blocks\.(\d)", lambda found: f"blocks.{int(found[1]) // 2}.{found[1]}", name): value
        for name, value in source.state_dict().items()
    }
    assert "blocks.1.3.norm1.weight" in chunks
    plain(chunks, tmp_path / "a.pth")
    load_weights(target, str(tmp_path / "a.pth"))
    assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("better", "worse"),
    [("state_dict_ema", "state_dict"), ("ema_state_dict", "model_state_dict"), ("teacher", "student")],
)
def test_of_two_containers_the_averaged_one_is_read(tmp_path, better, worse):
    source, target = model(1), model(2)
    state = source.state_dict()
    plain({worse: {name: value + 1 for name, value in state.items()}, better: state}, tmp_path / "a.pth")
    load_weights(target, str(tmp_path / "a.pth"))
    assert_close(target.state_dict(), state, rtol=0, atol=0)


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
    load_weights(fresh, str(tmp_path / "a.pth"), warm_start=True)
    assert torch.equal(fresh.head.weight, head)
    assert torch.equal(fresh.cls_token, trained.cls_token)
    total = len(fresh.state_dict())
    assert f"{total - 2} of the model's {total} tensors matched, 2 of another shape (head" in caplog.text


@pytest.mark.parametrize(
    "gaug", [True, {"learned_alpha": False, "query_dependent": False}, {"mixture": 2}], ids=str
)
def test_locat_is_new_at_a_warm_start_from_a_model_without(tmp_path, gaug, caplog):
    """As adapt_pretrained.yaml begins."""
    trained = model(1, gaug=False, prr=False).eval()
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    located = add_locat(model(2, gaug=False, prr=False), gaug=gaug, start="identity").eval()
    with pytest.raises(InputError, match=r"do not fit \(attn_pool.gate, .*gaug"):
        load_weights(located, str(tmp_path / "a.pth"))

    caplog.set_level("INFO")
    load_weights(located, str(tmp_path / "a.pth"), warm_start=True)
    assert "missing (attn_pool.gate, " in caplog.text
    images = torch.randn(2, 3, 32, 32)
    assert_close(located(images), trained(images))

    state = located.state_dict()  # of which a part is no model without LocAt
    del state["attn_pool.gate"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"do not fit \(attn_pool.gate\)"):
        load_weights(located, str(tmp_path / "b.pth"), warm_start=True)


def test_missing_and_unexpected_tensors_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    state = model(1).state_dict()
    torch.save({k: v for k, v in state.items() if "head" not in k} | {"a": torch.ones(1)}, tmp_path / "a.pth")
    load_weights(model(2), str(tmp_path / "a.pth"), warm_start=True)
    assert "2 missing (head.bias, head.weight), 1 unexpected (a)" in caplog.text
    torch.save(state | {"a": torch.ones(1)}, tmp_path / "c.pth")
    caplog.clear()
    without = model(2)
    without.reset_classifier(0)
    load_weights(without, str(tmp_path / "c.pth"))
    assert "tensors matched, without the classifier, 1 unexpected (a)" in caplog.text
    del state["norm.weight"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"do not fit \(norm.weight\)"):
        load_weights(model(2), str(tmp_path / "b.pth"), warm_start=True)


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


def test_kernels_follow_images_of_another_size(tmp_path):
    """As wide beside the image as before, up to what saturates in the variance."""
    trained, larger = model(1), model(2, img_size=64)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    load_weights(larger, str(tmp_path / "a.pth"))
    q = torch.randn(1, 3, 1 + 64, 8)
    of_weights, of_model = (each.blocks[0].attn.gaug for each in (trained, larger))
    expected, strength = of_weights.variance_and_alpha(
        q, (8, 8), (4, 4)
    )  # the rule for images of another size
    var, alpha = of_model.variance_and_alpha(q, (8, 8), (8, 8))
    assert expected.mean().item() == pytest.approx(2, rel=0.1)
    torch.testing.assert_close(var, expected, rtol=0.1, atol=0)
    torch.testing.assert_close(alpha, strength)


@pytest.mark.parametrize("pos_embed", ["learn", "none"])
@pytest.mark.parametrize("patch_size", [2, 4, 16])
def test_kernels_in_pixels_stay_with_other_patches(tmp_path, patch_size, pos_embed):
    """The variance in pixels, from the narrowest to the bound, is that of the weights."""
    trained, other = model(1, pos_embed=pos_embed), model(2, patch_size=patch_size, pos_embed=pos_embed)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    load_weights(other, str(tmp_path / "a.pth"))
    q = 100 * torch.randn(1, 3, 50, 8)
    grid = (32 // patch_size,) * 2
    of_weights, of_model = (each.blocks[0].attn.gaug for each in (trained, other))
    before, strength = of_weights.variance_and_alpha(q, (4, 4), (4, 4))
    var, alpha = of_model.variance_and_alpha(q, grid, grid)
    assert before.max() > 15  # of 16 patches, the bound
    assert before.min() < 0.5
    torch.testing.assert_close(var * patch_size**2, before * 8**2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(alpha, strength)


def test_kernels_with_other_patches_and_images(tmp_path):
    trained, other = model(1), model(2, patch_size=4, img_size=64)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    load_weights(other, str(tmp_path / "a.pth"))
    name = "blocks.0.attn.gaug.log_var.bias"
    before, after = (each.get_parameter(name) for each in (trained, other))
    # From 4 × 4 to 8 × 8 patches of one image, C from 16 to 64; then an image twice as large.
    torch.testing.assert_close(after, before + math.log(63 / 15) + math.log(2))


def test_a_mixture_in_pixels_stays_with_other_patches(tmp_path):
    trained, other = (model(seed, gaug={"mixture": 3}, patch_size=p) for seed, p in ((1, 8), (2, 4)))
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    load_weights(other, str(tmp_path / "a.pth"))
    name = "blocks.1.attn.gaug.log_var"
    before, after = (each.get_parameter(name) for each in (trained, other))
    torch.testing.assert_close(after.exp() * 4**2, before.exp() * 8**2)


# Both in timm's resampling of the bias tables.
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
def test_windows_follow_their_size(tmp_path):
    size = {"img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    trained = timm.create_model("locatswin_tiny", window_size=4, **size)
    larger = timm.create_model("locatswin_tiny", window_size=8, **size)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    load_weights(larger, str(tmp_path / "a.pth"))
    name = "layers.0.blocks.0.attn.gaug.log_var.bias"
    before, after = (each.get_parameter(name) for each in (trained, larger))
    torch.testing.assert_close(after, before + math.log(2))


def test_a_file_of_the_authors_script_says_what_it_is(tmp_path):
    trained = model(1).eval()
    authors(trained.state_dict(), tmp_path / "model_best.pth.tar")
    read = load_backbone(str(tmp_path / "model_best.pth.tar"), classifier=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(read(images), trained(images))
    headless = load_backbone(str(tmp_path / "model_best.pth.tar")).eval()
    assert torch.equal(headless(images), trained.forward_head(trained.forward_features(images), True))


def test_a_hub_s_folder_says_what_it_is(tmp_path):
    trained = model(1).eval()
    config = {"architecture": "locatvit_tiny", "num_classes": 5, "model_args": SMALL, "pretrained_cfg": {}}
    layers = {"first_conv": "patch_embed.proj", "classifier": "head"}
    config["pretrained_cfg"] = {"num_classes": 5, "input_size": [3, 32, 32], **layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    read = load_backbone(f"local-dir:{tmp_path}", classifier=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(read(images), trained(images))
    larger = load_backbone(f"local-dir:{tmp_path}", arguments={"img_size": 48, "in_chans": 1})
    assert larger(torch.randn(1, 1, 48, 48)).shape == (1, 24)


SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1)}


# What timm's interpolation of Swin's positions does is not as torch wants it.
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    ("name", "arguments", "larger"),
    [
        ("locatvit_tiny", SMALL, {"img_size": 48}),
        ("swin_tiny_patch4_window7_224", SWIN | {"num_heads": (1, 2)}, {"img_size": 48, "window_size": 6}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1}, {"img_size": 56}),
    ],
)
def test_weights_follow_resolution_as_timm_has_it(tmp_path, name, arguments, larger):
    torch.manual_seed(0)
    trained = timm.create_model(name, **arguments | {"num_classes": 5})
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    save_for_hf(trained, tmp_path / "hub", safe_serialization=True)
    expected = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, **larger)
    found = timm.create_model(name, **arguments | larger | {"num_classes": 5})
    load_weights(found, str(tmp_path / "a.pth"))
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_channels_and_patches_follow_as_timm_has_it(tmp_path, in_chans):
    trained = model(1)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    fresh = model(2, in_chans=in_chans, patch_size=16)
    load_weights(fresh, str(tmp_path / "a.pth"))
    patches = resample_patch_embed(trained.patch_embed.proj.weight.detach(), [16, 16])
    expected = patches.sum(1, keepdim=True) if in_chans == 1 else patches[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(fresh.patch_embed.proj.weight.detach(), expected)
    assert fresh(torch.randn(1, in_chans, 32, 32)).shape == (1, 5)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"less than half .* matched: .*0 of the model's .* another model"):
        load_weights(model(), str(tmp_path / "a.pth"), warm_start=True)
    torch.save(model(embed_dim=48).state_dict(), tmp_path / "b.pth")
    with pytest.raises(InputError, match="of another shape"):
        load_weights(model(), str(tmp_path / "b.pth"), warm_start=True)


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


def test_nothing_in_a_hub_s_folder_is_executed(tmp_path):
    config = {"architecture": "locatvit_tiny", "num_classes": 5, "model_args": SMALL, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": {"a": Exploit()}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="timm cannot load local-dir:") as refused:
        load_backbone(f"local-dir:{tmp_path}")
    assert "\n" not in str(refused.value)


def test_an_object_in_a_command_line_is_refused(tmp_path):
    torch.save({"state_dict": {}, "args": argparse.Namespace(data=Exploit())}, tmp_path / "a.pth.tar")
    with pytest.raises(InputError, match="could execute code"):
        read_checkpoint(tmp_path / "a.pth.tar")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_any_other_bytes_are_refused(tmp_path, suffix):
    path, generator = tmp_path / f"a{suffix}", np.random.default_rng(0)
    for content in (b"junk", b"just text", *(generator.bytes(size) for size in range(1, 300))):
        path.write_bytes(content)
        with pytest.raises(InputError) as refused:
            read_checkpoint(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["a.pth", "a.safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    path = tmp_path / kind
    (save_file if path.suffix == ".safetensors" else torch.save)(model().state_dict(), path)
    whole = path.read_bytes()
    for size in (*range(1, 200, 7), *range(200, len(whole) - 1, len(whole) // 50), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pth", b"\x80\x02}q\x00.", "a.pth holds no weights|cannot be read|is not a checkpoint"),
        ("a.pth", b"\x89PNG\r\n\x1a\n" + bytes(64), "a.pth (cannot be read|is not a checkpoint)"),
        ("a.pth", b"PK\x03\x04" + bytes(64), "a.pth (cannot be read|is not a checkpoint)"),
        ("a.pth", b"", "a.pth cannot be read .*: it is empty"),
        ("a.pth", b"just text", "a.pth (cannot be read|is not a checkpoint)"),
        ("a.pth", b"h1\n", "a.pth (cannot be read .*: KeyError|is not a checkpoint)"),
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


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.9])
def test_a_flipped_byte_is_noticed(tmp_path, place):
    """PyTorch reads tensors without looking at their checksums."""
    file = tmp_path / "a.pth"
    torch.save({"state_dict": {"weight": torch.arange(5000.0)}}, file)
    contents = bytearray(file.read_bytes())
    contents[int(place * len(contents))] ^= 1
    file.write_bytes(contents)
    with pytest.raises(InputError, match=r"a.pth is damaged \(.* has another checksum"):
        read_checkpoint(file)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    state = {"weight": torch.zeros(5), "bias": torch.tensor([0.0, value])}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} holds weights that are not finite numbers \(bias\)"):
        read_checkpoint(tmp_path / name)


def test_weights_that_are_integers_are_refused(tmp_path):
    model = timm.create_model("locatvit_tiny", **SMALL)
    state = model.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].char()
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"patch_embed.proj.weight holds torch.int8, not floating-point"):
        load_weights(model, str(tmp_path / "a.pth"))
