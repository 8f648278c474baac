"""What a study consists of: the commands of each arm and seed, from its config."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from locat_lightning.errors import InputError, near

TRAIN = "train"
Options = dict[str, Any]  # by name, dotted as one types them
PROBES = {  # of a frozen backbone, by the command that each is
    "knn": "knn",
    "linear": "linear",
    "digits": "fit",
    "digits_retrieve": "retrieve",
    "masks": "fit",
    "retrieve": "retrieve",
}
# Of every fit: as little beside the training as can be, and on one device.
QUIET: Options = {
    "trainer.devices": 1,
    "trainer.enable_progress_bar": False,
    "trainer.num_sanity_val_steps": 0,
    "pictures.every_n_epochs": 0,
}


class Measure(NamedTuple):
    """A figure of quality, between 0 and 1.

    Attributes:
        title: for people.
        step: that measures it.
        metric: its name in the step's `metrics.json`.
    """

    title: str
    step: str
    metric: str


MEASURES = {
    "top1": Measure("top-1", TRAIN, "val/top1"),
    "knn": Measure("k-NN top-1", "knn", "knn/top1_k20"),
    "linear": Measure("linear top-1", "linear", "linear/top1"),
    "digits": Measure("probe mIoU (digit scenes)", "digits", "val/miou"),
    "digits_retrieve": Measure("retrieval mIoU (digit scenes)", "digits_retrieve", "retrieval/miou"),
    "masks": Measure("probe mIoU", "masks", "val/miou"),
    "retrieve": Measure("retrieval mIoU", "retrieve", "retrieval/miou"),
}


class Step(NamedTuple):
    """One command of `locat`.

    Attributes:
        name: of its run.
        command: `fit`, `knn`, …
        options: without weights, name and directory; `{images}` and `{masks}` stand for folders.
        of: the step whose last checkpoint are its weights; "" where there is none.
    """

    name: str
    command: str
    options: Options
    of: str = ""

    def arguments(self, **folders: str) -> list[str]:
        """The command as one types it.

        Args:
            folders: that stand for `{images}` and `{masks}`.
        """
        given = [self.command]
        for option, value in self.options.items():
            for name, folder in folders.items():
                value = folder if value == f"{{{name}}}" else value
            given.append(f"--{option}={value if isinstance(value, str) else json.dumps(value)}")
        return given

    def typed(self) -> str:
        """The command for people: beside the folders' names, that of a step stands for its checkpoint."""
        weights = [f"--weights={{{self.of}}}"] if self.of else []
        return shlex.join(["locat", *self.arguments(), *weights, f"--name={self.name}"])


@dataclass(frozen=True)
class Study:
    """Arms that differ in little, and what is done with each.

    Attributes:
        preset: its name.
        seeds: of each arm.
        arms: options of each, beside those of its recipe.
        recipe_of: the recipe of each arm. The first arm of a recipe is what the others are compared with.
        recipes: options of the trainings.
        probes: options of `PROBES`.
        images_per_class: training images of each class; None takes all.
    """

    preset: str
    seeds: list[int]
    arms: dict[str, Options]
    recipe_of: dict[str, str]
    recipes: dict[str, Options]
    probes: dict[str, Options]
    images_per_class: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any], preset: str) -> "Study":
        """A study with the options of a preset, which hold where its config says something else.

        Args:
            config: `seeds`, `arms`, `recipes`, `probes`, `presets`, as in the shipped `study_cifar.yaml`.
            preset: name of one of its presets.

        Raises:
            InputError: a name is none of those that the config has.
        """
        own = dict(_known("preset", preset, config["presets"]))
        changed = own.pop("options", {})
        for name in changed:
            _known(f"presets.{preset}.options", name, config["recipes"] | PROBES)
        arms = {name: dict(_known("arms", name, config["arms"])) for name in own.pop("arms", config["arms"])}
        if missing := [name for name, options in arms.items() if "recipe" not in options]:
            raise InputError(f"arms.{missing[0]}: recipe is missing, one of {', '.join(config['recipes'])}")
        recipe_of = {name: options.pop("recipe") for name, options in arms.items()}
        for recipe in recipe_of.values():
            _known("recipe", recipe, config["recipes"])
        for probe in config["probes"]:
            _known("probes", probe, PROBES)
        recipes, probes = (
            {name: options | changed.get(name, {}) for name, options in config[group].items()}
            for group in ("recipes", "probes")
        )
        images_per_class, seeds = own.pop("images_per_class", None), own.pop("seeds", config["seeds"])
        if own:
            raise InputError(
                f"presets.{preset} has no {next(iter(own))}: it takes arms, seeds, images_per_class, options"
            )
        return cls(preset, seeds, arms, recipe_of, recipes, probes, images_per_class)

    def base_of(self, arm: str) -> str:
        """The arm with which another is compared."""
        return next(name for name, recipe in self.recipe_of.items() if recipe == self.recipe_of[arm])

    def steps(self, arm: str, seed: int) -> list[Step]:
        """What is done for an arm and a seed, in order; of the first seed also predictions to look at."""
        recipe = self.recipes[self.recipe_of[arm]] | self.arms[arm]
        steps = [Step(TRAIN, "fit", _seeded("fit", recipe, seed))]
        for name, options in self.probes.items():
            steps.append(Step(name, PROBES[name], _seeded(PROBES[name], options, seed), of=TRAIN))
        if "masks" in self.probes and seed == self.seeds[0]:
            quiet = {"trainer.devices": 1, "trainer.enable_progress_bar": False}
            steps.append(Step("predictions", "predict", quiet, of="masks"))
        return steps


def _seeded(command: str, options: Options, seed: int) -> Options:
    if command == "fit":
        return options | QUIET | {"seed_everything": seed, "data.seed": seed}
    return options | {"seed": seed}


def _known(option: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise InputError(f"{option}: there is no {name!r} among {', '.join(known)}{near(name, known)}")
    return known[name]
