"""What all tests share."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from multiprocessing import get_context, set_start_method
from pathlib import Path
from threading import Thread

import lightning.pytorch
import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing import start_processes

from locat.command import main

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that a test runs as processes of their own
torch.set_num_threads(1)  # of fixtures that several tests share: they come before `one_thread`

SMALL = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"
# Drawing them takes as long as training; `small_options` does without.
PICTURES = ["--pictures.every_n_epochs", "1", "--pictures.images", "2", "--pictures.side", "64"]


@pytest.fixture(autouse=True)
def messages_captured(monkeypatch):
    """`caplog` has Lightning's messages, whether or not pytest had handlers when Lightning was imported."""
    for imported in (lightning.pytorch, lightning.fabric):
        monkeypatch.setattr(logging.getLogger(imported.__name__), "propagate", True)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations on two threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_images(root):
    """A folder of three classes, 6 images each to train on and 3 (of the last: 2) to validate on."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(count - (split == "val" and name == "cat")):
                noise = torch.randint(0, 80, (32, 32, 3), generator=generator, dtype=torch.uint8)
                noise[..., label] += 120
                Image.fromarray(noise.numpy()).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    """The folder of `write_images`, for a test to change."""
    return write_images(tmp_path / "images")


def small_options(folder):
    """Options that make any config of classification run in seconds on a folder."""
    return [
        *("--data.root", str(folder), "--data.img_size", "32", "--data.batch_size", "6"),
        *("--data.num_workers", "0", "--model.backbone_args", SMALL, "--model.warmup_epochs", "0"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--pictures.every_n_epochs", "0"),
    ]


@pytest.fixture
def small(folder):
    """The options of `small_options` for `folder`."""
    return small_options(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def run_of_two_epochs(tmp_path_factory):
    """A directory with `images` and with the run of classify_tiny.yaml on them, not to be changed."""
    from locat_lightning.commands.fit import main

    place = tmp_path_factory.mktemp("run_of_two_epochs")
    with contextlib.chdir(place):
        main(["fit", "--config", "classify_tiny.yaml", *small_options(write_images(place / "images"))])
    return place


@pytest.fixture
def trained(run_of_two_epochs, small, folder):
    """`small`, and a copy of the run of these options on `folder` in the working directory."""
    shutil.copytree(run_of_two_epochs / "runs", "runs")
    for record in Path("runs").rglob("*.yaml"):
        record.write_text(record.read_text().replace(str(run_of_two_epochs / "images"), str(folder)))
    return small


@pytest.fixture(scope="session")
def fork_server():
    """A server that processes are forked from: it imports the libraries once for all tests."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "locat_lightning.commands.fit"])
    return context


def begin_child():
    """Undo what a server hands on: its way of starting processes, which those that read images would take."""
    set_start_method(None, force=True)
    torch.set_num_threads(1)


def one_of_two(rank, port, function, arguments):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    begin_child()
    from lightning.pytorch.utilities import (
        rank_zero_only,
    )  # imported above, it would keep messages from caplog

    rank_zero_only.rank = rank  # which Lightning reads from the environment when a process imports it
    function(rank, *arguments)


@pytest.fixture(scope="session")
def two_processes(fork_server):
    """Calls `function(rank, *arguments)` in two processes, which are those of a trainer with two devices."""

    def run(function, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start_processes(one_of_two, (port, function, arguments), nprocs=2, start_method="forkserver")

    return run


def command_of_its_own(arguments, folder, output, environment):
    """The `locat` of a shell's user: the first process of a session, with its output in a file."""
    os.setsid()
    os.chdir(folder)
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin_child()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.modules["__main__"].__spec__ = find_spec("locat.__main__")  # which Lightning starts again
    main(list(arguments))


@pytest.fixture
def start_locat(fork_server, tmp_path):
    """Starts `locat` as a process of its own in a folder; returns the process and the file of its output."""
    started = []

    def start(*arguments, folder=".", **environment):
        output = tmp_path / f"output_{len(started)}.txt"
        given = (arguments, Path(folder).absolute(), output, environment)
        process = fork_server.Process(target=command_of_its_own, args=given)
        process.start()
        started.append(process)
        while process.is_alive() and not output.exists():  # it has no session of its own yet
            time.sleep(0.01)
        return process, output

    yield start
    for process in started:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)


class Web(ThreadingHTTPServer):
    """A web server of a folder, which answers after a delay, and fails as it is told.

    Attributes:
        delay: seconds before an answer.
        faults: what happens at the next requests of a path, one after the other: `500` or another status,
            `cut` (half of the file, then the connection ends) or `flipped` (a byte is another).
        requests: the paths that were asked for.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(WebHandler, directory=str(folder)))
        self.delay, self.faults, self.requests = 0, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class WebHandler(SimpleHTTPRequestHandler):
    def do_GET(self):
        path = self.path.lstrip("/")
        self.server.requests.append(path)
        time.sleep(self.server.delay)
        fault = self.server.faults.get(path) and self.server.faults[path].pop(0)
        if fault is None or fault == []:
            super().do_GET()
            return
        if fault.isdigit():
            self.send_error(int(fault))
            return
        content = bytearray((Path(self.directory) / path).read_bytes())
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "flipped":
            content[700] ^= 1
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tmp_path):
    """A web server of the test's folder, see `Web`."""
    server = Web(tmp_path)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


