import os
import time
from pathlib import Path
from threading import Thread

import pytest

from locat_lightning.data import stores
from locat_lightning.data.shards import INDEX, Index
from locat_lightning.data.stores import Ahead, Store, in_bytes, is_remote, readable
from locat_lightning.errors import InputError


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(stores, "PAUSES", (0.01, 0.01))


@pytest.fixture
def store(web, shards, tmp_path):
    """The training shards by way of a web server, with room for three of the seven."""
    return Store(f"{web.url}/shards/train", tmp_path / "cache", 3 * 40_960)


@pytest.fixture
def listed(store):
    """The seven shards."""
    return Index.load(store.read(INDEX), INDEX).shards


def kept(store):
    return {path.stem for path in store.cache.glob("*.tar")}


def original(shards, shard):
    return (shards / "train" / shard.name).read_bytes()


def test_bytes_of_a_shard_come_from_a_copy_that_is_fetched_once(store, listed, shards, web):
    content = original(shards, listed[2])
    assert store.read_part(listed[2], 600, 50) == content[600:650]
    assert store.read_part(listed[2], 0, 9) == content[:9]
    assert web.requests.count("shards/train/000002.tar") == 1
    assert store.fetched(listed[2]).read_bytes() == content


def test_the_cache_stays_within_its_bound_and_keeps_what_was_read_last(store, listed):
    for number in (0, 1, 2):
        store.fetched(listed[number])
    old = time.time() - 100
    for number, shard in enumerate(listed[:3]):
        os.utime(store.fetched(shard), (old + number, old + number))
    reading = store.fetched(listed[1]).open("rb")
    store.read_part(listed[0], 0, 1)
    store.fetched(listed[3])
    assert kept(store) == {listed[number].sha256 for number in (0, 2, 3)}
    assert len(reading.read()) == listed[1].size  # whoever reads a shard is not disturbed
    reading.close()
    for shard in listed:
        assert store.read_part(shard, 0, 1)
        assert sum(path.stat().st_size for path in store.cache.iterdir()) <= store.bound


def test_shards_that_are_being_fetched_count(store, listed):
    store.fetched(listed[0])
    part = store.cache / f"{'a' * 64}.{store.bound - listed[1].size}.1.1.part"
    part.touch()
    store.fetched(listed[1])
    assert kept(store) == {listed[1].sha256}
    old = time.time() - stores.ABANDONED - 1
    os.utime(part, (old, old))
    store.fetched(listed[2])
    assert kept(store) == {listed[1].sha256, listed[2].sha256}
    assert not part.exists()  # its process was killed


def test_files_of_the_user_in_the_folder_of_the_cache_are_left_alone(store, listed):
    store.cache.mkdir()
    own = [store.cache / name for name in ("movie.part", "backup.tar", f"{'a' * 64}.tar.part")]
    for path in own:
        path.write_bytes(bytes(store.bound))
        os.utime(path, (0, 0))
    store.fetched(listed[0])
    assert kept(store) == {listed[0].sha256, "backup"}
    assert all(path.exists() for path in own)


def test_a_part_that_a_killed_process_left_is_replaced(store, listed, shards):
    store.cache.mkdir()
    (store.cache / f"{listed[0].sha256}.100.7.7.part").write_bytes(b"half")
    assert store.fetched(listed[0]).read_bytes() == original(shards, listed[0])
    assert list(store.cache.glob("*.part")) == []


@pytest.mark.parametrize("faults", [["500"], ["cut"], ["500", "cut"], ["flipped"], ["flipped", "500"]])
def test_a_store_that_fails_for_a_while_is_asked_again(faults, store, listed, shards, web):
    web.faults["shards/train/000001.tar"] = list(faults)
    assert store.fetched(listed[1]).read_bytes() == original(shards, listed[1])
    assert web.requests.count("shards/train/000001.tar") == len(faults) + 1


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (["500"] * 3, r"cannot read \S+/000001\.tar, tried 3 times: 500, .*Internal Server Error"),
        (["cut"] * 3, r"cannot read \S+/000001\.tar, tried 3 times: "),
        (["flipped"] * 2, r"shard \S+/000001\.tar is corrupt, fetched twice: its SHA-256 is \w+, not \w+"),
    ],
)
def test_a_shard_that_cannot_be_fetched_is_named(faults, said, store, listed, web):
    web.faults["shards/train/000001.tar"] = faults
    with pytest.raises(InputError, match=said):
        store.read_part(listed[1], 0, 1)
    assert kept(store) == set()
    assert list(store.cache.glob("*.part")) == []
    assert faults == []


def test_images_of_a_batch_do_not_wait_for_a_store_one_after_the_other(store, listed, web):
    """Each shard would be tried again and again for each image that lies in it."""
    at_hand = store.read_part(listed[0], 0, 1)
    for shard in listed:
        web.faults[f"shards/train/{shard.name}"] = ["500"] * 99
    said = set()
    for shard in (listed[2], listed[2], listed[3]):
        with pytest.raises(InputError, match=r"000002\.tar, tried 3 times") as refused:
            store.read_part(shard, 0, 1)
        said.add(str(refused.value))
    assert len(said) == 1
    assert [web.requests.count(f"shards/train/00000{number}.tar") for number in (2, 3)] == [3, 0]
    assert store.read_part(listed[0], 0, 1) == at_hand


def test_a_missing_shard_is_named_at_once(store, listed, shards, web):
    (shards / "train" / "000004.tar").unlink()
    with pytest.raises(InputError, match=r"shard http\S+/000004\.tar is missing: restore it"):
        store.fetched(listed[4])
    assert web.requests.count("shards/train/000004.tar") == 1
    local = Store(str(shards / "train"), store.cache, 1)
    with pytest.raises(InputError, match=r"shard /\S+/000004\.tar is missing: restore it"):
        local.read_part(listed[4], 0, 1)


