"""Adaptation: it starts as the original, trains what is new, and its targets are those of plain loops."""

import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.formats import write_model
from locat_lightning.errors import InputError
from locat_lightning.methods.adaptation import LocalityAdaptation, Shift, averaged_features, without_patches
from locat_lightning.methods.base import features
from tests.methods.runs import BACKBONE, Batches, copied, fit, part_of, random_batch, same, small, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
NO_CLS = {"no_embed_class": True}


def adaptation(**options):
    """By default only what is new is trained, by averaged versions alone."""
    return small("LocalityAdaptation", **({"trained": "new", "masked_weight": 0.0} | options))


@pytest.mark.parametrize("side", [32, 48])
def test_it_starts_as_the_original(side):
    task = adaptation().eval()
    images = torch.randn(2, 3, side, side)
    for own, of_original in zip(*(features(each, images) for each in task.networks().values()), strict=True):
        torch.testing.assert_close(own, of_original, atol=1e-5, rtol=0)


def test_only_what_is_new_is_trained():
    task = adaptation(lr=1e-2, masked_weight=1.0)
    before = copied(task)
    fit(task, [random_batch(2)] * 3)
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    new = {
        name for name in before if ".gaug." in name or name.startswith(("decoder.", "backbone.attn_pool."))
    }
    assert {"backbone.blocks.0.attn.gaug.gate", "backbone.attn_pool.gate", "decoder.token"} < changed <= new


def test_all_is_trained_with_smaller_rates_below():
    task = adaptation(trained="all", layer_decay=0.5)
    before = copied(task)
    groups = task.parameter_groups()
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    scales = {names[id(p)]: group.lr_scale for group in groups for p in group.parameters}
    decays = {names[id(p)] for group in groups if group.decays for p in group.parameters}
    assert scales.keys() == {name for name in before if not name.startswith("original.")}
    assert scales["backbone.blocks.0.attn.gaug.log_var.weight"] == scales["backbone.attn_pool.gate"] == 1
    last, first = (scales[f"backbone.blocks.{block}.mlp.fc1.weight"] for block in (1, 0))
    assert first == 0.5 * last
    assert scales["backbone.patch_embed.proj.weight"] == 0.5 * first
    assert "backbone.blocks.0.mlp.fc1.weight" in decays
    assert "backbone.blocks.0.mlp.fc1.bias" not in decays
    fit(task, [random_batch(2)])
    assert not same({n: v for n, v in copied(task).items() if "mlp.fc1" in n}, before)
    assert all(torch.equal(v, before[n]) for n, v in copied(task).items() if n.startswith("original."))


def read_at(maps, row, column):
    """Read maps [N, D, h, w] between their cells, bilinearly; None outside the centres."""
    height, width = maps.shape[-2:]
    if not (0 <= row <= height - 1 and 0 <= column <= width - 1):
        return None
    total = 0
    for r in {int(row), min(int(row) + 1, height - 1)}:
        for c in {int(column), min(int(column) + 1, width - 1)}:
            total = total + (1 - abs(row - r)) * (1 - abs(column - c)) * maps[..., r, c]
    return total


def test_versions_are_averaged_as_in_a_plain_loop():
    """On images that are not square, by a ViT, with shifts of whole and of parts of patches."""
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=0, **BACKBONE).eval()

    def find(images):
        return features(model, images)[1]

    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    shifts = [Shift(8, 0, False), Shift(-3, 5, False), Shift(0, -8, True), Shift(2, 9, True)]
    with torch.no_grad():
        plain = find(images)
        found = averaged_features(find, images, plain, shifts)
        values = [[[plain[..., r, c]] for c in range(6)] for r in range(4)]
        for down, right, flipped in shifts:
            version = torch.empty_like(images)
            for y in range(32):
                for x in range(48):
                    version[..., y, x] = images[..., min(max(y - down, 0), 31), min(max(x - right, 0), 47)]
            maps = find(version.flip(-1)).flip(-1) if flipped else find(version)
            for r in range(4):
                for c in range(6):
                    if (value := read_at(maps, r + down / 8, c + right / 8)) is not None:
                        values[r][c].append(value)
    assert {len(value) for row in values for value in row} >= {2, 3, 4}
    for r in range(4):
        for c in range(6):
            torch.testing.assert_close(found[..., r, c], sum(values[r][c]) / len(values[r][c]))


