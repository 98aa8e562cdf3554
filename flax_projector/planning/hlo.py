"""HLO, the text of a compiled program, as computations of instructions."""

import math
import re
from dataclasses import dataclass

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
      dtype: as HLO writes it.
      shape: its dimensions.
      is_on_chip: whether it is in the chip's own memory instead of HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    is_on_chip: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return _BYTES.get(self.dtype, 1) * math.prod(self.shape)

    @property
    def hbm_bytes(self) -> int:
        """Bytes of its elements in HBM."""
        return 0 if self.is_on_chip else self.nbytes


def arrays_of(text: str) -> list[Array]:
    """The arrays in the text of a type, such as `(f32[2]{0}, bf16[3,4]{1,0:T(8,128)S(1)})`."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?", text)
    return [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(1)" in layout)
        for dtype, dims, layout in found
        if dtype in _BYTES
    ]


@dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      name: its name.
      opcode: what it does.
      results: what it makes.
      operands: names of what it reads.
      line: the whole line.
    """

    name: str
    opcode: str
    results: list[Array]
    operands: list[str]
    line: str

    def find(self, pattern: str) -> str:
        """What a group matches in the line, or nothing."""
        found = re.search(pattern, self.line)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate, or 0 if there is none."""
        return int(self.find(r'"estimated_cycles":"(\d+)"') or 0)

    @property
    def op_name(self) -> str:
        """Where it comes from."""
        return self.find(r'op_name="((?:[^"\\]|\\.)*)"')

    @property
    def called(self) -> str:
        """The computation of a fusion, or of an asynchronous operation."""
        return self.find(r"calls=%?([\w.\-]+)")


_LINE = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\((?:[^()]|\([^()]*\))*\)|\S+) "
    r"(?P<opcode>[\w\-]+)\((?P<operands>[^)]*)\)"
)


def _parse(line: str) -> Instruction | None:
    line_without_index = re.sub(r"/\*index=\d+\*/", "", line)
    if (found := _LINE.match(line_without_index)) is None:
        return None
    return Instruction(
        found["name"],
        found["opcode"],
        arrays_of(found["type"]),
        re.findall(r"%([\w.\-]+)", found["operands"]),
        line_without_index,
    )


def read_hlo(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the one that it begins with."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = [], ""
    # The metadata of a kernel spreads its instruction over several lines.
    for line in re.split(r"\n(?=  \S|%|ENTRY|\}\n)", text):
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            current = computations.setdefault(head[2], [])
            if head[1]:
                entry = head[2]
        elif (instruction := _parse(line)) is not None:
            current.append(instruction)
    return computations, entry
