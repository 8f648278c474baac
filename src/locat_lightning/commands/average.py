"""`locat average`: one model of the mean weights of several (a soup), chosen uniformly or greedily."""

from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor, nn

from locat.runs import write_json
from locat_lightning.backbones.channels import take_channels
from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.formats import write_model
from locat_lightning.backbones.soups import (
    State,
    Trial,
    first_difference,
    greedy_soup,
    similarity,
    uniform_soup,
)
from locat_lightning.backbones.weights import (
    RANDOM,
    Role,
    contents_of,
    digest_of,
    exported_config,
    state_for,
)
from locat_lightning.callbacks.record import versions
from locat_lightning.commands import checks, parsing, sources
from locat_lightning.commands.defaults import IMAGES, of_evaluation
from locat_lightning.commands.evaluate import ConfigOfImages
from locat_lightning.commands.export import check_target, files_for, forget_notes, write_card
from locat_lightning.commands.measurement import check_images, columns
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.data import ImageData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import autocast_type, extract_features
from locat_lightning.evaluation.knn import label_ranks
from locat_lightning.tasks.class_names import check_same_classes, classes_of
from locat_lightning.tasks.long_tail import CLASS_COUNTS, class_counts_of

DESCRIPTION = (
    "Average the weights of models of one architecture, as of runs that began with the same weights, into a "
    "folder as `locat export` writes it. What was averaged is in its metrics.json"
)
USAGE = "locat average RUN RUN … --to DIR [options]"
UNLIKE = 0.5  # a cosine between models below which their mean is most probably of no use


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat average …`."""
    given = list(takewhile(lambda each: not each.startswith("-"), arguments[1:]))
    parser = _parser()
    weights = [_weights_of(each) for each in given]
    if {"--help", "-h"}.isdisjoint(arguments) and len(weights) < 2:
        needed = f"two models or more before its options, not {len(weights)}"
        raise InputError(f"locat average needs {needed}: {USAGE}")
    config = parsing.parse(parser, options := arguments[1 + len(given) :])
    if config.recipe == "greedy":  # otherwise no image is read
        typed = {argument.partition("=")[0] for argument in arguments}
        recorded = parsing.as_arguments(of_evaluation("images", weights[0], typed))
        config = parsing.parse(parser, [*recorded, *options], recorded=recorded)
    checks.check_root(parsing.decisive_options(arguments), config.data.dataset, config.data.stream)
    autocast_type(config.precision)  # a mistake shows before anything is read
    check_target(to := Path(config.to), config.overwrite)
    _average(weights, config, parser, to)


def _average(weights: list[str], config: Namespace, parser: ArgumentParser, to: Path) -> None:
    models = _Models(weights, config)
    model = models.model
    trials, headline = dict[int, Trial](), dict[str, Any]()
    if config.recipe == "greedy":
        validation = _Validation(parser, config, models)
        soup, trials = greedy_soup(models.load, len(weights), validation.top1)
        best = next(iter(trials.values()))
        headline = {"val/top1": next(each.soup for each in reversed(trials.values()) if each.kept)}
        headline |= {"best ingredient val/top1": best.alone}
        _show(weights, trials)
        if soup.number == 1:
            rank_zero_warn(
                f"no other model makes {weights[next(iter(trials))]} better: the soup is this model alone"
            )
    else:
        soup = uniform_soup(models.load, len(weights))
    model.cpu().load_state_dict(state := soup.mean())
    if soup.number > 1 and any(name.endswith("running_var") for name in state):
        rank_zero_warn(
            "the statistics of BatchNorm are averaged as well, and may not be those of the soup: measure it "
            "before you use it"
        )
    if Path(weights[0]).is_file():
        forget_notes(model)
    kept = [each for each in range(len(weights)) if not trials or trials[each].kept]
    ingredients = [
        {"weights": each, "digest": models.digests[number], "similarity": models.similarities[number]}
        | ({"val/top1": trials[number].alone} if trials else {})
        | {"kept": number in kept}
        for number, each in enumerate(weights)
    ]
    record = {"recipe": config.recipe, **headline, "ingredients": ingredients, "digest": digest_of(state)}
    models_of = f"{soup.number} model{'s' * (soup.number > 1)}"
    what = f"the mean of the weights of {models_of} ({config.recipe})"
    told = {"SHA-256 of their weights": {f"model {each + 1}": models.digests[each] for each in kept}}
    with files_for(to) as directory:
        notes = {CLASS_COUNTS: models.counts} if models.counts else {}
        write_model(model, directory, classes=models.classes or None, images=models.images, notes=notes)
        source = Path("the models below")
        write_card(model, directory, to.absolute().name, "timm", what, source, models.images, told)
        write_json(directory / "metrics.json", record | {"versions": versions()})
        files = sorted(each.name for each in directory.iterdir())
    print(f"{what} -> {to}: {', '.join(files)}")


class _Models:
    """The models to average, of which one is built and the weights of few are in memory.

    Attributes:
        model: the first, to take the weights of any.
        classes: names of their classes; [] if unknown.
        images: how their images are prepared, by timm's names.
        counts: training images of each class; [] if unknown, or not the same of all.
        digests: SHA-256 of the weights of each.
        similarities: of each to the first, see `similarity`.
    """

    def __init__(self, weights: list[str], config: Namespace) -> None:
        self.weights, self.config = weights, config
        self._network: Role = "student" if config.student else "teacher"
        self.digests, self.similarities = dict[int, str](), dict[int, float]()
        self.model, self.classes, self.counts = self._read(0)
        self.images = _images_of(weights[0])
        own: dict[str, Tensor] = self.model.state_dict()
        self._first = {name: value.clone() for name, value in own.items()}

    def load(self, number: int) -> State:
        """Return the weights of a model, which is checked when it is read first."""
        if number in self.digests and number:
            own = state_for(self.model, self.weights[number], network=self._network)
            return {name: own[name] for name in self._first}
        state = self._first
        if number:
            state = self._checked(number).state_dict()
        self.digests[number] = digest_of(state)
        self.similarities[number] = alike = similarity(self._first, state)
        if alike < UNLIKE:
            rank_zero_warn(
                f"{self.weights[number]} and {self.weights[0]} have little in common (cosine of their "
                f"weights {alike:.2f}): only models that began with the same weights have a good mean"
            )
        return state

    def _read(self, number: int) -> tuple[Any, list[str], list[int]]:
        """Return a model, the names of its classes and their training images; [] of what is unknown."""
        weights, config = self.weights[number], self.config
        contents = contents_of(weights)
        options: dict[str, Any] = {"network": self._network, "classifier": True, "contents": contents}
        model: Any = load_backbone(weights, config.backbone, config.backbone_args, **options)
        names = exported_config(weights).get("label_names") or classes_of(contents or {})
        classes = list(names) if len(names) == model.num_classes else []
        return model, classes, class_counts_of(weights, contents, model.num_classes)

    def _checked(self, number: int) -> nn.Module:
        """Return a model that can be averaged with the first: `InputError` if it cannot."""
        a, b = self.weights[0], self.weights[number]
        model: nn.Module
        model, own, counts = self._read(number)
        if found := first_difference(self.model, model):
            raise InputError(f"{b} cannot be averaged with {a}: it has {found}")
        if self.classes and own and own != self.classes:
            pair = next((i, j) for i, j in zip(own, self.classes, strict=True) if i != j)
            raise InputError(f"{b} cannot be averaged with {a}: its class {pair[0]} is {pair[1]} there")
        self.counts = self.counts if counts == self.counts else []
        images, known = _images_of(b), self.images
        for name in {"mean", "std"} & images.keys() & known.keys():
            if list(images[name]) != list(known[name]):
                raise InputError(
                    f"{b} cannot be averaged with {a}: its images have another {name}, {images[name]}, not "
                    f"{known[name]}"
                )
        return model


class _Validation:
    """Measures top-1 of a model's weights on the validation images."""

    def __init__(self, parser: ArgumentParser, config: Namespace, models: _Models) -> None:
        self.model = models.model
        fabric = Fabric(accelerator=config.accelerator, devices=1)
        self._options: dict[str, Any] = {"device": fabric.device}
        self._options["autocast_dtype"] = autocast_type(config.precision)
        data: ImageData = parser.instantiate_classes(config).data
        data.prepare_data()
        data.setup("validate")
        classes = self.model.num_classes
        if classes != data.num_classes:
            has = f"a classifier of {classes} classes" if classes else "no classifier"
            raise InputError(
                f"{models.weights[0]} has {has}, and the data have {data.num_classes} classes: --recipe "
                "greedy measures top-1 on images of the model's classes; take uniform"
            )
        check_same_classes(models.classes, data.class_names)
        self.model.to(fabric.device)
        take_channels(self.model, data.model_channels)
        check_images(self.model, data, fabric.device)
        self._loader = data.eval_dataloader("val")

    def top1(self, state: State) -> float:
        """Return the share of the images of which the model with these weights names the class."""
        self.model.load_state_dict(state)
        # A module that is not timm's gives its outputs, the logits, for features.
        logits, labels, _ = extract_features(nn.Sequential(self.model), self._loader, **self._options)
        return float((label_ranks(logits, labels) < 1).double().mean())


def _weights_of(given: str) -> str:
    """Return what a word names: of the directory of a run its best weights, or what --weights takes."""
    best = Path(given) / "checkpoints" / "best.ckpt"
    if given == RANDOM:
        raise InputError("locat average: random weights have nothing in common to average")
    weights = str(best) if best.is_file() else given
    if weights == given and Path(given).is_dir() and not exported_config(given):
        raise InputError(f"locat average: {given} has no checkpoints/best.ckpt: give the checkpoint itself")
    sources.check_weights(weights, "locat average")
    return weights


def _images_of(weights: str) -> dict[str, Any]:
    """Return how images are prepared, by timm's names, as far as the weights record it."""
    known = of_evaluation("images", weights, {"--data.dataset"})  # whose images are not read
    found = {name: known.get(f"data.{option}") for option, name in IMAGES.items()}
    return {name: value for name, value in found.items() if value is not None}


def _show(weights: list[str], trials: dict[int, Trial]) -> None:
    table = columns("model", "top-1", "soup with it", "kept")
    table.columns[0].justify, table.columns[0].overflow = "left", "fold"
    for number, (alone, soup, kept) in trials.items():
        table.add_row(weights[number], f"{alone:.4f}", f"{soup:.4f}", "yes" if kept else "no")
    Console().print(table)
    rank_zero_info("the best soup was chosen on these images: measure it on others, as by locat test")


def _parser() -> ArgumentParser:
    parser = parsing.command_parser("average", DESCRIPTION)
    parser.usage = USAGE
    add = parser.add_argument
    add("-c", "--config", action=ConfigOfImages, help="any of these options, or a config of locat fit")
    add("--to", type=str, required=True, help="folder for the files, which --weights takes")
    add("--overwrite", action="store_true", help="replace files of the same names in the folder")
    help_ = "uniform takes all models; greedy those with which top-1 on the validation images does not fall"
    add("--recipe", type=Literal["uniform", "greedy"], default="uniform", help=help_)
    parsing.add_backbone_options(parser)
    parser.add_class_arguments(ImageData, "data")
    add("--accelerator", type=str, default="auto", help="as the trainer's")
    add("--precision", type=str | None, default=parsing.mixed_precision(), help="as the trainer's")
    return parser
