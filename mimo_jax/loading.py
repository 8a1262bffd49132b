"""Opens a checkpoint, ours or a released one, as an Engine on a mesh of devices."""

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mimo_jax.checkpoint import released, store, zlab
from mimo_jax.compilation import use_compilation_cache
from mimo_jax.config import ModelConfig
from mimo_jax.decode.batch import CHUNKS
from mimo_jax.decode.kernel_weights import kernel_plan, pack_params
from mimo_jax.decode.output_fp8 import output_fp8_plan, quantize_output_params
from mimo_jax.decode.program import Plan, Settings, make_plan
from mimo_jax.drafter_config import AnyDrafterConfig
from mimo_jax.engine import DRAFTERS, Engine
from mimo_jax.errors import MimoError
from mimo_jax.planning.memory import check_memory
from mimo_jax.sharding import AXIS, RULES, AnyMesh, make_mesh
from mimo_jax.text.tokenizer import Tokenizer
from pallas_kernels.choice import kernel_absence

DEFAULT_MAX_LEN = 4096
"""Cache length where the model's context is longer and none is asked for."""

Opened = store.Checkpoint | released.Released

_log = logging.getLogger("mimo_jax")


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    devices: int | Sequence[Any] | None = None,
    drafter: bool | str | Path = True,
    max_len: int | None = None,
    experts: str = "auto",
    linear: str = "auto",
    o_proj: str = "stored",
    layout: str = "tensor",
    kernel: bool | str = True,
    dtype: Any = None,
    progress: bool = True,
) -> Engine:
    """Opens a checkpoint onto a mesh of devices.

    Args:
      path: directory of the checkpoint: ours, or one that Xiaomi released, as downloaded.
      mesh: from `make_mesh`.
      devices: instead of a mesh: how many devices, or which; all of them by default.
      drafter: "dflash", or "mtp", the target's own multi-token-prediction layers; True is the
        first that the checkpoint has; False leaves both out: decoding is plain, at its fastest,
        with a block of 1. Or the directory of another DFlash drafter, such as z-lab's.
      max_len: tokens of a sequence, prompt included; by default the model's context, at most 4096.
      experts: "packed" keeps MXFP4 in memory; "dequantized" decodes it once, here: the same
        tokens, more memory; "auto" is "dequantized" on CPUs, where decoding at every step costs
        more than it saves, if that takes at most a quarter of the machine's memory; else "packed".
        Experts that a released checkpoint stores in FP8 or bfloat16 are held in `dtype`; "mxfp4"
        quantises them here, which changes them.
      linear: what becomes of FP8 weights (attention's input projections, dense MLPs): "decoded"
        decodes them once, here; "fp8" keeps them and decodes at each use: the same tokens, less
        memory, and half the bytes for the kernels to read; "auto" is "fp8" where these run.
      o_proj: what becomes of attention's output projections: "stored" keeps them as they are; "fp8"
        quantises them here, which changes them and halves their bytes.
      layout: "tensor" cuts every expert over the devices, "expert" gives each device whole ones.
      kernel: on Hopper GPUs, run what `pallas_kernels` has kernels for by them; "whole": also
        attention of a window's layer in one launch, where it fits (`attention_layer`'s README says
        where); False is for comparing with XLA's own programs.
      dtype: of weights, activations and caches; float32 on CPUs and bfloat16 on GPUs by default.
      progress: say on stderr what takes time.

    Raises:
      MimoError: if the checkpoint is missing or damaged, does not fit the arguments, or needs more
        memory than the devices have, which is known before anything is loaded.
    """
    mesh = _mesh(mesh, devices)
    checkpoint = _open(path, drafter)
    given = dict(experts=experts, linear=linear, o_proj=o_proj, layout=layout, kernel=kernel)
    held = _held(checkpoint, mesh, dtype=dtype, **given)
    max_len = _max_len(max_len, checkpoint.config)
    tokenizer = _tokenizer(checkpoint)
    use_compilation_cache()

    def say(message: str) -> None:
        if progress:
            print(message, file=sys.stderr, flush=True)

    other = _other_drafter(drafter, checkpoint)
    drafted = _drafter(drafter, checkpoint) if other is None else other.config
    if drafter and drafted is None:
        say(f"{path} has no drafter: decoding is plain.")
    block = 1 if drafted is None else drafted.block_size
    settings = Settings(1, max_len, block, CHUNKS[-1], held.dtype)
    remake = partial(held.declare, checkpoint.config, drafted)
    plan = check_memory(remake, mesh, settings, held.ways(checkpoint))
    start = time.perf_counter()
    plan, params = held.load(plan, lambda: _load_params(checkpoint, other, plan, say))
    say(_loaded(checkpoint, plan, params, held, time.perf_counter() - start))
    return Engine(
        plan,
        params,
        tokenizer,
        max_len=max_len,
        experts=held.experts,
        dtype=held.dtype,
        progress=progress,
        directory=checkpoint.directory,
    )


