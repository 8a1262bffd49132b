"""Compiles a program for H200s where there are none, and reports what the compilers made of it.

    python tests/aot/h200.py cases:kernel_pro_tp8 [--devices 8] [--dump DIR]

prints a report as JSON; `report` runs that in a process of its own, since the compilers read where
to leave their dumps when they are loaded. Nothing is run or timed. Needs jax[cuda13] >= 0.11.2.
"""

import argparse
import dataclasses
import glob
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = HERE / "h200.txtpb"
LEAST_JAX = (0, 11, 2)
TIMEOUT_S = 280


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
      function: jitted.
      arguments: ShapeDtypeStructs; without a sharding they are replicated.
      options: compiler options of XLA.
      counters: read after compiling, for the report; what tracing the case counted.
    """

    function: Any
    arguments: tuple
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    counters: Callable[[], dict[str, int]] = dict


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compilation of a Mosaic GPU kernel.

    Attributes:
      name: of the kernel.
      registers: of a thread at launch.
      spilled_bytes: stores and loads.
    """

    name: str
    registers: int
    spilled_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a program.

    Attributes:
      kernels: Mosaic GPU kernels, once for each time that one was compiled.
      lowered: Mosaic GPU calls in the lowered program: its functions are lowered once, however
        often they are called.
      launches: Mosaic GPU calls in the optimised program.
      graphs: kinds of the thunks in each CUDA graph, nested ones included.
      outside: kinds of the thunks that the host launches itself, in loops included.
      temporaries: bytes.
      counters: of the case.
    """

    kernels: list[Kernel]
    lowered: int
    launches: int
    graphs: list[list[str]]
    outside: list[str]
    temporaries: int
    counters: dict[str, int]


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    import jax

    if jax.__version_info__ < LEAST_JAX:
        return f"needs jax >= 0.11.2 with the extra cuda13; here: jax {jax.__version__}"
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "needs the extra cuda13: pip install -e '.[dev,cuda13]'"
    return None


def report(case: str, devices: int = 1, dump: str | None = None) -> Report:
    """Compiles a case, of cases.py or as MODULE:NAME, in a process of its own.

    Args:
      case: its name.
      devices: of the mesh.
      dump: a folder, without which what the compilers leave is read and forgotten.

    Raises:
      RuntimeError: if it fails, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() if dump is None else nullcontext(dump) as dump:
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if "xla_dump" not in flag] + [f"--xla_dump_to={dump}"]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_TO": dump,
            "XLA_FLAGS": " ".join(flags),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        }
        # A program that comes out of the cache is not compiled and leaves no dump.
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [
            sys.executable,
            __file__,
            case if ":" in case else f"cases:{case}",
            f"--devices={devices}",
            f"--dump={dump}",
        ]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    fields = json.loads(done.stdout.splitlines()[-1])
    kernels = [Kernel(**kernel) for kernel in fields.pop("kernels")]
    return Report(kernels=kernels, **fields)


def make_mesh(devices: int):
    """A mesh of H200s that are not there."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    topology = topologies.get_topology_desc(
        topology_name="h200",
        platform="cuda",
        target_config=TARGET.read_text(),
        topology=f"1x1x{devices}",
    )
    return Mesh(np.array(topology.devices), ("model",))


def compile_case(case: Case, mesh, dump: str) -> Report:
    """Lowers and compiles; the compilers must have been loaded with their dumps going to `dump`."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        sharding = getattr(leaf, "sharding", None) or replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    lowered = case.function.trace(*jax.tree.map(place, case.arguments)).lower()
    compiled = lowered.compile(compiler_options=case.options or None)
    graphs, outside = read_thunks(dump)
    return Report(
        kernels=read_kernels(dump),
        lowered=lowered.as_text().count("@mosaic_gpu"),
        launches=compiled.as_text().count('custom_call_target="mosaic_gpu'),
        graphs=graphs,
        outside=outside,
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        counters=case.counters(),
    )


def read_kernels(dump: str) -> list[Kernel]:
    """Registers and spills from ptxas' reports."""
    kernels = []
    for path in sorted(glob.glob(f"{dump}/*.ptxas")):
        text = Path(path).read_text()
        # A function's properties: a warning before them may say the same.
        line = r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        spills = re.findall(line, text)
        kernels.append(
            Kernel(
                name=re.sub(r"_\d+$", "", Path(path).stem),
                registers=max(map(int, re.findall(r"Used (\d+) registers", text))),
                spilled_bytes=sum(int(n) for pair in spills for n in pair),
            )
        )
    return kernels


def read_thunks(dump: str) -> tuple[list[list[str]], list[str]]:
    """Kinds of the thunks in each CUDA graph, and of those outside, of the largest program dumped.

    XLA writes its thunks as they are scheduled, and again if passes change them: a graph is a thunk
    `kCommandBuffer`, its contents and the bodies of loops are indented below theirs.
    """
    paths = glob.glob(f"{dump}/*thunk_sequence*.txt")
    scheduled = [path for path in paths if path.endswith("thunk_sequence.txt")]
    path = max(scheduled, key=lambda path: Path(path).stat().st_size)
    after = path.replace("thunk_sequence.txt", "thunk_sequence_after_thunk_passes.txt")
    graphs, outside, graph_indent = [], [], None
    for line in Path(after if after in paths else path).read_text().splitlines():
        match = re.match(r"( *)\d+:\s+(k\w+)", line)
        if match is None:
            continue
        indent, kind = len(match[1]), match[2]
        if graph_indent is not None and indent > graph_indent:
            graphs[-1].append(kind)
        elif kind == "kCommandBuffer":
            graph_indent = indent
            graphs.append([])
        else:
            graph_indent = None
            outside.append(kind)
    return graphs, outside


def main() -> None:
    """Compiles the case that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", help="MODULE:FUNCTION; it takes a mesh and returns a Case")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--dump", help="leave PTX, ptxas' reports and XLA's dumps here")
    options = parser.parse_args()
    dump = options.dump or tempfile.mkdtemp(prefix="h200_")
    os.makedirs(dump, exist_ok=True)
    # What `report` sets; here for whoever runs this by hand.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("MOSAIC_GPU_DUMP_TO", dump)
    os.environ.setdefault("XLA_FLAGS", f"--xla_dump_to={dump}")
    sys.path[:0] = [str(ROOT), str(HERE)]
    module, _, name = options.case.partition(":")
    # The case's module must see this one as h200, not as a second copy of it.
    sys.modules["h200"] = sys.modules[__name__]
    mesh = make_mesh(options.devices)
    made = getattr(importlib.import_module(module), name)(mesh)
    print(json.dumps(dataclasses.asdict(compile_case(made, mesh, dump))))


if __name__ == "__main__":
    main()
