"""A chart of what the layers of models do: a line for each model, from the first layer to the last."""

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure

from locat_lightning.evaluation.layers import MEASURES, ByLayer

LEFT_OUT = ("distance",)  # which depends on the size of patches, as that in pixels does not
LEAST = {"outlying_share": 0.01}  # that the axis reaches, so that a few patches of thousands look like few


def layers_figure(columns: Mapping[str, Mapping[str, ByLayer]]) -> Figure:
    """Draw what was measured of layers: a row for each measure, a column for each title.

    Args:
        columns: by title of the column, of each model by name; a layer that a model lacks is a gap.
    """
    models = [model for column in columns.values() for model in column.values()]
    measures = [name for name in MEASURES if name not in LEFT_OUT and any(name in each for each in models)]
    layers = layers_of(models)
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    figure = Figure((1.6 + 2.9 * len(columns), 0.8 + 1.7 * len(measures)), layout="constrained", dpi=110)
    grid = figure.subplots(len(measures), len(columns), sharex=True, sharey="row", squeeze=False)
    for column, (title, of_model) in enumerate(columns.items()):
        for row, measure in enumerate(measures):
            axes = grid[row, column]
            for name, found in of_model.items():
                values = [found.get(measure, {}).get(layer, float("nan")) for layer in layers]
                axes.plot(values, "o-", color=f"C{names.index(name)}", markersize=3, label=name)
            axes.margins(y=0.1)
            axes.grid(alpha=0.3)
            axes.set_xticks(range(len(layers)), map(short, layers), fontsize="small")
            axes.set_title(title if row == 0 else "")
            axes.set_ylabel(
                MEASURES[measure].replace(" in ", "\nin ") if column == 0 else "", fontsize="small"
            )
    for measure, [axes, *_] in zip(measures, grid, strict=True):  # when all lines of a row are drawn
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low) if "cosine" in measure else 0, max(1.05 * high, LEAST.get(measure, 0)))
    grid[-1, 0].set_xlabel("block")
    if len(names) > 1:
        grid[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def layers_of(models: Iterable[ByLayer]) -> list[str]:
    """Return the layers that any of the models has, in their order: blocks by number, norm, PRR."""
    found = {layer for model in models for of_layer in model.values() for layer in of_layer}
    return sorted(found, key=lambda layer: (not layer.startswith("block"), layer))


def short(layer: str) -> str:
    """Return how a layer is called beside others: 0, 1, …, norm, PRR."""
    return {"prr": "PRR"}.get(layer, layer.removeprefix("block_").lstrip("0") or "0")
