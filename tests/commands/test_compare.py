"""`locat compare` as a user calls it."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest
import timm
import torch

from locat.command import main
from locat.runs import write_json
from locat_lightning.evaluation.intervals import paired_differences
from locat_lightning.evaluation.per_image import ConditionAreas, Scores, fingerprint, read_table, write_table

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def save_net(name, seed):
    torch.manual_seed(seed)
    torch.save(timm.create_model("locatvit_tiny", num_classes=0, **SIZES).state_dict(), name)


def evaluated(run, hits, *, protocol="k-NN", names=None, figure="top1_k5"):
    """The run of an evaluation with these hits."""
    indices = torch.arange(len(hits))
    names = names or [f"val/{index}.png" for index in indices.tolist()]
    results = Scores(indices, names, indices % 2, {figure: torch.tensor(hits)})
    write_json(
        Path(run) / "metrics.json", {"protocol": protocol, "fingerprint": fingerprint(results) or None}
    )
    write_table(Path(run) / "images.csv", results)
    return run


@pytest.mark.usefixtures("workplace")
def test_two_runs(capsys):
    evaluated("a", [1, 1, 1, 0, 1])
    evaluated("b", [1, 0, 0, 1, 1])
    main(["compare", "a", "b", "--name", "mine"])
    record = json.loads(Path("runs/mine/version_0/metrics.json").read_text())
    expected = paired_differences(*(read_table(Path(run) / "images.csv") for run in "ab"))["top1_k5"]
    found = record["differences"]["top1_k5"]
    assert (found["a"], found["b"]) == pytest.approx((0.8, 0.6))
    assert found["interval"] == pytest.approx(list(expected.interval))
    assert (found["a_better"], found["b_better"], record["images"]) == (2, 1, 5)
    out = capsys.readouterr().out
    low, high = (100 * end for end in expected.interval)
    assert f"+20.00 [{low:+.2f}, {high:+.2f}]" in out
    assert "A − B on 5 images, with 95 % intervals (k-NN)" in out


@pytest.mark.usefixtures("workplace")
def test_errors_are_printed_in_their_unit(capsys):
    evaluated("a", [0.25, 0.5, 0.75], figure="rmse")
    evaluated("b", [0.5, 0.75, 1.0], figure="rmse")
    main(["compare", "a", "b"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if "rmse" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["rmse", "0.5000 m", "0.7500 m", "-0.2500 [-0.2500, -0.2500]", "3 / 0"]


def test_weights_are_measured_first(folder, workplace, capsys):
    for seed, name in enumerate(("a.pth", "b.pth")):
        save_net(name, seed)
    options = [
        "--data.root",
        str(folder),
        "--data.img_size",
        "32",
        "--data.num_workers",
        "0",
        "--accelerator",
    ]
    options += ["cpu", "--backbone", "locatvit_tiny", "--backbone_args", json.dumps(SIZES), "--k", "3"]
    main(["compare", "a.pth", "b.pth", "--protocol", "knn", *options])
    record = json.loads(Path("runs/compare/version_0/metrics.json").read_text())
    for side in "ab":
        own = json.loads(Path(f"runs/{side}_knn/version_0/metrics.json").read_text())
        assert record["differences"]["top1_k3"][side] == pytest.approx(own["knn/top1_k3"])
        assert record["fingerprint"] == own["fingerprint"]


@pytest.mark.usefixtures("workplace")
def test_over_seeds(capsys):
    """mIoU is the mean over two seeds; its interval is over images, its deviation over seeds."""
    generator, means = torch.Generator().manual_seed(0), {}
    for run in "ab":
        areas = {}
        for seed in (1, 2):
            right = torch.randint(1, 40, (6, 2), generator=generator)
            areas[f"miou_seed{seed}"] = torch.stack([right, torch.full((6, 2), 50), right + 10], 1)
        results = ConditionAreas(torch.arange(6), [f"{i}.png" for i in range(6)], ["sky", "road"], areas)
        known = {"protocol": "dense retrieval, seeds 1 2", "fingerprint": fingerprint(results)}
        write_json(Path(run) / "metrics.json", known)
        write_table(Path(run) / "images.csv", results)
        sums = [each.sum(0) for each in areas.values()]
        means[run] = [float((s[0] / (s[1] + s[2] - s[0])).mean()) for s in sums]
    main(["compare", "a", "b"])
    found = json.loads(Path("runs/compare/version_0/metrics.json").read_text())["differences"]
    differences = [a - b for a, b in zip(means["a"], means["b"], strict=True)]
    assert list(found) == ["miou", "miou_seed1", "miou_seed2"]
    assert found["miou"]["difference"] == pytest.approx(mean(differences))
    assert found["miou"]["std"] == pytest.approx(stdev(differences))
    assert found["miou_seed2"]["difference"] == pytest.approx(differences[1])
    assert "std" not in found["miou_seed1"]
    assert f"of miou: standard deviation over the seeds {stdev(differences):.2%}" in capsys.readouterr().out


@pytest.mark.usefixtures("workplace")
def test_unlike_protocols_are_told_apart(capsys):
    evaluated("a", [1, 0], protocol="k-NN, 224 × 224 px, crop 1")
    evaluated("b", [1, 1], protocol="k-NN, 384 × 384 px, crop 1")
    said = refused("a", "b", capsys)
    assert "different protocols: '224 × 224 px' and '384 × 384 px'; add --unlike" in said
    main(["compare", "a", "b", "--unlike"])
    assert "crop 1; but '224 × 224 px' and '384 × 384 px')" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_checkpoints_are_validated_first(workplace, trained, capsys):
    best, last = (f"runs/classify_tiny/version_0/checkpoints/{name}.ckpt" for name in ("best", "last"))
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["compare", best, last, "--protocol", "validate", *quiet])
    found = json.loads(Path("runs/compare/version_0/metrics.json").read_text())
    for number, side in enumerate("ab"):
        own = json.loads(Path(f"runs/classify_tiny_validate/version_{number}/metrics.json").read_text())
        assert found["differences"]["top1"][side] == pytest.approx(own["val/top1"])
    assert found["images"] == 8


@pytest.mark.usefixtures("workplace")
def test_what_a_file_says_is_printed_and_not_obeyed(capsys):
    evaluated("a", [1, 0], figure="[/red]\x1b[31m", protocol="k-NN\x1b[31m")
    main(["compare", "a", "a"])
    out = capsys.readouterr().out
    assert "[/red]?[31m" in out
    assert "k-NN?[31m" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"protocol": "linear"}, "a and b were measured by different protocols: 'k-NN' and 'linear'"),
        ({"hits": [1, 1, 0]}, "a and b were not measured on the same images: 2 ("),
        ({"names": ["val/0.png", "val/2.png"]}, "a and b were not measured on the same images"),
        ({"figure": "top1_k7"}, "a and b have no figure in common"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(second, message, workplace, capsys):
    evaluated("a", [1, 0])
    evaluated("b", **{"hits": [1, 0]} | second)
    assert message in refused("a", "b", capsys)
    assert not Path("runs").exists()


def refused(*arguments):
    *arguments, capsys = arguments
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *arguments])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.usefixtures("workplace")
def test_one_data_set_is_compared(workplace, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "a.pth", "b.pth", "--protocol", "knn", "--datasets", "digits", "images"])
    assert stopped.value.code == 2
    assert "compare takes one data set: give --data.root in place of --datasets" in capsys.readouterr().err


def test_what_is_no_evaluation_is_refused_in_a_line(workplace, capsys):
    evaluated("a/version_0", [1, 0])
    assert f"in {Path('a').absolute()}: did you mean a/version_0?" in refused("a", "a/version_0", capsys)
    assert "give a run of locat knn or the like" in refused("a/version_0", "nowhere", capsys)
    assert "--k is an option of --protocol" in refused("a/version_0", "a/version_0", "--k", "3", capsys)
    assert "the following arguments are required: B" in refused("a", capsys)
    evaluated("nameless", [1, 0], names=["", ""])
    assert "its images have no names" in refused("nameless", "nameless", capsys)
    evaluated("damaged", [1, 0])
    table = Path("damaged/images.csv")
    table.write_text(table.read_text().replace("1.png", "7.png"))
    assert "damaged/images.csv is not the table of damaged/metrics.json" in refused(
        "damaged", "damaged", capsys
    )
    Path("damaged/metrics.json").write_text('["val/top1"]')
    assert "damaged/metrics.json is not the record of an evaluation" in refused("damaged", "damaged", capsys)
