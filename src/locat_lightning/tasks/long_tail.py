"""Classes of unequal size: what a loss does about them, and which ones were rare in training."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from locat_lightning.backbones.weights import exported_config
from locat_lightning.errors import InputError
from locat_lightning.evaluation.shots import FIGURES, figures_of
from locat_lightning.tasks.sharpness import SharpnessAware

CLASS_COUNTS = "class_counts"  # a checkpoint's or export's key of the training images of each class
MOST = 2**53  # images of a class that a file may tell: float64 holds all whole numbers to here


def class_counts_of(weights: str, contents: Mapping[str, Any] | None, num_classes: int) -> list[int]:
    """Return the training images of each class that weights record; [] if they do not, or of other classes.

    Args:
        weights: a checkpoint or an exported folder.
        contents: of the file of weights; None if they are in none.
        num_classes: of the model.
    """
    counts = (exported_config(weights) if contents is None else contents).get(CLASS_COUNTS, [])
    if not isinstance(counts, list) or not all(isinstance(n, int) and 0 <= n <= MOST for n in counts):
        raise InputError(f"{weights}: {CLASS_COUNTS} is not a list of numbers of images")
    return counts if len(counts) == num_classes else []


def effective_number_weights(counts: Tensor, beta: float, prior: Tensor) -> Tensor:
    """Return class weights ∝ (1 − β) / (1 − βⁿ) of n images, ∝ 1 / n for β = 1: float64 [C].

    Their mean over draws from `prior` [C] is 1, so that the loss keeps its scale. A class without images
    counts as one with an image.

    Source: "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019); there the weights add up
    to C.
    """
    n = counts.double().clamp_min(1)
    weights = 1 / (n if beta == 1 else (1 - beta**n) / (1 - beta))
    return weights / (prior * weights).sum()


class LongTailed(SharpnessAware):
    """A classification whose loss may make up for classes of unequal size.

    Logit adjustment adds τ log π to the logits in the training loss alone, where π is the share of each class
    among the images that are drawn. For τ = 1, the logits that minimise it name the class that would be most
    probable if all classes were equally frequent. Deferred re-weighting weights the terms of the classes in
    the loss by their effective number of images, in the last part of the run.

    Source: "Long-Tail Learning via Logit Adjustment" (ICLR 2021), and "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss" (NeurIPS 2019) for deferred re-weighting.

    Args:
        logit_adjustment: τ, 1 for example; null for none.
        reweighting: β of the effective number of images, (1 − βⁿ) / (1 − β), 0.9999 for example (1 weights by
            1 / n); null for no weights.
        reweight_from: share of the steps of the run after which the weights count.
        options: `sam`, and those of every task (`SharpnessAware`, `Task`).

    Attributes:
        class_counts: training images of each class, by label; [] if unknown.
    """

    _adjustment: Tensor | None  # τ log π [C]
    _class_weights: Tensor | None  # [C]

    def __init__(
        self,
        *,
        logit_adjustment: NonNegativeFloat | None = None,
        reweighting: ClosedUnitInterval | None = None,
        reweight_from: ClosedUnitInterval = 0.8,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.class_counts: list[int] = []
        self.register_buffer("_adjustment", None, persistent=False)
        self.register_buffer("_class_weights", None, persistent=False)

    def agree_on_class_counts(self, contents: Mapping[str, Any] | None, *, training: bool) -> None:
        """Note how many training images each class has: as the data say or, in an evaluation, the weights."""
        if not training:
            if self.weights is not None:
                recorded = class_counts_of(self.weights, contents, self.hp.num_classes)
                self.class_counts = recorded or self.class_counts
            return
        counts = self.of_data("class_counts")
        self.class_counts = [] if counts is None else counts.tolist()
        self._check_monitored()
        hp = self.hp
        options = {"logit_adjustment": hp.logit_adjustment, "reweighting": hp.reweighting}
        given = [f"model.{name}" for name, value in options.items() if value is not None]
        if not given:
            return
        if counts is None:
            raise InputError(f"{given[0]}: the data do not tell how many images each class has: leave it out")
        shares = self.of_data("class_shares")
        if shares is not None and (hp.reweighting is not None or np.ptp(shares) == 0):
            sampling = f"data.sampling {self.of_data('sampling')}"
            raise InputError(f"{given[-1]} with {sampling}: both make up for the same: choose one")
        number = torch.tensor(self.class_counts).clamp_min(1).double()
        prior = number / number.sum() if shares is None else torch.from_numpy(shares)
        prior = prior.clamp_min(prior[prior > 0].min())  # of a class without images
        if hp.logit_adjustment is not None:
            self._adjustment = hp.logit_adjustment * prior.log().float()
        if hp.reweighting is not None:
            self._class_weights = effective_number_weights(number, hp.reweighting, prior).float()

    def _check_monitored(self) -> None:
        """Check that no checkpoint waits for a figure of groups of classes that there is not."""
        counts, measured = self.class_counts, figures_of(self.class_counts)
        monitored = {getattr(each, "monitor", None) for each in self.trainer.checkpoint_callbacks}
        lacking = [each for each in FIGURES if f"val/{each}" in monitored and each not in measured]
        if lacking:
            sizes = f"{min(counts)} to {max(counts)}" if counts else "unknown numbers of"
            choices = " or ".join(f"val/{each}" for each in ("top1", *measured))
            raise InputError(
                f"--checkpoint.monitor: val/{lacking[0]} is not measured of classes with {sizes} images: "
                f"take {choices}"
            )

    def is_reweighted(self) -> bool:
        """Return whether the weights of the classes count in this step."""
        begun: bool = self.step >= self.hp.reweight_from * self.steps
        return self._class_weights is not None and begun

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, smoothing: float = 0.0, *, reweighted: bool = True
    ) -> Tensor:
        """Return the cross-entropy of a batch with adjusted logits and, if `reweighted`, class weights.

        Labels are smoothed as those of balanced classes would be: where it is least, the softmax of `logits`
        is (1 − ε) b + ε / C, with b the class probabilities of balanced (or weighted) classes. For targets t
        and s = w t, the loss is −Σ ((1 − ε) s + ε a / C Σ s / a) log p, with a = π^τ and p = softmax(z +
        log a). It is averaged over images, not over weights, whose mean differs from batch to batch.

        Args:
            logits: z [B, C].
            targets: t, labels, int64 [B], or shares of the classes [B, C].
            smoothing: ε, share of a label that is spread over all classes.
            reweighted: whether the weights w count, once it is time (`is_reweighted`).
        """
        weights = self._class_weights if reweighted and self.is_reweighted() else None
        if self._adjustment is None and weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1])
        shares = targets if weights is None else targets * weights
        spread = shares.sum(1, keepdim=True)
        if self._adjustment is not None:
            logits, prior = logits + self._adjustment, self._adjustment.exp()
            spread = (shares / prior).sum(1, keepdim=True) * prior
        return F.cross_entropy(logits, (1 - smoothing) * shares + smoothing * spread / logits.shape[1])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.class_counts:
            checkpoint[CLASS_COUNTS] = self.class_counts
