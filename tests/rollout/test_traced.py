# SPDX-License-Identifier: Apache-2.0
"""The states that a traced method shows are those of the method's own sampling."""

import jax
import numpy as np

from lvjax.flow.trajectory import windowed
from lvjax.rollout.condition import pin
from lvjax.rollout.method import stream
from lvjax.rollout.traced import traced
from lvjax.run.open_error_free import settings
from lvjax.run.request import Request, resolved
from lvjax.run.session import open_session
from tests.tiny import relative, tiny_bundle

PROMPT = "the camera pans left over a landscape, a red circle moves up"
START = np.random.default_rng(0).uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)


def test_a_window_of_the_traced_clip_is_the_methods_own_clip():
    """With guidance, and with given frames."""
    bundle = tiny_bundle()
    request = Request((((0.0, PROMPT),),), 13, start=START, seed=3)
    session = open_session(bundle, request)
    chosen = settings(bundle.defaults, resolved(bundle, request))
    assert chosen.guidance == 2.0 and chosen.window == (0.3, 0.7)
    own = next(session.run())
    method = traced(session.method, chosen.schedule, chosen.solver)
    state = session.state()
    condition = np.asarray(state.condition)
    after, (states, frames) = next(stream(method, state, session.clips(0)))
    states = np.asarray(states)
    assert states.shape == (5, *own.latents.shape) and frames.shape == (1, 17, 16, 16, 3)
    found = pin(windowed(states, chosen.schedule, chosen.window), condition)
    assert relative(found, own.latents) < 1e-6
    for other in ((0.0, 1.0), (0.2, 0.7)):
        off = pin(windowed(states, chosen.schedule, other), condition)
        assert relative(off, own.latents) > 0.01  # the window matters
    np.testing.assert_allclose(windowed(states, chosen.schedule, (0, 1)), states[-1], atol=1e-5)
    assert int(after.clip) == 1 and int(after.next_frame) == int(own.state.next_frame)
    again = traced(session.method, chosen.schedule, chosen.solver)
    assert jax.tree.structure(again.step) == jax.tree.structure(method.step)  # compiled once
