"""What the compiled loop does on eight devices: its collectives, and what it does not copy."""

import dataclasses
from collections import Counter
from collections.abc import Set

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_request
from hlo import Module

from mimo_jax import cache
from mimo_jax.decode.nucleus import THRESHOLDS
from mimo_jax.decode.program import Settings, make_plan, make_program, state_maker
from mimo_jax.drafter_config import MTPConfig
from mimo_jax.presets import drafter_preset, preset
from mimo_jax.sharding import make_mesh

DEVICES, BLOCK, MAX_LEN = 8, 8, 2048
MTP_LAYERS, WINDOW = 3, 139
CONFIG = preset("mimo-nano")
DRAFTER = drafter_preset("mimo-nano")
MOVES = {
    # What may hold a cache without copying it.
    "bitcast",
    "conditional",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "scatter",
    "tuple",
    "while",
}


def trace(layout="tensor", devices=DEVICES, batch=1, block=BLOCK, config=CONFIG, drafter=DRAFTER):
    """The program of mimo-nano, traced and not yet compiled; nothing is allocated."""
    plan = make_plan(config, drafter, make_mesh(devices), layout=layout, dtype=jnp.float32)
    settings = Settings(batch=batch, max_len=MAX_LEN, block=block, chunk=64, dtype=jnp.float32)
    state = jax.eval_shape(state_maker(plan, settings))
    request = make_request(batch, limit=100)
    return make_program(plan, settings).trace(plan.params, state, request)


@pytest.fixture(scope="module", params=["tensor", "expert"])
def module(request) -> Module:
    return Module(trace(request.param).lower().compile().as_text())


@pytest.fixture(scope="module")
def whole() -> Module:
    """On one device, where a cache has several heads and sequences: there its order matters.

    A block of 7: with 8, scores would have a cache's shape by chance.
    """
    return Module(trace(devices=1, batch=3, block=7).lower().compile().as_text())


def decode_loop(module: Module):
    """What the draft-and-verify loop runs: the entry's other loop, before it, is prefill."""
    loops = module.loops()
    assert len(loops) == 2
    return module.run_by(loops[1].body)


def test_collectives_of_a_round(module):
    layers, draft_layers, d = CONFIG.num_hidden_layers, DRAFTER.num_hidden_layers, 256
    found = Counter()
    for i in decode_loop(module):
        if i.opcode.startswith(("all-", "reduce-scatter", "collective", "ragged", "send", "recv")):
            shapes = tuple((dtype, tuple(n for n in s if n > 1)) for dtype, s in i.shapes)
            found[i.opcode, shapes] += 1
    block, drafted = (BLOCK, d), (BLOCK, DEVICES)
    expected = {
        # Two a layer, of target and drafter, and the block's embeddings.
        ("all-reduce", (("f32", block),)): 2 * layers + 2 * draft_layers + 1,
        # The anchor's embedding.
        ("all-reduce", (("f32", (d,)),)): 1,
        # The projected features; every device's best logit and its token, in the branches for
        # greedy and for sampled tokens, and the likeliest before the latter.
        ("all-gather", (("f32", block),)): 1,
        ("all-gather", (("f32", drafted),)): 3,
        ("all-gather", (("s32", drafted),)): 2,
        # A pass of the searches for top-k and top-p.
        ("all-reduce", (("u32", (BLOCK, THRESHOLDS["cpu"])),)): 1,
        ("all-reduce", (("u32", (4, BLOCK, THRESHOLDS["cpu"])),)): 1,
        # The same for the drafts.
        ("all-gather", (("f32", (BLOCK - 1, DEVICES)),)): 1,
        ("all-gather", (("s32", (BLOCK - 1, DEVICES)),)): 1,
    }
    assert found == expected


def test_no_weight_is_gathered(module):
    """Activations of a chunk are the largest thing that any gather makes."""
    everything = module.run_by(module.entry)
    gathered = [i for i in everything if i.opcode.startswith("all-gather")]
    assert gathered
    most = 64 * CONFIG.hidden_size
    assert max(i.elements for i in gathered) <= most
    smallest_weight = CONFIG.hidden_size * CONFIG.num_attention_heads * CONFIG.v_head_dim
    assert most < smallest_weight


def cache_sized(instructions, block: int, more: Set[int] = frozenset()) -> list:
    """Instructions that make an array of a cache's rows and columns, and may have copied it."""
    found = []
    heads = {CONFIG.head_dim, CONFIG.v_head_dim, DRAFTER.head_dim}
    attentions = [CONFIG.attention(layer) for layer in range(CONFIG.num_hidden_layers)]
    attentions.append(DRAFTER.attention)
    rows = {cache.cache_rows(attention, MAX_LEN, block) for attention in attentions} | more
    for i in instructions:
        for _, sizes in i.shapes:
            holds_cache = any(row in sizes for row in rows) and any(h in sizes for h in heads)
            if holds_cache and i.opcode not in MOVES:
                found.append(i)
    return found


def writes_in_place(instruction, module: Module) -> bool:
    """Whether a fusion is a scatter, or a slice written, into its own operand."""
    if instruction.opcode != "fusion":
        return False
    inner = [i for name in instruction.called for i in module.computations[name]]
    root = next(i for i in inner if i.text.lstrip().startswith("ROOT"))
    return root.opcode in ("scatter", "dynamic-update-slice")


def check_copies(module, block):
    body = decode_loop(module)
    assert sum(i.opcode == "scatter" for i in body) >= 2 * CONFIG.num_hidden_layers
    copies = [i for i in cache_sized(body, block) if not writes_in_place(i, module)]
    assert not copies, "\n".join(i.text[:160] for i in copies)