@dataclasses.dataclass(frozen=True)
class _Held:
    """How a model's weights are held: what was asked for, checked and decided.

    Attributes:
      experts: "packed", "dequantized" or "dense".
      fp8: whether FP8 weights stay so.
      o_proj: "stored" or "fp8".
      layout: a key of `RULES`.
      kernel: whether to run kernels where there are some; "whole": a window layer's attention in
        one launch.
      dtype: of all other weights.
    """

    experts: str
    fp8: bool
    o_proj: str
    layout: str
    kernel: bool | str
    dtype: Any

    def declare(self, config: ModelConfig, drafter: AnyDrafterConfig | None, mesh: AnyMesh) -> Plan:
        """The model as it is loaded."""
        options = dict(layout=self.layout, packed=self.experts == "packed", fp8=self.fp8)
        return make_plan(config, drafter, mesh, dtype=self.dtype, **options)

    def ways(self, checkpoint: Opened) -> tuple[str, ...]:
        """How else its weights could take less memory."""
        dense = isinstance(checkpoint, released.Released) and self.experts == "dense"
        return ("hold the experts in 4 bits, which changes them: experts='mxfp4'",) * dense

    def load(self, plan: Plan, read: Callable[[], Any]) -> tuple[Plan, Any]:
        """Reads parameters and brings them into the form that programs take, with their plan."""
        # What cannot be is refused before anything is read.
        rewritten = output_fp8_plan(plan) if self.o_proj == "fp8" else plan
        params = jax.block_until_ready(read())
        if rewritten is not plan:
            params = quantize_output_params(plan, rewritten, params)
        run = dict(kernels=bool(self.kernel), whole_layers=self.kernel == "whole")
        plan = dataclasses.replace(rewritten, **run)
        on_cpu = plan.mesh.devices.flat[0].platform == "cpu"
        if self.experts == "packed" and self.kernel and not on_cpu:
            return _for_kernel(plan, params, self.dtype)
        return plan, params


def _held(
    checkpoint: Opened,
    mesh: Mesh,
    *,
    experts: str,
    linear: str,
    o_proj: str,
    layout: str,
    kernel: bool | str,
    dtype: Any,
) -> _Held:
    """Checks the arguments of `load` of these names, and decides what "auto" is."""
    for name, value, allowed in (
        ("experts", experts, ("auto", "packed", "dequantized", "mxfp4")),
        ("linear", linear, ("auto", "decoded", "fp8")),
        ("o_proj", o_proj, ("stored", "fp8")),
        ("layout", layout, tuple(RULES)),
        ("kernel", kernel, (True, False, "whole")),
    ):
        if value not in allowed:
            raise MimoError(f"{name}={value!r} is not allowed: it must be one of {allowed}.")
    if linear == "fp8" and not checkpoint.fp8:
        raise MimoError(
            f"linear='fp8', but {checkpoint.directory} stores no FP8 weights: use 'auto'."
        )
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = _dtype(dtype, on_cpu)
    return _Held(
        experts=_experts(experts, checkpoint, dtype, on_cpu),
        fp8=checkpoint.fp8 and _keeps_fp8(linear, bool(kernel), dtype, on_cpu),
        o_proj=o_proj,
        layout=layout,
        kernel=kernel,
        dtype=dtype,
    )


