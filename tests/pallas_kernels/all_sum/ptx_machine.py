"""Runs the exchanges' PTX on a CPU: the threads of several devices, in any order, word by word.

The text that runs is the kernel's own. What a device stores into another's memory arrives later, a
word at a time, in any order; what it stores into its own memory is there at once.
"""

import re

import ml_dtypes
import numpy as np

U32 = 0xFFFFFFFF
_SPACE = 1 << 40
"""Addresses of a device."""


class Trap(Exception):
    """A thread gave up, or found its mailbox elsewhere."""


class Memory:
    """Of all devices, by word; and the words that are on their way."""

    def __init__(self, rng):
        self.rng, self.words, self.flying, self.next = rng, {}, [], {}

    def place(self, device: int, words) -> int:
        """Puts an array of 32-bit words into a device's memory; returns where."""
        at = self.next.get(device, (device + 1) * _SPACE)
        self.next[device] = at + 4 * len(words) + 256
        self.words.update({at + 4 * i: int(word) for i, word in enumerate(words)})
        return at

    def read(self, at: int, number: int) -> list[int]:
        """Words from an address on."""
        return [self.words[at + 4 * i] for i in range(number)]

    def array(self, at: int, number: int) -> np.ndarray:
        """The same, as an array."""
        return np.array(self.read(at, number), np.uint32)

    def store(self, device: int, at: int, values) -> None:
        """Words go to their places; to those on other devices by and by."""
        for i, value in enumerate(values):
            where = at + 4 * i
            assert where in self.words, hex(where)
            if where // _SPACE - 1 == device:
                self.words[where] = value
            else:
                self.flying.append((where, value))

    def deliver(self) -> None:
        """One of the words that are on their way arrives."""
        if self.flying:
            chosen = self.rng.integers(len(self.flying))
            self.flying[chosen], self.flying[-1] = self.flying[-1], self.flying[chosen]
            where, value = self.flying.pop()
            self.words[where] = value


def _float(word: int) -> np.float32:
    return np.array(word, np.uint32).view(np.float32)[()]


def _word(value) -> int:
    return int(np.array(value, np.float32).view(np.uint32))


def _pair(high: int, low: int) -> int:
    halves = np.array([_float(high), _float(low)]).astype(ml_dtypes.bfloat16).view(np.uint16)
    return int(halves[0]) << 16 | int(halves[1])


ARITHMETIC = {
    "mov": lambda a: a,
    "mad.lo": lambda a, b, c: a * b + c,
    "mul.lo": lambda a, b: a * b,
    "mul.wide": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rem": lambda a, b: a % b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "min": min,
    "max": max,
    "add.rn": lambda a, b: _word(_float(a) + _float(b)),
    "cvt.rn.bf16x2": _pair,
}
COMPARE = {"ge": int.__ge__, "eq": int.__eq__, "ne": int.__ne__}


def parse(text: str) -> tuple[list[tuple], dict[str, int]]:
    """Instructions (predicate, name, operands), and where the labels are."""
    code, labels = [], {}
    for line in text.strip().strip("{}").splitlines():
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
            continue
        predicate, name, operands = re.fullmatch(r"(?:@(\w+) )?(\S+?)(?: (.*))?;", line).groups()
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands or "")
        code.append((predicate, name, parts))
    return code, labels


def thread(memory: Memory, device: int, tid: int, program, operands: list[int]):
    """A thread, as a generator that stops at each access to memory."""
    code, labels = program
    registers: dict[str, int] = {f"${i}": value for i, value in enumerate(operands)}
    registers["%tid.x"] = tid

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def names(operand: str) -> list[str]:
        return re.findall(r"\w+", operand)

    def address(operand: str) -> int:
        base, _, offset = operand.strip("[]").partition("+")
        return value(base) + int(offset or 0)

    at = 0
    while at < len(code):
        predicate, name, parts = code[at]
        at += 1
        if predicate and not registers[predicate]:
            continue
        kind = name.split(".")
        if kind[0] == "bra":
            at = labels[parts[0]]
        elif kind[0] == "trap":
            raise Trap(f"device {device}, thread {tid}")
        elif kind[0] == "ld":
            yield
            into = names(parts[0])
            if kind[-1] == "b64":
                low, high = memory.read(address(parts[1]), 2)
                registers[into[0]] = low | high << 32
            else:
                found = memory.read(address(parts[1]), len(into))
                registers.update(zip(into, found, strict=True))
        elif kind[0] == "st":
            yield
            values = [value(word) for word in re.findall(r"[$\w]+", parts[1])]
            if kind[-1] == "b64":
                values = [values[0] & U32, values[0] >> 32]
            memory.store(device, address(parts[0]), values)
        elif kind[0] == "setp":
            registers[parts[0]] = COMPARE[kind[1]](*map(value, parts[1:]))
        else:
            found = ARITHMETIC[".".join(kind[:-1])](*map(value, parts[1:]))
            wide = kind[-1] == "u64" or kind[:2] == ["mul", "wide"]
            registers[parts[0]] = found if wide else found & U32


def run(memory: Memory, devices: list, favourite: int | None = None) -> None:
    """Runs each device's launches to their ends, one after the other; devices side by side.

    Args:
      memory: of all.
      devices: for each device its launches: functions that return generators, its threads.
      favourite: a device that is nearly always asked first, or None.
    """
    rng = memory.rng
    running = [[] for _ in devices]
    launches = [iter(each) for each in devices]
    left = set(range(len(devices)))
    while left:
        if rng.random() < 0.6:
            memory.deliver()
        device = int(rng.choice(sorted(left)))
        if favourite in left and rng.random() < 0.9:
            device = favourite
        if not running[device]:
            launch = next(launches[device], None)
            if launch is None:
                left.discard(device)
                continue
            running[device] = launch()
        chosen = int(rng.integers(len(running[device])))
        for _ in range(8):
            if next(running[device][chosen], "over") == "over":
                running[device].pop(chosen)
                break
