"""The temperature of attention: a setting of a measurement, which a model is not built or trained with."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from locat_lightning.errors import InputError
from locat_lightning.nn.gaussian import Gaussians, LazyGaussians, gaussian_kernel
from locat_lightning.nn.layers import ATTENTIONS


@contextmanager
def attention_temperature(model: nn.Module, temperature: float) -> Iterator[None]:
    """Divide the attention logits of all blocks by a temperature: softmax((q kᵀ / √d + S) / T) v.

    Keys are divided by T where timm's layers and ours normalise them, and S where there is one, which is then
    in memory as a whole. Above 1, attention is smoother. Weights and the class of a layer do not change.

    Raises:
        InputError: the temperature is not positive, or the model has a layer that does not take one.
    """
    if temperature <= 0:
        raise InputError(f"attention temperature {temperature:g} must be above 0 (1 changes nothing)")
    known = (*ATTENTIONS, *ATTENTIONS.values())
    layers: list[Any] = [each for each in model.modules() if isinstance(each, known)]
    if temperature != 1 and (not layers or any(isinstance(each, WindowAttention) for each in layers)):
        raise InputError(
            f"{type(model).__name__} has no attention whose temperature can be set: leave it at 1"
        )
    with ExitStack() as stack:
        for layer in layers if temperature != 1 else ():
            hook = layer.k_norm.register_forward_hook(lambda _, __, keys: keys / temperature)
            stack.callback(hook.remove)
            if hasattr(layer, "gaug"):
                hook = layer.gaug.register_forward_hook(lambda _, __, found: _kernel(found) / temperature)
                stack.callback(hook.remove)
        yield


def _kernel(gaussians: LazyGaussians | Gaussians | Tensor) -> Tensor:
    return gaussians if isinstance(gaussians, Tensor) else gaussian_kernel(gaussians)
