"""Reads a compiled program (HLO text): where its time goes, and what crosses HBM and the network.

The TPU's compiler writes its own estimate, in cycles of the chip, beside every fusion. Neither that
text nor XLA's cost analysis says how often a loop runs: here every body counts as often as the
condition of its loop lets it run. Programs for GPUs carry no estimates.

Pallas kernels carry none either, and are counted by formula: an MXU multiplies rows of 128 numbers,
so that a head of 64 takes the time of one of 128.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

PARTS = (
    "encoder",
    "projector",
    "LLM forward",
    "LLM backward",
    "head and loss",
    "optimizer",
    "rest",
    "layout",
)
"""Of a step: what `Program.cycles` is divided into. The backward pass of the LLM includes what it
recomputes, "rest" is the input of the LLM and of the encoder, and "layout" moves numbers without
computing any: pads, copies, transposes, slices of stacked weights."""

_PART_OF_NAME = (  # the first that is found in an operation's name, which lists the modules around
    (r"WhisperEncoder|log_mel", "encoder"),
    (r"transpose\(jvp\(ResidualAudioProjector|ResidualAudioProjector", "projector"),
    (r"LlamaDecoder\.logits", "head and loss"),
    (r"transpose\(.*LlamaDecoder\.blocks|rematted_computation", "LLM backward"),
    (r"LlamaDecoder\.blocks", "LLM forward"),
    (r"jvp\(", "rest"),
    (r"^jit\(\w+\)/", "optimizer"),  # outside of the gradient
)
_MOVES = {  # operations that compute nothing
    "bitcast", "broadcast", "concatenate", "constant", "copy", "copy-done", "copy-start",
    "dynamic-slice", "dynamic-update-slice", "get-tuple-element", "iota", "pad", "parameter",
    "reshape", "slice", "transpose", "tuple",
}  # fmt: skip
_FREE = {  # operations that touch no memory themselves
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "iota",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
LANES = 128


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


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of attention, by formula.

    Attributes:
      name: the kernel's.
      part: which of `PARTS`.
      count: how often it runs in a step.
      flops: of all its runs, with heads padded to the lanes of the MXU.
    """

    name: str
    part: str
    count: int
    flops: float


@dataclass(frozen=True)
class Collective:
    """What chips exchange.

    Attributes:
      kind: the operation.
      dtype: of most of what is exchanged.
      count: how often it runs in a step.
      group: number of chips that exchange.
      sent: bytes that leave a chip in a step, by the ring algorithm.
      is_hidden: whether it runs beside computation.
      crosses_slices: whether it uses the network between slices.
    """

    kind: str
    dtype: str
    count: int
    group: int
    sent: float
    is_hidden: bool
    crosses_slices: bool = False


@dataclass
class Program:
    """What a chip does in one run of a program, loops multiplied.

    Attributes:
      cycles: the compiler's estimate by part; empty for GPUs.
      kernels: what has no estimate.
      collectives: what chips exchange.
      hbm_bytes: read and written, estimated from the shapes of all operations.
      loops: by the name of its body: how often a loop runs, and its cycles each time.
    """

    cycles: Counter[str] = field(default_factory=Counter)
    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    hbm_bytes: float = 0.0
    loops: dict[str, tuple[int, float]] = field(default_factory=dict)


