"""What patch features show without labels: correspondences, similarity, clusters, an object in front.

Features of an image are a map [D, H, W] (of `evaluation.dense.patch_features`), in a size of its own. Patches
are numbered row by row. Everything is computed on the CPU, in float32 or float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from locat_lightning.errors import InputError

THRESHOLD = 0.2  # TokenCut's τ
FAINT = 1e-5  # TokenCut's ε: the weight of an edge between patches that are not alike
STARTS = 4  # of k-means, from different centres


class Matches(NamedTuple):
    """Patches of two images that are each other's nearest, most similar first."""

    pairs: Tensor  # [M, 2] int64: a patch of the first image, a patch of the second
    similarities: Tensor  # [M] cosines, float32


class Foreground(NamedTuple):
    """A cut of an image's patches in two."""

    mask: Tensor  # [H, W] bool: the object; nowhere true where no cut separates anything
    eigenvector: Tensor  # [H, W] float32, of norm 1, larger in the object; 0 where there is no cut


def match_patches(one: Tensor, other: Tensor) -> Matches:
    """Find the patches of two images that are each other's nearest neighbours by cosine.

    Of patches that are equally similar the first counts.
    """
    similarities = _directions(one) @ _directions(other).T
    there, back = similarities.argmax(1), similarities.argmax(0)
    mine = torch.arange(len(there))
    mine = mine[back[there] == mine]
    found = similarities[mine, there[mine]]
    order = found.argsort(descending=True, stable=True)
    return Matches(torch.stack([mine, there[mine]], 1)[order], found[order])


def similarity_to(maps: Sequence[Tensor], patch: tuple[int, int]) -> list[Tensor]:
    """Return the cosine of every patch of each map to one patch (row, column) of the first: [H, W] each."""
    directions = [_directions(features) for features in maps]
    row, column = patch
    chosen = directions[0][row * maps[0].shape[-1] + column]
    return [(each @ chosen).view(m.shape[1:]) for each, m in zip(directions, maps, strict=True)]


def cluster_patches(maps: Sequence[Tensor], count: int, seed: int = 0) -> list[Tensor]:
    """Cluster the patches of all images together by k-means of their directions (unit length).

    Returns:
        For each image [H, W] int64: the number of each patch's cluster; cluster 0 has most patches.

    Raises:
        InputError: there are fewer different patches than clusters.
    """
    directions = torch.cat([_directions(features) for features in maps]).numpy()
    different = len(np.unique(directions, axis=0))
    if different < count:
        raise InputError(f"{count} clusters of {different} different patches: give fewer clusters")
    found = KMeans(count, n_init=STARTS, random_state=seed).fit_predict(directions)
    sizes = np.bincount(found, minlength=count)
    rank = np.empty(count, np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(count)
    parts = torch.from_numpy(rank[found]).split([features[0].numel() for features in maps])
    return [part.view(features.shape[1:]) for part, features in zip(parts, maps, strict=True)]


def cut_foreground(features: Tensor, threshold: float = THRESHOLD) -> Foreground:
    """Cut the patches of an image into an object and its background by the normalised cut of their graph.

    Two patches are joined by an edge of weight 1 if their cosine is above `threshold`, else of 1e-5. The
    eigenvector y of (D - W) y = λ D y with the second smallest λ is cut at its mean; the side of the patch
    with the largest |y| is the object.

    Source: TokenCut (Wang et al., CVPR 2022), which takes the keys of the last attention as features.
    """
    alike = (_directions(features) @ _directions(features).T > threshold).double().numpy()
    H, W = features.shape[1:]
    if alike.all() or not (alike - np.eye(H * W)).any():  # every cut is as good as any other
        return Foreground(torch.zeros(H, W, dtype=torch.bool), torch.zeros(H, W))
    weights = np.where(alike > 0, 1.0, FAINT)
    # D^½ y is an eigenvector of the symmetric D^-½ W D^-½, with 1 - λ.
    scale = 1 / np.sqrt(weights.sum(1))
    _, vectors = eigh(scale[:, None] * weights * scale, subset_by_index=[H * W - 2, H * W - 2])
    y = torch.from_numpy(scale * vectors[:, 0])
    mask, seed = y > y.mean(), y.abs().argmax()
    if not mask[seed]:
        mask, y = ~mask, -y
    y = F.normalize(y, dim=0).float()
    return Foreground(mask.view(H, W), y.view(H, W))


def _directions(features: Tensor) -> Tensor:
    """Turn a map [D, H, W] into unit vectors [H·W, D], float32 on the CPU."""
    return F.normalize(features.detach().float().cpu().flatten(1).T, dim=1)
