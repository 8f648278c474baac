"""Files of features: formats that others read, interrupted at any place, and what they refuse."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from locat_lightning.errors import InputError
from locat_lightning.evaluation import feature_files
from locat_lightning.evaluation.feature_files import FeatureFile, Row

pytestmark = pytest.mark.usefixtures("workplace")
RECORD = {"weights": "w"}


def features_of(positions, shape, dtype):
    return (np.asarray(positions)[(slice(None), *[None] * len(shape))] + np.ones(shape) / 4).astype(dtype)


def describe(position, label):
    return Row(f"dir/{position},\n.png", label, f"class {label}")


def write(name, batches, shape=(3,), dtype="float32", finish=True, **options):
    with FeatureFile(Path(name), shape=shape, dtype=dtype, record=RECORD, **options) as file:
        start = file.start
        for batch in batches:
            positions = np.array(batch)
            file.add(positions, positions % 3 - 1, features_of(batch, shape, dtype))
        if finish:
            file.finish(describe)
    return start


def read(name):
    """Features, and rows of path, label and class, by the libraries that others use."""
    path = Path(name)
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        shape = json.loads(table.schema.metadata[b"shape"])
        values = np.stack(table["features"].to_numpy()).reshape(-1, *shape)
        return values, [list(map(str, row.values())) for row in table.drop(["features"]).to_pylist()]
    if path.suffix == ".npy":
        values = np.load(path, mmap_mode="r")
    else:
        with safe_open(path, "numpy") as file:
            values = file.get_tensor("features")
            assert file.metadata()["what"] == "cls"
    with path.with_suffix(".csv").open(newline="") as table:
        header, *rows = csv.reader(table)
    assert header == ["path", "label", "class"]
    return values, rows


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.parquet"])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_files_hold_rows_with_path_and_label(name, shape, dtype, monkeypatch):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
        monkeypatch.setattr(feature_files, "GROUP", 2 * np.prod(shape) * np.dtype(dtype).itemsize)
    kept = [0, 1, 4, 5, 6]  # 2 and 3 could not be read
    write(name, [[0, 1], [4], [5, 6]], shape, dtype, notes={"what": "cls"})
    values, rows = read(name)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, features_of(kept, shape, dtype))
    assert rows == [[f"dir/{i},\n.png", str(i % 3 - 1), f"class {i % 3 - 1}"] for i in kept]
    beside = [] if name.endswith("parquet") else ["a.csv"]
    assert sorted(path.name for path in Path().iterdir()) == sorted([name, *beside])


def test_a_file_that_was_cut_anywhere_continues():
    """Whatever part of the last writes has reached the disk, rows and positions agree again."""
    write("whole.npy", [range(12)])
    for cut_features in (0, 1, 11, 12, 25, 9000):
        for cut_index in (0, 1, 15, 16, 40):
            write("a.npy", [[0, 1, 3], [4, 5]], finish=False, overwrite=True)
            for name, cut in (("features", cut_features), ("index", cut_index)):
                file = Path("a.npy.part", name)
                content = file.read_bytes()
                file.write_bytes(content[: max(0, len(content) - cut)])
            rows = min(max(0, 60 - cut_features) // 12, (80 - cut_index) // 16)
            start = write("a.npy", [[0, 1, 3, 4, 5][rows:], [6]], overwrite=True)
            assert start == ([0, 1, 3, 4, 5][rows - 1] + 1 if rows else 0)
            np.testing.assert_array_equal(read("a.npy")[0], features_of([0, 1, 3, 4, 5, 6], (3,), "float32"))


def test_rows_survive_an_error_and_a_kill():
    def computing():
        yield [0, 1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("a.npy", computing())
    assert not Path("a.npy").exists()
    assert not Path("a.npy.part/.lock").exists()
    file = FeatureFile(Path("a.npy"), shape=(3,), dtype="float32", record=RECORD).__enter__()
    assert file.start == 2
    file.add(np.array([2]), np.array([0]), features_of([2], (3,), "float32"))
    file.save()
    copied = {path.name: path.read_bytes() for path in Path("a.npy.part").iterdir() if path.name != ".lock"}
    file.add(np.array([3]), np.array([0]), features_of([3], (3,), "float32"))
    file.__exit__(None, None, None)
    for name, content in copied.items():  # as it was when a process was killed
        Path("a.npy.part", name).write_bytes(content)
    assert write("a.npy", [[3]]) == 3
    assert len(np.load("a.npy")) == 4


def test_rows_reach_the_disk_every_few_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(feature_files, "monotonic", lambda: now[0])
    with FeatureFile(Path("a.npy"), shape=(3,), dtype="float32", record=RECORD) as file:
        for position in range(4):
            now[0] += feature_files.PATIENCE * 0.6
            file.add(np.array([position]), np.array([0]), features_of([position], (3,), "float32"))
            assert Path("a.npy.part/index").stat().st_size == 16 * (position + 1) // 32 * 32


def test_a_failure_while_the_file_is_put_in_place_loses_nothing(monkeypatch):
    original = Path.replace

    def full(self, target):
        if str(target) == "a.npy":
            raise OSError(28, "No space left on device")
        return original(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write("a.npy", [[0, 1]])
    assert write("a.npy", []) == 2  # although a.csv is there
    np.testing.assert_array_equal(read("a.npy")[0], features_of([0, 1], (3,), "float32"))


def test_a_full_disk(monkeypatch):
    """What was saved before is kept, the lock is not, and the error says which file it was."""
    write("a.npy", [[0, 1]], finish=False)

    def full(opened):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(feature_files, "_flush", full)
        with pytest.raises(OSError, match=r"No space left on device: 'a.npy'"):
            write("a.npy", [[2]])
    assert not Path("a.npy.part/.lock").exists()
    assert write("a.npy", [[2]]) == 2
    np.testing.assert_array_equal(read("a.npy")[0], features_of([0, 1, 2], (3,), "float32"))


def test_one_process_at_a_time(monkeypatch):
    def locked(run):
        raise BlockingIOError

    monkeypatch.setattr(feature_files, "lock", locked)
    with pytest.raises(InputError, match=r"a\.npy is being written by another process"):
        write("a.npy", [[0]])


def test_what_is_refused(monkeypatch):
    write("a.npy", [[0]], finish=False)
    with pytest.raises(InputError, match=r"another command \(dtype, shape differ\): .* --overwrite"):
        write("a.npy", [[0]], (4,), "float16")
    assert write("a.npy", [[0]], (4,), overwrite=True) == 0
    with pytest.raises(InputError, match=r"a\.npy exists: give another name, or add --overwrite"):
        write("a.npy", [[0]])
    with pytest.raises(InputError, match=r"a\.csv exists"):
        write("a.safetensors", [[0]])
    with pytest.raises(InputError, match=r"a\.h5 must end in one of \.npy, \.parquet, \.safetensors"):
        write("a.h5", [[0]])
    Path("b.npy").mkdir()
    with pytest.raises(InputError, match=r"b\.npy is a folder"):
        write("b.npy", [[0]])
    with pytest.raises(InputError, match="none of the images can be read"):
        write("c.npy", [])
    monkeypatch.setattr(feature_files, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'locat-lightning\[parquet\]'"):
        write("d.parquet", [[0]])