def _keeps_fp8(linear: str, kernel: bool, dtype: Any, on_cpu: bool) -> bool:
    """Whether FP8 weights stay FP8; by itself where their kernel runs: XLA decodes at every use."""
    if linear != "auto":
        return linear == "fp8"
    return kernel and not on_cpu and dtype == jnp.bfloat16 and kernel_absence() is None


def _for_kernel(plan: Plan, params: Any, dtype: Any) -> tuple[Plan, Any]:
    """Experts in the kernel's order, or as they were, with a warning that says why."""
    try:
        if (absence := kernel_absence()) is not None:
            raise absence
        if dtype != jnp.bfloat16:
            raise ValueError(f"The kernel takes bfloat16; dtype is {jnp.dtype(dtype).name}.")
        packed = kernel_plan(plan)
    except (ValueError, NotImplementedError) as error:
        _log.warning("The experts run without their kernel: %s", error)
        return plan, params
    return packed, pack_params(plan, packed, params)


def _loaded(checkpoint: Opened, plan: Plan, params: Any, held: _Held, seconds: float) -> str:
    """What was loaded, in a sentence."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    kept = {"dequantized": "decoded from MXFP4 to ", "dense": ""}.get(held.experts)
    how = "" if kept is None else f", experts {kept}{jnp.dtype(held.dtype).name}"
    platform = plan.mesh.devices.flat[0].platform
    return (
        f"Loaded {checkpoint.directory}: {checkpoint.nbytes / 1e6:.0f} MB on disk, "
        f"{size / 1e6:.0f} MB on {plan.shards} {platform} device(s){how}, {seconds:.1f} s."
    )


def _other_drafter(wanted: bool | str | Path, checkpoint: Opened) -> zlab.StoredDrafter | None:
    """A drafter in a directory of its own, if that is what was asked for."""
    named = isinstance(wanted, str) and wanted not in DRAFTERS and Path(wanted).is_dir()
    if named or isinstance(wanted, Path):
        return zlab.open_drafter(wanted, checkpoint.config)
    return None


def _load_params(
    checkpoint: Opened,
    other: zlab.StoredDrafter | None,
    plan: Plan,
    say: Callable[[str], None],
) -> Any:
    """Parameters of target and drafter on the mesh; the drafter's may come from elsewhere."""
    (target, drafter), (where, draft_where) = plan.params, plan.param_shardings
    own = (target, None if other else drafter), (where, None if other else draft_where)
    if isinstance(checkpoint, released.Released):
        for note in checkpoint.notes:
            say(note)
        params = released.load(checkpoint, *own, _reporter(say), plan.parts)
    else:
        params = store.load(checkpoint, *own, parts=plan.parts)
    if other is None:
        return params
    if other.mask is None:
        say(
            f"{other.directory} has no embedding of the mask: it is the target's row "
            f"{other.config.mask_token_id}."
        )
    embedding = params[0]["embedding"].get_value()
    return params[0], zlab.load(other, drafter, draft_where, embedding)


def _drafter(wanted: bool | str, checkpoint: Opened) -> AnyDrafterConfig | None:
    """The drafter that is asked for, or the first that there is."""
    if wanted is False:
        return None
    found = {kind: getattr(checkpoint, part) for kind, part in DRAFTERS.items()}
    present = [kind for kind, config in found.items() if config is not None]
    if wanted is True:
        return found[present[0]] if present else None
    if wanted not in present:
        raise MimoError(
            f"drafter={wanted!r} is not allowed: {checkpoint.directory} has "
            f"{' and '.join(map(repr, present)) or 'no drafter'}; True takes what there is, False "
            "leaves it out, and a directory brings another (there is none of this name)."
        )
    return found[wanted]


