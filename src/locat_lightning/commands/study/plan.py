"""What a study consists of: the commands to run for each arm and seed, as its config says."""

import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from locat_lightning.commands import evaluate, fit
from locat_lightning.commands.parsing import as_arguments
from locat_lightning.errors import InputError, near

Options = dict[str, Any]  # of a command, by dotted name

TRAIN = "train"  # the first step of every arm and seed
MEASURING = ("validate", "test", "predict")  # without training; their runs are named NAME_COMMAND
EVALUATIONS = ("knn", "linear", "retrieve", "layers")
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **dict.fromkeys(("fit", *MEASURING), fit.main),
    **dict.fromkeys(EVALUATIONS, evaluate.main),
}
ON_ONE_DEVICE: Options = {"trainer.devices": 1, "trainer.enable_progress_bar": False}
ONLY_TRAINING: Options = {"trainer.num_sanity_val_steps": 0, "pictures.every_n_epochs": 0}
PLACEHOLDER = re.compile(r"\{(\w+)\}")  # stands for the folder of that name


@dataclass(frozen=True)
class Step:
    """One run of a command of `locat`."""

    name: str  # of the run
    command: str  # one of `COMMANDS`
    options: Options  # all but weights, name and directory, with placeholders for folders
    weights: str = ""  # the step whose checkpoint it takes; "" for none
    epoch: int = 0  # after which the checkpoint was kept; 0 for the last
    figures: tuple[str, ...] = ()  # of which the values of each image are recorded

    @property
    def run(self) -> Path:
        """Directory of its run, beneath that of its arm and seed."""
        return Path(f"{self.name}_{self.command}" if self.command in MEASURING else self.name) / "version_0"

    def arguments(self, folders: Mapping[str, str]) -> list[str]:
        """Return the command and its options, with these folders for their placeholders."""
        texts = as_arguments(self.options)
        return [self.command, *(PLACEHOLDER.sub(lambda n: folders.get(n[1], n[0]), each) for each in texts)]

    def typed(self) -> str:
        """Return the command for people, with placeholders for folders and for checkpoints of steps."""
        after = f", epoch {self.epoch}" if self.epoch else ""
        weights = [f"--weights={{{self.weights}{after}}}"] if self.weights else []
        return shlex.join(["locat", *self.arguments({}), *weights, f"--name={self.name}"])


@dataclass(frozen=True)
class Arm:
    """One of the things to compare."""

    recipe: str
    options: Options = field(default_factory=dict)  # that differ from the recipe's
    baseline: str | None = None  # the arm to compare it with; None for the first of its recipe


@dataclass(frozen=True)
class Probe:
    """A step after the training."""

    command: str
    options: Options = field(default_factory=dict)
    weights: str = TRAIN  # the earlier step whose last checkpoint it takes
    seeds: list[int] | None = None  # None for all
    recipes: list[str] | None = None  # None for all
    curve: bool = False  # whether it also measures the training's earlier checkpoints, see `Study.epochs`


@dataclass(frozen=True)
class Measure:
    """A number between 0 and 1 to compare arms by; higher is better."""

    title: str  # its column in the report
    step: str
    metric: str  # its name in the `metrics.json` of the step


@dataclass(frozen=True)
class Pictures:
    """What to draw besides the widths of the kernels."""

    quality: tuple[str, str] | None = None  # two measures, the second over the first
    layers: str | None = None  # a step of `locat layers`; its chart and its table
    features: str | None = None  # a step; patch features of its validation images
    predictions: str | None = None  # a step of `locat predict` that writes label maps
    colours: list[tuple[int, int, int]] | None = None  # of its classes, RGB; None for those in the data


@dataclass(frozen=True)
class Preset:
    """Changes to a study; None leaves as it is."""

    arms: list[str] | None = None  # only these
    probes: list[str] | None = None  # only these
    seeds: list[int] | None = None
    epochs: list[int] | None = None
    per_class: dict[str, int] | None = None
    pictures: Pictures | None = None
    options: dict[str, Options] = field(default_factory=dict)  # more of recipes and probes, by name


