"""The 95 % interval of mIoU at each validation, which TensorBoard draws as a band."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from locat_lightning.evaluation.intervals import intervals
from locat_lightning.evaluation.per_image import Areas

ENDS = ("val/miou_low", "val/miou_high")


class Bands(Callback):
    """Log the 95 % interval of `val/miou` at each validation of a training, as `val/miou_low` and `…_high`.

    In TensorBoard's Custom Scalars, the three are one curve with a band.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_laid_out = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        areas = getattr(pl_module, "results", None)
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not (fitting and trainer.is_global_zero and isinstance(areas, Areas)):
            return
        ends = intervals(areas).get("miou")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and not self._is_laid_out:
                band = {"mIoU, with its 95 % interval over the images": ["Margin", ["val/miou", *ENDS]]}
                logger.experiment.add_custom_scalars({"val": band})
            if ends is not None:
                step = max(0, trainer.global_step - 1)
                logger.log_metrics(dict(zip(ENDS, ends, strict=True)), step=step)
        self._is_laid_out = True