def _mesh(mesh: Any, devices: Any) -> Mesh:
    """The mesh that is given, or one of the devices."""
    if mesh is None:
        return make_mesh(devices)
    if devices is not None:
        raise MimoError("mesh and devices are both given: one is enough.")
    if not isinstance(mesh, Mesh) or mesh.axis_names != (AXIS,):
        raise MimoError(
            f"mesh={mesh!r} is not allowed: it must be a jax.sharding.Mesh of one axis, {AXIS!r}; "
            "devices=N makes one."
        )
    return mesh


def _open(path: Any, drafter: bool | str | Path) -> Opened:
    """Our checkpoints have a manifest; whatever else holds safetensors is taken as released.

    In the folder of a training run that has ended there is one of ours.
    """
    if not isinstance(path, str | Path):
        raise MimoError(f"path={path!r} is not allowed: it must be a checkpoint's directory.")
    path = Path(path)
    if not (path / store.NAME).exists():
        if (path / store.FINISHED / store.NAME).exists():
            return store.open_checkpoint(path / store.FINISHED)
        if released.is_released(path):
            return released.open_released(path, drafter=drafter in (True, "dflash"))
        if (path / store.CONFIG).exists() and not (path / store.PARAMS).exists():
            raise MimoError(
                f"{path} has a {store.CONFIG}, but no manifest of ours and no .safetensors files: "
                f"`mimo inspect {path}` says what a half downloaded checkpoint lacks."
            )
    return store.open_checkpoint(path)


def _reporter(say: Callable[[str], None], every_s: float = 5.0) -> Callable[[int, int], None]:
    """Says now and then how much was read."""
    last = start = time.perf_counter()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= every_s:
            last = now
            rate = done / 1e9 / (now - start)
            say(f"Read {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate:.2f} GB/s.")

    return report


def _tokenizer(checkpoint: Opened) -> Tokenizer:
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise MimoError(
            f"{checkpoint.tokenizer} has {tokenizer.vocab_size} tokens, the model "
            f"{checkpoint.config.vocab_size}: they do not belong together. Use the tokenizer that "
            "the model was trained with."
        )
    return tokenizer


def _dtype(dtype: Any, on_cpu: bool) -> Any:
    if dtype is None:
        return jnp.float32 if on_cpu else jnp.bfloat16
    for allowed in (jnp.float32, jnp.bfloat16):
        if dtype == allowed or dtype == jnp.dtype(allowed).name:
            return allowed
    raise MimoError(f"dtype={dtype!r} is not allowed: it must be float32 or bfloat16.")


def _experts(experts: str, checkpoint: Opened, dtype: Any, on_cpu: bool) -> str:
    """How the experts are held."""
    if not checkpoint.packed:
        if experts == "mxfp4" and isinstance(checkpoint, released.Released):
            return "packed"
        if experts in ("packed", "mxfp4"):
            raise MimoError(
                f"experts={experts!r}, but {checkpoint.directory} stores dense experts: use "
                "'auto'. Released checkpoints can be quantised while they are loaded, with 'mxfp4'."
            )
        return "dense"
    if experts != "auto":
        return "packed" if experts == "mxfp4" else experts
    config = checkpoint.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    weights = sum(config.moe_layer_freq) * config.n_routed_experts * expert
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = weights * jnp.dtype(dtype).itemsize <= memory // 4
    return "dequantized" if on_cpu and fits else "packed"


def _max_len(max_len: Any, config: ModelConfig) -> int:
    context = config.max_position_embeddings
    if max_len is None:
        return min(context, DEFAULT_MAX_LEN)
    whole = isinstance(max_len, int) and not isinstance(max_len, bool)
    if not whole or not 2 <= max_len <= context:
        raise MimoError(
            f"max_len={max_len!r} is not allowed: it must be 2 to {context}, the model's context."
        )
    return max_len
