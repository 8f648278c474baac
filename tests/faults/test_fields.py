"""Fields of a checkpoint and of a run's record that are something else."""

import pytest
import torch
import yaml

from locat.command import main
from tests.commands.runs import LAST, RUN

pytestmark = pytest.mark.usefixtures("workplace")

RESUMED = ["fit", "--ckpt_path", str(LAST)]
# Without them no run can resume: whatever else is there, it is refused.
NEEDED = (
    *("global_step", "epoch", "pytorch-lightning_version", "state_dict", "loops", "callbacks"),
    *("hyper_parameters", "run", "optimizer_states"),
)


def code_of(arguments, capsys):
    """The exit code of a command; what it says of a mistake is one line."""
    capsys.readouterr()
    try:
        main(arguments)
    except SystemExit as end:
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(errors) == 1, errors
        return end.code
    return 0


@pytest.mark.parametrize("field", NEEDED)
def test_a_resumed_run_refuses_a_field_that_is_of_another_kind(field, trained, capsys):
    assert code_of(RESUMED, capsys) == 0  # as it is
    contents = torch.load(LAST, weights_only=True)
    for value in ("word", [1, "a"], 0.5, 10**20):
        torch.save(contents | {field: value}, LAST)
        assert code_of(RESUMED, capsys) == 2, (field, value)


def test_counts_that_contradict_each_other_are_refused(trained, capsys):
    contents = torch.load(LAST, weights_only=True)
    torch.save(contents | {"global_step": contents["global_step"] + 1}, LAST)
    assert code_of(RESUMED, capsys) == 2


def of_another_shape(state):
    state["state"][0]["exp_avg"] = torch.zeros(3)


def of_another_kind(state):
    state["state"][0]["exp_avg"] = "word"


def of_no_parameter(state):
    state["state"][9999] = state["state"][0]


def no_state(state):
    state["state"][0] = "word"


def one_group_less(state):
    del state["param_groups"][0]


def one_parameter_less(state):
    state["param_groups"][0]["params"].pop()


def another_order(state):
    state["param_groups"][0]["params"].reverse()


def without_an_average(state):
    del state["state"][0]["exp_avg"]


def not_finite(state):
    state["state"][0]["exp_avg"].fill_(float("nan"))


def no_number_of_steps(state):
    state["state"][0]["step"] = "word"


def amsgrad(state):
    state["param_groups"][0]["amsgrad"] = True


def betas(state):
    state["param_groups"][0]["betas"] = "word"


@pytest.mark.parametrize(
    "change",
    [
        *(of_another_shape, of_another_kind, of_no_parameter, no_state, one_group_less, one_parameter_less),
        *(another_order, without_an_average, not_finite, no_number_of_steps, amsgrad, betas),
        *(dict.clear, lambda state: state.update(state="word"), lambda state: state.update(param_groups=[1])),
    ],
)
def test_a_state_of_the_optimizer_that_does_not_fit_is_refused(change, trained, capsys):
    contents = torch.load(LAST, weights_only=True)
    change(contents["optimizer_states"][0])
    torch.save(contents, LAST)
    assert code_of([*RESUMED, "--trainer.max_epochs", "3", "--allow_changes", "true"], capsys) == 2


@pytest.mark.parametrize("value", ["word", -1, 0.5, 10**20])
def test_a_number_of_images_seen_that_counts_nothing_is_refused(value, trained, capsys):
    torch.save(torch.load(LAST, weights_only=True) | {"images_seen": value}, LAST)
    assert code_of(RESUMED, capsys) == 2


@pytest.mark.parametrize(
    "group", ["trainer", "checkpoint", "pictures", "knn", "linear", "retrieval", "model", "data"]
)
def test_options_of_a_record_are_checked_like_typed_ones(group, trained, capsys, record_property):
    """Each in turn that is no word becomes one: which is refused in a line, or is right."""
    record = RUN / "config.yaml"
    config = yaml.safe_load(record.read_text())
    options = config[group].get("init_args", config[group])
    codes = []
    for option in [option for option, value in options.items() if not isinstance(value, str)]:
        before = options[option]
        options[option] = "!!x"
        record.write_text(yaml.safe_dump(config))
        codes.append(code_of([*RESUMED, "--trainer.max_epochs", "2"], capsys))
        options[option] = before
    assert set(codes) <= {0, 2}
    record_property(f"options of a record, {group}", f"{len(codes)}, {codes.count(2)} of them refused")
