"""Reading optimised HLO: what a program's decoding loop launches, in order, and for which part."""

import dataclasses
import re

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:body|calls|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_APPLIED = re.compile(r"to_apply=%?([\w.\-]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_REST = re.compile(r", (?:metadata|backend_config|frontend_attributes)=\{.*$")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_NOTHING = frozenset(
    # What a program does not launch anything for.
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier copy-done all-reduce-done all-gather-done".split()
)
_GROUPS = {
    "accept": "accept, sampling",
    "attend": "attention proper",
    "attend_cached": "attention proper",
    "attention_cache": "attention proper",
    "attention_layer": "attention in one launch",
    "attention_output": "attention output",
    "attention_project": "attention qkv",
    "commit": "accept, sampling",
    "dense_mlp": "dense MLP",
    "drafter": "drafter",
    "experts": "experts",
    "head": "head",
    "router": "router",
}
OTHERS = "norms, sums, others"
GROUPS = (*dict.fromkeys(_GROUPS.values()), OTHERS)
"""The parts of a round."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """An instruction that the program launches something for.

    Attributes:
      name: of the instruction.
      kind: its opcode, or the target of a custom call.
      same: of instructions that may share a kernel, the same text; for a Mosaic kernel its name.
      scope: names of the parts of the program that it is in, from the outermost.
    """

    name: str
    kind: str
    same: str
    scope: str

    @property
    def group(self) -> str:
        """The part of a round that it belongs to: all of the drafter's, else the innermost."""
        names = self.scope.split("/")
        if "drafter" in names:
            return _GROUPS["drafter"]
        return next((_GROUPS[n] for n in reversed(names) if n in _GROUPS), OTHERS)

    @property
    def layer(self) -> int | None:
        """The target's layer that it is in, if it is in one."""
        found = re.search(r"/layer_(\d+)(?:/|$)", self.scope)
        return int(found[1]) if found else None


class Module:
    """The computations of a module's text, each a list of (name, opcode, line)."""

    def __init__(self, text: str):
        self.computations: dict[str, list[tuple[str, str, str]]] = {}
        self.entry = ""
        current = None
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _LINE.match(line)):
                current.append((found[1], found[3], line))
        self._texts: dict[str, str] = {}

    def round(self, sampled: bool = False) -> list[Launch]:
        """What a round of the decoding loop launches: condition and body of the entry's last loop.

        Args:
          sampled: whether tokens are sampled: where tokens are chosen, the branch that launches
            more is taken, else the one that launches less. Of other branches it is always the one
            that launches more: a round that drafts.
        """
        loops = [line for _, op, line in self.computations[self.entry] if op == "while"]
        names = _CONDITION.search(loops[-1])[1], _called(loops[-1])[-1]
        return [one for name in names for one in self._launches(name, sampled)]

    def _launches(self, name: str, sampled: bool) -> list[Launch]:
        found: list[Launch] = []
        for instruction, opcode, line in self.computations[name]:
            scope = (_SCOPE.search(line) or ["", ""])[1]
            if opcode == "conditional":
                branches = [self._launches(branch, sampled) for branch in _called(line)]
                greedy = "accept" in scope.split("/") and not sampled
                found += min(branches, key=len) if greedy else max(branches, key=len)
            elif opcode == "call":
                found += self._launches(_APPLIED.search(line)[1], sampled)
            elif opcode in ("while", "async-start"):
                found += self._launches(_called(line)[-1], sampled)
            elif opcode == "fusion":
                found.append(Launch(instruction, opcode, self._text(_called(line)[0]), scope))
            elif opcode == "custom-call":
                target = (_TARGET.search(line) or ["", opcode])[1]
                kernel = scope.split("/")[-2:][0] if target.startswith("mosaic") else target
                found.append(Launch(instruction, target, kernel, scope))
            elif opcode not in _NOTHING:
                found.append(Launch(instruction, opcode, opcode, scope))
        return found

    def _text(self, name: str) -> str:
        """A computation without names: fusions with the same text can have one kernel."""
        if name not in self._texts:
            names: dict[str, str] = {}
            lines = []
            for instruction, _, line in self.computations[name]:
                names[instruction] = f"v{len(names)}"
                line = _REST.sub("", line)
                for called in _called(line):
                    line = line.replace(called, self._text(called))
                lines.append(
                    re.sub(r"%([\w.\-]+)", lambda found: names.get(found[1], "other"), line)
                )
            self._texts[name] = "\n".join(lines)
        return self._texts[name]


def _called(line: str) -> list[str]:
    names: list[str] = []
    for group in _CALLED.findall(line):
        names += [name.strip(" %") for name in group.strip("{}").split(",")]
    return names


def kernels_a_layer(launches: list[Launch], pattern: tuple[int, ...]) -> dict[str, float]:
    """Launches of the target's layers: the median of each kind, and all over all layers.

    Args:
      launches: of a round.
      pattern: each layer's kind of attention, as in the configuration: 0 is full.
    """
    counts = [0] * len(pattern)
    for one in launches:
        if one.layer is not None and one.group != _GROUPS["drafter"]:
            counts[one.layer] += 1
    found: dict[str, float] = {"mean": sum(counts) / len(counts)}
    for kind, name in ((0, "full attention"), (1, "sliding")):
        mine = sorted(n for n, this in zip(counts, pattern, strict=True) if this == kind)
        if mine:
            found[name] = mine[len(mine) // 2]
    return found
