"""Adaptation: LocAt or registers are put into a trained model, which itself teaches them, without labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from locat_lightning.backbones.create import load_backbone, noted_arguments, where_recorded
from locat_lightning.backbones.weights import RANDOM, contents_of, read_state
from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import feature_width
from locat_lightning.methods.base import Group, Output, Pretraining, features, freeze_pooling
from locat_lightning.methods.distillation import DISTANCES
from locat_lightning.methods.pixels import image_noise
from locat_lightning.tasks.base import announce_size
from locat_lightning.tasks.frozen import FrozenNetwork, reference_to


class Shift(NamedTuple):
    """By how many pixels a version of an image is moved, and whether it is mirrored after that."""

    down: int
    right: int
    flipped: bool


class LocalityAdaptation(Pretraining, FrozenNetwork):
    """Train what is added to a trained model to give better patch features, from images without labels.

    The model of `--weights`, the original, is frozen and teaches a copy of itself that has LocAt
    (`model.locat`), further registers (`model.backbone_args.reg_tokens`), or both. Only the first size of
    views is used. The loss is a weighted sum of up to three distances:

    - views: the copy's patch features are to be the original's, averaged over shifted and flipped versions of
      the image (`averaged_features`). What comes and goes with the position of the grid averages out.
    - masked: some of the copy's patch features are hidden behind a token, and a small decoder has to make of
      the others what the original makes of the image without the pixels of these patches. That is possible
      as far as each patch feature is about its own place.
    - [CLS]: the copy's [CLS], after PRR, is to stay the original's.

    Checkpoints hold the copy, and say where the original is.

    Source: "Vision Transformers with Self-Distilled Registers" (Chen et al. 2025, PH-Reg) for views, and
    "Locality Alignment Improves Vision-Language Models" (Covert et al., ICLR 2025, MaskEmbed) for masked.
    Both are followed from memory, and not compared with the authors' code: the number and sizes of the
    shifts, the uniform number of hidden patches, the decoder's form, and that its loss counts all patches.

    Args:
        backbone: timm's name of the model.
        trained: `new` trains what the original does not have; `all` also trains the rest, with smaller
            learning rates in earlier layers.
        layer_decay: factor of the learning rate from each layer of the original to the one before.
        criterion: `cosine` (1 - cosine) or `smooth_l1` (per value) between features after the final norm.
        views_weight: weight of the distance to averaged patch features.
        versions: shifted versions of each image that the original sees beside the image itself.
        shift: the largest shift in patches, in both directions; shifts are in whole pixels.
        hflip: probability that a version is mirrored.
        masked_weight: weight of the distance to the features of the masked image.
        decoder_depth: blocks of the decoder that predicts these.
        cls_weight: weight of the distance to the original's [CLS] (to what a model without [CLS] pools).
        backbone_weights: where the original of a run that is resumed is, if it has moved.
        options: those of every pre-training (`Pretraining`).
    """

    frozen, recorded_as, read_from = "original", "adapted_from", "model.backbone_weights"

    def __init__(
        self,
        backbone: str = "vit_base_patch14_dinov2",
        *,
        trained: Literal["new", "all"] = "new",
        layer_decay: ClosedUnitInterval = 0.65,
        criterion: Literal["cosine", "smooth_l1"] = "smooth_l1",
        views_weight: NonNegativeFloat = 1.0,
        versions: PositiveInt = 8,
        shift: NonNegativeFloat = 1.0,
        hflip: ClosedUnitInterval = 0.5,
        masked_weight: NonNegativeFloat = 0.0,
        decoder_depth: NonNegativeInt = 2,
        cls_weight: NonNegativeFloat = 1.0,
        backbone_weights: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.backbone_weights = backbone_weights

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        if self.weights in (None, RANDOM):
            raise InputError(
                "what is adapted is a trained model: give --weights, a checkpoint, a file or a timm name"
            )
        if not self.hp.views_weight + self.hp.masked_weight > 0:
            raise InputError("model.views_weight and model.masked_weight are both 0: patches learn nothing")

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        super().resume(checkpoint)
        self.weights = where_recorded(
            checkpoint.get(self.recorded_as), "the checkpoint", self.backbone_weights
        )

    def build(self, make_backbone: Callable[[], Any]) -> None:
        hp = self.hp
        self.backbone = backbone = make_backbone()
        announce_size(hp.backbone, backbone)
        width = feature_width(backbone)
        self.original: Any = self._original()
        self._reference = reference_to(str(self.weights), self.original)
        new = begin_as(backbone, self.original)
        if not new and hp.trained == "new":
            raise InputError(
                f"{hp.backbone} has nothing that {self.weights} lacks: set model.locat or "
                "model.backbone_args.reg_tokens, or train all (model.trained)"
            )
        if hp.trained == "new" and all(name.startswith("attn_pool.") for name in new):
            raise InputError(
                "PRR comes after the patch features, which learn nothing if it alone is new: set "
                "model.locat.gaug or model.backbone_args.reg_tokens, or train all (model.trained)"
            )
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(hp.trained == "all" or name in new)
        if not hp.cls_weight:
            freeze_pooling(backbone)
        self._new = new
        self.decoder = MaskedDecoder(width, hp.decoder_depth) if hp.masked_weight else None
        self._features = torch.compile(features, **self.compiler_options()) if hp.compile else features
        trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        rank_zero_info(f"{hp.backbone}: {trained:,} of its parameters are trained")

    def _original(self) -> nn.Module:
        """Build the model of `--weights`: the one that is trained, less what is added to it."""
        weights, arguments = str(self.weights), noted_arguments(self.hp)
        arguments.pop("locat", None)
        contents = contents_of(weights)
        state = read_state(weights, contents=contents)
        registers = next((value for name, value in state.items() if name.endswith("reg_token")), None)
        if registers is None:
            arguments.pop("reg_tokens", None)
        elif arguments.get("reg_tokens", number := registers.shape[1]) != number:
            raise InputError(
                f"model.backbone_args.reg_tokens ({arguments['reg_tokens']}): {weights} has {number} "
                "registers, to which none can be added"
            )
        known: dict[str, Any] = {"any_size": True, "contents": contents or state}  # not read twice
        original = load_backbone(weights, self.hp.backbone, arguments, **known)
        for part, key in {"LocAt": ".gaug.", "registers": "reg_token"}.items():
            of_weights, of_model = (
                any(key in name for name in each) for each in (state, original.state_dict())
            )
            if of_weights and not of_model:
                raise InputError(
                    f"{weights} has {part} already, which {self.hp.backbone} has not: set model.backbone and "
                    "model.backbone_args to what the weights are of"
                )
        return original.requires_grad_(False).eval()

    def networks(self) -> dict[str, nn.Module]:
        return {"adapted": self.backbone, "original": self.original}

    def to_compile(self) -> Iterable[nn.Module]:
        return ()  # `_features` is compiled as a whole

    def parameter_groups(self) -> list[Group]:
        """Return groups of what is new, then those of the original's layers, the last one first."""
        layers = []
        if self.hp.trained == "all":
            layers = param_groups_layer_decay(self.backbone, 1.0, layer_decay=self.hp.layer_decay)
        of_new = {id(p) for name, p in self.backbone.named_parameters() if name in self._new}
        old = {id(p) for layer in layers for p in layer["params"]} - of_new
        new = [p for p in self.trained() if p.requires_grad and id(p) not in old]
        groups = [
            Group([p for p in new if p.ndim > 1], decays=True),
            Group([p for p in new if p.ndim <= 1], decays=False),
        ]
        for layer in sorted(layers, key=lambda layer: -layer["lr_scale"]):
            of_original = [p for p in layer["params"] if id(p) in old]
            groups.append(Group(of_original, bool(layer["weight_decay"]), layer["lr_scale"]))
        return [group for group in groups if group.parameters]

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compare the first size of views with what the original makes of them."""
        hp, images = self.hp, batch.views[0].crops.flatten(0, 1)
        own_cls, own_patches = self._features(self.backbone, images)
        learnt, taught = {"cls": own_cls, "views": own_patches.movedim(1, -1)}, {}
        with torch.no_grad():
            if hp.cls_weight or hp.views_weight:
                taught["cls"], patches = self._features(self.original, images)
            if hp.views_weight:
                shifts = self.shifts(self.step)
                averaged = averaged_features(self._patches_of_original, images, patches, shifts)
                taught["views"] = averaged.movedim(1, -1)
            if hp.masked_weight:
                hidden = self.hidden(batch, (own_patches.shape[-2], own_patches.shape[-1]))
                masked = self._patches_of_original(without_patches(images, hidden))
                taught["masked"] = masked.movedim(1, -1)
        if self.decoder is not None:
            learnt["masked"] = self.decoder(own_patches, hidden)
        weights = {name: hp[f"{name}_weight"] for name in taught if hp[f"{name}_weight"]}
        with torch.autocast(images.device.type, enabled=False):
            distance = DISTANCES[hp.criterion]
            losses = {name: distance(learnt[name].float(), taught[name].float()) for name in weights}
            loss = torch.stack([weight * losses[name] for name, weight in weights.items()]).sum()
        return Output(
            loss, {f"{name}_loss": each.detach() for name, each in losses.items()}, own_cls.detach()
        )

    def shifts(self, step: int) -> list[Shift]:
        """Draw the shifted versions of an optimizer step, the same in every process."""
        rng = np.random.default_rng([self.of_data("seed") or 0, step])
        backbone: Any = self.backbone
        most = round(self.hp.shift * backbone.feature_info[-1]["reduction"])
        moved = rng.integers(-most, most + 1, (self.hp.versions, 2)).tolist()
        flipped = rng.random(self.hp.versions) < self.hp.hflip
        return [Shift(down, right, flip) for (down, right), flip in zip(moved, flipped.tolist(), strict=True)]

    def hidden(self, batch: ViewBatch, grid: tuple[int, int]) -> Tensor:
        """Choose the hidden patches, bool [V·B, h, w]: at least one of each image, and never all.

        How many is uniform. They follow from the seed of the data, the epoch and the image's index.
        """
        places, key = grid[0] * grid[1], (self.of_data("seed") or 0, self.current_epoch)
        views = range(len(batch.views[0].crops))
        noise = torch.cat([image_noise(batch.indices, places + 1, *key, view) for view in views])
        number = 1 + noise[:, -1:] % max(1, places - 1)
        hidden: Tensor = (noise[:, :-1].argsort(1).argsort(1) < number).unflatten(1, grid)
        return hidden

    def _patches_of_original(self, images: Tensor) -> Tensor:
        patches: Tensor = self._features(self.original, images)[1]
        return patches


class MaskedDecoder(nn.Module):
    """Predict the patch features of an image without some of its patches, from those of the whole image.

    Args:
        dim: D.
        depth: Transformer blocks before the last linear layer.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.Sequential(*(Block(dim, gcd(dim, max(1, dim // 64))) for _ in range(depth)))
        self.norm, self.predict = nn.LayerNorm(dim), nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """Map patch features [N, D, h, w], of which `hidden` [N, h, w] are not seen, to [N, h, w, D]."""
        seen = torch.where(hidden.unsqueeze(-1), self.token.to(patches.dtype), patches.movedim(1, -1))
        positions = build_sincos2d_pos_embed(list(hidden.shape[1:]), self.token.numel(), device=seen.device)
        x = self.predict(self.norm(self.blocks(seen.flatten(1, 2) + positions.to(seen.dtype))))
        predicted: Tensor = x.unflatten(1, hidden.shape[1:])
        return predicted


def begin_as(backbone: nn.Module, original: nn.Module) -> set[str]:
    """Give a model the weights of the one that it extends; return the names of those that it has besides.

    Registers that are added have a position embedding of 0, where they have one at all.
    """
    own, state = backbone.state_dict(), original.state_dict()
    if "pos_embed" in state and (more := own["pos_embed"].shape[1] - state["pos_embed"].shape[1]) > 0:
        prefix, patches = state["pos_embed"].tensor_split([original.num_prefix_tokens], dim=1)
        state["pos_embed"] = torch.cat([prefix, prefix.new_zeros(1, more, prefix.shape[-1]), patches], dim=1)
    other = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if other:
        raise InputError(
            f"the model does not extend that of --weights ({', '.join(other[:3])} differ): registers, for "
            "example, cannot be added to others"
        )
    backbone.load_state_dict(state, strict=False)
    return own.keys() - state.keys()


def averaged_features(
    find: Callable[[Tensor], Tensor], images: Tensor, patches: Tensor, shifts: Sequence[Shift]
) -> Tensor:
    """Average the patch features of images over shifted versions of them, each back in the images' grid.

    A version repeats the image's border where the image does not reach. Its features are interpolated
    linearly at the places of the image's patches; where such a place lies outside the centres of its own
    patches, it does not count.

    Args:
        find: Returns patch features [N, D, h, w] of images.
        images: [N, 3, H, W].
        patches: Those of the images themselves, which count as one version.
        shifts: The others.

    Returns:
        [N, D, h, w] float32.
    """
    size, grid = images.shape[-2:], patches.shape[-2:]
    total, count = patches.float(), patches.new_ones(grid, dtype=torch.float32)
    for down, right, flipped in shifts:
        rows, columns = (
            (torch.arange(side, device=images.device) - by).clamp(0, side - 1)
            for side, by in zip(size, (down, right), strict=True)
        )
        version = images[..., rows, :][..., columns]
        found = find(version.flip(-1)).flip(-1) if flipped else find(version)
        vertical, horizontal = (
            interpolation(cells, by * cells / side, images.device)
            for cells, by, side in zip(grid, (down, right), size, strict=True)
        )
        with torch.autocast(images.device.type, enabled=False):
            total = total + vertical @ found.float() @ horizontal.mT
        count = count + vertical.sum(1, keepdim=True) * horizontal.sum(1)
    return total / count


def interpolation(cells: int, by: float, device: torch.device) -> Tensor:
    """Return the matrix [cells, cells] that reads a row of cells at i + by; 0 where that is outside."""
    places = torch.arange(cells, device=device, dtype=torch.float32)
    read = (places + by).unsqueeze(1)
    inside = (read >= 0) & (read <= cells - 1)
    return (1 - (read - places).abs()).clamp(min=0) * inside


def without_patches(images: Tensor, hidden: Tensor) -> Tensor:
    """Set the pixels of the hidden patches, bool [N, h, w], of images [N, 3, H, W] to 0, their mean."""
    size = images.shape[-2:]
    rows, columns = (
        torch.arange(side, device=images.device) * cells // side
        for side, cells in zip(size, hidden.shape[1:], strict=True)
    )
    return images.masked_fill(hidden[:, rows][:, :, columns].unsqueeze(1), 0)
