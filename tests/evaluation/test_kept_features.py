"""Features that are kept: whose they are."""

import timm
import torch

from locat_lightning.evaluation.kept_features import digest_of_model

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_classes": 0}


def model(**arguments):
    return timm.create_model("vit_tiny_patch16_224", **{"num_heads": 2} | SIZES | arguments)


def test_the_digest_is_of_weights_and_of_settings_that_they_do_not_say():
    one = model()
    same, other = model(), model(num_heads=3)
    assert digest_of_model(one) != digest_of_model(same)  # of other weights
    for each in (same, other):
        each.load_state_dict(one.state_dict())
    assert digest_of_model(one) == digest_of_model(same) == digest_of_model(one.eval())
    assert digest_of_model(one) != digest_of_model(other)
    with torch.no_grad():
        same.norm.bias[0] += 1e-6
    assert digest_of_model(one) != digest_of_model(same)
