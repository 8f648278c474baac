"""Schedules as functions of the optimizer step, and how the learning rate follows the batch."""

import math


def linear_rule(base_lr: float, global_batch: int, reference_batch: int) -> float:
    """Return a learning rate proportional to the batch: `base_lr` at `reference_batch` images a step.

    Source: Goyal et al., "Accurate, Large Minibatch SGD" (2017).
    """
    return base_lr * global_batch / reference_batch


def square_root_rule(base_lr: float, global_batch: int, reference_batch: int) -> float:
    """Return a learning rate proportional to the square root of the batch, as DINOv2 has it."""
    return base_lr * math.sqrt(global_batch / reference_batch)


def warmup_then_linear(step: int, *, steps: int, warmup: int, peak: float, start: float, end: float) -> float:
    """Return a value of the paper's supervised schedule: linear from `start` to `peak`, then to `end`.

    Step `warmup` has the value `peak`, the last step, `steps` - 1, the value `end`.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak + (end - peak) * min(1.0, (step - warmup) / max(1, steps - 1 - warmup))


def one_cycle(
    step: int, *, steps: int, peak: float, up: float = 0.25, div: float = 1e4, final_div: float = 1e4
) -> float:
    """Return a value of one cycle: linear from `peak` / `div` to `peak`, to `peak` / `div` / `final_div`.

    The ascent takes the share `up` of all steps; the last step has the last value.

    Source: `torch.optim.lr_scheduler.OneCycleLR`, `anneal_strategy="linear"`, without its cycle of momentum.
    """
    start, top = peak / div, up * steps - 1
    if top > 0 and step <= top:
        return start + (peak - start) * step / top
    down = steps - 1 - top
    return peak + (start / final_div - peak) * (min(1.0, (step - top) / down) if down > 0 else 1.0)


def cosine(step: int, *, steps: int, start: float, end: float) -> float:
    """Return a value of half a cosine from `start` at step 0 towards `end`, which step `steps` would have."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmup_then_cosine(step: int, *, steps: int, warmup: int, peak: float, end: float) -> float:
    """Return a value of DINO's schedule: linear from 0 to `peak`, then half a cosine towards `end`.

    The last step of the warm-up and the first after it both have the peak.

    Source: `cosine_scheduler` in `utils.py` of github.com/facebookresearch/dino.
    """
    if step < warmup:
        return peak * step / max(1, warmup - 1)
    return cosine(step - warmup, steps=steps - warmup, start=peak, end=end)


def linear_warmup(epoch: int, *, warmup: int, start: float, end: float) -> float:
    """Return a value from `start` in epoch 0 to `end` in epoch `warmup` - 1, in equal steps, then `end`."""
    return start + (end - start) * epoch / (warmup - 1) if epoch < warmup - 1 else end
