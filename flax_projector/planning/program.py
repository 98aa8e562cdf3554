"""Reads a compiled program (HLO text): where its time goes, and what crosses HBM and the network.

The TPU's compiler writes its own estimate, in cycles of the chip, beside every fusion. Neither that
text nor XLA's cost analysis says how often a loop runs: here every body counts as often as the
condition of its loop lets it run. Programs for GPUs carry no estimates: there, the FLOPs of the
products and the bytes of all operations are counted.

Kernels of attention carry none either, and are counted by formula. An MXU multiplies rows of 128
numbers, so that a head of 64 takes the time of one of 128.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from flax_projector.planning.hlo import Instruction, arrays_of, read_hlo

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
_SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda group: 2 * (group - 1) / group,
    "all-gather": lambda group: (group - 1) / group,
    "reduce-scatter": lambda group: group - 1,
    "all-to-all": lambda group: (group - 1) / group,
    "collective-permute": lambda group: 1,
    "send": lambda group: 1,
}
"""Bytes that leave a chip for each byte of the result, by the ring algorithm."""
LANES = 128


@dataclass(frozen=True)
class Kernel:
    """A kernel of attention, by formula.

    Attributes:
      name: the kernel's.
      part: which of `PARTS`.
      count: how often it runs in a step.
      flops: of all its runs: on TPUs with heads padded to the lanes of the MXU, on GPUs without
        what a causal mask hides.
    """

    name: str
    part: str
    count: int
    flops: float


@dataclass(frozen=True)
class Operation:
    """What a program computes or moves at once, beside kernels and collectives.

    Attributes:
      part: which of `PARTS`.
      count: how often it runs in a step.
      flops: of the products of matrices in it, each time; on GPUs.
      hbm_bytes: read and written each time.
    """

    part: str
    count: int
    flops: float
    hbm_bytes: float


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


@dataclass(frozen=True)
class Loop:
    """A loop of a program.

    Attributes:
      count: how often its body runs in one run of the program.
      cycles: of its body each time, with the loops inside.
      hbm_bytes: likewise.
    """

    count: int
    cycles: float
    hbm_bytes: float


@dataclass
class Program:
    """What a chip does in one run of a program, loops multiplied.

    Attributes:
      cycles: the compiler's estimate by part; empty for GPUs.
      kernels: what has no estimate on TPUs either.
      operations: all else that touches memory and has no estimate, one by one.
      collectives: what chips exchange.
      hbm_bytes: read and written, estimated from the shapes of all operations.
      loops: by the names of their bodies.
    """

    cycles: Counter[str] = field(default_factory=Counter)
    kernels: list[Kernel] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    hbm_bytes: float = 0.0
    loops: dict[str, Loop] = field(default_factory=dict)


def read_program(text: str) -> Program:
    """Reads the text of a compiled program."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str):
        self.computations, self.entry = read_hlo(text)
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
            touched = self._hbm_bytes(each, made)
            self.program.hbm_bytes += times * touched
            if each.opcode == "while":
                body, count = each.find(r"body=%?([\w.\-]+)"), self._trips(each)
                before = self.program.hbm_bytes
                inside, runs = self._walk(body, times * count), times * count
                moved = (self.program.hbm_bytes - before) / max(runs, 1)
                self.program.loops[body] = Loop(runs, inside, moved)
                cycles += count * inside
            elif each.opcode in ("call", "conditional", "async-start"):
                for called in self._called(each):
                    cycles += self._walk(called, times)
            elif (kernel := _kernel(each, times)) is not None:
                self.program.kernels.append(kernel)
            elif not self._add_collective(each, times) and touched and not each.cycles:
                flops = self._flops(each, made)
                self.program.operations.append(Operation(self._part(each), times, flops, touched))
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
        read = 0.0
        for number, name in enumerate(each.operands):
            arrays = made[name].results if name in made else []
            whole = sum(array.hbm_bytes for array in arrays)
            read += min(whole, self._read_bytes(each, number))
        results = each.results[1:] if each.opcode.endswith("-start") else each.results
        if each.opcode == "custom-call":  # without the scratch memory of a library
            results = [a for a in results if (a.dtype, len(a.shape)) != ("s8", 1)]
        return read + min(sum(array.hbm_bytes for array in results), self._written(each, made))

    def _read_bytes(self, each: Instruction, number: int) -> float:
        """How much of an operand an operation reads at most; infinite if all of it."""
        if each.opcode in ("dynamic-slice", "slice", "gather") and number == 0:
            return float(sum(array.nbytes for array in each.results))
        if each.opcode == "dynamic-update-slice" and number == 0:
            return 0.0
        if each.opcode == "fusion":
            return self._parameter_bytes(each.called, number)
        return math.inf

    @functools.cache  # noqa: B019 - it lives as long as the program is read
    def _parameter_bytes(self, name: str, number: int) -> float:
        """How much of a parameter the operations of a fusion read, each of them once."""
        inside = self.computations.get(name, [])
        aliases = {i.name for i in inside if i.find(r" parameter\((\d+)\)") == str(number)}
        total = 0.0
        for each in inside:
            for position, operand in enumerate(each.operands):
                if operand not in aliases:
                    continue
                if each.opcode == "bitcast":
                    aliases.add(each.name)
                else:
                    total += self._read_bytes(each, position)
        return total

    def _written(self, each: Instruction, made: dict[str, Instruction]) -> float:
        """How much an operation writes at most; infinite if all of its result."""
        if each.opcode == "dynamic-update-slice":
            update = made.get(each.operands[1])
            return float(sum(a.nbytes for a in update.results)) if update else math.inf
        inside = {i.name: i for i in self.computations.get(each.called, [])}
        if each.opcode == "fusion" and inside:
            return self._written(list(inside.values())[-1], inside)
        if each.opcode == "bitcast" and each.operands[0] in made:
            return self._written(made[each.operands[0]], made)
        return math.inf

    def _flops(self, each: Instruction, made: dict[str, Instruction]) -> float:
        """Of the products of matrices in an operation of a GPU's program."""
        if each.opcode == "fusion":
            inside = {i.name: i for i in self.computations.get(each.called, [])}
            return sum(self._flops(i, inside) for i in inside.values())
        dims = each.find(r'lhs_contracting_dim\w*"?[=:][{\[]([^}\]]*)')  # of a dot or of cuBLAS
        if not dims or each.operands[0] not in made:
            return 0.0
        left = made[each.operands[0]].results[0].shape
        contracted = math.prod(left[int(dim)] for dim in re.findall(r"\d+", dims))
        return 2.0 * math.prod(each.results[0].shape) * contracted

    def _add_collective(self, each: Instruction, times: int) -> bool:
        """Adds what an instruction sends, if it is a collective or begins one; says if it is."""
        if each.opcode == "fusion" and each.name.startswith("async-collective-start"):
            for inside in self.computations.get(each.called, []):
                if inside.opcode in _SENT:
                    self._append(inside, times, is_hidden=True)
            return True
        if is_sent := each.opcode.removesuffix("-start") in _SENT:
            self._append(each, times, is_hidden=each.opcode.endswith("-start"))
        return is_sent

    def _append(self, each: Instruction, times: int, *, is_hidden: bool) -> None:
        kind, crosses = each.opcode.removesuffix("-start"), "megascale" in each.line
        if kind == "send" and not crosses:  # to the host, or within a slice by other means
            return
        arrays, group = each.results, _group_size(each.line)
        largest = max(arrays, key=lambda array: array.nbytes)
        nbytes = sum(array.nbytes for array in arrays)
        if kind == "send" or (each.opcode.endswith("-start") and kind != "all-reduce"):
            nbytes = largest.nbytes  # what was read and flags are among the results
        sent = float(times * nbytes * _SENT[kind](group))
        self.program.collectives.append(
            Collective(kind, largest.dtype, times, group, sent, is_hidden or crosses, crosses)
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
    """A kernel of attention: two products forward; backward five in one, or four and three."""
    is_of_gpu = "__cudnn$fmha" in each.line
    if each.opcode != "custom-call" or not (is_of_gpu or "tpu_custom_call" in each.line):
        return None
    inputs = arrays_of(each.find(r"operand_layout_constraints=\{(.*?)\}, (?:frontend|api)"))
    part = next((p for pattern, p in _PART_OF_NAME if re.search(pattern, each.op_name)), "rest")
    name = re.sub(r"[.\d]+$", "", each.name)
    if is_of_gpu:  # heads after positions
        (b, num_queries, h, dim), num_keys = inputs[0].shape, inputs[1].shape[1]
        num_products = 5 if "Backward" in each.line else 2
        seen = 0.5 if '"CAUSAL"' in each.line else 1.0
        flops = seen * 2 * num_products * b * h * num_queries * num_keys * dim
        return Kernel(name, part, times, times * flops)
    # Queries, keys and values, with the batch if it has more than one row; the rest are masks.
    heads = [a for a in inputs if a.dtype in ("bf16", "f32") and len(a.shape) in (3, 4)]
    if len(heads) < 3:
        return None
    results = [array.shape[-2:] for array in each.results]
    # Narrow heads are read with positions last, and written with positions first.
    is_turned = heads[1].shape[-2:] not in results and heads[1].shape[:-3:-1] in results
    (*rows, num_queries, dim), num_keys = heads[0].shape, heads[1].shape[-2]
    if is_turned:
        num_queries, dim, num_keys = dim, num_queries, heads[1].shape[-1]
    num_products = 3 if "dq" in each.name else 2
    if "dkv" in each.name:  # with the gradient of the queries too, if it has as many results more
        num_products = 5 if sum(len(array.shape) > 2 for array in each.results[2:]) > 2 else 4
    flops = 2 * num_products * math.prod(rows) * num_queries * num_keys * -(-dim // LANES) * LANES
    return Kernel(name, part, times, float(times * flops))
