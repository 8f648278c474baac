"""Scenes of handwritten digits with an exact mask: a data set for segmentation that needs no download."""

import numpy as np
from PIL import Image

from locat_lightning.data import digits
from locat_lightning.data.dataset import Source

CLASS_NAMES = ["ground", *digits.CLASS_NAMES]
# Of the ground, then ten of matplotlib's ("tab10").
PALETTE = "303030 1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 7f7f7f bcbd22 17becf"
COLOURS = np.array([list(bytes.fromhex(colour)) for colour in PALETTE.split()], np.uint8)
SIDE = 64  # pixels
DIGITS = (2, 4)  # in a scene, fewest and most
SIZES = (24, 36)  # of a digit in pixels, smallest and largest
INK = 0.4  # share of the pen's full colour from which on a pixel belongs to the digit
GROUND, PEN = (10, 110), (150, 255)  # levels of the colours, of 255: pale on dark, as the digits are
ATTEMPTS = 20  # at a place for a digit


class Scenes(Source[np.ndarray]):
    """A split of the scenes: two to four digits of scikit-learn's on rough ground, 64 x 64 pixels.

    Scene i follows from (split, i) alone. Training scenes are of training digits, the others of those held
    out. Class 0 is the ground, class d + 1 the digit d.
    """

    def __init__(self, train: bool, count: int) -> None:
        self.train = train
        self.count = count
        self.digits = digits.Digits(train)

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> str:
        return f"scenes/{'train' if self.train else 'val'}/{index}"

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        rng = np.random.default_rng([int(self.train), index])
        scene = ground(rng)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        covered = np.zeros((SIDE, SIDE), bool)
        for _ in range(rng.integers(DIGITS[0], DIGITS[1] + 1)):
            chosen = int(rng.integers(len(self.digits)))
            size = int(rng.integers(SIZES[0], SIZES[1] + 1))
            digit = Image.fromarray(self.digits.pixels[chosen])
            ink = np.asarray(digit.resize((size, size), Image.Resampling.BICUBIC)) / 255
            pen = rng.uniform(*PEN, 3)
            for _ in range(ATTEMPTS):
                top, left = rng.integers(SIDE - size + 1, size=2)
                place = np.s_[top : top + size, left : left + size]
                if not covered[place][ink > INK].any():
                    scene[place] += ink[..., None] * (pen - scene[place])
                    mask[place][ink > INK] = self.digits.labels[chosen] + 1
                    covered[place] |= ink > INK / 2
                    break
        scene += rng.normal(0, 8, scene.shape)
        return Image.fromarray(scene.clip(0, 255).astype(np.uint8)), mask


def ground(rng: np.random.Generator) -> np.ndarray:
    """Make a ground to write on, float [64, 64, 3]: a gradient between two colours, with blotches."""
    start, end = rng.uniform(*GROUND, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    along = ((np.cos(angle) * x + np.sin(angle) * y) / 2.9 + 0.5)[..., None]
    surface: np.ndarray = start + along * (end - start)
    for cells, strength in ((5, 18), (16, 14)):
        noise = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
        surface += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[..., None]
    return surface
