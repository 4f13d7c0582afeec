# SPDX-License-Identifier: Apache-2.0
"""The one file that knows about jax versions and process-wide jax settings."""

import os
from pathlib import Path

import jax

SLICES_WIDEN = jax.__version_info__ < (0, 11)
"""Whether XLA on the CPU slices bfloat16 as float32, see core/offload.py."""


def cache_dir() -> Path:
    """Where compiled programs are kept between runs ($LVJAX_CACHE_DIR, else the user's cache
    folder).
    """
    if own := os.environ.get("LVJAX_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lvjax"


def enable_compilation_cache() -> None:
    """Turn on jax's persistent compilation cache, unless the user has configured one or has no
    writable place.
    """
    if jax.config.jax_compilation_cache_dir or os.environ.get("LVJAX_NO_CACHE"):
        return
    try:
        path = cache_dir() / "xla"
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no writable place, or no home at all
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
