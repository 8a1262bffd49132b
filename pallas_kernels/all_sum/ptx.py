"""What a thread does in an exchange, in PTX: send, wait, make the slots empty, add or write.

Operands of the program: $0 the array, $1 this device's mailbox, $2 the result, $3 the number of the
thread block, $4 the residual if there is one. README.md says why it cannot hang or overwrite what
is not read.
"""

import dataclasses
import functools
import math

from pallas_kernels.all_sum.mail import EMPTY, RANK, THREADS, WORDS, Mail

KINDS = {"float32": "f32", "bfloat16": "bf16", "int32": "b32", "uint32": "b32"}
"""What a 32-bit word of a type is."""
PATIENCE = 1 << 25
"""Looks at the mailbox, each about a microsecond, before a thread gives up: the launch fails."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An exchange of `words` 32-bit words of each device.

    Attributes:
      mail: the mailbox.
      words: of the array.
      kind: what a word is: "f32", "bf16" (two of them) or "b32" (integers).
      total: whether the devices' words are added; else they are written, rank after rank.
      residual: whether an array of this device's is added last.
      patience: looks at the mailbox before a thread gives up.
    """

    mail: Mail
    words: int
    kind: str
    total: bool
    residual: bool = False
    patience: int = PATIENCE

    @property
    def halved(self) -> bool:
        """Whether a word is sent as two halves, because it may be what an empty slot holds."""
        return self.kind == "b32"

    @property
    def width(self) -> int:
        """Words of a thread."""
        most = WORDS // 2 if self.halved else WORDS
        return most if self.words % most == 0 else 1

    @property
    def sent(self) -> int:
        """Words that a thread sends."""
        return 2 * self.width if self.halved else self.width

    @property
    def threads(self) -> int:
        """That have something to send."""
        return self.words // self.width

    @property
    def blocks(self) -> int:
        """Thread blocks."""
        return -(-self.threads // THREADS)

    def program(self) -> str:
        """The text."""
        parts = (_begin, _send, _wait, _empty, _add_up if self.total else _write)
        return "{\n" + "\n".join(part(self) for part in parts) + "\nEND:\n}"


def exchange_of(x, mail: Mail, *, total: bool, residual: bool = False) -> Exchange:
    """The exchange of an array; the last of an odd number of bfloat16 would be half a word."""
    size = math.prod(x.shape)
    if x.dtype.name == "bfloat16" and size % 2:
        return Exchange(mail, size, "f32", total, residual)
    return Exchange(mail, size * x.dtype.itemsize // 4, KINDS[x.dtype.name], total, residual)


def _registers(name: str, number: int) -> list[str]:
    return [f"{name}{i}" for i in range(number)]


def _vector(names: list[str]) -> str:
    """An operand of a load or store, and its type's suffix."""
    return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"


def _wide(number: int) -> str:
    return "b32" if number == 1 else f"v{number}.b32"


def _received(exchange: Exchange, sender: int) -> list[str]:
    return _registers(f"r{sender}_", exchange.sent)


def _begin(exchange: Exchange) -> str:
    """Names of registers; which thread this is, where the mailboxes are, how often it has sent."""
    mail, sent = exchange.mail, exchange.sent
    n = mail.devices
    received = [name for s in range(n) for name in _received(exchange, s)]
    names = [*_registers("x", exchange.width), *_registers("s", sent), *received]
    names += _registers("y", exchange.width) if exchange.residual else []
    lines = [
        ".reg .pred p;",
        f".reg .b32 g, count, phase, rank, slot, looks, any, t, u, {', '.join(names)};",
        f".reg .b64 at, counts, mine, off, out, {', '.join(_registers('to', n))};",
        ".reg .b32 e, one;",
        "mov.u32 g, %tid.x;",
        f"mad.lo.u32 g, $3, {THREADS}, g;",
        f"setp.ge.u32 p, g, {exchange.threads};",
        "@p bra END;",
        *(f"ld.global.b64 to{i}, [$1+{8 * i}];" for i in range(n)),
        # Where the others send to must be here: XLA may not have moved the mailbox.
        f"setp.ne.u64 p, to{n - 1}, $1;",
        "@p trap;",
        f"ld.global.b32 rank, [$1+{4 * RANK}];",
        "mul.wide.u32 off, g, 4;",
        "add.u64 counts, $1, off;",
        f"ld.global.b32 count, [counts+{4 * mail.counts}];",
        "and.b32 phase, count, 1;",
    ]
    return "\n".join(lines)


def _send(exchange: Exchange) -> str:
    """To all devices, this one too; the next rank first."""
    mail, width = exchange.mail, exchange.width
    x, s = _registers("x", width), _registers("s", exchange.sent)
    lines = [
        f"mul.wide.u32 off, g, {4 * width};",
        "add.u64 at, $0, off;",
        f"ld.global.{_wide(width)} {_vector(x)}, [at];",
    ]
    for i in range(width):
        if exchange.halved:
            lines += [f"and.b32 s{2 * i}, x{i}, 65535;", f"shr.u32 s{2 * i + 1}, x{i}, 16;"]
        else:
            # What an empty slot holds is a NaN, twice for bfloat16; the next number is one too.
            lines.append(f"min.u32 s{i}, x{i}, {EMPTY - 1};")
    lines += [
        f"mad.lo.u32 slot, phase, {mail.devices}, rank;",
        f"mad.lo.u32 slot, slot, {mail.threads}, g;",
        f"mul.wide.u32 off, slot, {4 * WORDS};",
    ]
    for i in range(mail.devices):
        lines += [
            f"add.u64 to{i}, to{i}, off;",
            f"st.relaxed.sys.global.{_wide(len(s))} [to{i}+{4 * mail.slots}], {_vector(s)};",
        ]
    if exchange.residual:
        # Under way while the others' words are.
        lines += [
            f"mul.wide.u32 off, g, {4 * width};",
            "add.u64 at, $4, off;",
            f"ld.global.{_wide(width)} {_vector(_registers('y', width))}, [at];",
        ]
    return "\n".join(lines)


def _place(exchange: Exchange, sender: int) -> str:
    return f"[mine+{4 * exchange.mail.slot(0, sender, 0)}]"


def _wait(exchange: Exchange) -> str:
    """Until no word of this thread's slots is empty: each word says for itself that it is there."""
    mail, wide = exchange.mail, _wide(exchange.sent)
    words = [_received(exchange, s) for s in range(mail.devices)]
    first, *rest = [word for received in words for word in received]
    lines = [
        f"mul.lo.u32 slot, phase, {mail.devices * mail.threads};",
        "add.u32 slot, slot, g;",
        f"mul.wide.u32 off, slot, {4 * WORDS};",
        "add.u64 mine, $1, off;",
        "mov.b32 looks, 0;",
        "WAIT:",
        "add.u32 looks, looks, 1;",
        f"setp.ge.u32 p, looks, {exchange.patience};",
        "@p trap;",
        *(
            f"ld.relaxed.sys.global.{wide} {_vector(received)}, {_place(exchange, sender)};"
            for sender, received in enumerate(words)
        ),
        f"mov.b32 any, {first};",
        *(f"max.u32 any, any, {word};" for word in rest),
        f"setp.eq.u32 p, any, {EMPTY};",
        "@p bra WAIT;",
    ]
    return "\n".join(lines)


def _empty(exchange: Exchange) -> str:
    """The slots, for the exchange after the next."""
    nothing = _vector(["e"] * exchange.sent)
    lines = [
        f"mov.b32 e, {EMPTY};",
        *(
            f"st.relaxed.sys.global.{_wide(exchange.sent)} {_place(exchange, s)}, {nothing};"
            for s in range(exchange.mail.devices)
        ),
        "add.u32 count, count, 1;",
        f"st.global.b32 [counts+{4 * exchange.mail.counts}], count;",
        f"mul.wide.u32 off, g, {4 * exchange.width};",
        "add.u64 out, $2, off;",
    ]
    return "\n".join(lines)


def _joined(exchange: Exchange, sender: int) -> list[str]:
    """Halves to words again."""
    if not exchange.halved:
        return []
    r = _received(exchange, sender)
    return [
        line
        for i in range(exchange.width)
        for line in (f"shl.b32 t, {r[2 * i + 1]}, 16;", f"or.b32 {r[i]}, {r[2 * i]}, t;")
    ]


def _add_up(exchange: Exchange) -> str:
    """In the order of ranks, then the residual, in float32; integers modulo 2^32."""
    n, width = exchange.mail.devices, exchange.width
    lines = [line for s in range(n) for line in _joined(exchange, s)]
    add = _ADD[exchange.kind]
    for i in range(width):
        more = [f"y{i}"] if exchange.residual else []
        lines += add([*(_received(exchange, s)[i] for s in range(n)), *more], f"x{i}")
    lines.append(f"st.global.{_wide(width)} [out], {_vector(_registers('x', width))};")
    return "\n".join(lines)


def _add_words(kind: str, words: list[str], total: str) -> list[str]:
    return [f"mov.b32 {total}, {words[0]};", *(f"{kind} {total}, {total}, {w};" for w in words[1:])]


def _add_pairs(words: list[str], total: str) -> list[str]:
    lines = [f"shl.b32 t, {words[0]}, 16;", f"and.b32 u, {words[0]}, 0xFFFF0000;"]
    for word in words[1:]:
        lines += [f"shl.b32 one, {word}, 16;", "add.rn.f32 t, t, one;"]
        lines += [f"and.b32 one, {word}, 0xFFFF0000;", "add.rn.f32 u, u, one;"]
    return [*lines, f"cvt.rn.bf16x2.f32 {total}, u, t;"]


_ADD = {
    "f32": functools.partial(_add_words, "add.rn.f32"),
    "b32": functools.partial(_add_words, "add.u32"),
    "bf16": _add_pairs,
}


def _write(exchange: Exchange) -> str:
    """All devices' words, rank after rank."""
    width, lines = exchange.width, []
    for s in range(exchange.mail.devices):
        words = _vector(_received(exchange, s)[:width])
        lines += _joined(exchange, s)
        lines.append(f"st.global.{_wide(width)} [out+{4 * s * exchange.words}], {words};")
    return "\n".join(lines)


def opening(devices: int) -> str:
    """What the first thread does once: the header. $0 the mailbox, $1 the rank, then all mailboxes.

    The address of a rank's mailbox is word pair (that rank - this rank - 1) modulo `devices`.
    """
    lines = [
        ".reg .pred p;",
        ".reg .b32 t;",
        ".reg .b64 at, off;",
        "mov.u32 t, %tid.x;",
        "setp.ne.u32 p, t, 0;",
        "@p bra END;",
        f"st.global.b32 [$0+{4 * RANK}], $1;",
    ]
    for rank in range(devices):
        lines += [
            f"sub.u32 t, {rank + devices - 1}, $1;",
            f"rem.u32 t, t, {devices};",
            "mul.wide.u32 off, t, 8;",
            "add.u64 at, $0, off;",
            f"st.global.b64 [at], ${2 + rank};",
        ]
    return "{\n" + "\n".join(lines) + "\nEND:\n}"
