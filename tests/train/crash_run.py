# SPDX-License-Identifier: Apache-2.0
"""A small training run in a process of its own, to be killed: python crash_run.py FOLDER STEPS."""

import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from lvjax.core.compat import enable_compilation_cache  # noqa: E402
from lvjax.core.signals import interruptible  # noqa: E402
from lvjax.models.dit import dit_spec  # noqa: E402
from lvjax.train.extension import ExtensionTask, extension_loss  # noqa: E402
from lvjax.train.loop import Indexed, fit  # noqa: E402
from lvjax.train.state import TrainOptions, init_state, make_optimizer, make_step  # noqa: E402
from tests.drawn import drawn  # noqa: E402
from tests.tiny import DIT  # noqa: E402


def batch(n):
    rng = np.random.default_rng(n)
    return {
        "latents": rng.standard_normal((2, 1, 3, 4, 4, 16)).astype(np.float32),
        "text": rng.standard_normal((2, 1, 5, 16)).astype(np.float32),
        "null": np.zeros((2, 5, 16), np.float32),
        "least": np.zeros((2, 1), np.int32),
    }


def main(folder: str, steps: int) -> None:
    enable_compilation_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # it starts many times
    o = TrainOptions(steps, 1e-3, 2, log_every=1, save_every=0.05)
    optimizer = make_optimizer(o)
    loss = extension_loss(DIT, lambda params, rows: rows, ExtensionTask())
    begin = jax.jit(lambda params: init_state(params, optimizer, seed=3))
    state = begin({"dit": drawn(dit_spec(DIT), 0)})
    print("ready", flush=True)
    with interruptible():
        state = fit(make_step(loss, optimizer, o), state, Indexed(batch), o, folder)
    total = sum(float(np.abs(np.asarray(a, np.float64)).sum()) for a in jax.tree.leaves(state))
    print("done", total, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