def test_what_may_not_be_read_is_told_at_once(store, listed, web):
    web.faults = {"shards/train/000004.tar": ["403", "401"], f"shards/train/{INDEX}": ["403"]}
    for _ in range(2):
        with pytest.raises(InputError, match=r"shard http\S+/000004\.tar cannot be read \(access denied\)"):
            store.fetched(listed[4])
    with pytest.raises(PermissionError):
        store.read(INDEX)
    assert web.faults == {"shards/train/000004.tar": [], f"shards/train/{INDEX}": []}


def test_a_local_folder_is_read_in_place(shards, listed, store):
    local = Store(str(shards / "train"), store.cache / "own", 1)
    assert local.read_part(listed[0], 512, 30) == original(shards, listed[0])[512:542]
    assert not local.cache.exists()
    file = shards / "train" / listed[0].name
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"000000\.tar is cut off"):
        local.read_part(listed[0], 900, 200)


def test_several_readers_fetch_a_shard_once(store, listed, web):
    web.delay = 0.1
    threads = [Thread(target=store.fetched, args=(listed[0],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert web.requests.count("shards/train/000000.tar") == 1


def test_a_cache_that_cannot_be_written_is_named(store, listed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data\.cache: .*file/below: Not a directory: make room there"):
        Store(store.url, tmp_path / "file" / "below", store.bound).fetched(listed[0])


def until(condition):
    deadline = time.monotonic() + 10
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert met


def test_shards_are_fetched_ahead_but_not_further_than_told(store, listed, web):
    fetched = [f"shards/train/{shard.name}" for shard in listed]
    web.requests.clear()
    ahead = Ahead(store, listed, ends=range(10, 80, 10), most=2)
    for done in range(5):
        ahead.reached(10 * done + 9)
        until(lambda expected=done + 2: web.requests == fetched[:expected])
        until(lambda expected=done + 2: len(kept(store)) == min(expected, 3))
    ahead.close()
    ahead.reached(1000)
    time.sleep(0.05)
    assert web.requests == fetched[:6]
    assert sum(path.stat().st_size for path in store.cache.iterdir()) <= store.bound


def test_a_thread_that_fetches_leaves_errors_to_those_who_read(store, listed, web):
    web.faults["shards/train/000000.tar"] = ["500"] * 3
    Ahead(store, listed, ends=range(10, 80, 10), most=2)
    until(lambda: web.requests.count("shards/train/000000.tar") == 3)
    until(lambda: listed[1].sha256 in kept(store))  # and goes on
    assert store.read_part(listed[0], 0, 1)


def test_a_copy_that_is_cut_off_is_fetched_again(store, listed, shards, web):
    copy = store.fetched(listed[0])
    copy.write_bytes(copy.read_bytes()[:1000])
    assert store.read_part(listed[0], 900, 200) == original(shards, listed[0])[900:1100]
    with pytest.raises(InputError, match="is cut off"):
        store.read_part(listed[0], listed[0].size, 1)
    assert web.requests.count("shards/train/000000.tar") == 3


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("64MB", 64_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("2tb", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes_have_units(size, bytes_):
    assert in_bytes("data.cache_size", size) == bytes_


@pytest.mark.parametrize("size", [0, -1, "", "many", "5 parsecs", "-5MB", "0GB"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(
        InputError, match=r"data\.cache_size \(.*\) must be a number of bytes, or a size such"
    ):
        in_bytes("data.cache_size", size)


def test_a_size_is_written_so_that_it_is_enough():
    assert [readable(size) for size in (999, 1000, 1001, 64_000_000, 1_234_567_890)] == [
        *("999B", "1KB", "1.1KB", "64MB", "1.3GB")
    ]
    assert all(in_bytes("", readable(size)) >= size for size in (1, 12, 1234, 99_999, 10**6 - 1, 10**13 + 1))


@pytest.mark.parametrize("url", ["s3://b/x", "http://h", "simplecache::s3://b", "file:///x", "data:,x"])
def test_what_fsspec_opens_is_remote(url):
    assert is_remote(url)
    assert not is_remote(f"/folder/{url.partition(':')[0]}")


@pytest.mark.parametrize(
    ("url", "said"), [("nothing://x", "Protocol not known: nothing"), ("gs://x", "gcsfs")]
)
def test_a_store_that_fsspec_cannot_open_is_told_in_a_line(url, said, tmp_path):
    with pytest.raises(InputError, match=f"data.stream {url}: .*{said}"):
        Store(url, tmp_path, 1).read(INDEX)


@pytest.mark.slow
def test_shards_of_an_s3_store(shards, tmp_path, monkeypatch):
    """With a server of its own, whose address is in the environment, as S3-compatible stores have it."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        import s3fs

        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        system.put(str(shards), "bucket/shards", recursive=True)
        store = Store("s3://bucket/shards/train", tmp_path / "cache", 10**6)
        index = Index.load(store.read(INDEX), INDEX)
        assert store.read_part(index.shards[3], 0, 700) == original(shards, index.shards[3])[:700]
        with pytest.raises(FileNotFoundError):
            store.read("nothing")
        system.rm("bucket/shards/train/000005.tar")
        with pytest.raises(InputError, match=r"shard s3://bucket/shards/train/000005\.tar is missing"):
            store.fetched(index.shards[5])
    finally:
        server.stop()
        Path("moto_recording").unlink(missing_ok=True)
