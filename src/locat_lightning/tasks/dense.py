"""A head on the patch features of a backbone that is frozen or trained: what dense tasks share."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import AdamW

from locat_lightning.backbones.channels import channels_of
from locat_lightning.backbones.create import (
    create_for_any_size,
    find_backbone,
    load_backbone,
    where_recorded,
)
from locat_lightning.backbones.weights import DECODER_OF, RANDOM, Role, check_source, contents_of
from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import frozen as in_evaluation
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.features import surrounding_autocast
from locat_lightning.tasks.channels import agree_on_channels, tell_channels
from locat_lightning.tasks.frozen import FrozenNetwork, check_same, reference_to
from locat_lightning.tasks.heads import head_in, load_head


class DenseTask(FrozenNetwork):
    """A task that trains a head, `decoder`, on the patch features of a backbone.

    A checkpoint holds the head, and says where the weights of the frozen backbone are; it also holds a
    backbone that is trained or has random weights.

    Args:
        backbone: timm's name of the model; null takes the one that the weights name.
        backbone_args: further arguments of the model, as in `timm.create_model`.
        backbone_weights: where the frozen backbone of a checkpoint of such a task is, if it has moved.
        student: whether to take the student of a DINO checkpoint instead of the teacher.
        train_backbone: whether to train the backbone, too, with smaller learning rates in earlier layers.
        layer_decay: factor of the learning rate from each layer of a trained backbone to the one before.
        save_backbone: whether checkpoints hold a frozen backbone as well.
        weight_decay: weight decay of the head, and of the matrices of a trained backbone.
        options: those of every task (`Task`). `weights` may be a checkpoint of such a task, too.
    """

    frozen, recorded_as, read_from = "backbone", DECODER_OF, "--weights"
    decoder: nn.Module

    def __init__(
        self,
        backbone: str | None = None,
        *,
        backbone_args: dict[str, Any] | None = None,
        backbone_weights: str | None = None,
        student: bool = False,
        train_backbone: bool = False,
        layer_decay: ClosedUnitInterval = 0.65,
        save_backbone: bool = False,
        weight_decay: NonNegativeFloat = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.backbone_weights = backbone_weights

    @property
    def read(self) -> dict[str, Any]:
        """Which features the head reads, as arguments of `patch_features`."""
        return {}

    def check(self, trainer: Trainer, *, training: bool) -> None:
        if self.weights is None and not (self.hp.train_backbone or self.resumed):
            raise InputError(
                "a frozen backbone needs --weights: a checkpoint of a run, a file or a timm name "
                f"('{RANDOM}' for an untrained one, with --model.backbone)"
            )
        if self.weights is None and self.hp.backbone is None:
            raise InputError("give --weights, or --model.backbone to train one from random weights")
        if self.backbone_weights is not None:
            check_source(self.backbone_weights)
        super().check(trainer, training=training)
        every, steps = trainer.val_check_interval, trainer.max_steps
        if training and isinstance(every, int) and 0 < steps < every:
            raise InputError(
                f"trainer.val_check_interval ({every}) is more than trainer.max_steps ({steps}), so nothing "
                f"would be measured: add --trainer.val_check_interval {steps}"
            )

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        self.resumed = True
        own = checkpoint["hyper_parameters"]
        self.hp.backbone, self.hp.backbone_args = own["backbone"], own["backbone_args"]
        reference = checkpoint.get(DECODER_OF)
        moved = self.backbone_weights
        self.weights = reference and where_recorded(reference, "the checkpoint", moved)

    def read_weights(self, make_decoder: Callable[[dict[str, Tensor]], nn.Module]) -> None:
        """Build the backbone with its weights, and the head of a checkpoint's, which may have none."""
        self.backbone, state = self._read_backbone()
        tell_channels(self, self.backbone)
        self.decoder = make_decoder(state)
        self._compiled_features = torch.compile(patch_features, **self.compiler_options())
        if self.hp.train_backbone:
            self._freeze_what_is_not_read()
        else:
            self.backbone.requires_grad_(False)
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.parameters())
        rank_zero_info(f"{self.hp.backbone}: {whole:,} parameters with the decoder, {trained:,} are trained")
        self.train(self.training)

    def load_decoder(self, head: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load the weights of a checkpoint's head; `InputError` if they are needed and do not fit."""
        if (obstacle := load_head(head, state)) and not self.trainer.training:
            raise InputError(f"--weights {self.weights}: {obstacle}; train a decoder with locat fit")
        if state and self.trainer.training:
            rank_zero_info(f"{self.weights}: {obstacle or 'training begins with its decoder'}")

    def _freeze_what_is_not_read(self) -> None:
        """Freeze what follows the features (norm, pooling): DDP would wait for its gradients."""
        side: Any = self.trainer.datamodule.crop_size  # type: ignore[attr-defined]
        size = (side, side) if isinstance(side, int) else side
        weight = next(self.backbone.parameters())
        with in_evaluation(self.backbone), torch.enable_grad():
            images = torch.zeros(
                1, channels_of(self.backbone), *size, device=weight.device, dtype=weight.dtype
            )
            patch_features(self.backbone, images, **self.read).sum().backward()
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def _read_backbone(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the backbone with its weights, and the decoder's weights if there are any."""
        hp = self.hp
        if self.weights is None:
            agree_on_channels(self)
            return create_for_any_size(hp.backbone, hp.backbone_args), {}
        given = contents_of(self.weights)
        weights, hp.backbone, hp.backbone_args, contents = find_backbone(
            self.weights, hp.backbone, hp.backbone_args, moved=self.backbone_weights, contents=given
        )
        agree_on_channels(self)
        network: Role = "student" if hp.student else "teacher"
        backbone = load_backbone(
            weights, hp.backbone, hp.backbone_args, network=network, any_size=True, contents=contents
        )
        hp.backbone = hp.backbone or weights
        left_out = not (hp.train_backbone or hp.save_backbone or weights == RANDOM)
        recorded = (given or {}).get(DECODER_OF)
        if left_out or recorded is not None:
            reference = reference_to(weights, backbone)
        if recorded is not None:
            learnt = f"the backbone that the decoder in {self.weights} was trained on"
            check_same(reference, recorded, learnt, "model.backbone_weights")
        if left_out:
            self._reference = reference
        return backbone, head_in(given or {})

    def features(self, images: Tensor) -> Tensor:
        """Return patch features [B, D, h, w] of images [B, 3, H, W], padded to whole patches."""
        dtype = surrounding_autocast(images.device)
        compiled = self.hp.compile and self.training  # in evaluation each image may have its own size
        find = self._compiled_features if compiled else patch_features
        with nullcontext() if self.hp.train_backbone else torch.inference_mode():
            found = find(self.backbone, images, **self.read, autocast_dtype=dtype)
        found = found.clone() if found.is_inference() else found  # an ordinary tensor, fit for autograd
        return found.to(next(self.decoder.parameters()).dtype)  # half only if the trainer made all weights so

    def adamw(self, heads: Iterable[nn.Module]) -> AdamW:
        """Return AdamW over heads, and a trained backbone with a learning rate for each layer."""
        hp = self.hp
        groups: list[dict[str, Any]] = [{"params": list(head.parameters())} for head in heads]
        if hp.train_backbone:
            backbone: Any = self.backbone
            without_decay = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
            groups += param_groups_layer_decay(
                backbone, hp.weight_decay, no_weight_decay_list=without_decay, layer_decay=hp.layer_decay
            )
        return AdamW(groups, lr=hp.lr, weight_decay=hp.weight_decay, fused=self.fused)