@dataclass(frozen=True)
class Study:
    """Arms that differ in a few options, and the steps to run for each.

    Args:
        recipes: options of `locat fit`, by name of the recipe.
        arms: by name, a recipe and the options that differ; the first of a recipe is the others' baseline,
            if they name none.
        probes: steps after the training by name: command, options, weights (a step), seeds, recipes, curve.
        measures: what to compare by name: title, step, metric in the step's metrics.json.
        pictures: what to draw: quality (two measures), layers (a step of locat layers), features (a step),
            predictions (a step), colours of their classes.
        seeds: of each arm.
        epochs: after which the training keeps its weights, for the probes with a curve; the last needs none.
        per_class: training images of each class to keep, by name of the folder.
        notes: sentences for the report.
        presets: by name: arms, probes, seeds, epochs, per_class, pictures, and options by recipe or probe.
    """

    recipes: dict[str, Options]
    arms: dict[str, Arm]
    probes: dict[str, Probe] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    pictures: Pictures = field(default_factory=Pictures)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    epochs: list[int] = field(default_factory=list)
    per_class: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    presets: dict[str, Preset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, arm in self.arms.items():
            _check(f"arms.{name}.recipe", arm.recipe, self.recipes)
            if arm.baseline is not None:
                _check(f"arms.{name}.baseline", arm.baseline, self.arms)
        steps = [TRAIN]
        for name, probe in self.probes.items():
            _check(f"probes.{name}.command", probe.command, COMMANDS)
            _check(f"probes.{name}.weights", probe.weights, steps)
            for recipe in probe.recipes or ():
                _check(f"probes.{name}.recipes", recipe, self.recipes)
            if probe.curve and probe.weights != TRAIN and not self.probes[probe.weights].curve:
                raise InputError(
                    f"probes.{name}.curve: {probe.weights}, whose weights it takes, has no curve"
                )
            steps.append(name)
        for name, measure in self.measures.items():
            _check(f"measures.{name}.step", measure.step, steps)
        for name in self.pictures.quality or ():
            _check("pictures.quality", name, self.measures)
        for step in (self.pictures.layers, self.pictures.features, self.pictures.predictions):
            if step is not None:
                _check("pictures", step, self.probes)

    def with_preset(self, name: str) -> "Study":
        """Return the study as one of its presets changes it."""
        _check("preset", name, self.presets)
        preset = self.presets[name]
        for each in preset.options:
            _check(f"presets.{name}.options", each, [*self.recipes, *self.probes])
        for arm in preset.arms or ():
            _check(f"presets.{name}.arms", arm, self.arms)
        for probe in preset.probes or ():
            _check(f"presets.{name}.probes", probe, self.probes)
        more = {each: preset.options.get(each, {}) for each in (*self.recipes, *self.probes)}
        probes = {
            key: replace(each, options=each.options | more[key])
            for key, each in self.probes.items()
            if preset.probes is None or key in preset.probes
        }
        measures = {key: each for key, each in self.measures.items() if each.step in (TRAIN, *probes)}
        return replace(
            self,
            recipes={key: options | more[key] for key, options in self.recipes.items()},
            probes=probes,
            measures=measures,
            arms={arm: self.arms[arm] for arm in preset.arms or self.arms},
            pictures=preset.pictures or self.pictures,
            seeds=preset.seeds or self.seeds,
            epochs=preset.epochs or self.epochs,
            per_class=preset.per_class or self.per_class,
        )

    def baseline_of(self, arm: str) -> str:
        """Return the arm that another is compared with: the one that it names, or the first of its recipe."""
        first = next(name for name, each in self.arms.items() if each.recipe == self.arms[arm].recipe)
        return self.arms[arm].baseline or first

    def runs(self) -> list[tuple[str, int]]:
        """Return all arms with all seeds, seed by seed, so that an interrupted study can compare arms."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def steps(self, arm: str, seed: int) -> list[Step]:
        """Return the steps of an arm and a seed, in order."""
        recipe = self.recipes[self.arms[arm].recipe] | self.arms[arm].options
        last = recipe.get("trainer.max_epochs", inf)
        kept = [each for each in self.epochs if each < last]
        if kept and any(probe.curve for probe in self.probes.values()):
            recipe |= {"checkpoint.keep": kept}
        steps = []
        for name, probe in {TRAIN: Probe("fit", recipe, weights=""), **self.probes}.items():
            chosen = probe.recipes is None or self.arms[arm].recipe in probe.recipes
            if chosen and (probe.seeds is None or seed in probe.seeds):
                own = {"seed": seed} if probe.command in EVALUATIONS else ON_ONE_DEVICE
                if probe.command == "fit":
                    own = own | ONLY_TRAINING | {"seed_everything": seed, "data.seed": seed}
                figures = tuple(each.metric for each in self.measures.values() if each.step == name)
                step = Step(name, probe.command, probe.options | own, probe.weights, figures=figures)
                for epoch in kept if probe.curve else ():
                    of_train = probe.weights == TRAIN
                    source = (TRAIN, epoch) if of_train else (epoch_of(probe.weights, epoch), 0)
                    named = epoch_of(name, epoch)
                    steps.append(Step(named, probe.command, step.options, *source, step.figures))
                steps.append(step)
        return steps

    def folders(self) -> list[str]:
        """Return the names of the folders that the options of the steps have placeholders for."""
        arguments = [text for run in self.runs() for step in self.steps(*run) for text in step.arguments({})]
        return list(dict.fromkeys(PLACEHOLDER.findall(" ".join(arguments))))


def epoch_of(step: str, epoch: int) -> str:
    """Return the name of a step that measures an earlier checkpoint."""
    return f"{step}_epoch_{epoch}"


def _check(option: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise InputError(f"{option}: {name!r} is not one of {', '.join(known) or 'none'}{near(name, known)}")
