# SPDX-License-Identifier: Apache-2.0
"""The suite runs on the CPU with 8 simulated devices, strict dtype promotion and no silent rank
promotion.  XLA leaves out most optimisations, also in the commands that tests start: the
compiler takes more time than the small models do.  Where there is one (jax 0.10), it also writes
its code by the older of its two ways, which compiles a step of training in less than half of the
time.  The files that import `tests.full` have the optimisations; `make test-long` runs the whole
suite with all that users have, by JAX_DISABLE_MOST_OPTIMIZATIONS=0.
"""

import gc
import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
OLDER_WAY = version("jaxlib").startswith("0.10.")  # later ones know no such flag, and end at it
if OLDER_WAY and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax  # noqa: E402

from lvjax.core.compat import enable_compilation_cache  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
enable_compilation_cache()
# processes meet the same small programs: a sixth less time, measured on a third of the suite
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_runtest_teardown(item, nextitem):
    """Forget the compiled programs of a file with its last test.  Each is mapped into memory
    several times, and a process that keeps those of the whole suite comes to the kernel's limit of
    65,530.
    """
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()
        gc.collect()
