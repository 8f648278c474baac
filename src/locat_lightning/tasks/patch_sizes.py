"""Which size the patches of a training batch have, where one model is trained with several."""

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from math import isclose

import numpy as np

from locat_lightning.errors import InputError


def check_given(sizes: Sequence[int] | None, shares: Sequence[float] | None) -> None:
    """Check that there are sizes to train with, where any are asked for: `InputError` if not."""
    if sizes is not None and not sizes:
        raise InputError("model.patch_sizes is empty: name sizes, or null to train with the backbone's own")
    if sizes is None and shares is not None:
        raise InputError(
            f"model.patch_shares ({list(shares)}) needs model.patch_sizes: the sizes that have these shares"
        )


def check_sizes(sizes: Sequence[int], shares: Sequence[float] | None, own: int, side: int | None) -> None:
    """Check that patches of these sizes fit the images and the backbone: `InputError` if not.

    Args:
        sizes: as of `size_of_batch`.
        shares: as of `size_of_batch`.
        own: that of the backbone, with which it is evaluated; 0 if it has none.
        side: of the images, where it is known.
    """
    if whole := [size for size in sizes if side is not None and side % size]:
        raise InputError(
            f"model.patch_sizes: images of {side} pixels have no whole patches of {whole[0]}: set "
            "data.img_size to a multiple, or leave that size out"
        )
    if shares is not None and (len(shares) != len(sizes) or not isclose(sum(shares), 1)):
        raise InputError(
            f"model.patch_shares ({list(shares)}) must be one share for each of model.patch_sizes "
            f"({list(sizes)}), 1 in all"
        )
    if own and own not in (sizes if shares is None else sizes[-1:]):
        where = "among" if shares is None else "the last of"
        raise InputError(
            f"the backbone's own patches ({own} pixels), with which it is validated and saved, must be "
            f"{where} model.patch_sizes ({list(sizes)}): set model.backbone_args.patch_size"
        )


def size_of_batch(
    sizes: Sequence[int], shares: Sequence[float] | None, progress: float, seed: Sequence[int]
) -> int:
    """Return the size of the patches of a batch, the same in all processes.

    Args:
        sizes: in pixels.
        shares: of the training, in which the sizes come one after the other; None draws one of them for each
            batch, each as likely.
        progress: share of the training before this batch.
        seed: of this batch.
    """
    if shares is None:
        return sizes[int(np.random.default_rng(seed).integers(len(sizes)))]
    return sizes[min(bisect(list(accumulate(shares)), progress), len(sizes) - 1)]
