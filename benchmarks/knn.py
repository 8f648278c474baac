"""Time and scratch memory of k-NN beside faiss-cpu's exact search and lightly's `knn_predict`.

    python benchmarks/knn.py [--bank 50000] [--queries 5000] [--dim 384] [--k 200] [--rounds 5] [--threads 1]
        [--scratch]

Medians of interleaved runs in one process, and of the ratios of neighbouring ones; all get the same
normalised features. `--scratch` instead measures the memory k-NN takes beyond its inputs, by the process's
peak: try it with --bank 1280000 --queries 2048.
"""

import argparse
import importlib
import importlib.util
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightly.utils.benchmarking.knn import knn_predict
from torch import Tensor

from locat_lightning.evaluation.knn import knn_classify, nearest_neighbours

faiss: Any = importlib.import_module("faiss") if importlib.util.find_spec("faiss") else None

CLASSES = 1000
LIGHTLY_BATCH = 256  # its one-hot table [batch, k, classes] takes 205 MB at k = 200


def clustered(n: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    features = torch.randn(n, dim, generator=generator).mul_(2)
    for rows in torch.split(torch.arange(n), 1024):
        features[rows] = F.normalize(features[rows] + centres[labels[rows]], dim=1)
    return features, labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("bank", 50_000), ("queries", 5_000), ("dim", 384), ("k", 200), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bank, bank_labels = clustered(args.bank, args.dim, 1)
    queries, query_labels = clustered(args.queries, args.dim, 2)
    sizes = f"{args.bank} x {args.dim} against {args.queries}, k = {args.k}, threads: {args.threads}"

    if args.scratch:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        knn_classify(bank, bank_labels, queries, query_labels)
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"k-NN, {sizes}: {taken:.0f} MiB beyond the inputs, {time.perf_counter() - start:.1f} s")
        return

    def search() -> None:
        for _ in nearest_neighbours(bank, queries, args.k):
            pass

    def lightly() -> None:
        for chunk in torch.split(queries, LIGHTLY_BATCH):
            knn_predict(chunk, columns, bank_labels, CLASSES, args.k, 0.07)

    def faiss_search() -> None:
        index.search(queries.numpy(), args.k)

    columns = bank.T.contiguous()
    whole, alone = "locat: search and votes (k = 10, 20, 100, 200)", "locat: search alone"
    others = {"lightly: knn_predict (one k)": whole}  # and with which of ours each is to be compared
    runs: dict[str, Callable[[], object]] = {
        whole: lambda: knn_classify(bank, bank_labels, queries, query_labels),
        alone: search,
        "lightly: knn_predict (one k)": lightly,
    }
    if faiss is None:
        print("faiss-cpu: not installed (pip install faiss-cpu)")
    else:
        index = faiss.IndexFlatIP(args.dim)
        index.add(bank.numpy())
        faiss.omp_set_num_threads(args.threads)
        runs["faiss-cpu: IndexFlatIP, search alone"] = faiss_search
        others["faiss-cpu: IndexFlatIP, search alone"] = alone
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(f"k-NN, {sizes}, medians of {args.rounds}")
    for name, times in seconds.items():
        print(f"  {name:<48} {statistics.median(times):7.2f} s")
    for name, ours in others.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[ours], seconds[name], strict=True))
        print(f"  {ours} takes {ratio:.2f} x the time of {name}")


if __name__ == "__main__":
    main()
