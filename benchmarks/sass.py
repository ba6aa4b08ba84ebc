"""What machine code says of a kernel: its loops, and how many instructions it issues for an element.

An instruction takes one issue slot of a warp, and a multiprocessor's four schedulers issue one each a
cycle: instructions an element x elements / (4 x multiprocessors x clock) is the least time they take.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # Triton's package has them

_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # of a load; 4 without a suffix


class Instruction(NamedTuple):
    """An opcode with its suffixes, as "LDG.E.64", and where a branch goes."""

    opcode: str
    target: str | None

    def named(self, name: str) -> bool:
        """Whether the opcode, without its suffixes, is `name`."""
        return self.opcode.split(".")[0] == name


class Loop(NamedTuple):
    """A loop of the code, by the places of its first and its last instruction."""

    first: int
    last: int


class Code(NamedTuple):
    """One kernel's machine code."""

    instructions: list[Instruction]
    loops: list[Loop]

    def count(self, name: str, loop: Loop | None = None) -> int:
        """Instructions of that name, in a loop or in all."""
        return sum(instruction.named(name) for instruction in self.within(loop))

    def within(self, loop: Loop | None) -> list[Instruction]:
        """The instructions of a loop, or all."""
        return self.instructions if loop is None else self.instructions[loop.first : loop.last + 1]

    def main_loop(self) -> Loop | None:
        """The longest loop that has no other inside."""
        inner = [a for a in self.loops if not any(a != b and _inside(b, a) for b in self.loops)]
        return max(inner, key=lambda loop: loop.last - loop.first, default=None)


Rate = Callable[[Code], float | None]
"""Instructions that a kernel issues for an element; None where the code does not say."""


def disassemble(cubin: Path) -> dict[str, Code]:
    """The kernels of a file, by symbol."""
    run = [str(TOOLS / "nvdisasm"), "-c", str(cubin)]
    listing = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    found: dict[str, Code] = {}
    for part in re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]:
        found[part.split(":")[0]] = parse(part)
    return found


def parse(listing: str) -> Code:
    """The code in what `nvdisasm -c` prints of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([\w.]+)(.*?);", line):
            target = re.search(r"`\((\.L_\w+)\)", found[2])
            instructions.append(Instruction(found[1], target[1] if target else None))
    ends: dict[int, int] = {}  # a loop may go back from several places
    for place, instruction in enumerate(instructions):
        first = labels.get(instruction.target or "", place)
        if instruction.named("BRA") and first < place:
            ends[first] = max(place, ends.get(first, 0))
    return Code(instructions, [Loop(first, last) for first, last in ends.items()])


def by_loads(times: float, itemsize: int) -> Rate:
    """Of the main loop of a kernel that loads each element of so many bytes so many times."""

    def rate(code: Code) -> float | None:
        loop = code.main_loop()
        if loop is None:
            return None
        loads = [i.opcode.split(".") for i in code.within(loop) if i.named("LDG")]
        loaded = sum(next((_BYTES[s] for s in load if s in _BYTES), 4) for load in loads)
        return len(code.within(loop)) * itemsize * times / loaded if loaded else None

    return rate


def by_elements(elements: float) -> Rate:
    """Of the main loop of a kernel in which a thread handles so many elements a pass."""

    def rate(code: Code) -> float | None:
        loop = code.main_loop()
        return len(code.within(loop)) / elements if loop else None

    return rate


def of_product(m: int, n: int, k: int, warps: int) -> Rate:
    """Of a whole program that makes an [m, n] tile of a product over k, an output being an element.

    Its loop over k takes as many passes as make the product complete.
    """

    def rate(code: Code) -> float | None:
        total = float(len(code.instructions))
        for loop in code.loops:
            for name, needed in (_needed(code, m, n, k, warps)).items():
                inside = code.count(name, loop)
                if inside:
                    passes = (needed - code.count(name) + inside) / inside
                    total += (passes - 1) * len(code.within(loop))
                    break
        return total * 32 * warps / (m * n)

    return rate


def of_arrivals(products: float, parts: int, tiles: int, steps: int, warps: int) -> Rate:
    """Of a kernel whose programs make parts of tiles, and count themselves in when they are done.

    All walk over their part. One of `parts` goes on to its tile, after the first count where there are
    two, and one of `tiles` to what all tiles need, after the last.

    Args:
        products: elements of all tiles' parts together.
        parts: 1 where a program walks over all of a tile.
        tiles: which are merged one after another at the end.
        steps: of the walks in the code, together. Where programs make parts the code has two walks, of
            which a program takes one: half of both is counted.
        warps: of a program.
    """

    def rate(code: Code) -> float | None:
        counts = [i for i, found in enumerate(code.instructions) if found.named("ATOMG")]
        loads = [i for i, found in enumerate(code.instructions) if found.named("LDGSTS")]
        name = "HMMA" if code.count("HMMA") else "FFMA"
        before = [i for i in range(counts[0] if counts else 0) if code.instructions[i].named(name)]
        if len(counts) != (2 if parts > 1 else 1) or not loads or not before:
            return None
        walk = range(min(loads), max(before) + 1)
        loops = [loop for loop in code.loops if loop.first in walk and code.count(name, loop)]
        each = sum(code.count(name, loop) for loop in loops) / max(1, len(loops))
        unrolled = sum(i in walk for i in before) - each * len(loops)
        times = (steps - unrolled / each) / len(loops) if loops else 0
        walked = len(walk) + sum((times - 1) * len(code.within(loop)) for loop in loops)
        first = counts[0] - len(walk) + walked / (2 if parts > 1 else 1)
        tile = counts[-1] - counts[0]
        merged = sum(len(code.within(loop)) for loop in code.loops if loop.first > counts[-1])
        end = len(code.instructions) - counts[-1] + (tiles - 1) * merged
        return (tiles * (parts * first + tile) + end) * 32 * warps / products

    return rate


def _needed(code: Code, m: int, n: int, k: int, warps: int) -> dict[str, float]:
    """How many product instructions a warp must issue, by name; the first that the code has counts."""
    wide = next((i.opcode for i in code.instructions if i.named("HGMMA")), None)
    if wide is not None:
        columns = int(wide.split(".")[1].split("x")[1])
        return {"HGMMA": m * n * k / (64 * columns * 16) / (warps / 4)}
    if code.count("UTCHMMA"):
        return {"UTCHMMA": (m / 128) * k / 16}  # one thread issues them for the whole program
    if code.count("HMMA"):
        return {"HMMA": m * n * k / (16 * 8 * 16) / warps}
    return {"FFMA": m * n * k / (32 * warps)}


def _inside(inner: Loop, outer: Loop) -> bool:
    return outer.first <= inner.first and inner.last <= outer.last
