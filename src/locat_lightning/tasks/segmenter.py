"""A segmentation as a module, from its checkpoint, without a Trainer or data."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from locat_lightning.backbones.create import find_backbone, load_backbone
from locat_lightning.backbones.weights import DECODER_OF, contents_of
from locat_lightning.errors import InputError, in_a_line
from locat_lightning.evaluation.dense import feature_width, patch_features, upsampled
from locat_lightning.evaluation.features import surrounding_autocast
from locat_lightning.evaluation.iou import check_classes
from locat_lightning.records import plain
from locat_lightning.tasks.frozen import check_same, reference_to
from locat_lightning.tasks.heads import NORMED, Head, head_in, load_head, make_head


class Segmenter(nn.Module):
    """A backbone and the head that names the class of each pixel from its patch features.

    Args:
        backbone: as in `patch_features`.
        decoder: maps patch features [B, D, h, w] to logits [B, C, h', w'].
        num_classes: C.
        read: which features the head reads, as arguments of `patch_features`.
    """

    def __init__(
        self, backbone: nn.Module, decoder: nn.Module, num_classes: int, read: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        self.num_classes, self.read = num_classes, read

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C, H, W] of normalised images [B, 3, H, W], each taken as a whole."""
        dtype = surrounding_autocast(images.device)
        features = patch_features(self.backbone, images, **self.read, autocast_dtype=dtype)
        height, width = images.shape[-2:]
        return upsampled(self.backbone, self.decoder(features), (height, width))


def holds_segmentation(contents: Mapping[str, Any] | None) -> bool:
    """Return whether a checkpoint is one of a segmentation: a head, and a number of classes."""
    return bool(contents and "num_classes" in contents.get("hyper_parameters", {}) and head_in(contents))


def load_segmenter(
    weights: str,
    name: str | None = None,
    arguments: dict[str, Any] | None = None,
    *,
    moved: str | None = None,
    **options: Any,
) -> Segmenter:
    """Build the model of a segmentation's checkpoint, with the backbone that it holds or names.

    Args:
        weights: file of the checkpoint.
        name: timm's name of the backbone; None takes the one that is recorded.
        arguments: of the backbone, in addition to or instead of those that are recorded.
        moved: where the weights of a frozen backbone are now, if they have moved.
        options: of `load_backbone`.

    Raises:
        InputError: the checkpoint is of something else or damaged, or the backbone is not the one that the
            head was trained on.
    """
    contents = contents_of(weights)
    if contents is None or not holds_segmentation(contents):
        raise InputError(f"{weights} is not the checkpoint of a segmentation")
    own = plain(contents["hyper_parameters"], weights)
    source = find_backbone(weights, name, arguments, moved=moved, contents=contents)
    backbone: Any = load_backbone(
        source.weights, source.name, source.arguments, contents=source.contents, **options
    )
    if (recorded := contents.get(DECODER_OF)) is not None:
        learnt = f"the backbone that the decoder in {weights} was trained on"
        check_same(reference_to(source.weights, backbone), recorded, learnt, "--backbone_weights")
    try:
        kind, layers = own.get("head", "mlp"), own.get("layers", 1)  # which old checkpoints do not say
        classes, hidden = own["num_classes"], own["hidden_dim"]
        if kind not in get_args(Head):
            raise ValueError(f"there is no head {kind!r:.60}")
        check_classes(classes)
        width, patch = feature_width(backbone, layers), backbone.feature_info[-1]["reduction"]
        number = layers if isinstance(layers, int) else len(layers)
        with torch.device("meta"):  # without memory for sizes that the weights may not have
            decoder = make_head(kind, width, classes, hidden=hidden, layers=number, patch=patch)
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"{weights} does not describe its decoder: {in_a_line(error)}") from error
    if obstacle := load_head(decoder, head_in(contents)):
        raise InputError(f"{weights}: {obstacle}")
    return Segmenter(backbone, decoder, classes, {"layers": layers, "norm": kind in NORMED})
