"""Pictures of what a model sees: Gaussian kernels, attention of [CLS], patch features, predictions."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from locat_lightning.data.classification import ImageData
from locat_lightning.data.dataset import Failure
from locat_lightning.data.sources import Stream
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import frozen
from locat_lightning.inspection import cls_attention, gaussian_kernels, observe, pca_colours
from locat_lightning.methods import Dino
from locat_lightning.tasks import Segmentation

__all__ = [
    "AttentionPictures",
    "Column",
    "cls_attention",
    "draw",
    "fitted",
    "gaussian_kernels",
    "inferno",
    "is_due",
    "kernel_columns",
    "patch_features",
    "pca_colours",
    "resized",
    "spaced_items",
    "table",
    "tensorboards",
]

# Ten colours of matplotlib's "inferno", from 0 to 1.
INFERNO = "000004 1b0c42 4b0c6b 781c6d a52c60 cf4446 ed6925 fb9a06 f7d03c fcffa4"
PATCHES = ((0.5, 0.5), (0.2, 0.2), (0.8, 0.8))  # where the drawn kernels sit: shares of height and width
SHOWN_CLASSES = 3
INK, FAINT, PAPER, MARK = "#1f2328", "#6e7781", "#ffffff", "#5ce1ff"
RIGHT, WRONG = "#1a7f37", "#cf222e"


def patch_features(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """What the last block makes of each patch, before the final norm: what dense probes read.

    Args:
        backbone: a timm model; of a CNN these are the features of the last stage.
        images: [B, 3, height, width], normalised.

    Returns:
        [B, D, H, W]; None if the model has no `forward_intermediates`.
    """
    forward = getattr(backbone, "forward_intermediates", None)
    if forward is None:
        return None
    with frozen(backbone), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        [features] = forward(images, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True)
    return features  # type: ignore[no-any-return]


def inferno(heat: Tensor) -> Tensor:
    """Colours of matplotlib's "inferno", from black to pale yellow.

    Args:
        heat: [...], from 0 to 1.

    Returns:
        [..., 3] float32, RGB from 0 to 1.
    """
    colours = torch.tensor([list(bytes.fromhex(colour)) for colour in INFERNO.split()]) / 255
    place = heat * (len(colours) - 1)
    lower = place.long().clamp_max(len(colours) - 2)
    return torch.lerp(colours[lower], colours[lower + 1], (place - lower).unsqueeze(-1))


def draw(
    images: Tensor,
    labels: Sequence[int],
    class_names: Sequence[str] = (),
    *,
    kernels: Sequence[Tensor] = (),
    attention: Tensor | None = None,
    student_attention: Tensor | None = None,
    features: Tensor | None = None,
    probabilities: Tensor | None = None,
    side: int = 224,
) -> Tensor:
    """A row for each image; a column for the image itself and for each of the things that are given.

    Args:
        images: [B, 3, height, width], RGB from 0 to 1.
        labels: of each image; -1 where unknown.
        class_names: by label; the labels' numbers stand in for names that are missing.
        kernels: what `gaussian_kernels` gives. Those of three patches are drawn, of the first, the middle and
            the last block, each column in a scale of its own.
        attention: what `cls_attention` gives. Each image has a scale of its own.
        student_attention: the same of a model's student, drawn beside; `attention` is the teacher's then.
        features: what `patch_features` gives, drawn as `pca_colours`.
        probabilities: [B, classes].
        side: shorter side of an image in the picture, in pixels; small images are enlarged without smoothing.

    Returns:
        [3, height, width] uint8.
    """
    tiles = resized(images, side)
    height, width = tiles.shape[-2:]
    columns = [Column("input", "", [to_pil_image(tile) for tile in tiles])]
    columns += kernel_columns(tiles, kernels)
    if student_attention is not None:
        columns.append(_attention_column("student: attention of [CLS]", tiles, student_attention))
    if attention is not None:
        title = "attention of [CLS]" if student_attention is None else "teacher: attention of [CLS]"
        columns.append(_attention_column(title, tiles, attention))
    if features is not None:
        colours = F.interpolate(pca_colours(features), tiles.shape[-2:], mode="nearest-exact")
        title, note = "PCA of patch features", "last block, first three as RGB"
        columns.append(Column(title, note, [to_pil_image(tile) for tile in colours]))
    if probabilities is not None:
        panels = [
            _prediction((height, width), row, label, class_names)
            for row, label in zip(probabilities.float().cpu(), labels, strict=True)
        ]
        columns.append(Column("prediction", "", panels))
    return pil_to_tensor(table(columns, side))  # type: ignore[no-any-return]


class Column(NamedTuple):
    """A title, a smaller line beneath, and a tile for each row of a `table`."""

    title: str
    note: str
    tiles: list[Image.Image]


def table(columns: Sequence[Column], side: int) -> Image.Image:
    """The columns side by side under their titles.

    Args:
        columns: at least one, with as many tiles each, all of one size.
        side: shorter side of a tile in pixels; gaps and letters follow it.
    """
    gap = max(4, side // 20)
    title, note = (ImageFont.load_default(size=side / parts) for parts in (13, 18))
    header = round(side / 13 + side / 18) + 2 * gap
    width, height = columns[0].tiles[0].size
    rows = len(columns[0].tiles)
    drawn = Image.new("RGB", (gap + len(columns) * (width + gap), header + rows * (height + gap)), PAPER)
    pen = ImageDraw.Draw(drawn)
    for number, column in enumerate(columns):
        left = gap + number * (width + gap)
        pen.text((left, gap), column.title, INK, title)
        pen.text((left, header - gap // 2), column.note, FAINT, note, anchor="ld")
        for row, tile in enumerate(column.tiles):
            drawn.paste(tile, (left, header + row * (height + gap)))
    return drawn


def resized(images: Tensor, side: int) -> Tensor:
    """Images as the tiles of a `table`: small ones enlarged without smoothing.

    Args:
        images: [B, 3, height, width], RGB from 0 to 1.
        side: the shorter side of the result in pixels.

    Returns:
        [B, 3, height, width] float32 on the CPU, from 0 to 1.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    size = (round(height * side / shorter), round(width * side / shorter))
    images = images.detach().float().cpu().clamp(0, 1)
    if side > shorter:
        return F.interpolate(images, size, mode="nearest-exact")
    return F.interpolate(images, size, mode="bilinear", antialias=True)


