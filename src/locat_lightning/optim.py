"""Schedules as functions of the optimizer step, and the linear rule for the learning rate."""


def linear_rule(base_lr: float, global_batch: int, reference_batch: int) -> float:
    """The learning rate for a global batch, proportional to it: base_lr at `reference_batch` images a step.

    Source: Goyal et al., "Accurate, Large Minibatch SGD" (2017).
    """
    return base_lr * global_batch / reference_batch


def warmup_then_linear(step: int, *, steps: int, warmup: int, peak: float, start: float, end: float) -> float:
    """The paper's supervised schedule: from `start` up to `peak` in `warmup` steps, then down to `end`.

    Both parts are linear. `peak` is the value of step `warmup`, `end` that of the last step, `steps` − 1.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak + (end - peak) * min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
