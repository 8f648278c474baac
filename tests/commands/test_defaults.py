"""What a run says of its images, as commands take it over."""

import pytest
import yaml

from locat_lightning.commands.defaults import images_for
from locat_lightning.errors import InputError


def recorded(run, **data):
    """Return the checkpoint of a run with such data."""
    model = {"class_path": "locat_lightning.tasks.Classification", "init_args": {}}
    data = {"class_path": "locat_lightning.data.ImageData", "init_args": {"dataset": "folder", **data}}
    (run / "checkpoints").mkdir()
    config = {"model": model, "data": data, "ckpt_path": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (checkpoint := run / "checkpoints" / "last.ckpt").touch()
    return str(checkpoint)


def test_a_constant_channel_may_have_been_left_out(tmp_path):
    mean, std = [1.0, 2.0, 3.0], [1.0, 0.0, 2.0]
    found = images_for(recorded(tmp_path, mean=mean, std=std, channels=[2, 0]))
    assert found == {"mean": mean, "std": std, "channels": [2, 0], "img_size": 224}


@pytest.mark.parametrize("channels", [3, [1, 0]])
def test_one_that_is_taken_has_a_deviation(tmp_path, channels):
    checkpoint = recorded(tmp_path, mean=[1.0, 2.0, 3.0], std=[1.0, 0.0, 2.0], channels=channels)
    with pytest.raises(InputError, match="must be above 0"):
        images_for(checkpoint)
