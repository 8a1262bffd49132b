"""Where compiled programs are kept between processes."""

import logging
import os
from pathlib import Path

import jax

_log = logging.getLogger("mimo_jax")


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, unless the user has set that up already.

    The folder is `mimo_jax/xla` in $XDG_CACHE_HOME, else in ~/.cache. Mosaic GPU numbers the
    kernels of a process (as of jax 0.11.2), and the number is part of what a program is found by: a
    process finds there what it compiles in the same order as the one before.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    from jax.experimental.compilation_cache import compilation_cache

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "mimo_jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.warning("Compiled programs are not kept: %s cannot be made (%s).", folder, error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # What was compiled before may have made JAX decide that there is no cache.
    compilation_cache.reset_cache()
