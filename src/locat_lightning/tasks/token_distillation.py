"""Distillation through a token (DeiT): a second classifier of the student learns what a teacher predicts."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.weights import RANDOM, check_source, contents_of
from locat_lightning.errors import InputError
from locat_lightning.tasks.base import announce_size
from locat_lightning.tasks.class_names import check_same_classes, classes_of
from locat_lightning.tasks.frozen import FrozenNetwork, reference_to
from locat_lightning.tasks.long_tail import LongTailed


def soft_distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Return τ² KL(softmax(taught / τ) ‖ softmax(logits / τ)), mean over images, of logits [B, C].

    DeiT's code divides by B · C instead of B.
    """
    own, given = (F.log_softmax(each.float() / temperature, -1) for each in (logits, taught))
    return temperature**2 * F.kl_div(own, given, reduction="batchmean", log_target=True)


class TokenDistilled(LongTailed, FrozenNetwork):
    """A classification that may have a teacher, a classifier that is frozen.

    The loss is (1 − λ) L + λ D. L compares the classifier of [CLS] with the labels; D compares the classifier
    of the distillation token with the teacher's predictions of the same images, augmented and mixed. In
    evaluation the logits of both are averaged. Checkpoints hold the student, and say where the teacher is.

    Of the options for classes of unequal size, logit adjustment is in L and in a D of hard labels, and class
    weights are in D alone: [CLS] becomes the expert of the frequent classes, and the distillation token that
    of the rare ones.

    Source: "Training Data-Efficient Image Transformers & Distillation through Attention" (DeiT, ICML 2021);
    "DeiT-LT: Distillation Strikes Back for Vision Transformer Training on Long-Tailed Datasets" (CVPR 2024)
    for class weights, with a CNN as teacher that was trained without such strong augmentation.

    Args:
        teacher: where the teacher's weights come from, with its classifier: a checkpoint, a file or a timm
            name, as for --weights; null for no teacher.
        teacher_backbone: timm's name of the teacher; null takes the one that its weights name.
        teacher_args: further arguments of the teacher, as in `timm.create_model`.
        distillation: what the teacher predicts: `hard`, its most probable class, or `soft`, its
            probabilities.
        distillation_weight: λ; DeiT takes 0.5 for `hard` and 0.1 for `soft`.
        distillation_temperature: τ of `soft`.
        options: those of `LongTailed`, `SharpnessAware` (`sam`) and every task (`Task`).
    """

    _scale: Tensor | None  # of the student's images, to be normalised as the teacher's [3, 1, 1]
    _shift: Tensor | None

    frozen, recorded_as, read_from = "teacher", "taught_by", "model.teacher"

    def __init__(
        self,
        *,
        teacher: str | None = None,
        teacher_backbone: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        distillation: Literal["hard", "soft"] = "hard",
        distillation_weight: ClosedUnitInterval = 0.5,
        distillation_temperature: PositiveFloat = 3.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.teacher: Any = None
        self.register_buffer("_scale", None, persistent=False)
        self.register_buffer("_shift", None, persistent=False)

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        hp = self.hp
        if not training:
            return
        if hp.teacher is None:
            of_teacher = {"teacher_backbone": hp.teacher_backbone, "teacher_args": hp.teacher_args}
            of_teacher["distillation"] = hp.distillation == "soft"
            if idle := [name for name, value in of_teacher.items() if value]:
                raise InputError(f"model.{idle[0]} says how a teacher is used: set model.teacher, too")
            return
        if hp.teacher == RANDOM:
            raise InputError("model.teacher: a teacher with random weights has nothing to teach")
        check_source(hp.teacher, "model.teacher")
        if hp.distillation == "soft" and hp.reweighting is not None:
            raise InputError(
                "model.reweighting weights the classes that a teacher names: set model.distillation to hard"
            )

    def add_teacher(self, student: Any, classes: list[str]) -> None:
        """Read the teacher, and have a student with a distillation token give both logits in training."""
        hp = self.hp
        if hp.teacher is None:
            return
        if not hasattr(student, "set_distilled_training"):
            raise InputError(
                f"model.teacher: {hp.backbone} has no distillation token: set model.backbone to "
                "locatvit_tiny_distilled (small, base) or deit_tiny_distilled_patch16_224"
            )
        contents = contents_of(hp.teacher)
        own: dict[str, Any] = {"any_size": True, "channels": self.of_data("model_channels")}
        arguments = hp.teacher, hp.teacher_backbone, hp.teacher_args
        teacher: Any = load_backbone(*arguments, classifier=True, contents=contents, **own)
        if teacher.num_classes != hp.num_classes:
            knows = f"{teacher.num_classes} classes" if teacher.num_classes else "no classes"
            raise InputError(f"model.teacher: {hp.teacher} knows {knows}, but the data have {hp.num_classes}")
        learnt = classes_of(contents or {}) or teacher.pretrained_cfg.get("label_names") or []
        if learnt != self.class_names:  # which an export has
            try:
                check_same_classes(learnt, classes)
            except InputError as error:
                raise InputError(f"model.teacher: {error}") from error
        self.teacher = teacher.requires_grad_(False).eval()
        announce_size(f"teacher {hp.teacher}", teacher)
        self._agree_on_normalisation(contents or {})
        names = [*teacher.state_dict(prefix="teacher.")]  # which processes need not compare in each step
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)  # private
        self._reference = reference_to(hp.teacher, teacher)
        student.set_distilled_training(True)

    def _agree_on_normalisation(self, contents: Mapping[str, Any]) -> None:
        """Note how the student's RGB images become those that the teacher was trained on.

        A run says how its images were normalised, and so does timm of its weights; those of another file are
        taken to be for images like the student's.
        """
        own, noted = self.of_data("normalisation"), contents.get("datamodule_hyper_parameters")
        known: Any = noted if contents else self.teacher.pretrained_cfg
        if own is None or not isinstance(known, Mapping) or self.of_data("model_channels") is not None:
            return
        values = [known.get(name) for name in ("mean", "std")]
        if not all(isinstance(each, list | tuple) and len(each) == 3 for each in values):
            return
        try:
            mean, std, own_mean, own_std = torch.tensor([*values, own["mean"], own["std"]]).view(4, 3, 1, 1)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.teacher: mean or std in {self.hp.teacher} are no numbers") from error
        if not (std > 0).all():
            raise InputError(f"model.teacher: std in {self.hp.teacher} must be above 0")
        if not (torch.equal(mean, own_mean) and torch.equal(std, own_std)):
            self._scale, self._shift = own_std / std, (own_mean - mean) / std

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor | None:
        """Return the teacher's logits of the student's images, as it takes them; None without a teacher."""
        if self.teacher is None:
            return None
        if self._scale is not None and self._shift is not None:
            images = (images * self._scale + self._shift).type_as(images)
        logits: Tensor = self.teacher(images)
        return logits

    def distilled(self, loss: Tensor, logits: Tensor, taught: Tensor) -> Tensor:
        """Return (1 − λ) `loss` + λ D, of the distillation token's and the teacher's logits [B, C]."""
        hp = self.hp
        if hp.distillation == "hard":
            learnt = self.cross_entropy(logits, taught.argmax(-1))
        else:
            learnt = soft_distillation(logits, taught, hp.distillation_temperature)
        share: float = hp.distillation_weight
        return (1 - share) * loss + share * learnt
