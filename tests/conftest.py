"""Sets JAX up for the tests before anything imports it; holds the fixtures that all of them use.

Environment:
  MIMO_TEST_PLATFORM: "cpu" (default; eight virtual devices) or "gpu".
  MIMO_TEST_SEED: the seed of the fixture `rng`; without it each test draws a fresh one.
  MIMO_TEST_UNTIL: seconds since 1970; tests whose turn comes later are skipped, each by its name.
  JAX_DISABLE_MOST_OPTIMIZATIONS: 0 compiles for a CPU with LLVM's optimizations, as users do.
"""

import importlib.util
import os
import pathlib
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
VIRTUAL_DEVICES = 8
LONGEST = ("decode", "train", "model")
"""Folders whose files take long: begun first, so that processes end at the same time."""
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}


def _set_environment() -> None:
    """Environment variables rather than jax.config: the commands that tests start inherit them."""
    platform = os.environ.get("MIMO_TEST_PLATFORM", "cpu")
    if platform not in PLATFORMS:
        raise pytest.UsageError(f"MIMO_TEST_PLATFORM={platform!r} is not one of {list(PLATFORMS)}.")
    os.environ["JAX_PLATFORMS"] = PLATFORMS[platform]
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if "host_platform_device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={VIRTUAL_DEVICES}")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if platform == "cpu":
        # Compiling is most of the tests' time, and LLVM's optimizations are half of that. The HLO
        # is the same.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # Entries are not written atomically, so that processes of pytest-xdist do not share a folder.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = ROOT / ".cache" / "tests" / f"python{sys.version_info.minor}-{worker}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


_set_environment()
import jax  # noqa: E402  (its settings are read when it is imported)

jax.config.update("jax_numpy_dtype_promotion", "strict")

# A first example compiles, and machines are busy: time is bounded by pytest-timeout alone.
slow = [HealthCheck.too_slow]
settings.register_profile("mimo", deadline=None, print_blob=True, suppress_health_check=slow)
settings.load_profile("mimo")


def _missing(marker: str, least: int = 8) -> str | None:
    """Why tests of this marker cannot run here, or None.

    Args:
      marker: its name.
      least: GPUs that a test of the marker gpu8 can do with.
    """
    if marker in ("gpu", "gpu8"):
        needed = least if marker == "gpu8" else 1
        platform, count = jax.default_backend(), jax.device_count()
        if platform != "gpu" or count < needed:
            return f"needs {needed} GPU(s); here: {count} {platform} device(s)"
    if marker == "oracle":
        absent = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
        if absent:
            return f"{', '.join(absent)} not installed: pip install -e '.[dev,oracle]'"
    return None


def pytest_collection_modifyitems(items):
    """The longest first; skips, with the reason, tests whose device or package is not here."""
    first = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.parent, len(first)))
    for marker in ("gpu", "gpu8", "oracle"):
        for item in items:
            found = item.get_closest_marker(marker)
            if found and (reason := _missing(marker, **found.kwargs)):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture: whether there is time left to begin this test."""
    if time.time() > float(os.environ.get("MIMO_TEST_UNTIL") or "inf"):
        pytest.skip(f"NOT RUN, MIMO_TEST_UNTIL has passed: {item.nodeid}")


def _fresh_generator() -> np.random.Generator:
    seed = int(os.environ.get("MIMO_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"MIMO_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator for each test; a failure's report shows the seed that repeats it."""
    return _fresh_generator()


@pytest.fixture(scope="module")
def module_rng() -> np.random.Generator:
    """A fresh generator for what a file's tests share; the first test's report shows the seed."""
    return _fresh_generator()


@pytest.fixture
def compiles():
    """Counts backend compiles while a test runs."""
    seen = []

    def listen(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    seen.append(None)  # The listener stays registered: what it sees from now on is not looked at.
