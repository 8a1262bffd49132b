"""Runs a kernel's PTX hooks on a CPU: 128 threads at once, an array for a register.

The hooks build their program by calling a few functions of MLIR's; here these functions compute.
So what is tested is the very code that makes the kernel: addresses, fragments, and the inline PTX,
read line by line. Memory is bytes; a load or store outside of its array fails.
"""

import contextlib
import re
import types

import ml_dtypes
import numpy as np

from pallas_kernels import barriers, carriers, ptx

THREADS = 128
U32, F32 = np.uint32, np.float32


class Memory:
    """An array in memory, as a reference of the kernel."""

    def __init__(self, array):
        self.array, self.shape = np.ascontiguousarray(array), array.shape
        self.bytes = self.array.reshape(-1).view(np.uint8)
        self.type = self.dtype = self.array.dtype
        self.prefetched = []

    def load(self, at, kind):
        """One value a thread, where `at` is not None."""
        found = np.zeros(THREADS, F32 if kind == "f32" else U32)
        size = 2 if kind == "i16" else 4
        for thread, start in at:
            assert 0 <= start <= self.bytes.size - size and start % size == 0, start
            value = self.bytes[start : start + size]
            found[thread] = value.view(np.uint16 if size == 2 else found.dtype)[0]
        return found

    def store(self, at, values, size):
        """One value a thread."""
        for thread, start in at:
            assert 0 <= start <= self.bytes.size - size and start % size == 0
            self.bytes[start : start + size] = values[thread : thread + 1].view(np.uint8)[:size]


class Pointer:
    """An address in each thread."""

    def __init__(self, memory, at):
        self.memory, self.at = memory, np.broadcast_to(np.asarray(at, np.int64), THREADS)

    def plus(self, count):
        """Some bytes on."""
        return Pointer(
            self.memory, self.at + (count if count.dtype == np.int64 else count.view(np.int32))
        )

    def places(self, offset=0, where=None):
        """Of the threads that take part."""
        live = _taking_part[-1] if where is None else _taking_part[-1] & where
        return [(i, int(self.at[i]) + offset) for i in np.flatnonzero(live)]


_taking_part = [np.ones(THREADS, bool)]
"""Threads that do not pass by, in each `when` that is open."""


@contextlib.contextmanager
def when(condition):
    """Only threads for which it holds touch memory."""
    _taking_part.append(_taking_part[-1] & condition)
    try:
        yield
    finally:
        _taking_part.pop()


def full(value, dtype=U32):
    """The same in all threads."""
    if isinstance(value, np.ndarray):
        return value
    return np.full(THREADS, value & 0xFFFFFFFF if dtype is U32 else value, dtype)


def bf16(words):
    """The halves of words as float32: low, high."""
    return (words << U32(16)).view(F32), (words & U32(0xFFFF0000)).view(F32)


def pair(low, high):
    """Two float32 rounded to the halves of words."""
    halves = [v.astype(ml_dtypes.bfloat16).view(np.uint16).astype(U32) for v in (low, high)]
    return halves[0] | halves[1] << U32(16)


