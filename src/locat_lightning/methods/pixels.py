"""What methods share that hide a part of an image and predict its pixels from the rest."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.figures.grid import rgb
from locat_lightning.figures.reconstruction import reconstruction_figure
from locat_lightning.methods.base import Pretraining


class PixelPrediction(Pretraining):
    """Predict the hidden pixels of the global views. A method adds `compute_loss` and `reconstruct`.

    A mask follows from the seed of the data, the epoch and the position of the image in the data set.
    """

    backbone: Any
    places: int  # to hide or to show in an image

    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predict images [N, 3, H, W]; return that, and which pixels were hidden, [N, 1, H, W]."""
        raise NotImplementedError

    def to_compile(self) -> Iterable[nn.Module]:
        return ()  # a method compiles what it calls, which is not the backbone as a whole

    def on_fit_start(self) -> None:
        super().on_fit_start()
        size, own = getattr(self.of_data("views"), "size", None), self.backbone.patch_embed.img_size
        if size is not None and tuple(own) != (size, size):
            raise InputError(
                f"data.views.global_size ({size}) has to be the size that the model was built for "
                f"({own[0]} × {own[1]}): set model.backbone_args.img_size"
            )

    def images_and_noise(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """Return the global views [V·B, 3, H, W], and noise [V·B, places] for their masks."""
        crops = batch.views[0].crops
        key = self.of_data("seed") or 0, self.current_epoch
        noise = [image_noise(batch.indices, self.places, *key, view) for view in range(len(crops))]
        return crops.flatten(0, 1), torch.cat(noise)

    def pictures(self, samples: Sequence[Any], data: Any, side: int) -> dict[str, Figure]:
        figures = super().pictures(samples, data, side)
        images = torch.stack([sample[0] for sample in samples]).to(self.device)
        noise = image_noise(torch.arange(len(images), device=self.device), self.places, 0)
        predicted, hidden = self.reconstruct(images, noise)
        normalisation = getattr(data, "normalisation", None)
        shown = [images, images.masked_fill(hidden, 0), predicted.where(hidden, images)]
        figures["reconstruction"] = reconstruction_figure(
            *(rgb(each, normalisation) for each in shown), side=side
        )
        return figures


def image_noise(indices: Tensor, count: int, *key: int) -> Tensor:
    """Return random int64 [N, count] that follow from each image's index and the key alone.

    They are the same on every device, in any batch and process, so that a resumed run hides the same.

    Source: the generator SplitMix64 (Steele et al., OOPSLA 2014), which steps over images, then over places.
    """
    start = np.random.SeedSequence(key).generate_state(1, np.uint64).astype(np.int64).item()
    of_image = _mixed(indices.unsqueeze(-1) * _STEP + start)
    return _mixed(of_image + torch.arange(count, device=indices.device) * _STEP)


def _mixed(state: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # A shift of int64 keeps the sign, which has to go.
        state = state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))
        state = state * (factor - (1 << 64) if factor >> 63 else factor)
    return state


_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64