def test_features_that_move_with_the_image_are_their_own_average():
    """Those of a patch-wise linear model that sees no left and right; a ramp also by parts of a patch."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(5, 3, 8, 4, generator=generator)
    weight = torch.cat([half, half.flip(-1)], dim=-1)

    def find(images):
        return F.conv2d(images, weight, stride=8)

    images = torch.randn(2, 3, 40, 48, generator=generator)
    shifts = [Shift(8, -8, False), Shift(-8, 16, True), Shift(0, 8, True)]
    average = averaged_features(find, images, find(images), shifts)
    torch.testing.assert_close(average, find(images), atol=1e-4, rtol=1e-5)
    ramp = (torch.arange(40.0).unsqueeze(1) + 2 * torch.arange(48.0)).expand(1, 3, 40, 48) / 100
    average = averaged_features(find, ramp, find(ramp), [Shift(3, -5, False), Shift(-7, 2, True)])
    torch.testing.assert_close(average[..., 1:-1, 1:-1], find(ramp)[..., 1:-1, 1:-1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["cosine", "smooth_l1"])
def test_the_loss_is_the_plain_one(criterion):
    weights = {"cls_weight": 0.5, "views_weight": 2.0, "masked_weight": 3.0}
    task = adaptation(criterion=criterion, locat={"start": "paper"}, **weights).eval()
    batch = random_batch(3)
    images, hidden = batch.views[0].crops.flatten(0, 1), task.hidden(batch, (4, 4))
    masked = images.clone()
    for image, own in zip(masked, hidden, strict=True):
        for row, column in own.nonzero().tolist():
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
    torch.testing.assert_close(without_patches(images, hidden), masked)
    own_cls, own = features(task.backbone, images)
    cls, patches = features(task.original, images)
    versions = averaged_features(lambda x: features(task.original, x)[1], images, patches, task.shifts(0))
    seen = [row.movedim(0, -1).clone() for row in own]  # [4, 4, D] each
    for image, places in zip(seen, hidden, strict=True):
        image[places] = task.decoder.token
    decoder = task.decoder
    positions = timm.layers.build_sincos2d_pos_embed([4, 4], 24)
    decoded = decoder.predict(decoder.norm(decoder.blocks(torch.stack(seen).flatten(1, 2) + positions)))
    taught = features(task.original, masked)[1].flatten(2).mT
    pairs = {
        "cls": (own_cls, cls),
        "views": (own.flatten(2).mT, versions.flatten(2).mT),
        "masked": (decoded, taught),
    }
    total = 0
    loss, scalars, _ = task.compute_loss(batch)
    for name, (learnt, target) in pairs.items():
        if criterion == "cosine":
            term = 1 - (F.normalize(learnt, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()
        else:
            error = (learnt - target).abs()
            term = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
        torch.testing.assert_close(scalars[f"{name}_loss"], term)
        total = total + weights[f"{name}_weight"] * term
    torch.testing.assert_close(loss, total)
    trained = [parameter for parameter in task.trained() if parameter.requires_grad]
    gradients = (torch.autograd.grad(each, trained, allow_unused=True) for each in (loss, total))
    torch.testing.assert_close(*map(list, gradients))


def test_hidden_patches_follow_the_image_alone():
    task, batch = adaptation(masked_weight=1.0), random_batch(200)
    hidden = task.hidden(batch, (3, 4))
    numbers = hidden.flatten(1).sum(1)
    assert set(numbers.tolist()) == set(range(1, 12))
    assert not torch.equal(hidden[:200], hidden[200:])  # of the second view
    some = torch.tensor([5, 190])
    assert torch.equal(task.hidden(part_of(batch, some), (3, 4)), hidden[torch.tensor([5, 190, 205, 390])])


def test_versions_differ_by_step_and_stay_near():
    task = adaptation(versions=50, shift=0.5, hflip=0.0)
    shifts = task.shifts(0)
    assert {shift.down for shift in shifts} | {shift.right for shift in shifts} == set(range(-4, 5))
    assert not any(shift.flipped for shift in shifts)
    assert shifts == task.shifts(0) != task.shifts(1)


@pytest.mark.parametrize("positions", [{}, NO_CLS, {"pos_embed": "none"}])
def test_registers_are_added(tmp_path, positions):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **(BACKBONE | positions))
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    options = {"weights": str(tmp_path / "vit.pt"), "lr": 1e-2, "cls_weight": 0.0, "locat": None}
    task = adaptation(backbone_args={"reg_tokens": 3} | positions, **options)
    if not positions:
        place, own = model.pos_embed, task.backbone.pos_embed
        assert torch.equal(own, torch.cat([place[:, :1], torch.zeros(1, 3, 24), place[:, 1:]], dim=1))
    before = copied(task)
    fit(task, [random_batch(2)], ModelCheckpoint(tmp_path / "run", save_last=True))
    after = copied(task)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"backbone.reg_token"}
    again = load_backbone(last := str(tmp_path / "run" / "last.ckpt"))
    assert again.num_prefix_tokens == 4
    assert same(again.state_dict(), task.backbone.state_dict())
    # LocAt goes into what has registers now.
    write_model(again, tmp_path / "exported")
    for weights in (last, str(tmp_path / "exported")):
        more = adaptation(backbone_args={"reg_tokens": 3} | positions, weights=weights)
        assert same(more.original.state_dict(), again.state_dict())


def test_checkpoints_hold_the_adapted_model_alone(tmp_path):
    task = adaptation(lr=1e-2)
    fit(task, [random_batch(2)] * 2, ModelCheckpoint(tmp_path, save_last=True))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in checkpoint["state_dict"]} == {"backbone"}
    assert checkpoint["adapted_from"]["weights"] == task.weights
    images = torch.randn(2, 3, 32, 32)
    adapted = load_backbone(str(tmp_path / "last.ckpt")).eval()
    assert torch.equal(adapted(images), task.eval()(images))
    assert not torch.equal(adapted(images), task.original(images))


def test_a_run_finds_its_original_again(tmp_path):
    weights = tmp_path / "vit.pt"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **BACKBONE)
    torch.save(model.state_dict(), weights)
    batches = [random_batch(2)] * 2
    fit(adaptation(weights=str(weights)), batches, ModelCheckpoint(tmp_path / "run", save_last=True))
    last = tmp_path / "run" / "last.ckpt"
    moved = weights.rename(tmp_path / "moved.pt")
    checkpoint = torch.load(last, weights_only=True)

    def resumed(**options):
        task = adaptation(**options)
        for name in ("backbone", "original", "_features"):
            delattr(task, name)
        task.resume(checkpoint)
        trainer(max_epochs=2).fit(task, Batches(batches), ckpt_path=last, weights_only=True)
        return task

    with pytest.raises(
        InputError, match=r"vit\.pt', which are not on this machine: set model\.backbone_weig"
    ):
        resumed()
    assert resumed(backbone_weights=str(moved)).global_step == 4
    nn.init.ones_(model.norm.bias)
    torch.save(model.state_dict(), moved)
    with pytest.raises(
        InputError, match=r"moved\.pt is not the one that the run began with .* as model\.back"
    ):
        resumed(backbone_weights=str(moved))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "what is adapted is a trained model: give --weights"),
        ({"weights": "random"}, "what is adapted is a trained model: give --weights"),
        ({"views_weight": 0.0}, "patches learn nothing"),
    ],
)
def test_what_cannot_be_adapted_is_an_error(options, message):
    task = adaptation()
    task.weights = options.pop("weights", task.weights)
    task.hparams.update(options)
    with pytest.raises(InputError, match=message):
        task.check(trainer(max_epochs=20), training=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"locat": None}, "nothing that .* lacks: set model.locat or model.backbone_args.reg_tokens"),
        ({"locat": {"start": "identity", "gaug": False}}, "patch features, which learn nothing if it alone"),
        ({"backbone_args": {"embed_dim": 48}}, "weights do not fit|less than half"),
        (
            {"of": {"reg_tokens": 2}, "backbone_args": {"reg_tokens": 4}},
            "has 2 registers, to which none can be added",
        ),
        (
            {"of": {"reg_tokens": 2} | NO_CLS, "backbone_args": NO_CLS},
            "has registers already, which vit_tiny_patch16_224 has not",
        ),
        ({"of": {"name": "locatvit_tiny"}}, "has LocAt already, which vit_tiny_patch16_224 has not"),
        ({"backbone": "locatvit_tiny"}, "has it already: pass gaug=False"),
    ],
)
@pytest.mark.parametrize("exported", [False, True], ids=["file", "export"])
def test_models_that_do_not_fit_are_an_error(tmp_path, options, message, exported):
    own = {"name": "vit_tiny_patch16_224"} | options.get("of", {})
    model = timm.create_model(own.pop("name"), num_classes=0, **(BACKBONE | own))
    weights = str(tmp_path / ("exported" if exported else "weights.pt"))
    if exported:
        write_model(model, tmp_path / "exported")
    else:
        torch.save(model.state_dict(), weights)
    with pytest.raises(InputError, match=message):
        adaptation(weights=weights, **{key: value for key, value in options.items() if key != "of"})


def test_a_model_without_a_grid_of_patches_is_an_error():
    task = LocalityAdaptation("resnet10t", locat={"start": "identity"}, weights="resnet.pt")
    with pytest.raises(InputError, match=r"model\.locat does not fit resnet10t: gaug=True needs attention"):
        task.check(trainer(max_epochs=20), training=True)
