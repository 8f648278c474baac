"""What a run says: Lightning's messages and warnings, without those that tell a user nothing."""

import logging
import sys
import warnings

EXPECTED_WARNINGS = (
    # A run's directory has TensorBoard's log before metrics.csv is begun; a resumed run's has everything.
    "Experiment logs directory .* exists and is not empty",
    "Checkpoint directory .* exists and is not empty",
    # A checkpoint from elsewhere starts a run of its own.
    "The dirpath has changed from .* to ",
    # Models too large for one GPU are not for this trainer, and all others can be averaged.
    "You're using the WeightAveraging callback with a model that overrides the configure_model",
    # A frozen backbone stays in evaluation mode.
    "Found .* module.* in eval mode at the start of training",
    # The trainer then logs once an epoch, unless the user set it otherwise.
    "The number of training batches .* is smaller than the logging interval",
    # Lightning 2.6 calls torch's pytree in a way that torch 2.15 deprecates.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
# Beginnings of messages that --debug alone shows.
NO_NEWS = (
    "Seed set to",
    "GPU available",
    "TPU available",
    "HPU available",
    "Loading `train_dataloader` to estimate",
    "💡 Tip",
)


class Messages(logging.StreamHandler):
    """Writes to standard error as it is at the time: above the progress bar, while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self.stream = sys.stderr
        super().emit(record)


def direct_messages(*, debug: bool) -> None:
    """Ignore expected warnings, and write Lightning's messages by `Messages`; all of them with `debug`."""
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", expected)
    messages = Messages()
    if not debug:
        messages.addFilter(lambda record: not record.getMessage().startswith(NO_NEWS))
    for name in ("lightning.pytorch", "lightning.fabric"):
        if not (logger := logging.getLogger(name)).propagate:  # else whoever imports this decides
            logger.handlers = [messages]
