"""The watch of every task over its outputs; losses and weights are in the contract of the methods."""

import pytest
import torch

from locat_lightning.errors import InputError
from locat_lightning.tasks.watch import Watched


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_outputs_that_are_not_finite_are_refused_once(bad):
    task, outputs = Watched(), torch.zeros(2, 3)
    assert task.watched(outputs) is outputs
    task.check_outputs()
    task.watched(torch.tensor([0.0, bad]))
    task.watched(outputs)
    with pytest.raises(InputError, match="outputs are not finite numbers"):
        task.on_validation_epoch_end()
    task.on_test_epoch_end()
