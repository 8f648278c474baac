"""Signs of the quality of features that need no labels, while a model pre-trains."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer

from locat_lightning.callbacks.pictures import giving_up, watched_images
from locat_lightning.evaluation.batches import frozen
from locat_lightning.evaluation.rank import effective_rank, outlying_share, patch_signs
from locat_lightning.methods.base import Pretraining
from locat_lightning.tasks.sharding import whole

ALIKE = 0.99  # mean cosine of the patches of an image
ONE_DIRECTION = 1.5  # effective rank of the images' features


class FeatureSigns(Callback):
    """Log `signs/NAME` of a pre-training's `backbone` with every step that is logged.

    They are of the same images throughout: samples of `val`, or else of `train`. The names are
    `effective_rank`, `outlying_share`, and those of `patch_signs`. It warns once if the features of the
    images, or the patches of each image, have become the same.

    Args:
        images: how many, at most.
    """

    def __init__(self, images: int = 64) -> None:
        self.images = images

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.active = trainer.is_global_zero
        self._samples: Tensor | None = None
        self._collapsed: set[str] = set()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not (isinstance(pl_module, Pretraining) and pl_module.is_logged()):
            return
        with whole(pl_module), giving_up(self, "signs of features"):
            if not self.active:
                return
            if self._samples is None:
                self._samples = watched_images(trainer, self.images).to(pl_module.device)
            if len(self._samples):
                self._measure(pl_module, self._samples)

    def _measure(self, module: LightningModule, images: Tensor) -> None:
        backbone: Any = module.backbone
        with isolate_rng(), frozen(backbone), torch.no_grad():
            final, [maps] = backbone.forward_intermediates(images, indices=1, output_fmt="NCHW")
            of_images, tokens = backbone.forward_head(final, pre_logits=True), maps.flatten(2).mT
            norm = getattr(backbone, "norm", None)
            signs = patch_signs(of_images, tokens if norm is None else norm(tokens))
            signs |= {"effective_rank": effective_rank(of_images), "outlying_share": outlying_share(tokens)}
        # No other process takes part, and Lightning does not warn that none does.
        options: dict[str, Any] = {"batch_size": 1, "sync_dist": True, "rank_zero_only": True}
        for name, value in signs.items():
            module.log(f"signs/{name}", value, **options)
        if len(images) > 2 and signs["effective_rank"] < ONE_DIRECTION:
            self._warn("features of all images", "signs/effective_rank", signs["effective_rank"], module)
        if signs["patch_cosine"] > ALIKE:
            self._warn("patches of each image", "signs/patch_cosine", signs["patch_cosine"], module)

    def _warn(self, what: str, sign: str, value: Tensor, module: LightningModule) -> None:
        if what not in self._collapsed:
            self._collapsed.add(what)
            rank_zero_warn(
                f"the {what} are the same at step {module.global_step} ({sign} {value.item():.3g}): if it "
                "stays so, nothing more is learned: lower model.lr"
            )
