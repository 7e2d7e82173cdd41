"""Reads the machine code (SASS) of a compiled Triton kernel. It needs no GPU.

The disassembler is in Triton's wheel. ``read`` finds registers, spills and instructions.
``hot_loop`` finds the instructions of one iteration of the main loop, over one tile. ``Warp``
computes how often an iteration waits for memory.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

_LINE = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<rest>.*?);"
)


@dataclass(frozen=True)
class Instruction:
    """One instruction, such as ``LDG.E.128 R4, desc[UR6][R2.64]``, without its predicate."""

    address: int
    opcode: str
    operands: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.partition(".")[0]

    @cached_property
    def bytes_per_thread(self) -> int:
        """The bytes that a load or a store moves for each thread."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        suffixes = self.opcode.split(".")[1:]
        return next((sizes[suffix] for suffix in suffixes if suffix in sizes), 4)

    @property
    def target(self) -> int | None:
        """The address that a branch jumps to."""
        match = re.search(r"0x([0-9a-f]+)", " ".join(self.operands))
        return int(match[1], 16) if self.name == "BRA" and match else None


@dataclass(frozen=True)
class MachineCode:
    """The machine code of a kernel."""

    registers: int  # of a thread
    instructions: tuple[Instruction, ...]


def disassembler() -> Path | None:
    """Returns the path of ``cuobjdump``, or None if this Triton has none."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tools = [folder / "cuobjdump", folder / "nvdisasm"]  # the first one starts the second
    return tools[0] if all(tool.exists() for tool in tools) else None


def read(cubin: bytes) -> MachineCode:
    """Reads a cubin.

    Raises:
        FileNotFoundError: This Triton has no disassembler.
        ValueError: The disassembler's output has another form.
    """
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("this Triton has no disassembler")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tool, "--dump-resource-usage", file.name)
        listing = _output(tool, "--dump-sass", file.name)
    registers = re.search(r"\bREG:(\d+)", usage)
    instructions = tuple(parse(listing))
    if registers is None or not instructions:
        raise ValueError(f"{tool.name} printed another form: {usage}{listing[:2000]}")
    return MachineCode(int(registers[1]), instructions)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Instruction]:
    """Returns the instructions of a listing."""
    found = []
    for match in filter(None, map(_LINE.match, listing.splitlines())):
        # commas in brackets belong to an address
        operands = re.split(r",(?![^\[]*\])", match["rest"])
        stripped = tuple(filter(None, (operand.strip() for operand in operands)))
        found.append(Instruction(int(match["address"], 16), match["opcode"], stripped))
    return found


def hot_loop(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """Returns one iteration of the longest innermost loop that reads global memory.

    Without such a loop it returns all instructions.
    """
    loops = [
        (each.target, each.address)
        for each in instructions
        if each.target is not None and each.target < each.address
    ]
    reads = [each.address for each in instructions if is_global_load(each)]
    loops = [(s, e) for s, e in loops if any(s <= address <= e for address in reads)]
    innermost = [
        (s, e) for s, e in loops if not any(s <= t and f <= e for t, f in loops if (t, f) != (s, e))
    ]
    if not innermost:
        return instructions
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0])
    return tuple(each for each in instructions if start <= each.address <= end)


def is_global_load(instruction: Instruction) -> bool:
    return instruction.name in ("LDG", "LDGSTS")


def spills(instructions: tuple[Instruction, ...]) -> int:
    """Counts the loads and stores of spilled registers, or of other local memory."""
    return sum(each.name in ("LDL", "STL") for each in instructions)


def widths(instructions: tuple[Instruction, ...], name: str) -> dict[int, int]:
    """Counts the instructions of one name ("LDG" or "STG") by bytes per thread."""
    return dict(
        sorted(Counter(each.bytes_per_thread for each in instructions if each.name == name).items())
    )


# ---------------------------------------------------------------------------------------------
# a model of one warp
# ---------------------------------------------------------------------------------------------

# Cycles from an instruction to the use of its result; other instructions take 5. They are usual
# figures for Ampere and Hopper: near enough, because memory takes a hundred times as long.
_LATENCIES = {"MUFU": 24, "SHFL": 24, "REDUX": 24, "LDS": 30, "LDC": 30}
_CONVERSIONS = ("I2F", "F2I", "F2F", "I2FP", "F2FP", "FRND")
# these have no result
_ONLY_SOURCES = ("ISETP", "FSETP", "PLOP3", "BRA", "BAR", "DSETP", "BSSY", "BSYNC", "CALL", "FCHK")


@dataclass(frozen=True)
class Iteration:
    """What one warp does in an iteration of a loop, if no other warp is in its way."""

    cycles: float
    serial_waits: int  # waits for global memory, one after another


def registers_of(instruction: Instruction) -> tuple[list[int], list[int]]:
    """Returns the registers that an instruction writes, and those that it reads."""
    opcode, operands = instruction.opcode, instruction.operands
    width = 4 if ".128" in opcode else 2 if ".64" in opcode else 1

    def numbers(operand: str, width: int = 1) -> list[int]:
        found = []
        for match in re.finditer(r"(?<![A-Z])R(\d+)(\.64)?", operand):
            found += range(int(match[1]), int(match[1]) + (2 if match[2] else width))
        return found

    if instruction.name in ("LDG", "LDS", "LDC"):
        return numbers(operands[0], width), [r for each in operands[1:] for r in numbers(each)]
    if instruction.name in ("STG", "STS"):
        return [], [*numbers(operands[0]), *numbers(operands[1], width)]
    if instruction.name in _ONLY_SOURCES or not operands:
        return [], [r for each in operands for r in numbers(each)]
    wide = opcode.startswith(("IMAD.WIDE", "CS2R", "DADD", "DMUL", "DFMA")) and opcode != "CS2R.32"
    return (
        numbers(operands[0], 2 if wide else 1),
        [r for each in operands[1:] for r in numbers(each)],
    )


def simulate(loop: tuple[Instruction, ...], memory_cycles: float) -> Iteration:
    """Runs one warp through a loop, in order, until iterations repeat.

    A warp issues an instruction when the registers that it reads or writes are ready. A load from
    global memory takes ``memory_cycles``. ``LDGSTS`` (cp.async) loads into shared memory; the warp
    waits for a group of these loads at ``DEPBAR``, or ``LDGDEPBAR`` ends the group.
    """
    decoded = [(each, *registers_of(each)) for each in loop]
    ready: dict[int, float] = {}
    loading: set[int] = set()  # registers that a global load writes
    groups: list[float] = []  # when each group of LDGSTS has arrived
    group = time = 0.0
    iteration = Iteration(0.0, 0)
    for _ in range(4):
        begin, waits = time, 0
        for each, written, sources in decoded:
            blocking = max((*written, *sources), key=lambda r: ready.get(r, 0.0), default=None)
            start = max(time, ready.get(blocking, 0.0) if blocking is not None else 0.0)
            if blocking in loading and start > time + 50:
                waits += 1
            if each.name == "DEPBAR" and "SB0" in each.operands[0]:
                pending = int(each.operands[1], 0)
                arrived = max(groups[: len(groups) - pending], default=0.0)
                waits += arrived > start + 50
                start = max(start, arrived)
            elif each.name == "LDGDEPBAR":
                groups.append(group)
                group = 0.0
            elif each.name == "LDGSTS":
                group = start + memory_cycles
            result = start + _latency(each, memory_cycles)
            for register in written:
                ready[register] = result
                (loading.add if each.name == "LDG" else loading.discard)(register)
            time = start + (20 if each.name == "BAR" else 1)
        iteration = Iteration(time - begin, waits)
    return iteration


def _latency(instruction: Instruction, memory_cycles: float) -> float:
    if instruction.name == "LDG":
        return memory_cycles
    if instruction.name in _CONVERSIONS:
        return 12
    return _LATENCIES.get(instruction.name, 5)


# Cycles for which an instruction of one warp keeps a part of its scheduler busy. An H100's
# scheduler has 16 lanes for integers, 32 for floats (16 of them multiply integers), 4 for special
# functions and 8 for addresses.
_FLOATS = ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2")
_MEMORY = ("LDG", "LDGSTS", "STG", "LDS", "STS")
_NO_LANES = ("BRA", "BSSY", "BSYNC", "CALL", "EXIT", "NOP", "WARPSYNC", "BAR", "DEPBAR")


def issue_cycles(loop: tuple[Instruction, ...]) -> float:
    """Returns the cycles for which one warp's iteration keeps the busiest part of a scheduler."""
    busy: Counter[str] = Counter()
    for each in loop:
        busy["issue"] += 1
        name = each.name
        if name in _FLOATS or re.match(r"IMAD\.(MOV|SHL|IADD)", each.opcode):
            busy["floats"] += 1
        elif name == "IMAD":
            busy["floats"] += 2
        elif name in ("MUFU", "F2I", "F2F"):
            busy["special"] += 8
        elif name in ("SHFL", "REDUX"):
            busy["addresses"] += 4
        elif name in _MEMORY:
            busy["addresses"] += 4 if ".128" in each.opcode else 2
        elif name not in _NO_LANES and not name.startswith("U"):
            busy["integers"] += 2
    return max(busy.values())
