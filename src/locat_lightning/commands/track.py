"""`locat track`: how well a frozen backbone's patch features follow objects through videos."""

from dataclasses import fields
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from locat.runs import claim
from locat_lightning.commands import parsing
from locat_lightning.commands.evaluate import ConfigOfImages, add_run_options, launched, prepared
from locat_lightning.commands.measurement import Measurement, columns, protocol_of, report
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.data.videos import VideoData, palette_of
from locat_lightning.evaluation.dense import padded_size
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.per_image import Scores
from locat_lightning.evaluation.tracking import Propagation, measure_tracking

DESCRIPTION = (
    "J and F of video object segmentation (DAVIS): the objects of the first frame follow the patches most "
    "similar to theirs; nothing is trained"
)


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat track …`."""
    track(arguments)


def track(arguments: list[str]) -> Path | None:
    """Run the command, and return the directory of its run, in the first process."""
    command, *arguments = arguments
    parser = _parser(command)
    config, directory, fabric = prepared(command, parser, arguments)
    data: VideoData = parser.instantiate_classes(config).data
    data.source(config.split)  # mistakes in the files show before the weights are read

    backbone = launched(config, fabric)
    run = Path(fabric.broadcast(str(claim(directory)) if fabric.is_global_zero else ""))
    measurement = _track(backbone, data, config, fabric, run / "masks")
    if not fabric.is_global_zero:
        return None
    return report(measurement, run, weights=config.weights, seed=config.seed)


def _parser(command: str) -> ArgumentParser:
    parser = parsing.command_parser(command, DESCRIPTION)
    add = parser.add_argument
    add("-c", "--config", action=ConfigOfImages, help="any of these options, or a config of locat fit")
    parsing.add_weights_options(parser)
    parser.add_class_arguments(VideoData, "data")
    add(
        "--split",
        type=Literal["train", "val", "test"],
        default="val",
        help="videos to track in; test: test-dev",
    )
    parser.add_class_arguments(Propagation)
    add_run_options(parser)
    return parser


def _track(
    backbone: nn.Module, data: VideoData, config: Namespace, fabric: Fabric, directory: Path
) -> Measurement:
    frames = data.source(config.split)
    settings = Propagation(**{field.name: config[field.name] for field in fields(Propagation)})

    def write(place: int, objects: Tensor) -> None:
        video, frame = frames.places[place]
        file = directory / frames.videos[video].name / f"{Path(frames.videos[video].frames[frame]).stem}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(objects.numpy())
        image.putpalette(palette_of(str(frames.videos[video].masks[0])))
        image.save(file)

    mine = range(fabric.global_rank, len(frames.videos), fabric.world_size)
    patch = padded_size(backbone, (1, 1))[0]  # the smallest image has one
    found = measure_tracking(
        backbone,
        data.frames_dataloader(config.split, mine, patch),
        frames,
        fabric.device,
        settings,
        write=write,
        autocast_dtype=autocast_type(config.precision),
    )
    protocol = protocol_of(
        f"video object segmentation, videos of {data.year}, {data.resolution} resized to a short side of "
        f"{data.short_side}, first frame and {settings.previous} before, radius {settings.radius}, "
        f"{settings.neighbours} neighbours at temperature {settings.temperature:g}",
        precision=config.precision,
    )
    table = columns("video", "objects", "J", "F", "J&F")
    if not found:
        return Measurement(f"no annotations to compare with ({protocol})", table, {}, protocol, None)
    metrics, of_all = dict[str, float](), torch.cat(list(found.values()))
    for video, scores in found.items():
        j, f = scores.mean(0).tolist()
        table.add_row(video, f"{len(scores)}", f"{j:.2%}", f"{f:.2%}", f"{(j + f) / 2:.2%}")
        of_video = {"J&F": (j + f) / 2, "J": j, "F": f}
        metrics |= {f"tracking/{name}_{video}": value for name, value in of_video.items()}
    figures = Figures(_of_objects(found), "tracking")
    table.add_row("all", f"{len(of_all)}", *(figures.cell(name) for name in ("J", "F", "J&F")))
    objects = f"{len(of_all)} objects in {len(found)} videos"
    heading = f"J&F {figures.values['J&F']:.4f} ({objects}; {protocol})"
    return Measurement(heading, table, figures.metrics() | metrics, protocol, figures, units="objects")


def _of_objects(found: dict[str, Tensor]) -> Scores:
    """Return J and F of each object, whose means are the figures."""
    names = [f"{video}/{number}" for video, scores in found.items() for number in range(1, len(scores) + 1)]
    numbers = [number for scores in found.values() for number in range(1, len(scores) + 1)]
    j, f = torch.cat(list(found.values())).unbind(1)
    scores = {"J&F": (j + f) / 2, "J": j, "F": f}
    return Scores(torch.arange(len(names)), names, torch.tensor(numbers), scores)
