"""The rows of the paper's tables: names, parameters and multiply-adds, without LocAt and with it.

Prints the table of docs/models.md: `python benchmarks/rows.py`.
"""

from typing import Any

import timm
import torch

import locat_lightning  # noqa: F401 - registers the models
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
    """Parameters, and multiply-adds of an image of 224 px in billions."""
    model = timm.create_model(name, **kwargs)
    return count_parameters(model)[0], multiply_adds(model, torch.zeros(1, 3, 224, 224)) / 1e9


def shown(name: str, kwargs: dict[str, Any]) -> str:
    return f"`{name.format('{' + ','.join(SIZES) + '}')}`" + "".join(f" `{k}={v}`" for k, v in kwargs.items())


def main() -> None:
    print("| row | without LocAt | with LocAt | parameters (M) | + LocAt | multiply-adds (G) | + LocAt |")
    print("|---|---|---|---|---|---|---|")
    for row, plain, locat, kwargs in ROWS:
        of_plain = {} if plain.startswith("nopos") else kwargs
        before = [cost(plain.format(size), **of_plain) for size in SIZES]
        after = [cost(locat.format(size), **kwargs) for size in SIZES]
        cells = [
            " / ".join(f"{parameters / 1e6:.2f}" for parameters, _ in before),
            " / ".join(f"{b - a:,}" for (a, _), (b, _) in zip(before, after, strict=True)),
            " / ".join(f"{adds:.2f}" for _, adds in before),
            " / ".join(f"{b - a:.3f}" for (_, a), (_, b) in zip(before, after, strict=True)),
        ]
        print(f"| {row} | {shown(plain, of_plain)} | {shown(locat, kwargs)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
