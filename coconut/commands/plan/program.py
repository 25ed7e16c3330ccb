"""A compiled program, read from its text: what runs, how often, and the arithmetic and memory traffic of it.

XLA's own cost analysis counts the body of a loop once, which with scanned layers leaves out most of a step. It is what
this reading is held against (`coconut.commands.plan.cost`), since the form of the text is promised by nobody.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s4": 1, "u4": 1, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}

# They move nothing by themselves.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "optimization-barrier"}
_ALLOCATES = 'custom_call_target="AllocateBuffer"'

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ASSIGNED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"(?:body|condition|to_apply|true_computation|false_computation|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the text.

    Attributes:
      dtype: XLA's name of its type.
      shape: its sizes.
      fast: whether it is in a chip's fast memory (memory space 1), not in HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> int:
        """Its size; layouts that pad are not counted."""
        return math.prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: its name.
      result: the arrays it makes.
      opcode: what it does.
      operands: names of what it reads.
      line: its text.
      root: whether it is the result of its computation.
    """

    name: str
    result: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    line: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program.

    Attributes:
      computations: by name, each by its instructions' names.
      entry: name of the one that runs.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def without_fast_memory(self) -> "Program":
        """The same program with every array in main memory, as XLA's own analysis counts."""
        slow = lambda i: dataclasses.replace(i, result=tuple(dataclasses.replace(a, fast=False) for a in i.result))
        return Program({n: {i: slow(x) for i, x in c.items()} for n, c in self.computations.items()}, self.entry)

    def walk(
        self, *, fusions: bool, turns: int = 1, loops_once: bool = False
    ) -> Iterator[tuple[Mapping[str, Instruction], Instruction, int]]:
        """All instructions with the computation they stand in and how often they run in one execution.

        Of a conditional every branch counts.

        Args:
          fusions: also those inside of fusions.
          turns: how often a loop runs that does not say it, since that is data.
          loops_once: count the body of every loop once, as XLA's own analysis does.
        """
        yield from self._walk(self.entry, 1, fusions, turns, loops_once)

    def _walk(
        self, name: str, times: int, fusions: bool, turns: int, loops_once: bool
    ) -> Iterator[tuple[Mapping[str, Instruction], Instruction, int]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction, times
            if instruction.opcode == "fusion" and not fusions:
                continue
            loops = instruction.opcode == "while" and not loops_once
            trips = (self.trips(instruction) or turns) if loops else 1
            for below in self.called(instruction):
                yield from self._walk(below, times * trips, fusions, turns, loops_once)

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs; None where it does not say.

        CPU and GPU programs say it. Those for TPU leave it to the condition, which compares a counter with a constant;
        the body adds to it, 2 where the compiler has unrolled the loop.
        """
        if found := _TRIPS.search(loop.line):
            return int(found[1])
        condition, body = (
            self.computations[match[1]]
            for name in ("condition", "body")
            if (match := re.search(rf"{name}=%?([\w.\-]+)", loop.line))
        )
        compared = [i for i in condition.values() if "direction=LT" in i.line]
        limits = [value for i in condition.values() if (value := _constant(i)) is not None]
        if len(compared) != 1 or len(limits) != 1:
            return None
        counter = condition[compared[0].operands[0]]
        index = re.search(r"index=(\d+)", counter.line) if counter.opcode == "get-tuple-element" else None
        step = _added(body, int(index[1])) if index else None
        return -(-limits[0] // step) if step else None

    def called(self, instruction: Instruction) -> list[str]:
        """Names of the computations an instruction runs."""
        names = _CALLED.findall(instruction.line)
        for branches in _BRANCHES.findall(instruction.line):
            names += [branch.strip().lstrip("%") for branch in branches.split(",")]
        return [name for name in names if name in self.computations]


def parse(text: str) -> Program:
    """The program of ``compiled.as_text()``.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            computations[current] = {}
            entry = current if match[1] else entry
        elif current and (match := _ASSIGNED.match(line)):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            computations[current][instruction.name] = instruction
    if entry is None:
        raise ValueError("the text is that of no compiled program: it has no ENTRY")
    return Program(computations, entry)


def open_loops(program: Program) -> int:
    """How many loops with matrix products do not say how often they run."""
    count = 0
    for _, loop, _ in program.walk(fusions=True):
        if loop.opcode == "while" and program.trips(loop) is None:
            inside = (
                instruction
                for name in program.called(loop)
                for _, instruction, _ in Program(program.computations, name).walk(fusions=True)
            )
            count += any(i.opcode in ("dot", "convolution") or _KERNEL_FLOPS.search(i.line) for i in inside)
    return count


def flops(program: Program, *, turns: int = 1, loops_once: bool = False) -> int:
    """Floating point operations of all matrix products, on each device: two for a product and its sum.

    Those of a Pallas kernel are the ones it says it has (`pallas.CostEstimate`).

    Args:
      program: the program.
      turns: see `Program.walk`.
      loops_once: see there.
    """
    total = 0
    for computation, instruction, times in program.walk(fusions=True, turns=turns, loops_once=loops_once):
        if instruction.opcode == "dot":
            lhs = computation[instruction.operands[0]].result[0].shape
            contracted = [lhs[i] for i in _numbers(instruction.line, "lhs_contracting_dims")]
            total += times * 2 * math.prod(instruction.result[0].shape) * math.prod(contracted)
        elif instruction.opcode == "convolution":
            total += times * 2 * _products(computation, instruction)
        elif found := _KERNEL_FLOPS.search(instruction.line):
            total += times * int(found[1])
    return total


def memory_traffic(program: Program, *, turns: int = 1, loops_once: bool = False) -> int:
    """Bytes that instructions read from and write to a device's main memory, each result once for each use.

    What a fusion only slices out of an array, or writes into a slice of one, counts with the size of the slice.

    Args:
      program: the program.
      turns: see `Program.walk`.
      loops_once: see there.
    """
    total = 0
    for computation, instruction, times in program.walk(fusions=False, turns=turns, loops_once=loops_once):
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            continue
        if _ALLOCATES in instruction.line:
            continue
        if instruction.opcode.endswith("-start"):
            # What it returns includes what it was given; the smallest of both is what moves.
            arrays = [array for array in instruction.result if array.shape]
            moved = min((array.bytes for array in arrays), default=0)
            total += times * moved * (1 if any(array.fast for array in arrays) else 2)
            continue
        moved = _written(program, instruction)
        for index, operand in enumerate(instruction.operands):
            if operand in computation:
                moved += _read(program, computation[operand], instruction, index)
        total += times * moved
    return total


def _written(program: Program, instruction: Instruction) -> int:
    if instruction.opcode == "dynamic-update-slice":
        return 0  # Counted with what is read: an update of the same size.
    updates = _updates(program, instruction)
    if len(updates) != len(instruction.result):
        return sum(array.bytes for array in instruction.result if not array.fast)
    made = zip(instruction.result, updates, strict=True)
    return sum((update or array).bytes for array, update in made if not array.fast)


def _updates(program: Program, instruction: Instruction) -> Sequence[Array | None]:
    """For each array that a fusion returns: what it writes into a slice of it; None where it makes the whole array."""
    if instruction.opcode != "fusion":
        return [None] * len(instruction.result)
    inner = program.computations[program.called(instruction)[0]]
    [root] = [i for i in inner.values() if i.root]
    found = []
    for made in [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        made = _behind_bitcasts(made, inner)
        if made.opcode == "dynamic-update-slice":
            # Only what the fusion was given can be written into; of anything else it makes the whole array.
            in_place = _behind_bitcasts(inner[made.operands[0]], inner).opcode == "parameter"
            found.append(inner[made.operands[1]].result[0] if in_place else None)
        else:
            found.append(None)
    return found


def _behind_bitcasts(instruction: Instruction, inner: Mapping[str, Instruction]) -> Instruction:
    """What a bitcast, another name of the same bytes, is of."""
    while instruction.opcode == "bitcast":
        instruction = inner[instruction.operands[0]]
    return instruction


def _read(program: Program, operand: Instruction, user: Instruction, index: int) -> int:
    whole = sum(array.bytes for array in operand.result if not array.fast)
    if user.opcode == "dynamic-slice":
        return min(whole, sum(array.bytes for array in user.result))
    if user.opcode == "dynamic-update-slice":
        return 0 if index == 0 else 2 * whole
    used = _used(program, user, index) if user.opcode == "fusion" else None
    return whole if used is None else min(whole, used * operand.result[0].itemsize)


def _used(program: Program, fusion: Instruction, index: int) -> int | None:
    """How many elements of an operand a fusion reads that only slices it or writes into it; None where it uses all."""
    inner = program.computations[program.called(fusion)[0]]
    parameter = (i for i in inner.values() if i.opcode == "parameter" and f"parameter({index})" in i.line)
    if (operand := next(parameter, None)) is None:
        return None
    [root] = [i for i in inner.values() if i.root]
    total, names = 0, [(operand.name, False)]
    for name, converted in names:
        for user in inner.values():
            at = [position for position, read in enumerate(user.operands) if read == name]
            if user.opcode in ("bitcast", "convert") and at and not user.root:
                # Elements are converted where they are used.
                names.append((user.name, converted or user.opcode == "convert"))
            elif user.opcode == "fusion":
                used = [_used(program, user, position) for position in at]
                if None in used:
                    return None
                total += sum(filter(None, used))
            elif at == [0] and user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(math.prod(part.shape) for part in user.result)
            elif at and not (at == [0] and not converted and _is_result(user, root, inner)):
                return None
    return total


def _is_result(update: Instruction, root: Instruction, inner: Mapping[str, Instruction]) -> bool:
    """Whether an instruction updates an array that the fusion returns and does not use again."""
    users = [i for i in inner.values() if update.name in i.operands]
    while len(users) == 1 and users[0].opcode == "bitcast":
        users = [i for i in inner.values() if users[0].name in i.operands]
    returned = not users or (len(users) == 1 and users[0] is root and root.opcode == "tuple")
    return update.opcode == "dynamic-update-slice" and returned


def _instruction(name: str, text: str, root: bool) -> Instruction:
    result, rest = _split_result(text)
    opcode, _, rest = rest.partition("(")
    inside = rest[: _closing(rest)]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, tuple(_arrays(result)), opcode.strip(), operands, text, root)


def _split_result(text: str) -> tuple[str, str]:
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return text[:end], text[end:].lstrip()
    result, _, rest = text.partition(" ")
    return result, rest


def _closing(text: str) -> int:
    """Index of the parenthesis that closes one opened before ``text``."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return index
    return len(text)


def _arrays(text: str) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(text):
        yield Array(dtype, tuple(map(int, filter(None, shape.split(",")))), "S(1)" in layout)


def _constant(instruction: Instruction) -> int | None:
    """The number a whole constant is."""
    found = re.search(r" constant\((\d+)\)", f" {instruction.line}") if instruction.opcode == "constant" else None
    return int(found[1]) if found else None


def _added(body: Mapping[str, Instruction], index: int) -> int | None:
    """What a loop's body adds to an element of its state, if that is a constant."""
    root = next(i for i in body.values() if i.root)
    if root.opcode != "tuple":
        return None
    value, total = body[root.operands[index]], 0
    while value.opcode in ("add", "copy"):
        operands = [body[name] for name in value.operands]
        total += sum(constant for i in operands if (constant := _constant(i)) is not None)
        variable = [i for i in operands if i.opcode != "constant"]
        if len(variable) != 1:
            return None
        value = variable[0]
    same = value.opcode == "get-tuple-element" and f"index={index}" in re.split(r"[,\s]+", value.line)
    return total if same and total else None


def _numbers(line: str, field: str) -> Sequence[int]:
    found = re.search(rf"{field}=\{{([\d,]*)\}}", line)
    return [int(number) for number in found[1].split(",") if number] if found else []


def _products(computation: Mapping[str, Instruction], convolution: Instruction) -> int:
    """Products a convolution sums, without those with padding and between dilated inputs.

    The TPU compiler writes matrix products as convolutions, batches of them with windows that touch one input each.
    """
    line = convolution.line
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    assert labels is not None, line
    given, kernel = (computation[name].result[0].shape for name in convolution.operands[:2])
    inputs, weights, outputs = (
        dict(zip(names, shape, strict=True))
        for names, shape in zip(labels.groups(), (given, kernel, convolution.result[0].shape), strict=True)
    )
    window = re.search(r"window=\{(.*?)\}", line)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    total = outputs["b"] * outputs["f"] * weights["i"]
    for axis in filter(str.isdigit, labels[3]):
        index = int(axis)

        def field(name: str, default: str, index: int = index) -> str:
            return fields[name].split("x")[index] if name in fields else default

        stride, dilation = int(field("stride", "1")), int(field("rhs_dilate", "1"))
        spread, low = int(field("lhs_dilate", "1")), int(field("pad", "0_0").split("_")[0])
        end = (inputs[axis] - 1) * spread
        steps = np.arange(outputs[axis])[:, None] * stride + np.arange(weights[axis]) * dilation - low
        total *= int(((steps >= 0) & (steps <= end) & (steps % spread == 0)).sum())
    return total
