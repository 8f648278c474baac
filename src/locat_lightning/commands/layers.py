"""The measurement of `locat layers`: what each layer of a Vision Transformer does with some images."""

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric import Fabric
from torch import linspace, nn

from locat_lightning.commands.measurement import Measurement, check_images, columns, protocol_of, shape_of
from locat_lightning.data import ImageData
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.layers import GROUP, MEASURES, measure_layers
from locat_lightning.figures.layers import layers_figure, layers_of, short


def add_layers_options(parser: ArgumentParser) -> None:
    """Add the options of the measurement to those of the data."""
    help_ = "validation images to look at, evenly spaced"
    parser.add_argument("--images", type=PositiveInt, default=256, help=help_)


def look_at_layers(backbone: nn.Module, data: ImageData, config: Namespace, fabric: Fabric) -> Measurement:
    """Measure attention and tokens of each layer on images of the validation split."""
    check_images(backbone, data, fabric.device)
    last = len(data.source("val")) - 1
    places = linspace(0, last, min(config.images, last + 1)).round().int().tolist()
    own = places[fabric.global_rank :: fabric.world_size] or places[:1]
    found = measure_layers(
        backbone,
        data.loader_of("val", own),
        fabric.device,
        autocast_dtype=autocast_type(config.precision),
        progress=fabric.is_global_zero,
    )
    metrics = dict[str, float]()
    for measure, of_layer in found.by_layer.items():
        metrics |= {f"{GROUP}/{measure}/{layer}": value for layer, value in of_layer.items()}
    for layer, heads in found.heads.items():
        metrics |= {f"{GROUP}/distance/{layer}/head_{n:02}": value for n, value in enumerate(heads)}
    shown = {
        key: of_layer for key, of_layer in found.by_layer.items() if key != "distance_px"
    }  # for 80 columns
    table = columns("layer", *(MEASURES[measure] for measure in shown))
    for layer in layers_of([shown]):
        cells = (of_layer.get(layer) for of_layer in shown.values())
        table.add_row(short(layer), *("" if value is None else f"{value:.3f}" for value in cells))
    protocol = protocol_of(f"{found.images:,} images, {shape_of(data)}", precision=config.precision)
    pictures = {"layers": layers_figure({"": {config.weights: found.by_layer}})}
    return Measurement(f"layers: {protocol}", table, metrics, protocol, None, pictures=pictures)
