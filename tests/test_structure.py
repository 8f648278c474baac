"""Correspondences, clusters and cuts of patches, against plain references."""

import numpy as np
import pytest
import torch

from locat_lightning.errors import InputError
from locat_lightning.structure import (
    FAINT,
    cluster_patches,
    cut_foreground,
    match_patches,
    similarity_to,
)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def patches_of(features):
    return features.flatten(1).T


@pytest.mark.parametrize("sizes", [((4, 6), (4, 6)), ((3, 5), (6, 2)), ((1, 1), (2, 2))])
def test_matches_are_mutual_nearest_neighbours(sizes):
    torch.manual_seed(0)
    one, other = (torch.randn(5, *size) for size in sizes)
    a, b = patches_of(one), patches_of(other)
    nearest = [max(range(len(b)), key=lambda j: cosine(p, b[j])) for p in a]
    back = [max(range(len(a)), key=lambda i: cosine(q, a[i])) for q in b]
    expected = {(i, j): cosine(a[i], b[j]) for i, j in enumerate(nearest) if back[j] == i}

    pairs, similarities = match_patches(one, other)

    assert {(i, j) for i, j in pairs.tolist()} == set(expected)
    assert len(pairs) == len(expected)
    assert similarities.tolist() == sorted(similarities.tolist(), reverse=True)
    for (i, j), found in zip(pairs.tolist(), similarities.tolist(), strict=True):
        assert found == pytest.approx(expected[i, j], abs=1e-6)


def test_an_image_matches_itself_and_its_shifted_self():
    torch.manual_seed(0)
    features = torch.randn(8, 4, 5)
    assert sorted(match_patches(features, 3 * features).pairs.tolist()) == [[i, i] for i in range(20)]
    shifted = features.roll(1, dims=-1)
    for mine, theirs in match_patches(features, shifted).pairs.tolist():
        assert theirs == mine // 5 * 5 + (mine + 1) % 5


def test_equal_patches_match_once():
    pairs, similarities = match_patches(torch.ones(3, 2, 2), torch.ones(3, 1, 3))
    assert pairs.tolist() == [[0, 0]]
    assert similarities.tolist() == pytest.approx([1])


def test_similarity_to_a_patch_of_the_first_image():
    torch.manual_seed(0)
    maps = [torch.randn(4, 2, 3), torch.randn(4, 3, 1)]
    found = similarity_to(maps, (1, 2))
    for features, of_image in zip(maps, found, strict=True):
        assert of_image.shape == features.shape[1:]
        for i in range(features.shape[1]):
            for j in range(features.shape[2]):
                expected = cosine(features[:, i, j], maps[0][:, 1, 2])
                assert of_image[i, j].item() == pytest.approx(expected, abs=1e-6)


def test_clusters_are_shared_by_the_images():
    """Three directions, with noise and lengths that do not count; the commonest is cluster 0."""
    rng = np.random.default_rng(0)
    planted = [rng.choice(3, size, p=(0.2, 0.5, 0.3)) for size in ((6, 9), (7, 4))]
    centres = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], float)
    maps = []
    for truth in planted:
        patches = (centres[truth] + rng.normal(0, 0.05, (*truth.shape, 4))) * rng.uniform(
            1, 9, (*truth.shape, 1)
        )
        maps.append(torch.tensor(patches).movedim(-1, 0))
    found = cluster_patches(maps, 3)
    order = np.argsort(-np.bincount(np.concatenate([each.ravel() for each in planted])))
    for truth, clusters in zip(planted, found, strict=True):
        np.testing.assert_array_equal(order[clusters.numpy()], truth)


def test_clusters_are_a_fixed_point_of_lloyds_algorithm():
    torch.manual_seed(0)
    maps = [torch.randn(3, 5, 6), torch.randn(3, 4, 4)]
    first, again = (cluster_patches(maps, 4, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    directions = torch.cat([patches_of(each) / patches_of(each).norm(dim=1, keepdim=True) for each in maps])
    labels = torch.cat([each.flatten() for each in first])
    centres = torch.stack([directions[labels == k].mean(0) for k in range(4)])
    assert torch.equal(torch.cdist(directions, centres).argmin(1), labels)
    sizes = labels.bincount(minlength=4).tolist()
    assert sizes == sorted(sizes, reverse=True)


def test_more_clusters_than_patches_that_differ():
    with pytest.raises(InputError, match="3 clusters of 2 different patches"):
        cluster_patches([torch.eye(2)[:, None].repeat(1, 3, 1)], 3)


def planted_object(noise=0.3):
    torch.manual_seed(0)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:4, 2:5] = True
    directions = torch.zeros(16, 6, 8)
    directions[0], directions[1] = mask, ~mask
    return directions + noise * torch.randn(16, 6, 8) / 4, mask


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_the_cut_is_the_second_smallest_eigenvector(threshold):
    """As the general problem (D - W) y = λ D y, which numpy solves as D^-1 (D - W) y = λ y."""
    features, mask = planted_object()
    patches = patches_of(features).double().numpy()
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    N = len(patches)
    W = np.array(
        [[1.0 if patches[i] @ patches[j] > threshold else FAINT for j in range(N)] for i in range(N)]
    )
    D = np.diag(W.sum(1))
    values, vectors = np.linalg.eig(np.linalg.inv(D) @ (D - W))
    y = np.real(vectors[:, np.argsort(np.real(values))[1]])
    y *= np.sign(y[np.abs(y).argmax()] - y.mean())

    found = cut_foreground(features, threshold)

    np.testing.assert_allclose(found.eigenvector.flatten(), y, atol=1e-5)
    np.testing.assert_array_equal(found.mask.flatten(), y > y.mean())
    if threshold == 0.2:
        assert torch.equal(found.mask, mask)


@pytest.mark.parametrize("features", [torch.ones(3, 4, 5), torch.eye(6).view(6, 2, 3), torch.ones(2, 1, 1)])
def test_without_structure_there_is_no_foreground(features):
    mask, eigenvector = cut_foreground(features)
    assert mask.shape == eigenvector.shape == features.shape[1:]
    assert not mask.any()
    assert not eigenvector.any()
