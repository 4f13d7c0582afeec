# SPDX-License-Identifier: Apache-2.0
"""The one file that knows about jax versions and process-wide jax settings."""

import os
from pathlib import Path

import jax


def cache_dir() -> Path:
    """Where compiled programs are kept between runs ($LVJAX_CACHE_DIR, else the user's cache
    folder).
    """
    base = os.environ.get("LVJAX_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "lvjax"
    )
    return Path(base)


def enable_compilation_cache() -> None:
    """Turn on jax's persistent compilation cache, unless the user has configured one or has no
    writable place.
    """
    if jax.config.jax_compilation_cache_dir or os.environ.get("LVJAX_NO_CACHE"):
        return
    path = cache_dir() / "xla"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
