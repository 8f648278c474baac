"""Feature distillation: a student learns the [CLS] and patch features of a frozen teacher."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.weights import RANDOM, check_source
from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.methods.base import Output, Pretraining, features, widths
from locat_lightning.tasks.base import announce_size
from locat_lightning.tasks.frozen import FrozenNetwork, reference_to


class Distillation(Pretraining, FrozenNetwork):
    """Train a timm model to give the features of a larger one, from images without labels.

    Both see the same views. Where widths differ, a linear projection of the student's features learns the
    teacher's; where patch grids differ, the teacher's are resampled. Checkpoints hold the student, and say
    where the teacher is.

    Args:
        backbone: timm's name of the student.
        teacher: where the teacher's weights come from: a checkpoint, a file or a timm name, as for --weights.
        teacher_backbone: timm's name of the teacher; null takes the one that its weights name.
        teacher_args: further arguments of the teacher, as in `timm.create_model`.
        criterion: `cosine` (1 - cosine) or `smooth_l1` (per value) between features.
        cls_weight: weight of the loss of the [CLS] features (of what a model without [CLS] pools).
        patch_weight: weight of the loss of the patch features.
        options: those of every pre-training (`Pretraining`).
    """

    frozen, recorded_as, read_from = "teacher", "distilled_from", "model.teacher"
    by_channel = True

    def __init__(
        self,
        backbone: str = "locatvit_tiny",
        *,
        teacher: str,
        teacher_backbone: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        criterion: Literal["cosine", "smooth_l1"] = "cosine",
        cls_weight: NonNegativeFloat = 1.0,
        patch_weight: NonNegativeFloat = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        if self.hp.teacher == RANDOM:
            raise InputError("model.teacher: a teacher with random weights has nothing to teach")
        if not self.hp.cls_weight + self.hp.patch_weight > 0:
            raise InputError("model.cls_weight and model.patch_weight are both 0: there is nothing to learn")
        check_source(self.hp.teacher, "model.teacher")

    def build(self, make_backbone: Callable[[], Any]) -> None:
        hp = self.hp
        self.backbone = make_backbone()
        self.start(self.backbone)
        own = {"any_size": True, "channels": self.of_data("model_channels")}
        self.teacher = load_backbone(hp.teacher, hp.teacher_backbone, hp.teacher_args, **own)
        self.teacher.requires_grad_(False).eval()
        announce_size(f"teacher {hp.teacher}", self.teacher)
        self._reference = reference_to(hp.teacher, self.teacher)
        pairs = zip(widths(self.backbone), widths(self.teacher), strict=True)
        self.project_cls, self.project_patches = (
            nn.Identity() if own == taught else nn.Linear(own, taught) for own, taught in pairs
        )
        self._features = torch.compile(features, **self.compiler_options()) if hp.compile else features

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.backbone, "teacher": self.teacher}

    def to_compile(self) -> Iterable[nn.Module]:
        return ()  # `_features` is compiled as a whole

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compare the features of all views."""
        images = [views.crops.flatten(0, 1) for views in batch.views]
        shares = [len(each) / sum(map(len, images)) for each in images]
        terms = [self._compare(each) for each in images]
        cls_loss, patch_loss = (
            torch.stack([share * term[part] for share, term in zip(shares, terms, strict=True)]).sum()
            for part in (0, 1)
        )
        loss = self.hp.cls_weight * cls_loss + self.hp.patch_weight * patch_loss
        scalars = {"cls_loss": cls_loss.detach(), "patch_loss": patch_loss.detach()}
        return Output(loss, scalars, terms[0][2])

    def _compare(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of [CLS] and patches, and the student's [CLS], of images [N, 3, H, W]."""
        with torch.no_grad():
            cls, patches = self._features(self.teacher, images)
        own_cls, own_patches = self._features(self.backbone, images)
        with torch.autocast(images.device.type, enabled=False):
            if patches.shape[-2:] != (size := own_patches.shape[-2:]):
                patches = F.interpolate(patches.float(), size, mode="bilinear", antialias=True)
            learnt = self.project_patches(own_patches.float().movedim(1, -1))
            distance = DISTANCES[self.hp.criterion]
            cls_loss = distance(self.project_cls(own_cls.float()), cls.float())
            return cls_loss, distance(learnt, patches.float().movedim(1, -1)), own_cls.detach()


# The mean distance between vectors [..., D].
DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda learnt, taught: 1 - F.cosine_similarity(learnt, taught, dim=-1).mean(),
    "smooth_l1": F.smooth_l1_loss,
}
