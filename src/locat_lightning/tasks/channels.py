"""What the channels of a task's data mean for its models."""

from torch import nn

from locat_lightning.backbones.channels import take_channels, with_channels
from locat_lightning.tasks.base import Task


def agree_on_channels(task: Task) -> None:
    """Note in a task's options how many channels its model takes: those of the data, if they are not RGB."""
    if (channels := task.of_data("model_channels")) is not None:
        task.hp.backbone_args = with_channels(task.hp.backbone, task.hp.backbone_args, channels)


def tell_channels(task: Task, *models: nn.Module) -> None:
    """Tell built models which channels the data of a task have: `InputError` if they take others."""
    if task.of_data("normalisation") is not None:  # not a data module of the user's own
        for model in models:
            take_channels(model, task.of_data("model_channels"))
