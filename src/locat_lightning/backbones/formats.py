"""Write a timm model in formats that other tools read, each checked against the model."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import get_model_input_config, save_for_hf
from torch import Tensor, nn

from locat_lightning.errors import InputError, in_a_line

Format = Literal["timm", "onnx", "torchscript", "export"]
FILES: dict[Format, str] = {
    "timm": "model.safetensors",
    "onnx": "model.onnx",
    "torchscript": "model.pt",
    "export": "model.pt2",
}
OPSET = 18  # of ONNX
ONNX = ("onnx", "onnxscript", "onnxruntime")  # to write a file, and to run what was written
LARGEST = 2**31  # bytes of an ONNX file; weights that are more go beside it
TOLERANCE = 1e-4  # of a format that computes in its own way, relative to the largest output


def check_format(form: Format) -> None:
    """Check that the packages for a format are installed: `InputError` if not."""
    if form == "onnx" and (absent := [name for name in ONNX if find_spec(name) is None]):
        raise InputError(
            f"--format onnx needs {', '.join(absent)}: pip install 'locat-lightning[onnx]', or take another "
            "format"
        )


def write_model(
    model: nn.Module,
    directory: Path,
    form: Format = "timm",
    *,
    classes: list[str] | None = None,
    images: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> float:
    """Write a model, read it again and compare.

    - `timm`: config.json and model.safetensors, for `timm.create_model("local-dir:DIR", pretrained=True)`.
    - `onnx`: model.onnx, opset 18, from `images` [batch, C, height, width] to `output`.
    - `torchscript`: model.pt, for `torch.jit.load`.
    - `export`: model.pt2, for `torch.export.load(…).module()`.

    In the last three, the batch is dynamic and the size of images is fixed.

    The model is in evaluation mode afterwards, and float32. `config.json` also names the `classes`, the
    preprocessing of `images` (`mean`, `std`, `crop_pct`, `interpolation`), and has further `notes`.

    Returns:
        The largest relative difference of an output from the model's; 0 for timm's format.

    Raises:
        InputError: a package is not installed, the format cannot hold the model, or its outputs differ.
    """
    check_format(form)
    model.eval().float()
    named = {"label_names": classes} if classes else {}
    write: dict[Format, Callable[[nn.Module, Path], Callable[[Tensor], Tensor]]] = {
        "timm": partial(_timm, notes=named | (notes or {}), images=images),
        "onnx": _onnx,
        "torchscript": _torchscript,
        "export": _export,
    }
    with torch.no_grad(), _undisturbed():
        try:
            read_again = write[form](model, directory / FILES[form])
        except Exception as error:  # each exporter has its own exceptions
            raise InputError(
                f"{type(model).__name__} cannot be written as {form}: {in_a_line(error)[:300]}"
            ) from error
        difference = max(_difference(model, read_again, _images(model, batch)) for batch in (1, 3))
    if difference > (0 if form == "timm" else TOLERANCE):
        raise InputError(
            f"outputs of the {form} file differ from the model's by {difference:.2g} of the largest: "
            "it is not kept"
        )
    return difference


def _images(model: nn.Module, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *get_model_input_config(model)["input_size"], generator=generator)


def _difference(model: nn.Module, other: Callable[[Tensor], Tensor], images: Tensor) -> float:
    expected, found = model(images), other(images)
    if expected.shape != found.shape:
        return float("inf")
    if torch.equal(expected, found):
        return 0.0
    return float(((expected - found).abs().max() / expected.abs().max()).nan_to_num(torch.inf))


def _timm(model: nn.Module, file: Path, notes: dict[str, Any], images: dict[str, Any] | None) -> nn.Module:
    copies = model.register_state_dict_post_hook(_unshare)
    try:
        save_for_hf(model, file.parent, model_config=notes, data_config=images, safe_serialization=True)
    finally:
        copies.remove()
    written: nn.Module = timm.create_model(f"local-dir:{file.parent}", pretrained=True)
    return written.eval()


def _unshare(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Copy shared weights (Jumbo's MLP), so that each name has a tensor of its own, as safetensors needs."""
    seen: set[int] = set()
    for name, value in state.items():
        if value.data_ptr() in seen:
            state[name] = value.clone()
        seen.add(value.data_ptr())


def _program(model: nn.Module) -> torch.export.ExportedProgram:
    """Export a model for any batch, without the stack traces, which name paths of this machine."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (_images(model, 2),), dynamic_shapes=({0: batch},))
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _export(model: nn.Module, file: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(_program(model), program := BytesIO())
    file.write_bytes(program.getvalue())  # on a full disk, torch's own writer ends the process
    written: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return written


def _torchscript(model: nn.Module, file: Path) -> Callable[[Tensor], Tensor]:
    torch.jit.save(torch.jit.trace(model, _images(model, 2), check_trace=False), program := BytesIO())
    file.write_bytes(program.getvalue())  # as above
    written: Callable[[Tensor], Tensor] = torch.jit.load(str(file))
    return written


def _onnx(model: nn.Module, file: Path) -> Callable[[Tensor], Tensor]:
    from onnxruntime import InferenceSession

    size = sum(p.nbytes for p in model.parameters())
    program = _program(model)
    written = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["output"],
    )
    assert written is not None
    written.save(file, external_data=size > LARGEST // 2)
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Silence warnings and logs of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