class AttentionPictures(Callback):
    """Draws the same validation images in TensorBoard, as the model sees them, at each validation.

    Each row: the image, the Gaussian kernels of three patches at three depths, the attention of [CLS] in the
    last block, the principal components of its patch features, the likeliest classes. What a model lacks is
    left out: a plain ViT has no kernels, a CNN no attention either. Of `Dino` these are the teacher's, with
    the student's attention beside. Without a TensorBoard logger nothing is drawn, nor of `Segmentation`,
    which has pictures of its own.

    Args:
        images: how many, evenly spaced over the validation set.
        every_n_epochs: epochs from one picture to the next; 0 for never.
        side: shorter side of an image in the picture, in pixels; small images are enlarged without smoothing.

    Raises:
        InputError: an argument is out of its range, or the data are not `ImageData`.
    """

    def __init__(self, images: int = 8, every_n_epochs: int = 1, side: int = 224) -> None:
        for name, value, least in (
            ("images", images, 1),
            ("every_n_epochs", every_n_epochs, 0),
            ("side", side, 1),
        ):
            if value < least:
                raise InputError(f"pictures: {name} ({value}) must be at least {least}")
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.side = side

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads the images, in the main process."""
        if stage not in ("fit", "validate") or not self.every_n_epochs or not tensorboards(trainer):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(pl_module, Segmentation):
            return
        if not isinstance(data, ImageData):
            raise InputError(f"AttentionPictures draws images of ImageData, not of {type(data).__name__}")
        if trainer.is_global_zero:
            items = spaced_items(data.val_dataloader(), self.images)
            self.labels = [item[1] for item in items]
            if items:  # else the loader says that none can be read, or goes on without them
                self.inputs = torch.stack([item[0] for item in items])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draws after the first batch: a moving average of the weights is still in place then."""
        if trainer.sanity_checking or not trainer.is_global_zero or batch_idx or dataloader_idx:
            return
        if isinstance(pl_module, Segmentation) or not is_due(trainer, self.every_n_epochs):
            return
        if (loggers := tensorboards(trainer)) and self.labels:
            picture = self._picture(trainer.datamodule, pl_module)  # type: ignore[attr-defined]
            step = max(0, trainer.global_step - 1)  # the step just taken, as for the scalars of a validation
            for logger in loggers:
                logger.experiment.add_image("pictures/validation", picture, global_step=step)

    def _picture(self, data: ImageData, module: LightningModule) -> Tensor:
        backbone: Any = module.backbone
        inputs = self.inputs.to(module.device, next(backbone.parameters()).dtype)
        probabilities = None
        if getattr(backbone, "num_classes", 0) > 0:
            [call] = observe(backbone, inputs, [backbone])
            probabilities = call.output.float().softmax(-1)
        mean, std = (torch.tensor(data.normalisation[name]).view(3, 1, 1) for name in ("mean", "std"))
        return draw(
            self.inputs * std + mean,
            self.labels,
            module.class_names,  # type: ignore[arg-type]
            kernels=gaussian_kernels(backbone, inputs),
            attention=cls_attention(backbone, inputs),
            student_attention=(
                cls_attention(module.student.backbone, inputs) if isinstance(module, Dino) else None
            ),
            features=patch_features(backbone, inputs),
            probabilities=probabilities,
            side=self.side,
        )


