"""`locat pack`: the images of a folder as shards, for `--data.stream`; or an index of other tools' shards."""

import os
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich import get_console
from rich.progress import Progress

from locat_lightning.commands import checks, parsing
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.data import ImageData
from locat_lightning.data.packing import index_tars, pack
from locat_lightning.data.shards import Index, Meaning
from locat_lightning.data.stores import in_bytes, readable
from locat_lightning.data.streams import StreamableModule
from locat_lightning.errors import InputError

DESCRIPTION = (
    "Write the images of a folder, labelled or not or with masks, to shards in WebDataset's format, which "
    "--data.stream reads from a folder, a web server or an object store. An interrupted command continues if "
    "it is given again"
)

OF_READING = {"stream", "cache", "cache_size", "shards_at_once"}  # options of data that is packed already


class ConfigOfData(parsing.ConfigByName):
    """`--config` takes a config of `locat fit`, of which the data count."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        data = yaml.safe_load(Path(parsing.find_config(str(values))).read_text(encoding="utf-8")).get("data")
        if not isinstance(data, dict | str):
            raise InputError(f"--config: {values} has no data")
        for options in (data, data.get("init_args")) if isinstance(data, dict) else ():
            if isinstance(options, dict):
                for option in OF_READING & options.keys():
                    del options[option]
        ActionConfigFile.__call__(self, parser, cfg, yaml.safe_dump({"data": data}), option_string)


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat pack …`."""
    parser = _parser()
    config = parsing.parse(parser, arguments[1:])
    workers = config.workers or min(16, os.cpu_count() or 1)
    if config.tars is not None:
        if config.to is not None:
            raise InputError("--tars writes an index beside the shards: leave out --to")
        with _Progress("shards") as said:
            found = index_tars(Path(config.tars), Meaning(config.class_names), workers, said)
        said.report(config.tars, found)
        return
    if config.to is None:
        raise InputError("locat pack needs --to, a folder for the shards (or --tars, one of shards)")
    checks.check_writable("--to", Path(config.to))
    size = in_bytes("--shard_size", config.shard_size)
    data: StreamableModule[Any] = parser.instantiate_classes(config).data
    for split, files in data.files().items():
        # Training reads few shards at once: each has to be a mixture. Others keep their images' positions.
        seed = config.seed if split in ("train", "") else None
        with _Progress("images") as said:
            to = Path(config.to) / split
            found = pack(files, to, shard_size=size, seed=seed, workers=workers, said=said)
        said.report(to, found)


def _parser() -> ArgumentParser:
    parser = parsing.command_parser("pack", DESCRIPTION)
    add = parser.add_argument
    help_ = "a config of locat fit, whose data say how the folder is laid out"
    add("-c", "--config", action=ConfigOfData, help=help_)
    parser.add_subclass_arguments(StreamableModule, "data", skip=OF_READING)
    parser.set_defaults({"data": {"class_path": f"{ImageData.__module__}.{ImageData.__name__}"}})
    add("--to", type=str | None, default=None, help="folder of the shards")
    add("--shard_size", type=int | str, default="64MB", help="bytes of a shard, as a number or as text")
    add("--seed", type=NonNegativeInt, default=0, help="of the order of the training images")
    add(
        "--workers",
        type=PositiveInt | None,
        default=None,
        help="threads; null takes one for each processor, at most 16",
    )
    add("--tars", type=str | None, default=None, help="folder of shards, to write only their index")
    add("--class_names", type=list[str], default=[], help="of --tars, in the order of the labels")
    return parser


class _Progress:
    """Shows how far a command is, and says at its end what was made."""

    def __init__(self, units: str) -> None:
        self._bar = Progress(transient=True, disable=not get_console().is_terminal)
        self._units, self._began = units, perf_counter()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        self._task = self._bar.add_task(self._units)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if isinstance(error[1], SystemExit | KeyboardInterrupt):
            print("the same command continues", flush=True)

    def __call__(self, done: int, of: int) -> None:
        self._bar.update(self._task, completed=done, total=of)

    def report(self, where: object, found: Index) -> None:
        """Print what is in shards now."""
        seconds, size = perf_counter() - self._began, sum(shard.size for shard in found.shards)
        shards = f"{len(found.shards):,} shard{'s' * (len(found.shards) != 1)}"
        print(f"{where}: {len(found):,} images in {shards}, {readable(size)}, {seconds:,.1f} s")