def mma(a, b, c):
    """`mma.sync.m16n8k16` of four warps, in float64 and then float32."""
    out = [np.empty(THREADS, F32) for _ in range(4)]
    for warp in range(4):
        own = slice(32 * warp, 32 * warp + 32)
        left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        g, two = np.arange(32) // 4, 2 * (np.arange(32) % 4)
        for i, word in enumerate(a):
            for odd, values in enumerate(bf16(word[own])):
                left[g + 8 * (i % 2), two + 8 * (i // 2) + odd] = values
        for i, word in enumerate(b):
            for odd, values in enumerate(bf16(word[own])):
                right[two + 8 * i + odd, g] = values
        for i in range(4):
            sums[g + 8 * (i // 2), two + i % 2] = c[i][own]
        with np.errstate(invalid="ignore"):
            sums = sums + left @ right
        for i in range(4):
            out[i][own] = sums[g + 8 * (i // 2), two + i % 2]
    return out


def prmt(a, b, selector):
    """Bytes of a and b, chosen by the selector's digits."""
    source = np.stack([a, b], 1).reshape(-1, 2).view(np.uint8).reshape(THREADS, 8)
    digits = [(selector >> (4 * i)) & 15 for i in range(4)]
    return np.ascontiguousarray(source[:, digits]).view(U32).reshape(-1)


def lop3(a, b, c, table):
    """Only (a | b & c)."""
    assert table == 0xF8
    return a | b & c


def shuffle(value, step, clamp, members):
    """Values of the thread whose number differs in a bit."""
    return value[np.arange(THREADS) ^ step]


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "shl.b32": lambda a, n: a << U32(n),
    "shr.u32": lambda a, n: a >> U32(n),
    "and.b32": lambda a, b: a & full(b),
    "lop3.b32": lambda a, b, c, table: lop3(a, b, full(c), table),
    "prmt.b32": prmt,
    "mul.bf16x2": lambda a, b: pair(*(x * y for x, y in zip(bf16(a), bf16(b), strict=True))),
    "cvt.rn.bf16x2.f32": lambda high, low: pair(low, high),
    "cvt.rn.bf16.f32": lambda a: pair(a, a),
    "cvt.u32.u16": lambda a: a & U32(0xFFFF),
    "mul.lo.u32": lambda a, b: a * U32(b),
    "shf.l.wrap.b32": lambda low, high, n: high << U32(n) | low >> U32(32 - n),
    "mov.u32": full,
    "ex2.approx.f32": np.exp2,
    "rcp.approx.f32": lambda a: (1 / a).astype(F32),
    "mul.rn.f32": lambda a, b: a * b,
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(F32),
    "rsqrt.approx.f32": lambda a: (1 / np.sqrt(a)).astype(F32),
    "setp.ne.s32": lambda a, b: a != full(b),
    "setp.eq.s32": lambda a, b: a == full(b),
    "setp.ge.s32": lambda a, b: a.view(np.int32) >= b,
    "setp.lt.u32": lambda a, b: a < full(b),
    "setp.gt.u32": lambda a, b: a > full(b),
    "shfl.sync.bfly.b32": shuffle,
    "min.u32": np.minimum,
    "not.b32": lambda a: ~a,
    "setp.eq.u32": lambda a, b: a == full(b),
    "setp.eq.and.u32": lambda a, b, c: (a == full(b)) & c,
    "vote.sync.all.pred": lambda a, members: np.repeat(a.reshape(-1, 32).all(1), 32),
}


class Assembler:
    """Executes an inline assembly text."""

    def __init__(self, text, outputs, operands):
        self.names = {f"${i + outputs}": value for i, value in enumerate(operands)}
        text = text.strip()
        for line in (text[1:-1] if text.startswith("{") else text).split(";"):
            self.line(line.strip())
        self.outputs = [self.names.get(f"${i}") for i in range(outputs)]

    def value(self, name):
        """Of a register or a number; a float register's bits where a word is moved."""
        name = name.strip()
        if name in self.names:
            return self.names[name]
        if name.startswith("0f"):
            return full(U32(int(name[2:], 16)).view(F32), F32)
        # Grids are one-dimensional.
        return 0 if name == "%ctaid.z" else int(name, 0)

    def line(self, line):
        """One instruction."""
        if not line or line.startswith("."):
            return
        where = None
        line = re.sub(r"^[A-Z]+:\s*", "", line)
        if line.startswith("@"):
            name, line = line[1:].split(None, 1)
            where = ~self.names[name[1:]] if name.startswith("!") else self.names[name]
        operation, rest = line.split(None, 1)
        if operation.startswith(("mbarrier.", "bar.")):
            return
        if operation == "bra":
            assert not where.any(), "nobody else runs: it would wait for ever"
            return
        if operation.startswith("atom.add"):
            return self.add(rest)
        if operation.startswith("mma.sync"):
            groups = [part.split(",") for part in re.findall(r"\{(.*?)\}", rest)]
            sums = mma(*([self.value(name) for name in group] for group in groups[1:]))
            self.names |= dict(zip(groups[0], sums, strict=True))
            return
        if operation.startswith("cp.async"):
            return self.copy(operation, rest, where)
        if operation.startswith(("ld.", "st.")):
            return self.memory(operation, rest, where)
        target, *names = [name.strip() for name in rest.split(",")]
        values = [self.value(name) for name in names]
        if operation == "mov.b32" and isinstance(values[0], int):
            values[0] = full(values[0])
        elif operation == "mov.b32" and target in ("a", "b"):
            values[0] = values[0].view(F32)
        with np.errstate(all="ignore"):
            found = _OPERATIONS[operation](*values)
        if where is not None:
            found = np.where(where, found, self.names[target])
        self.names[target] = found

    def add(self, rest):
        """An atomic addition, thread after thread."""
        target, pointer, value = (part.strip(" []") for part in rest.split(","))
        pointer, value, old = self.value(pointer), self.value(value), np.zeros(THREADS, U32)
        for thread, start in pointer.places():
            word = pointer.memory.bytes[start : start + 4].view(U32)
            old[thread] = word[0]
            word[0] = (int(word[0]) + int(value[thread])) & 0xFFFFFFFF
        self.names[target] = old

    def copy(self, operation, rest, where):
        """A bulk copy, or a prefetch, which is written down."""
        values = [self.value(name.strip(" []")) for name in rest.split(",")]
        if "prefetch" in operation:
            pointer, size = values
            pointer.memory.prefetched += [
                (start, int(size[thread])) for thread, start in pointer.places(0, where)
            ]
            return
        target, source, size, _ = values
        for (thread, to), (_, start) in zip(
            target.places(0, where), source.places(0, where), strict=True
        ):
            count = int(size[thread])
            assert count % 16 == 0 and to % 16 == 0 and start % 16 == 0
            assert 0 <= start and start + count <= source.memory.bytes.size
            assert 0 <= to and to + count <= target.memory.bytes.size
            target.memory.bytes[to : to + count] = source.memory.bytes[start : start + count]

    def memory(self, operation, rest, where):
        """A load or a store, of one or several registers."""
        if operation.startswith("st."):
            address, registers = re.fullmatch(r"\[(.*)\], (.*)", rest).groups()
        else:
            registers, address = re.fullmatch(r"(.*), \[(.*)\]", rest).groups()
        base, _, offset = address.partition("+")
        pointer, names = self.names[base], registers.strip("{} ").split(",")
        for i, name in enumerate(name.strip() for name in names):
            places = pointer.places(int(offset or 0) + 4 * i, where)
            kind = {"f32": "f32", "b16": "i16"}.get(operation[-3:], "i32")
            if operation.startswith("st."):
                size = 2 if operation.endswith("b16") else 4
                pointer.memory.store(places, self.names[name], size)
                continue
            loaded = pointer.memory.load(places, kind)
            before = self.names.get(name)
            self.names[name] = loaded if where is None else np.where(where, loaded, before)


def _inline_asm(kind, operands, text, constraints, has_side_effects=False):
    if text.startswith("mma.sync"):
        return mma(operands[:4], operands[4:6], operands[6:])
    outputs = sum("=" in c for c in constraints.split(","))
    found = Assembler(text, outputs, operands).outputs
    if kind is None:
        assert not found
        return None
    # Several results are a struct.
    return found if isinstance(kind, list) else found[0]


def _load(kind, pointer, alignment):
    kind, n = kind if isinstance(kind, tuple) else (kind, 1)
    assert (pointer.at % alignment == 0).all()
    values = [pointer.memory.load(pointer.places(4 * i), kind) for i in range(n)]
    return values if n > 1 or alignment > 4 else values[0]


def _store(value, pointer, alignment):
    for i, part in enumerate(value if isinstance(value, list) else [value]):
        assert (pointer.at % alignment == 0).all()
        pointer.memory.store(pointer.places(4 * i), part, 4)


class Carried(list):
    """An array between hooks: its values, an array of all threads for each."""

    @property
    def registers(self):
        """The same in vectors."""
        width = next(n for n in (4, 2, 1) if len(self) % n == 0)
        vectors = [self[i : i + width] for i in range(0, len(self), width)]
        return types.SimpleNamespace(flat=vectors)


def _carry(registers, per_thread, signed=None):
    values = [value for vector in registers for value in vector]
    assert len(values) == per_thread
    return Carried(values)


def _compare(predicate, a, b):
    return {"ult": np.less, "eq": np.equal, "ne": np.not_equal}[predicate](a, b)


def _greater(a, b):
    return np.maximum(a.view(np.int32), b.view(np.int32)).view(U32)


def _constant(value, kind):
    return full(value, {"i32": U32, "i64": np.int64, "f32": F32}[kind])


def _inline_mgpu(*, arg_types, return_type=None):
    def decorate(run):
        return lambda *arguments: run(None, *arguments)

    return decorate


class _F32Type:
    @staticmethod
    def get():
        return "f32"


def _mem_ref_type(dtype):
    return types.SimpleNamespace(element_type=_F32Type() if dtype == F32 else None)


# In the place of MLIR's, in all modules of which the hooks are made.
_MLIR = dict(
    plgpu=types.SimpleNamespace(
        inline_mgpu=_inline_mgpu,
        RefType=lambda: None,
        Layout=types.SimpleNamespace(WG_SPLAT=None),
    ),
    arith=types.SimpleNamespace(
        CmpIPredicate=types.SimpleNamespace(ult="ult", eq="eq", ne="ne"),
        cmpi=_compare,
        select=np.where,
        extui=lambda kind, flag: flag.astype(U32),
        extsi=lambda kind, value: value.view(np.int32).astype(np.int64),
        bitcast=lambda kind, value: value.view({"i32": U32, "f32": F32}[kind]),
        addi=np.add,
        subi=np.subtract,
        muli=np.multiply,
        divui=np.floor_divide,
        remui=np.remainder,
        minui=np.minimum,
        maxui=np.maximum,
        maxsi=_greater,
        shli=np.left_shift,
        andi=np.bitwise_and,
        ori=np.bitwise_or,
        shrui=np.right_shift,
        addf=np.add,
        mulf=np.multiply,
    ),
    llvm=types.SimpleNamespace(
        inline_asm=_inline_asm,
        extractvalue=lambda kind, found, at: found[at[0]],
        StructType=types.SimpleNamespace(get_literal=list),
        load=_load,
        store=_store,
    ),
    ir=types.SimpleNamespace(
        IntegerType=types.SimpleNamespace(get_signless="i{}".format),
        F32Type=_F32Type,
        VectorType=types.SimpleNamespace(get=lambda shape, kind: (kind, *shape)),
        MemRefType=_mem_ref_type,
    ),
    utils=types.SimpleNamespace(
        c=_constant,
        when=when,
        warpgroup_barrier=lambda: None,
        thread_idx=lambda: np.arange(THREADS, dtype=U32),
        memref_ptr=lambda memory: Pointer(memory, 0),
        getelementptr=lambda pointer, at, kind: pointer.plus(at[0]),
    ),
)
# A vector is a list of values, too; an argument is an int of Python's.
_OWN = {
    ptx: dict(join=list, split=list, scalar=full),
    carriers: dict(
        carrier=lambda per_thread: None,
        carried=lambda per_thread, dtype: None,
        carry=_carry,
        carry_values=lambda values, signed=None: Carried(values),
        values=list,
    ),
}


@contextlib.contextmanager
def emulated(*modules):
    """The hooks that are made in these modules compute while this lasts."""
    modules = (*modules, barriers, carriers, ptx)
    fakes = [(module, *item) for module in modules for item in _MLIR.items()]
    fakes = [(module, name, fake) for module, name, fake in fakes if hasattr(module, name)]
    fakes += [(module, *item) for module, own in _OWN.items() for item in own.items()]
    before = [(module, name, getattr(module, name)) for module, name, _ in fakes]
    try:
        for module, name, fake in fakes:
            setattr(module, name, fake)
        yield
    finally:
        for module, name, real in before:
            setattr(module, name, real)