def is_due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Whether a validation is one whose pictures are drawn: any by itself, every n-th of a training."""
    if every_n_epochs == 0:
        return False
    return trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % every_n_epochs == 0


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The trainer's TensorBoard loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def spaced_items(loader: DataLoader, count: int) -> list[Any]:
    """Items of a loader's data set that can be read, evenly spaced over it; of a stream the first."""
    dataset: Any = loader.dataset
    if isinstance(dataset, Stream):
        with isolate_rng():
            items = list(islice(dataset, count))
    else:
        last = len(dataset) - 1
        places = torch.linspace(0, last, min(count, last + 1)).round().int().tolist()
        items = [dataset[place] for place in places]
    return [item for item in items if not isinstance(item, Failure)]


def kernel_columns(tiles: Tensor, kernels: Sequence[Tensor]) -> list[Column]:
    """The kernels of three patches in the first, the middle and the last block, over the images.

    Args:
        tiles: [B, 3, height, width], RGB from 0 to 1.
        kernels: what `gaussian_kernels` gives of them.
    """
    depths = {0, (len(kernels) - 1) // 2, len(kernels) - 1} if kernels else set()
    return [_kernel_column(f"kernels, block {block}", tiles, kernels[block]) for block in sorted(depths)]


def _kernel_column(title: str, tiles: Tensor, kernels: Tensor) -> Column:
    """The kernels [B, H·W, H, W] of `PATCHES` over images [B, 3, height, width], with the patches marked."""
    rows, columns = kernels.shape[-2:]
    places = [(int(down * rows), int(right * columns)) for down, right in PATCHES]
    drawn = kernels.float().cpu()[:, [i * columns + j for i, j in places]].amax(1)
    peak = drawn.max()
    overlaid = _overlaid(tiles, drawn / peak)
    patch_height, patch_width = tiles.shape[-2] / rows, tiles.shape[-1] / columns
    for tile in overlaid:
        for i, j in places:
            box = (j * patch_width, i * patch_height, (j + 1) * patch_width - 1, (i + 1) * patch_height - 1)
            ImageDraw.Draw(tile).rectangle(box, outline=MARK, width=2)
    return Column(title, f"mean of heads, brightest {peak:.2f}", overlaid)


def _attention_column(title: str, tiles: Tensor, attention: Tensor) -> Column:
    """Attention [B, h, H, W] over images [B, 3, height, width]."""
    heat = attention.float().cpu().mean(1)
    heat = heat / heat.amax((-2, -1), keepdim=True)
    return Column(title, "last block, mean of heads", _overlaid(tiles, heat))


def _overlaid(tiles: Tensor, heat: Tensor) -> list[Image.Image]:
    """Dimmed images [B, 3, height, width] under heat [B, H, W] from 0 to 1, which hides more where hotter."""
    heat = F.interpolate(heat.unsqueeze(1), tiles.shape[-2:], mode="bicubic").nan_to_num().clamp(0, 1)
    grey = 0.7 * tiles.mean(1, keepdim=True).expand_as(tiles)
    mixed = torch.lerp(grey, inferno(heat.squeeze(1)).movedim(-1, 1), 0.4 + 0.5 * heat)
    return [to_pil_image(tile) for tile in mixed]


def _prediction(
    size: tuple[int, int], probabilities: Tensor, label: int, class_names: Sequence[str]
) -> Image.Image:
    """The likeliest classes as bars (green: the true one; red: the first, if wrong), and the true class."""
    height, width = size
    panel = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(panel)
    line = min(size) / 11
    font = ImageFont.load_default(size=0.8 * line)

    def name_of(label: int) -> str:
        return class_names[label] if label < len(class_names) else str(label)

    likeliest = probabilities.topk(min(SHOWN_CLASSES, len(probabilities)))
    for rank, (share, predicted) in enumerate(
        zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
    ):
        top = 2.6 * rank * line
        colour = RIGHT if predicted == label else WRONG if rank == 0 and label >= 0 else FAINT
        percent = f"{share:.0%}"
        room = width - pen.textlength(percent, font) - line
        pen.text((0, top), fitted(name_of(predicted), room, font), colour, font)
        pen.text((width, top), percent, colour, font, anchor="ra")
        pen.rectangle((0, top + 1.2 * line, width - 1, top + 1.7 * line), "#eaeef2")
        pen.rectangle((0, top + 1.2 * line, share * (width - 1), top + 1.7 * line), colour)
    if label >= 0:
        pen.text((0, 9 * line), fitted(f"true: {name_of(label)}", width, font), INK, font)
    return panel


def fitted(text: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A text, cut short where it is longer than that many pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"
