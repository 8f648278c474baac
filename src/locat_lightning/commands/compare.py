"""`locat compare`: two models on the same images, and whether their difference may be chance."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from locat.errors import Parser
from locat.runs import claim, printable, write_json
from locat_lightning.callbacks.record import versions
from locat_lightning.commands import checks
from locat_lightning.commands.evaluate import DESCRIPTIONS, evaluate
from locat_lightning.commands.fit import validate
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.commands.track import track
from locat_lightning.errors import InputError, in_a_line
from locat_lightning.evaluation.intervals import ERRORS, Paired, paired_differences
from locat_lightning.evaluation.per_image import TABLE, PerImage, fingerprint, read_table, seeds_of

DESCRIPTION = (
    "Compare two models that were measured on the same images: A − B, its 95 % interval (paired bootstrap "
    "over images), and on how many images each is better"
)
RECORD = "metrics.json"
# The commands that measure weights: each returns the run of what it found, in the first process.
COMMANDS: dict[str, Callable[[list[str]], Path | None]] = {
    **dict.fromkeys(DESCRIPTIONS, evaluate),
    "track": track,
    "validate": validate,
}


class Evaluation(NamedTuple):
    """What a run of `locat knn` or the like has measured."""

    run: Path
    protocol: str
    results: PerImage
    units: str  # of what the results are: images, or the objects of videos


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat compare …`."""
    parser = Parser("locat compare", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    of_runs = "directory of a run of locat knn, linear, retrieve, robustness, track, validate or test"
    add("a", metavar="A", help=f"{of_runs}; with --protocol, weights")
    add("b", metavar="B", help="the same of another model")
    help_ = "measure the weights first, by this command, which takes all other options"
    add("--protocol", choices=sorted(COMMANDS), help=help_)
    help_ = "compare also what was measured by different protocols, on the same images"
    add("--unlike", action="store_true", help=help_)
    add("--runs", default="runs", help="directory of all runs")
    add("--name", default="compare", help="name of the run")
    given, rest = parser.parse_known_args(arguments[1:])
    checks.check_name(given.name)
    checks.check_writable("--runs", Path(given.runs) / given.name)
    if any(each.partition("=")[0] == "--datasets" for each in rest):
        raise InputError("locat compare takes one data set: give --data.root in place of --datasets")
    pair = [Path(given.a), Path(given.b)]
    if given.protocol:
        options = [*rest, "--runs", given.runs]
        measure = COMMANDS[given.protocol]
        measured = [measure([given.protocol, "--weights", str(each), *options]) for each in pair]
        pair = [run for run in measured if run is not None]  # the first process has them
    elif rest:
        raise InputError(f"locat compare: {rest[0]} is an option of --protocol, which is not given")
    if len(pair) == 2:
        _compare(_read(pair[0]), _read(pair[1]), Path(given.runs) / given.name, unlike=given.unlike)


def _compare(a: Evaluation, b: Evaluation, directory: Path, *, unlike: bool) -> None:
    """Print what two evaluations differ by, and write it to a new run in a directory."""
    if (differ := _differences(a.protocol, b.protocol)) and not unlike:
        raise InputError(
            f"{a.run} and {b.run} were measured by different protocols: {differ}; add --unlike to compare "
            "them nevertheless"
        )
    prints = [fingerprint(each.results) for each in (a, b)]
    if not prints[0]:
        raise InputError(f"{a.run}: its images have no names, by which two results could be paired")
    if prints[0] != prints[1]:
        numbers = [len(each.results.indices) for each in (a, b)]
        raise InputError(
            f"{a.run} and {b.run} were not measured on the same {a.units}: {numbers[0]:,} ({prints[0]}) and "
            f"{numbers[1]:,} ({prints[1]})"
        )
    found = paired_differences(a.results, b.results)
    if not found:
        raise InputError(f"{a.run} and {b.run} have no figure in common: measure both with the same options")
    number = len(a.results.indices)
    protocol = f"{a.protocol}; but {differ}" if differ else a.protocol
    heading = f"A − B on {number:,} {a.units}, with 95 % intervals ({protocol})"
    print(f"A: {a.run}\nB: {b.run}\n{heading}")
    deviations = {
        name: stdev(found[each].difference for each in own)
        for name, own in seeds_of(found).items()
        if name in found and len(own) > 1
    }
    Console().print(_table(found))
    for name, deviation in deviations.items():
        print(f"A − B of {printable(name)}: standard deviation over the seeds {deviation:.2%}")
    run = claim(directory)
    record = {
        "a": str(a.run),
        "b": str(b.run),
        "measured": heading,
        "images": number,
        "units": a.units,
        "fingerprint": prints[0],
        "protocol": protocol,
        "differences": {
            name: _plain(paired) | ({"std": deviations[name]} if name in deviations else {})
            for name, paired in found.items()
        },
        "versions": versions(),
    }
    write_json(run / RECORD, record)
    print(f"run: {run}")


def _differences(a: str, b: str) -> str:
    """Return the parts of two protocols that differ; nothing if they are equal."""
    parts = [each.split(", ") for each in (a, b)]
    own = [", ".join(part for part in parts[i] if part not in parts[1 - i]) for i in (0, 1)]
    return "" if a == b else f"{own[0]!r} and {own[1]!r}"


def _table(found: dict[str, Paired]) -> Table:
    titles = ("A", "B", "A − B", "better: A / B")
    table = Table(Column("figure", overflow="fold"), *(Column(title, justify="right") for title in titles))
    for name, paired in found.items():
        scale, digits = (1, 4) if name in ERRORS else (100, 2)
        both = (f"{scale * each:.{digits}f}{ERRORS.get(name, '%')}" for each in paired[:2])
        difference, *ends = (f"{scale * each:+.{digits}f}" for each in (paired.difference, *paired.interval))
        better = f"{paired.first_better:,} / {paired.second_better:,}"
        table.add_row(Text(printable(name)), *both, f"{difference} [{', '.join(ends)}]", better)
    return table


def _plain(paired: Paired) -> dict[str, Any]:
    names = ("a", "b", "difference", "interval", "a_better", "b_better")
    return dict(zip(names, paired, strict=True))


def _read(run: Path) -> Evaluation:
    """Read what a run has measured: `InputError` if it measured nothing of single images."""
    if not (run / TABLE).is_file() or not (run / RECORD).is_file():
        newest = max(run.glob(f"version_*/{TABLE}"), key=lambda file: file.stat().st_mtime, default=None)
        best = run / "checkpoints" / "best.ckpt"
        measuring = f"validate --weights {best}" if best.is_file() else "knn or the like"
        advice = f"did you mean {newest.parent}?" if newest else f"give a run of locat {measuring}"
        raise InputError(
            f"no {RECORD} with {TABLE} in {run.absolute()}: {advice} (or --protocol, for weights)"
        )
    results = read_table(run / TABLE)
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
        protocol, known = printable(str(record["protocol"])), record["fingerprint"]
        units = printable(str(record.get("units", "images")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{run / RECORD} is not the record of an evaluation: {in_a_line(error)}") from error
    if known != (fingerprint(results) or None):
        raise InputError(f"{run / TABLE} is not the table of {run / RECORD}: measure again")
    return Evaluation(run, protocol, results, units)
