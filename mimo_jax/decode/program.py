"""The compiled program: prefill and loop in one launch, on one device's shards of everything."""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from mimo_jax.config import ModelConfig
from mimo_jax.decode.loop import decode
from mimo_jax.decode.prefill import prefill
from mimo_jax.decode.sampling import Request
from mimo_jax.decode.state import State, init_state, state_specs
from mimo_jax.drafter_config import AnyDrafterConfig
from mimo_jax.model.drafters import make_drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.sharding import (
    AXIS,
    RULES,
    AnyMesh,
    Parallel,
    ShapesOnly,
    check_divisible,
    check_heads,
    first_part,
    has_mail_on,
    param_specs,
    shardings,
)
from pallas_kernels.choice import whole_layers, without_kernels

GPU_OPTIONS = {
    # The whole loop is one CUDA graph, its predicate read on the device: no launch by the host.
    # (An option here replaces XLA's list; "+WHILE" works in XLA_FLAGS alone.)
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
    ),
    "xla_gpu_graph_min_graph_size": 1,
    # A slice that XLA fuses with the kernel that reads it cannot be in a graph.
    "xla_gpu_enable_dynamic_slice_fusion": False,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a program is compiled for; everything else is traced.

    Attributes:
      batch: sequences.
      max_len: tokens that a sequence may have.
      block: rows of a verified block; 1 is the fastest plain decoding.
      chunk: rows of a prefill pass; 0 leaves prefill out, for states whose prompts are cached.
      dtype: of keys and values.
    """

    batch: int
    max_len: int
    block: int
    chunk: int
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model's abstract parameters, and how they lie on a mesh.

    Build it with `make_plan`. `params` is the pair (target, drafter) of abstract states; a missing
    drafter is None. `ranks` is 1, or of a plan of some ranks alone how many there are for each
    device of the mesh (see `mimo_jax.decode.rank`). Without `kernels`, programs are XLA's alone, on
    GPUs too; with `whole_layers`, attention of a window's layer is one launch.
    """

    config: ModelConfig
    drafter: AnyDrafterConfig | None
    mesh: AnyMesh
    layout: str
    graphs: tuple[Any, Any]
    params: tuple[nnx.State, nnx.State | None]
    ranks: int = 1
    kernels: bool = True
    whole_layers: bool = False

    def tracing(self) -> contextlib.AbstractContextManager:
        """Is entered where the model is traced."""
        if not self.kernels:
            return without_kernels()
        return whole_layers() if self.whole_layers else contextlib.nullcontext()

    @property
    def shards(self) -> int:
        """Devices that the model is divided over."""
        return self.mesh.shape[AXIS]

    @property
    def parallel(self) -> Parallel:
        """A device's view of the mesh, inside `shard_map`."""
        return Parallel(AXIS, experts=self.layout == "expert", ranks=self.ranks)

    def modules(self, params: tuple[Any, Any]) -> tuple[Any, Any]:
        """Target and drafter, or None, with these parameters."""
        model, drafter = (
            None if graph is None else nnx.merge(graph, values)
            for graph, values in zip(self.graphs, params, strict=True)
        )
        return model, drafter

    @property
    def rules(self) -> dict[str, str | None]:
        """Logical axis to mesh axis."""
        return RULES[self.layout]

    @property
    def param_specs(self) -> tuple[Any, Any]:
        """PartitionSpecs like `params`."""
        target, drafter = self.params
        return (
            param_specs(target, self.rules),
            None if drafter is None else param_specs(drafter, self.rules),
        )

    @property
    def param_shardings(self) -> tuple[Any, Any]:
        """NamedShardings like `params`."""
        return shardings(self.param_specs, self.mesh)

    @property
    def parts(self) -> tuple[str, str]:
        """What the names of each state's parameters begin with, in a checkpoint."""
        return "target", "drafter" if self.drafter is None else self.drafter.part

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target that the drafter reads."""
        return () if self.drafter is None else self.drafter.target_layer_ids


def make_plan(
    config: ModelConfig,
    drafter: AnyDrafterConfig | None,
    mesh: AnyMesh,
    *,
    layout: str = "tensor",
    packed: bool | None = None,
    fp8: bool = False,
    dtype,
) -> Plan:
    """Declares a model on a mesh, without allocating anything.

    Args:
      config: of the target.
      drafter: of the drafter, DFlash or MTP, or None.
      mesh: from `make_mesh`; or an abstract one, to learn sizes from.
      layout: "tensor" cuts every expert, "expert" gives each device whole ones.
      packed: whether experts are MXFP4; by default as the config says.
      fp8: whether the target's, and MTP layers', attention projections and dense MLPs are FP8.
      dtype: of the other weights.

    Raises:
      MimoError: if the mesh cannot divide the model, or the drafter does not fit the target.
    """
    shards = mesh.shape[AXIS]
    check_heads(config, drafter, shards)
    model = nnx.eval_shape(
        lambda: MiMo(config, ShapesOnly(), shards=shards, packed=packed, fp8=fp8, dtype=dtype)
    )
    graph, params = nnx.split(model)
    check_divisible(params, mesh, RULES[layout])
    draft_graph = draft_params = None
    if drafter is not None:
        drafter.check_target(config)
        draft = nnx.eval_shape(
            lambda: make_drafter(drafter, ShapesOnly(), shards=shards, fp8=fp8, dtype=dtype)
        )
        draft_graph, draft_params = nnx.split(draft)
        check_divisible(draft_params, mesh, RULES[layout])
    return Plan(config, drafter, mesh, layout, (graph, draft_graph), (params, draft_params))


def make_state(plan: Plan, settings: Settings) -> State:
    """An empty state, allocated on the mesh."""
    return state_maker(plan, settings)()


def state_maker(plan: Plan, settings: Settings) -> Callable[[], State]:
    """A jitted function that allocates empty states; keep it, and it compiles once."""
    init = _init(plan, settings)
    specs = state_specs(jax.eval_shape(init), plan.rules)
    return jax.jit(init, out_shardings=shardings(specs, plan.mesh))


def make_program(plan: Plan, settings: Settings, options: dict[str, Any] | None = None):
    """Compiles nothing yet: returns the jitted `program(params, state, request) -> state`.

    Args:
      plan: of the model.
      settings: what to compile for.
      options: XLA's compiler options on GPUs, beside ours.

    Parameters are arguments, never constants; the state is donated. One call prefills what is not
    cached and decodes up to `request.limit`, or to the round that reaches `request.pause`; the next
    goes on from there.
    """
    specs = state_specs(jax.eval_shape(_init(plan, settings)), plan.rules)

    def body(params, state: State, request: Request) -> State:
        model, drafter = plan.modules(params)
        # XLA's collectives would leave the loop to the host.
        mail = plan.kernels and has_mail_on(plan.mesh)
        parallel = plan.parallel.with_mail() if mail else plan.parallel
        with plan.tracing():
            if settings.chunk:
                state = prefill(model, drafter, plan.taps, state, settings.chunk, parallel)
            return decode(model, drafter, plan.taps, state, request, settings.block, parallel)

    sharded = jax.shard_map(
        body,
        mesh=plan.mesh,
        in_specs=(plan.param_specs, specs, PartitionSpec()),
        out_specs=specs,
        check_vma=False,
    )
    on_gpu = plan.mesh.devices.flat[0].platform == "gpu"
    return jax.jit(
        sharded,
        donate_argnums=1,
        # On one device jit may call the results' shardings otherwise, and then trace them anew.
        out_shardings=shardings(specs, plan.mesh),
        compiler_options=GPU_OPTIONS | (options or {}) if on_gpu else None,
    )


def _init(plan: Plan, settings: Settings):
    init = partial(
        init_state,
        plan.config,
        plan.drafter,
        batch=settings.batch,
        max_len=settings.max_len,
        block=settings.block,
        shards=plan.shards * plan.ranks,
        dtype=settings.dtype,
    )
    if plan.ranks == 1:
        return init

    def part() -> State:
        """The part of the ranks that are there."""
        state = init()
        return jax.tree.map(
            lambda leaf, spec: first_part(leaf, spec, plan.ranks),
            state,
            state_specs(state, plan.rules),
        )

    return part