def test_no_cache_is_copied(module):
    check_copies(module, BLOCK)


def test_no_cache_is_copied_on_one_device(whole):
    check_copies(whole, 7)


def test_only_the_drafter_joins_its_context_and_its_block(module):
    """Its keys, and its values, of the context and the block lie side by side: one copy a layer."""

    def beside(attention):
        return cache.cache_rows(attention, MAX_LEN, BLOCK) + BLOCK

    layers = Counter(beside(DRAFTER.attention_of(i)) for i in range(DRAFTER.num_hidden_layers))
    instructions = decode_loop(module)
    for rows, count in layers.items():
        joined = [i for i in instructions if i.opcode == "concatenate" and rows in i.shapes[0][1]]
        assert len(joined) == 2 * count
    for attention in (CONFIG.attention(0), CONFIG.attention(1)):
        rows = beside(attention)
        sized = [i for i in instructions if any(rows in sizes for _, sizes in i.shapes)]
        # The drafter's full layers have as many rows. Constants are named outside the loop.
        others = [i for i in sized if "while/body/" in i.text and "/drafter/" not in i.text]
        assert not others and (rows in layers or not sized)


def test_nothing_calls_the_host(module):
    check_host(module)


def check_host(module):
    for i in decode_loop(module):
        assert i.opcode not in ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")
        if i.opcode == "custom-call":
            # A routine inside XLA's CPU runtime; a callback's target has "callback" in its name.
            assert 'custom_call_target="TopK"' in i.text, i.text[:200]


def inner_jaxprs(jaxpr):
    """A closed jaxpr and all those inside it."""
    yield jaxpr
    for equation in jaxpr.jaxpr.eqns:
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(value, "jaxpr"):
                yield from inner_jaxprs(value)
            elif hasattr(value, "eqns"):
                yield from inner_jaxprs(jax.extend.core.ClosedJaxpr(value, []))


@pytest.fixture(scope="module", params=["tensor", "expert"])
def mtp(request) -> Module:
    """With three MTP layers, on eight devices, and a window that is no other size."""
    config = dataclasses.replace(CONFIG, sliding_window=WINDOW)
    kinds = {"block": MTP_LAYERS + 1, "config": config, "drafter": MTPConfig(config, MTP_LAYERS)}
    return Module(trace(request.param, **kinds).lower().compile().as_text())


@pytest.mark.slow
def test_collectives_of_a_round_of_mtp(mtp):
    """Of each layer one row alone goes through attention's output, MLP and head."""
    found = Counter()
    for i in decode_loop(mtp):
        if i.opcode.startswith(("all-", "reduce-scatter", "collective", "ragged", "send", "recv")):
            shapes = tuple((dtype, tuple(n for n in s if n > 1)) for dtype, s in i.shapes)
            found[i.opcode, shapes] += 1
    d, block = CONFIG.hidden_size, MTP_LAYERS + 1
    expected = Counter(
        {
            # Two a layer of the target, its block's embeddings, and those of the known tokens.
            ("all-reduce", (("f32", (block, d)),)): 2 * CONFIG.num_hidden_layers + 2,
            # Two a layer on its newest row, and the embeddings of all drafts but the last.
            ("all-reduce", (("f32", (d,)),)): 2 * MTP_LAYERS + MTP_LAYERS - 1,
            ("all-gather", (("f32", (block, DEVICES)),)): 3,
            ("all-gather", (("s32", (block, DEVICES)),)): 2,
            ("all-reduce", (("u32", (block, THRESHOLDS["cpu"])),)): 1,
            ("all-reduce", (("u32", (4, block, THRESHOLDS["cpu"])),)): 1,
            # Every device's best logit and its token, for each draft.
            ("all-gather", (("f32", (DEVICES,)),)): MTP_LAYERS,
            ("all-gather", (("s32", (DEVICES,)),)): MTP_LAYERS,
        }
    )
    for layer in range(MTP_LAYERS):
        # The projected rows: those of a block, and those that held drafts.
        expected["all-gather", (("f32", (block + layer, d)),)] += 1
    assert found == expected


@pytest.mark.slow
def test_mtp_copies_no_cache_and_calls_no_host(mtp):
    body, rings = decode_loop(mtp), {WINDOW, WINDOW + MTP_LAYERS}
    sized = [i for i in cache_sized(body, MTP_LAYERS + 1, rings) if not writes_in_place(i, mtp)]
    assert not sized, "\n".join(i.text[:160] for i in sized)
    scatters = 2 * (CONFIG.num_hidden_layers + MTP_LAYERS) + 1
    assert sum(i.opcode == "scatter" for i in body) >= scatters
    check_host(mtp)


def test_parameters_are_arguments_not_constants():
    import jax.extend.core  # noqa: F401  (inner_jaxprs uses it)

    traced = trace()
    constants = [
        np.asarray(constant).nbytes
        for jaxpr in inner_jaxprs(traced.jaxpr)
        for constant in jaxpr.consts
        if hasattr(constant, "shape") and not isinstance(constant, jax.core.Tracer)
    ]
    arguments = sum(v.aval.size * v.aval.dtype.itemsize for v in traced.jaxpr.jaxpr.invars)
    assert arguments > 8_000_000
    assert sum(constants) < 1_000_000
    assert not any(line.count(",") > 10_000 for line in traced.lower().as_text().splitlines()), (
        "a large literal in the lowered program"
    )
