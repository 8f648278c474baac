"""Scikit-learn's handwritten digits: 1,797 real images, which need no download."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from locat_lightning.data.dataset import Source
from locat_lightning.data.decoding import to_rgb

CLASS_NAMES = [str(digit) for digit in range(10)]
EVALUATED = 360  # of 1,797 images, stratified; the split is part of the data set, so its seed is fixed


class Digits(Source[int]):
    """A split of the digits, 8 x 8 pixels, white on black: 1,437 to train on, or the other 360."""

    def __init__(self, train: bool) -> None:
        data = load_digits()
        rows = np.arange(len(data.target))
        parts = train_test_split(rows, test_size=EVALUATED, stratify=data.target, random_state=0)
        self.rows: np.ndarray = np.sort(parts[0 if train else 1])
        self.pixels: np.ndarray = (data.images[self.rows] * (255 / 16)).round().astype(np.uint8)
        self.labels: list[int] = data.target[self.rows].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return f"digits/{self.rows[index]}"  # the row in load_digits()

    def read(self, index: int) -> tuple[Image.Image, int]:
        return to_rgb(Image.fromarray(self.pixels[index])), self.labels[index]
