"""The architectures of the paper: names, parameters and multiply-adds, without LocAt and with it.

Prints the tables of docs/models.md: `python benchmarks/rows.py`.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch

from locat_lightning.backbones.create import without_values
from locat_lightning.evaluation.cost import count_parameters, multiply_adds

ROWS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("ViT", "vit_{}_patch16_224", "locatvit_{}", {}),
    ("RegViT", "vit_{}_patch16_224", "locatvit_{}", {"reg_tokens": 4}),
    ("RoPE-ViT", "vit_{}_patch16_rope_mixed_224", "locatvit_{}_rope_mixed", {}),
    ("Swin", "swin_{}_patch4_window7_224", "locatswin_{}", {}),
    ("Jumbo", "jumbo_{}", "locatjumbo_{}", {}),
    ("ViT without position", "nopos_vit_{}_patch16_224", "locatvit_{}", {"pos_embed": "none"}),
]


SIZES = ("tiny", "small", "base")


def cost(name: str, **kwargs: Any) -> tuple[int, float]:
    """Parameters, and multiply-adds of an image of 224 px in billions; nothing is computed."""
    with without_values():
        model = timm.create_model(name, **kwargs)
        image = torch.zeros(1, 3, 224, 224)
    return count_parameters(model)[0], multiply_adds(model, image) / 1e9


def shown(name: str, kwargs: dict[str, Any]) -> str:
    return f"`{name.format('{' + ','.join(SIZES) + '}')}`" + "".join(f" `{k}={v}`" for k, v in kwargs.items())


def costs(sizes: Sequence[str]) -> list[str]:
    """Return the lines of the second table."""
    lines = []
    for row, plain, locat, kwargs in ROWS:
        before = [cost(plain.format(size), **_of_plain(plain, kwargs)) for size in sizes]
        after = [cost(locat.format(size), **kwargs) for size in sizes]
        cells = [
            " / ".join(f"{parameters / 1e6:.2f}" for parameters, _ in before),
            " / ".join(f"{b - a:,}" for (a, _), (b, _) in zip(before, after, strict=True)),
            " / ".join(f"{adds:.2f}" for _, adds in before),
            " / ".join(f"{b - a:.3f}" for (_, a), (_, b) in zip(before, after, strict=True)),
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    print("| architecture | without LocAt | with LocAt |")
    print("|---|---|---|")
    for row, plain, locat, kwargs in ROWS:
        print(f"| {row} | {shown(plain, _of_plain(plain, kwargs))} | {shown(locat, kwargs)} |")
    print("\n| architecture | parameters (M) | + LocAt | multiply-adds (G) | + LocAt |")
    print("|---|---|---|---|---|")
    print(*costs(SIZES), sep="\n")


def _of_plain(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a row's plain model, whose name may say already that it has no position."""
    return {} if name.startswith("nopos") else kwargs


if __name__ == "__main__":
    main()