# Where each data set of segmentation has its images and masks, for training and for validation; how the names
# of its masks end, and the values of its masks: of nothing annotated, of the first and of the last class.
LAYOUTS = {
    "folder": ("images/{}", "annotations/{}", ("train", "val"), ".png", (255, 0, 2)),
    "ade20k": (
        *("ADEChallengeData2016/images/{}", "ADEChallengeData2016/annotations/{}"),
        *(("training", "validation"), ".png", (0, 1, 150)),
    ),
    "pascal_context": (
        *("VOCdevkit/VOC2010/JPEGImages", "VOCdevkit/VOC2010/SegmentationClassContext"),
        *(("train", "val"), ".png", (0, 1, 59)),
    ),
    "coco_stuff": (
        *("coco_stuff164k/images/{}", "coco_stuff164k/annotations/{}"),
        *(("train2017", "val2017"), "_labelTrainIds.png", (255, 0, 170)),
    ),
    "pascal_voc": (
        *("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClass"),
        *(("trainaug", "val"), ".png", (255, 0, 20)),
    ),
    "cityscapes": (
        *("cityscapes/leftImg8bit/{}/bonn", "cityscapes/gtFine/{}/bonn"),
        *(("train", "val"), "_gtFine_labelIds.png", (4, 7, 33)),
    ),
}

# Folders of the files that list the images of a split.
LISTS = {
    "pascal_context": "VOCdevkit/VOC2010/ImageSets/SegmentationContext",
    "pascal_voc": "VOCdevkit/VOC2012/ImageSets/Segmentation",
}


@pytest.fixture
def scenes(tmp_path):
    """Makes a folder in the layout of a data set of segmentation: 6 images to train on, 3 to validate on.

    The upper quarter of a mask is not annotated, the next half has the first class, the rest the last.
    """

    def make(dataset):
        images, masks, splits, ending, (nothing, first, last) = LAYOUTS[dataset]
        rng = np.random.default_rng(0)
        for split, count in zip(splits, (6, 3), strict=True):
            names = [f"{split}_{i}" for i in range(count)]
            for name in names:
                image, mask = rng.integers(256, size=(40, 48, 3)), np.full((40, 48), nothing)
                mask[10:30], mask[30:] = first, last
                suffix = "_leftImg8bit.png" if dataset == "cityscapes" else ".jpg"
                places = {images: (image, suffix), masks: (mask, ending)}
                for place, (pixels, end) in places.items():
                    path = tmp_path / dataset / place.format(split) / (name + end)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.astype(np.uint8)).save(path)
            if dataset in LISTS:
                listed = tmp_path / dataset / LISTS[dataset] / f"{split}.txt"
                listed.parent.mkdir(parents=True, exist_ok=True)
                listed.write_text("\n".join(names) + "\n")
        return tmp_path / dataset

    return make


@pytest.fixture
def davis(tmp_path):
    """A folder in the layout of DAVIS 2017 with the videos `boat` and `cars` (two objects), of other sizes.

    A square of the first object moves to the right; one of the second, at the bottom, stays where it is.
    """
    root = tmp_path / "DAVIS"
    rng = np.random.default_rng(0)
    palette = [0, 0, 0, 200, 0, 0, 0, 200, 0] + 253 * [9, 9, 9]
    for name, (height, width), objects, frames in (("boat", (64, 96), 1, 5), ("cars", (80, 64), 2, 6)):
        for frame in range(frames):
            image, mask = rng.integers(60, size=(height, width, 3)), np.zeros((height, width), np.uint8)
            mask[8:32, 8 + 4 * frame : 32 + 4 * frame] = 1
            if objects == 2:
                mask[44:70, 10:50] = 2
            image[mask == 1, 0] += 180
            image[mask == 2, 1] += 180
            mask[:2, :2] = 255
            places = {"JPEGImages": (image.astype(np.uint8), ".jpg"), "Annotations": (mask, ".png")}
            for place, (pixels, ending) in places.items():
                path = root / place / "480p" / name / f"{frame:05}{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(pixels)
                if place == "Annotations":
                    picture.putpalette(palette)
                picture.save(path)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("boat\ncars\n")
    return root


@pytest.fixture
def nyu(tmp_path):
    """A folder in the layout of NYUv2: 4 images to train on and 3 to test on, 40 x 32 pixels, in two rooms.

    An image is darker where it is farther away, from 1 m on the left to 8 m on the right; the first rows have
    no depth.
    """
    root = tmp_path / "nyu"
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for number in range(count):
            metres = np.linspace(1, 8, 40)[None] + rng.normal(0, 0.1, (32, 1))
            image = np.repeat((255 - metres * 28)[..., None], 3, 2) + rng.normal(0, 4, (32, 40, 3))
            metres[:3] = 0
            folder = root / split / f"room_{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"rgb_{number:05}.jpg")
            depths = (metres * 1000).round().astype(np.uint16)
            Image.fromarray(depths).save(folder / f"sync_depth_{number:05}.png")
    return root
