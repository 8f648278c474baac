"""The Triton kernels compiled ahead of time, without a GPU: registers, spills, shared memory, instructions.

Instructions are those of the loop over tiles, for each logit that a thread computes. Spills are instructions
that move registers to local memory and back, counted in the loop and in the whole kernel. Of the settings
that a GPU would compare, the first is compiled. The usual case is bfloat16, tiles as wide as the grid, and
Gaussians that come from the queries; the last rows are of the other cases, one change at a time.
"""

import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from locat_lightning.nn import triton_attention

KERNELS = "forward", "d_queries", "d_keys_values"
CARDS = 80, 90, 100
WIDTHS = 16, 32, 64, 96, 128
ROWS, COLUMNS = 4, 16  # of a tile of keys
HALF = {"q", "k", "v", "source", "out", "d_out", "d_q", "d_k", "d_v", "d_source"}
FLOAT = {"maps", "lse", "kernels", "delta", "d_maps"}
SCALARS = {"widest", "epsilon", "cap", "scale"}


class Case(NamedTuple):
    """A kernel to compile.

    Attributes:
        kernel: its name.
        card: compute capability, 80 for sm_80.
        d: head width.
        dtype: Triton's name of the type of queries, keys and values.
        one: whether tiles are as wide as the grid.
        same: whether Gaussians come from the queries themselves.
    """

    kernel: str
    card: int
    d: int
    dtype: str = "bf16"
    one: bool = True
    same: bool = True


OTHERS: list[dict[str, Any]] = [{"dtype": "fp16"}, {"one": False}, {"same": False}]


class Compiled(NamedTuple):
    """One kernel for one kind of card."""

    registers: int
    spills_in_loop: int
    spills: int
    shared: int
    instructions: float
    ptx: str


def setting(name: str, d: int) -> triton.Config:
    """Return the first of the settings that a GPU would compare."""
    configs: list[triton.Config] = getattr(triton_attention, name).configs
    return triton_attention.candidates(configs, {}, D=d)[0]


def compiled(case: Case) -> Compiled:
    name, card, d, dtype, one, same = case
    function, config = getattr(triton_attention, name).fn, setting(name, d)
    queries = config.kwargs["BM"]
    constants = {"SAME": same, "D": d, "BD": max(16, 1 << (d - 1).bit_length()), "ONE": one}
    constants |= {"BM": queries, "R": ROWS, "WC": COLUMNS}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, attributes = {}, {}
    for number, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in SCALARS:
            signature[argument] = "fp32"
        else:
            kinds = (HALF, f"*{dtype}"), (FLOAT, "*fp32")
            signature[argument] = next((kind for names, kind in kinds if argument in names), "i32")
            if signature[argument] != "i32" or "_" in argument:  # tensors and strides
                attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    options = {name: value for name, value in config.all_kwargs().items() if name != "BM"}
    binary = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", cubin)
        lines = _output("nvdisasm", "-c", cubin).splitlines()
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    loop = _loop(lines)
    logits = queries * ROWS * COLUMNS / (32 * config.num_warps)
    return Compiled(
        registers=int(registers[1]),
        spills_in_loop=_spills(loop),
        spills=_spills(lines),
        shared=binary.metadata.shared,
        instructions=len(loop) / logits,
        ptx=binary.asm["ptx"],
    )


def _spills(lines: list[str]) -> int:
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines)


def _output(tool: str, *arguments: Any) -> str:
    path = getattr(triton.knobs.nvidia, tool).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _loop(lines: list[str]) -> list[str]:
    """Return the instructions of the shortest loop that multiplies matrices."""
    labels: dict[str, int] = {}
    code: list[str] = []
    loops = []
    for line in lines:
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*);", line):
            code.append(instruction[1])
            jump = re.search(r"\bBRA\b.*\((\.L\w+)\)", line)
            if jump and jump[1] in labels:  # backwards
                loop = code[labels[jump[1]] :]
                if any("MMA" in each for each in loop):
                    loops.append(loop)
    return min(loops, key=len)


def row(case: Case) -> str:
    name, card, d, dtype, one, same = case
    config, found = setting(name, d), compiled(case)
    tile = f"{config.kwargs['BM']:4} {config.num_warps:5} {config.num_stages:6}"
    spills = f"{found.spills_in_loop:8} {found.spills:6}"
    counts = f"{found.registers:9} {spills} {found.shared:7} {found.instructions:12.1f}"
    of_case = dtype + ("" if one else ", several tiles a row") + ("" if same else ", other source")
    return f"{name:14} {'sm_' + str(card):6} {d:3} {tile} {counts}  {of_case}"


def main() -> None:
    print("kernel         card     d   BM warps stages registers  in loop spills  shared instructions  case")
    cases = [Case(*each) for each in product(KERNELS, CARDS, WIDTHS)]
    cases += [Case(name, card, 64, **other) for other, name, card in product(OTHERS, KERNELS, CARDS)]
    with ProcessPoolExecutor() as pool:
        for line in pool.map(row, cases):
            print(line, flush=True)


if __name__ == "__main__":
    main()