def read_program(text: str) -> Program:
    """Reads the text of a compiled program, `compiled.as_text()`."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        # The metadata of a kernel spreads its instruction over several lines.
        for line in re.split(r"\n(?=  \S|%|ENTRY|\}\n)", text):
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
                current = self.computations.setdefault(head[2], [])
                if head[1]:
                    self.entry = head[2]
            elif (instruction := _parse(line)) is not None:
                current.append(instruction)
        self.program = Program()

    def read(self) -> Program:
        self._walk(self.entry, 1)
        return self.program

    def _walk(self, name: str, times: int) -> float:
        """Adds a computation that runs so often; returns its cycles each time."""
        cycles = 0.0
        made = {each.name: each for each in self.computations.get(name, [])}
        for each in made.values():
            cycles += each.cycles
            if each.cycles:
                self.program.cycles[self._part(each)] += times * each.cycles
            self.program.hbm_bytes += times * self._hbm_bytes(each, made)
            if each.opcode == "while":
                body, count = each.find(r"body=%?([\w.\-]+)"), self._trips(each)
                inside = self._walk(body, times * count)
                self.program.loops[body] = (times * count, inside)
                cycles += count * inside
            elif each.opcode in ("call", "conditional", "async-start"):
                for called in self._called(each):
                    cycles += self._walk(called, times)
            elif "tpu_custom_call" in each.line and (kernel := _kernel(each, times)) is not None:
                self.program.kernels.append(kernel)
            self._add_collective(each, times)
        return cycles

    def _called(self, each: Instruction) -> list[str]:
        found = re.findall(
            r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", each.line
        )
        branches = each.find(r"branch_computations=\{([^}]*)\}")
        return found + re.findall(r"%?([\w.\-]+)", branches)

    def _trips(self, each: Instruction) -> int:
        """How often a loop runs: what its counter is compared with, or what XLA has found out."""
        if known := each.find(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = each.find(r"condition=%?([\w.\-]+)")
        names = [condition, *(i.called for i in self.computations.get(condition, []) if i.called)]
        lines = [i.line for name in names for i in self.computations.get(name, [])]
        limits = re.findall(r" constant\((\d+)\)", "\n".join(lines))
        return max(map(int, limits), default=1)

    def _part(self, each: Instruction) -> str:
        if self._is_move(each):
            return "layout"
        names = [each.op_name]
        if not names[0].startswith("jit("):  # a fusion that the compiler has named
            inside = [i.op_name for i in self.computations.get(each.called, [])]
            names = [name for name in inside if name.startswith("jit(")][-1:]
        for pattern, part in _PART_OF_NAME:
            if any(re.search(pattern, name) for name in names):
                return part
        return "rest"

    def _is_move(self, each: Instruction) -> bool:
        if each.opcode == "fusion":
            return all(self._is_move(i) for i in self.computations.get(each.called, []))
        return each.opcode in _MOVES

    def _hbm_bytes(self, each: Instruction, made: dict[str, Instruction]) -> float:
        """Bytes that an operation reads from HBM and writes there."""
        if each.opcode in _FREE or each.opcode.endswith("-done"):
            return 0.0
        sliced = self._sliced(each.called) if each.opcode == "fusion" else {}
        if each.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * sum(array.hbm_bytes for array in each.results)
        read = 0.0
        for number, name in enumerate(each.operands):
            arrays = made[name].results if name in made else []
            whole = sum(array.hbm_bytes for array in arrays)
            read += min(whole, sliced.get(number, math.inf))
        if each.opcode == "dynamic-update-slice" or -1 in sliced:  # in place
            part = sliced.get(-1, 0.0) or sum(
                array.nbytes for array in made[each.operands[1]].results
            )
            return 2 * part
        results = each.results[1:] if each.opcode.endswith("-start") else each.results
        return read + sum(array.hbm_bytes for array in results)

    @functools.cache  # noqa: B019 - it lives as long as a program is read
    def _sliced(self, name: str) -> dict[int, float]:
        """Parameters of a fusion of which it reads only a part, with the bytes of that; -1: its
        result is written into a part of a parameter."""
        users: dict[str, list[Instruction]] = defaultdict(list)
        for each in self.computations.get(name, []):
            for operand in each.operands:
                users[operand].append(each)
        found = {}
        for each in self.computations.get(name, []):
            if each.opcode != "parameter":
                continue
            number, reads = int(each.find(r"parameter\((\d+)\)")), users[each.name]
            if reads and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in reads):
                found[number] = float(sum(a.nbytes for u in reads for a in u.results))
            elif len(reads) == 1 and reads[0].opcode == "dynamic-update-slice":
                update = next(i for i in self.computations[name] if i.name == reads[0].operands[1])
                found[-1] = float(sum(a.nbytes for a in update.results))
        return found

    def _add_collective(self, each: Instruction, times: int) -> None:
        kind = each.opcode.removesuffix("-start")
        if kind in ("send",) and "megascale" in each.line:
            (array, *_) = each.results
            self.program.collectives.append(
                Collective("send", array.dtype, times, 2, times * array.nbytes, True, True)
            )
            return
        if each.opcode == "fusion" and each.name.startswith("async-collective-start"):
            for inside in self.computations.get(each.called, []):
                if inside.opcode in _COLLECTIVES:
                    self._append(inside, inside.opcode, times, is_hidden=True)
        elif kind in _COLLECTIVES:
            self._append(each, kind, times, is_hidden=each.opcode.endswith("-start"))

    def _append(self, each: Instruction, kind: str, times: int, *, is_hidden: bool) -> None:
        arrays, group = each.results, _group_size(each.line)
        nbytes = sum(array.nbytes for array in arrays)
        if is_hidden and each.opcode.endswith("-start") and kind != "all-reduce":
            nbytes = max((array.nbytes for array in arrays), default=0)  # operand and result
        share = (group - 1) / group
        sent = {
            "all-reduce": 2 * share * nbytes,
            "all-gather": share * nbytes,
            "reduce-scatter": share * group * nbytes,
            "all-to-all": share * nbytes,
            "collective-permute": nbytes,
        }[kind]
        dtype = max(arrays, key=lambda array: array.nbytes).dtype
        self.program.collectives.append(
            Collective(kind, dtype, times, group, times * sent, is_hidden)
        )


def _group_size(line: str) -> int:
    """How many devices take part, by any of the three ways to write it."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 2  # pairs


def _kernel(each: Instruction, times: int) -> Kernel | None:
    """A kernel of attention: two products forward, and five or seven backward."""
    inputs = arrays_of(each.find(r"operand_layout_constraints=\{(.*?)\}, frontend"))
    heads = [array for array in inputs if len(array.shape) == 4 and array.shape[-1] > 1]
    if len(heads) < 3:
        return None
    (*rows, num_queries, dim), num_keys = heads[0].shape, heads[1].shape[-2]
    num_products = 4 if "dkv" in each.name else 3 if "dq" in each.name else 2
    flops = 2 * num_products * math.prod(rows) * num_queries * num_keys * -(-dim // LANES) * LANES
    part = next((p for pattern, p in _PART_OF_NAME if re.search(pattern, each.op_name)), "rest")
    name = re.sub(r"[.\d]+$", "", each.name)
    return Kernel(name, part, times, float(times * flops))
