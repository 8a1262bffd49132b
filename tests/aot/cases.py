"""The programs that test_h200.py compiles: each takes a mesh and returns a Case."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from h200 import Case
from jax.sharding import PartitionSpec

from mimo_jax.decode.kernel_weights import kernel_plan
from mimo_jax.decode.options import Request
from mimo_jax.decode.program import (
    GPU_OPTIONS,
    Settings,
    make_plan,
    make_program,
    state_maker,
)
from mimo_jax.drafter_config import MTPConfig
from mimo_jax.presets import drafter_preset, preset
from mimo_jax.sharding import shardings
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.expert_ffn.lanes import Lanes
from pallas_kernels.expert_ffn.layout import BARRIER_WORDS, KernelWeights, plan_for
from pallas_kernels.expert_ffn.mosaic_gpu import Launch, expert_ffn_mosaic
from pallas_kernels.expert_ffn.shapes import SHAPES, Shape

LAYERS = 24


def abstract(shape: Shape, t: int):
    """x, packed weights, expert ids and routing of a layer."""
    plans = plan_for(2 * shape.f, shape.d), plan_for(shape.d, shape.f)
    words = [jax.ShapeDtypeStruct((shape.e, *plan.packed_shape), jnp.uint32) for plan in plans]
    return (
        jax.ShapeDtypeStruct((t, shape.d), jnp.bfloat16),
        KernelWeights(*words, jax.ShapeDtypeStruct((BARRIER_WORDS,), jnp.uint32), *plans),
        jax.ShapeDtypeStruct((t, shape.c), jnp.int32),
        jax.ShapeDtypeStruct((t, shape.c), jnp.float32),
    )


def kernel(name: str, t: int) -> Case:
    """The kernel by itself."""
    return Case(
        jax.jit(functools.partial(expert_ffn, implementation="mosaic_gpu")),
        abstract(SHAPES[name], t),
    )


def kernel_pro_tp8(mesh) -> Case:
    """A rank of eight, two blocks of 8."""
    return kernel("pro-tp8", 16)


def kernel_pro(mesh) -> Case:
    """Whole experts, two blocks of 8."""
    return kernel("pro", 16)


def kernel_nano(mesh) -> Case:
    """The shipped model, two blocks of 8."""
    return kernel("nano", 16)


def kernel_prefill(mesh) -> Case:
    """A rank of eight, a chunk of a prompt."""
    return kernel("pro-tp8", 256)


ONE, TWO = Launch(), Launch(fused=False)


def launched(name: str, t: int, launch: Launch) -> Case:
    """The kernel by itself, launched in another way."""
    run = functools.partial(expert_ffn_mosaic, launch=launch)
    return Case(jax.jit(run), abstract(SHAPES[name], t))


def one_pro_tp8(mesh) -> Case:
    """A rank of eight, a block of 8."""
    return launched("pro-tp8", 8, ONE)


def one_pro_tp8_stream(mesh) -> Case:
    """The same with the residual stream added, and the next layer's weights brought near."""
    x, *others = abstract(SHAPES["pro-tp8"], 8)
    ahead = jax.ShapeDtypeStruct((1, 3392, 6144), jnp.float8_e4m3fn)
    return Case(jax.jit(functools.partial(expert_ffn_mosaic, launch=ONE)), (x, *others, x, ahead))


def one_pro(mesh) -> Case:
    """Whole experts, one token."""
    return launched("pro", 1, ONE)


def one_flash_tp8(mesh) -> Case:
    """Sixteen warps."""
    return launched("flash-tp8", 8, ONE)


def one_nano(mesh) -> Case:
    """The shipped model."""
    return launched("nano", 8, ONE)


@dataclasses.dataclass(frozen=True)
class Counted(Lanes):
    """The kernel's hooks, counting how often a kernel body is traced."""

    traced = 0

    def put(self, *args):
        """Called once by a trace of a pass."""
        Counted.traced += 1
        return super().put(*args)


def layers_in_a_loop(mesh) -> Case:
    """Many layers of one kind, with weights of their own, in a while-loop on every device."""
    return loop(mesh, TWO)


def layers_in_one_launch_each(mesh) -> Case:
    """The same in one launch a layer."""
    return loop(mesh, ONE)


