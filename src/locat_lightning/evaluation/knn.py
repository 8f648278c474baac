"""Weighted k-nearest-neighbour classification, the protocol of DINO (Caron et al. 2021; Wu et al. 2018)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locat_lightning.errors import InputError
from locat_lightning.evaluation.precision import float32_products

GROUP = 8  # similarities per group: of 4, 8, 16 and 32 the fastest for 200 neighbours among 50,000
QUERIES = 1024  # searched for at a time
ROWS = 8192  # of the bank, compared with at a time
VOTES = 2**24  # entries of the table of votes at a time: 64 MiB


class KnnAccuracy(NamedTuple):
    """Accuracy of one k."""

    neighbours: int  # that voted: k, or the size of the bank where that is smaller
    top1: float  # share of the test images, 0 to 1
    top5: float


class Neighbours(NamedTuple):
    """The nearest neighbours of some queries, nearest first."""

    similarities: Tensor  # [Q, K] cosines, float32
    indices: Tensor  # [Q, K] int64, rows of the bank


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, KnnAccuracy]:
    """Classify test images by votes of their nearest training images, weighted exp(cosine / temperature).

    One search, for the largest k, serves every k. It runs where `train_features` are, in full float32
    whatever precision the training around it has chosen, and takes some 250 MB besides the features.

    Features [N, D] and [M, D] need not be normalised, labels are int64 of any number of classes. A `k` above
    N is capped at N.

    Returns:
        Accuracy for each k. As in the original, top-5 counts the first min(5, k) classes, and of classes with
        equal votes the one of smaller number ranks first.
    """
    found = knn_ranks(train_features, train_labels, test_features, test_labels, k=k, temperature=temperature)
    return {each: accuracy_of(*ranked) for each, ranked in found.items()}


def accuracy_of(neighbours: int, ranks: Tensor) -> KnnAccuracy:
    """Return the accuracy of ranks [M], among so many neighbours."""
    hits = torch.stack([ranks < 1, ranks < min(5, neighbours)]).sum(1)
    return KnnAccuracy(neighbours, *(hit / len(ranks) for hit in hits.tolist()))


def knn_ranks(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int],
    temperature: float,
) -> dict[int, tuple[int, Tensor]]:
    """Return for each k of `knn_classify` how many neighbours voted, and the ranks of the right classes.

    A rank, [M] int64 on the CPU, is the number of classes that more or stronger neighbours voted for.
    """
    if not k or min(k) < 1:
        raise InputError(
            f"k is {list(k)}: give one or more numbers of neighbours, such as DINO's 10, 20, 100, 200"
        )
    if temperature <= 0:
        raise InputError(f"k-NN temperature is {temperature}: give a positive number, DINO's is 0.07")
    check_labelled(train_features, train_labels, "training")
    check_labelled(test_features, test_labels, "test")
    size, device = len(train_features), train_features.device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    ks = sorted({min(each, size) for each in k})
    found = torch.empty(len(ks), len(test_labels), dtype=torch.int64, device=device)
    start = 0
    for similarities, indices in nearest_neighbours(train_features, test_features, ks[-1]):
        # Below the nearest one's, so that no temperature overflows: a factor per image changes no ranking.
        weights = ((similarities - similarities[:, :1]) / temperature).exp_()
        rows = max(1, VOTES // classes)
        for weight, index in zip(weights.split(rows), indices.split(rows), strict=True):
            own = slice(start, start + len(weight))
            start = own.stop
            votes = weight.new_zeros(len(weight), classes)
            voted = 0
            for row, voters in enumerate(ks):
                votes.scatter_add_(1, train_labels[index[:, voted:voters]], weight[:, voted:voters])
                voted = voters
                found[row, own] = label_ranks(votes, test_labels[own])
    ranks = dict(zip(ks, found.cpu(), strict=True))
    return {each: (min(each, size), ranks[min(each, size)]) for each in k}


def nearest_neighbours(bank: Tensor, queries: Tensor, k: int) -> Iterator[Neighbours]:
    """Find the k rows of `bank` with the largest cosine to each query, exactly.

    The bank is read in chunks. Similarities are taken in groups of eight; only groups whose maximum beats the
    query's k-th best so far are searched: at most k of them can matter, and soon few do.

    Bank [N, D] and queries [M, D] need not be normalised, and the bank is not copied.

    Yields:
        The neighbours of `QUERIES` queries after another, on the device of `bank`.
    """
    if not 1 <= k <= len(bank):
        raise InputError(f"k is {k}: a k-NN search among {len(bank)} images needs k from 1 to {len(bank)}")
    check_same_width(bank, queries)
    scales, query_scales = inverse_norms(bank, "bank"), inverse_norms(queries, "query")
    for chunk, scale in zip(queries.split(QUERIES), query_scales.split(QUERIES), strict=True):
        yield _search(bank, scales, (chunk.detach().float() * scale).to(bank.device), k)


def faiss_neighbours(bank: Tensor, queries: Tensor, k: int) -> Iterator[Neighbours]:
    """Do what `nearest_neighbours` does by faiss's exact search; `bank` is normalised."""
    import faiss

    queries = queries * inverse_norms(queries, "query")
    found = faiss.knn(queries.cpu().numpy(), bank.cpu().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    yield Neighbours(*(torch.from_numpy(table).to(bank.device) for table in found))


def inverse_norms(features: Tensor, role: str) -> Tensor:
    """Return factors [N, 1] float32 that normalise features [N, D]; a zero row stays zero.

    Raises:
        InputError: a feature is not finite; the message says what its `role` is.
    """
    norms = torch.linalg.vector_norm(features.detach(), dim=1, keepdim=True, dtype=torch.float32)
    bad = (~norms.isfinite()).flatten().nonzero()
    if len(bad):
        raise InputError(
            f"{len(bad)} of {len(features)} {role} features are not finite (first: row {int(bad[0])}): "
            "check the weights, or extract without mixed precision"
        )
    scales: Tensor = norms.clamp_(min=1e-12).reciprocal_()
    return scales


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Count the classes that a stable descending sort of scores [..., C] places before labels [...].

    Below n, the label is among the top n. A label whose own score is NaN ranks C, behind all.
    """
    labels = labels[..., None]
    own = scores.gather(-1, labels)
    not_above = (scores <= own).sum(-1)
    earlier = torch.arange(scores.shape[-1], device=scores.device) < labels
    return scores.shape[-1] - not_above + ((scores == own) & earlier).sum(-1)


@torch.no_grad()
def _search(bank: Tensor, scales: Tensor, queries: Tensor, k: int) -> Neighbours:
    """Find the neighbours of normalised queries [Q, D]; `scales` [N, 1] normalises the bank."""
    best = queries.new_full((len(queries), k), -torch.inf)
    best_index = torch.zeros_like(best, dtype=torch.int64)
    buffer = queries.new_empty(len(queries), -(-min(ROWS, len(bank)) // GROUP) * GROUP)
    offsets = torch.arange(GROUP, device=bank.device)[:, None]
    for start in range(0, len(bank), ROWS):
        rows = bank[start : start + ROWS].float() * scales[start : start + ROWS]
        groups = -(-len(rows) // GROUP)
        similarities = buffer[:, : groups * GROUP]
        similarities[:, len(rows) :] = -torch.inf
        with torch.autocast(bank.device.type, enabled=False), float32_products("ieee"):
            torch.mm(queries, rows.T, out=similarities[:, : len(rows)])
        # A group is every `groups`-th column, so that its maximum is one of whole rows: vectorised.
        peaks = similarities.unflatten(1, (GROUP, groups)).amax(1)
        beating = int((peaks > best.amin(1, keepdim=True)).sum(1).max())
        if looked_into := min(k, beating):
            group = peaks.topk(looked_into, sorted=False).indices
            candidates = (offsets * groups + group[:, None]).flatten(1)
            values = torch.cat([best, similarities.gather(1, candidates)], 1)
            best, kept = values.topk(k, sorted=False)
            best_index = torch.cat([best_index, candidates.add_(start)], 1).gather(1, kept)
    best, order = best.sort(1, descending=True)
    return Neighbours(best, best_index.gather(1, order))


def check_same_width(features: Tensor, others: Tensor) -> None:
    """Check that features are [N, D] and [M, D]."""
    if features.ndim != 2 or features.shape[1:] != others.shape[1:]:
        raise InputError(
            f"features of shape {list(features.shape)} and {list(others.shape)} cannot be compared: "
            "extract both with the same backbone"
        )


def check_labelled(features: Tensor, labels: Tensor, split: str) -> None:
    """Check that there are features, each with a label."""
    if len(features) == 0 or len(features) != len(labels):
        raise InputError(
            f"{len(features)} {split} features with {len(labels)} labels: give one or more, each labelled"
        )
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise InputError(
            f"{unlabelled} of {len(labels)} {split} images have no label: "
            "use labelled images (a folder for each class), for example of another data set"
        )
