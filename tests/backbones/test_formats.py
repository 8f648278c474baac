"""A model in each format computes what it computed, for any batch, and tells nothing of the machine."""

import json
from functools import cache

import pytest
import timm
import torch

from locat_lightning import add_locat
from locat_lightning.backbones import formats
from locat_lightning.backbones.formats import FILES, write_model
from locat_lightning.errors import InputError

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "num_classes": 5}
MODELS = {
    "locatvit_tiny": VIT,
    "locatvit_tiny_rope_mixed": VIT,
    "locatvit_tiny_distilled": VIT,
    "locatjumbo_tiny": VIT | {"jumbo_multiplier": 2},
    "locatswin_tiny": SWIN | {"depths": (2,), "num_heads": (1,)},
}
CASES = [(name, form) for name in MODELS for form in ("timm", "torchscript")]
CASES += [pytest.param(name, "export onnx", marks=pytest.mark.slow) for name in MODELS]


def trained(name="locatvit_tiny", **arguments):
    """A model that weights say something of: untrained classifiers are 0."""
    torch.manual_seed(0)
    model = timm.create_model(name, **MODELS[name] | arguments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def run(form, directory):
    """The written model as a reader of its format has it."""
    file = directory / FILES[form]
    if form == "timm":
        return timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    if form == "torchscript":
        return torch.jit.load(file)
    if form == "export":
        return torch.export.load(file).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


shared = cache(trained)
program_of = cache(formats._program)


@pytest.fixture
def exported_once(monkeypatch):
    """All that is written of a shared model is written from one program, which takes seconds to make."""
    monkeypatch.setattr(formats, "_program", program_of)


@pytest.mark.compilers
@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
@pytest.mark.parametrize(("name", "forms"), CASES)
def test_the_outputs_are_the_same_for_any_batch(tmp_path, exported_once, name, forms):
    model = shared(name)
    for form in forms.split():
        if form == "onnx":
            pytest.importorskip("onnxruntime")
        difference = write_model(model, tmp_path, form)
        written = run(form, tmp_path)
        with torch.no_grad():
            for batch in (1, 2, 5):
                images = torch.randn(batch, 3, 32, 32)
                expected, found = model(images), written(images)
                if form == "timm":
                    assert torch.equal(expected, found)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert difference == 0 if form == "timm" else difference < 1e-5
        if form in ("export", "onnx"):  # no path of this machine is in it
            content = (tmp_path / FILES[form]).read_bytes()
            assert b"site-packages" not in content
            assert b"locat_lightning/" not in content


def test_the_config_says_what_a_model_is_and_what_its_images_are_like(tmp_path):
    write_model(
        trained(gaug=False, reg_tokens=2),
        tmp_path,
        classes=["a", "b", "c", "d", "e"],
        images={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.7},
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "locatvit_tiny"
    assert config["num_classes"] == 5
    assert config["label_names"] == ["a", "b", "c", "d", "e"]
    assert config["model_args"]["gaug"] is False
    assert config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert config["pretrained_cfg"]["crop_pct"] == 0.7
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=48, in_chans=1)
    assert larger(torch.zeros(1, 1, 48, 48)).shape == (1, 5)


def test_one_without_classes(tmp_path):
    model = trained("locatswin_tiny", num_classes=0)
    write_model(model, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(run("timm", tmp_path)(images), model(images))


@pytest.mark.parametrize("form", ["timm", "torchscript", "export"])
def test_other_outputs_are_an_error(tmp_path, form, exported_once, monkeypatch):
    monkeypatch.setattr(formats, "_difference", lambda *_: 0.01)
    with pytest.raises(InputError, match=rf"outputs of the {form} file differ .* by 0.01 of the largest"):
        write_model(shared("locatvit_tiny"), tmp_path, form)


def test_differences_are_found():
    model, images = trained(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        largest = model(images).abs().max()
        assert formats._difference(model, model, images) == 0
        other = formats._difference(model, lambda x: model(x) + 0.1 * largest, images)
        assert other == pytest.approx(0.1)
        assert formats._difference(model, lambda x: model(x)[:1], images) == float("inf")
        assert formats._difference(model, lambda x: model(x) * float("nan"), images) == float("inf")


@pytest.mark.parametrize(
    ("name", "arguments", "locat"),
    [
        ("vit_tiny_patch16_224", VIT, {"start": "identity"}),
        ("vit_tiny_patch16_224", VIT | {"global_pool": "avg"}, {}),
        ("vit_base_patch16_siglip_224", VIT, {"gaug": {"mixture": 2}}),
        ("vit_small_patch16_rope_mixed_224", VIT, {"gaug": False}),
        ("swin_tiny_patch4_window7_224", SWIN | {"depths": (2,), "num_heads": (1,)}, {"prr": False}),
    ],
)
def test_timm_builds_again_what_locat_was_added_to(tmp_path, name, arguments, locat):
    torch.manual_seed(0)
    model = add_locat(timm.create_model(name, **arguments), **locat)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert write_model(model, tmp_path) == 0
    written, images = run("timm", tmp_path), torch.randn(2, 3, 32, 32)
    assert torch.equal(written(images), model(images))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "located"
    assert config["model_args"]["backbone"] == name
    again = tmp_path / "again"  # of what was written, another size and other classes
    again.mkdir()
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64, num_classes=3)
    assert write_model(larger, again) == 0
    features = timm.create_model(f"local-dir:{again}", features_only=True, out_indices=(0,))
    assert features(torch.zeros(1, 3, 64, 64))[0].shape[0] == 1


def test_a_model_to_which_locat_was_added_is_a_program(tmp_path):
    """With the gates of a pretrained model; without, its modules are those of `locatvit_tiny` above."""
    torch.manual_seed(0)
    model = add_locat(timm.create_model("vit_tiny_patch16_224", **VIT), start="identity").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    write_model(model, tmp_path, "export")
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(run("export", tmp_path)(images), model(images), rtol=1e-4, atol=1e-4)


def test_onnx_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(InputError, match=r"needs onnxscript: pip install 'locat-lightning\[onnx\]'"):
        write_model(trained(), tmp_path, "onnx")


def test_a_model_that_cannot_be_written(tmp_path):
    model = trained()
    model.forward = lambda images: (_ for _ in ()).throw(RuntimeError("two\nlines"))
    with pytest.raises(InputError, match="VisionTransformer cannot be written as export: ") as refused:
        write_model(model, tmp_path, "export")
    assert "\n" not in str(refused.value)
