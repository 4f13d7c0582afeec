# SPDX-License-Identifier: Apache-2.0
"""A long-video method is a pair of functions; a rollout is a scan of one of them.

Owns: `Method`, the offline `rollout` and the live `stream` over the same step.  Does not own: any
method.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial


class Method(NamedTuple):
    """init(...) -> state and step(state, clip_in) -> (state, clip_out), both pure.

    The state is one pytree of arrays whose shapes never change; keeping a clip means keeping the
    state returned. A step that needs weights is a `jax.tree_util.Partial` holding them, so that
    they are arguments of the compiled program; weights that a plain function closes over would be
    copied into it as constants.
    """

    init: Callable[..., Any]
    step: Callable[[Any, Any], tuple[Any, Any]]


def rollout(method: Method, state, clips):
    """All clips in one program; clips has a leading axis K on every array.

    Returns (state, outputs with a leading axis K).  The given state stays valid.
    """
    return _scan(_as_tree(method.step), state, clips)


def stream(method: Method, state, clips: Iterable) -> Iterator[tuple[Any, Any]]:
    """Yield (state, clip_out) after each clip; clips may be endless, and decided while the video
    plays.

    States are donated, their buffers reused in place: do not use the state given, nor a yielded one
    after asking for the next clip (save it in between).  One compilation serves every clip and
    every stream of the same method.
    """
    step = _as_tree(method.step)
    for clip in clips:
        state, out = _step(step, state, clip)
        yield state, out


def compile_step(method: Method, state, clip):
    """The compiled step of `stream` for these shapes (arrays or `jax.ShapeDtypeStruct`s), to
    look at: its memory, its program."""
    return _step.lower(_as_tree(method.step), state, clip).compile()


def _as_tree(step: Callable) -> Partial:
    return step if isinstance(step, Partial) else Partial(step)


@partial(jax.jit, donate_argnums=1)
def _step(step, state, clip):
    return step(state, clip)


@jax.jit
def _scan(step, state, clips):
    return jax.lax.scan(step, state, clips)