def loop(mesh, launch: Launch) -> Case:
    """Layers in a while-loop."""
    shape = SHAPES["nano"]
    x, weights, ids, routing = abstract(shape, 8)

    def program(x, layers, ids, routing, rounds):
        def one_round(carry):
            left, x = carry
            for weights in layers:
                now = (ids + left) % shape.e
                y = expert_ffn_mosaic(x, weights, now, routing, launch=launch, hooks=Counted)
                x = (x + jax.lax.psum(y, mesh.axis_names).astype(x.dtype)) * 0.5
            return left - 1, x

        return jax.lax.while_loop(lambda carry: carry[0] > 0, one_round, (rounds, x))[1]

    everywhere = PartitionSpec()
    sharded = jax.shard_map(
        program, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    rounds = jax.ShapeDtypeStruct((), jnp.int32)
    return Case(
        jax.jit(sharded),
        (x, [weights] * LAYERS, ids, routing, rounds),
        GPU_OPTIONS,
        lambda: {"traced": Counted.traced},
    )


def layers_without_options(mesh) -> Case:
    """The same with XLA's default options, which leave the loop to the host."""
    return dataclasses.replace(layers_in_a_loop(mesh), options={})


def auto_in_a_program(mesh) -> Case:
    """`auto` on packed weights, traced on a machine without a GPU, becomes the kernel alone."""
    return Case(jax.jit(expert_ffn), abstract(SHAPES["nano"], 8))


def decode_nano(mesh) -> Case:
    """The whole decode program of mimo-nano, drafts included."""
    return decode(mesh, drafter_preset("mimo-nano"))


def decode_nano_mtp(mesh) -> Case:
    """The same with MTP layers as the drafter."""
    return decode(mesh, MTPConfig(preset("mimo-nano")))


def decode_nano_kernel(mesh) -> Case:
    """The same with the DFlash drafter, on the kernel."""
    return decode(mesh, drafter_preset("mimo-nano"), kernel=True)


def decode_wide(mesh, max_len: int) -> Case:
    """Three layers of MiMo-V2.6-Pro's widths with two of its drafter's, as they are stored."""
    return program(*wide(mesh, max_len))


def decode_wide_short(mesh) -> Case:
    """With little to attend to."""
    return decode_wide(mesh, 4096)


def decode_wide_long(mesh) -> Case:
    """With so much that attention's scores are most of the temporaries."""
    return decode_wide(mesh, 131072)


def wide(mesh, max_len: int):
    """The plan and the settings of `decode_wide`."""
    config = dataclasses.replace(
        preset("mimo-v2.6-pro"),
        num_hidden_layers=3,
        hybrid_layer_pattern=(0, 1, 0),
        moe_layer_freq=(0, 1, 1),
    )
    drafter = dataclasses.replace(
        drafter_preset("mimo-v2.6-pro"), num_hidden_layers=2, target_layer_ids=(0, 0, 1, 1, 2)
    )
    plan = make_plan(config, drafter, mesh, fp8=True, dtype=jnp.bfloat16)
    block = drafter.block_size
    return plan, Settings(batch=1, max_len=max_len, block=block, chunk=256, dtype=jnp.bfloat16)


def decode(mesh, drafter, kernel=False) -> Case:
    """The decode program of mimo-nano with a drafter."""
    plan = make_plan(preset("mimo-nano"), drafter, mesh, packed=True, dtype=jnp.bfloat16)
    plan = kernel_plan(plan) if kernel else plan
    block = drafter.block_size
    return program(plan, Settings(batch=1, max_len=2048, block=block, chunk=64, dtype=jnp.bfloat16))


def program(plan, settings: Settings) -> Case:
    """The decode program of a plan, for one sequence."""
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        plan.params,
        plan.param_shardings,
    )
    state = jax.eval_shape(state_maker(plan, settings))
    everywhere = shardings(PartitionSpec(), plan.mesh)

    def argument(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    request = Request(
        limit=argument(jnp.int32, 1),
        pause=argument(jnp.int32, 1),
        eos=argument(jnp.int32, 1),
        temperature=argument(jnp.float32, 1),
        top_p=argument(jnp.float32, 1),
        top_k=argument(jnp.int32, 1),
        seed=argument(jnp.uint32),
        sequence=argument(jnp.int32, 1),
        max_draft=argument(jnp.int32),
    )
    return Case(make_program(plan, settings), (params, state, request), GPU_OPTIONS)
