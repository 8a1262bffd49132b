"""Reading optimised HLO: its computations, what loop bodies run, and the shapes that they make."""

import dataclasses
import re

import numpy as np

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, the shapes that it makes as (dtype, sizes), its opcode, and the line."""

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    opcode: str
    text: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        names = []
        for group in _CALLED.findall(self.text):
            names += [name.strip(" %") for name in group.strip("{}").split(",")]
        return names

    @property
    def body(self) -> str:
        """A while loop's body."""
        return re.search(r"body=%?([\w.\-]+)", self.text).group(1)

    @property
    def elements(self) -> int:
        """Size of the largest array that it makes."""
        return max((int(np.prod(sizes)) for _, sizes in self.shapes), default=0)


class Module:
    """The computations of an HLO module's text, and which of them is the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current = None
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head.group(2), [])
                self.entry = head.group(2) if head.group(1) else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _LINE.match(line)):
                name, made, opcode, _ = found.groups()
                shapes = tuple(
                    (dtype, tuple(int(n) for n in sizes.split(",") if n))
                    for dtype, sizes in _SHAPE.findall(made)
                )
                current.append(Instruction(name, shapes, opcode, line))
        assert self.entry, "no ENTRY computation: is this HLO text?"

    def run_by(self, name: str) -> list[Instruction]:
        """All instructions that a computation runs, in inner loops, branches and fusions too."""
        found, waiting, seen = [], [name], set()
        while waiting:
            if (current := waiting.pop()) in seen:
                continue
            seen.add(current)
            for instruction in self.computations[current]:
                found.append(instruction)
                waiting += instruction.called
        return found

    def loops(self) -> list[Instruction]:
        """The entry's own while loops, in order."""
        return [i for i in self.computations[self.entry] if i.opcode == "while"]
