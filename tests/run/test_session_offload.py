# SPDX-License-Identifier: Apache-2.0
"""Sessions whose transformers wait in the host's memory: the same video, bit for bit, and no more
weights on the device than are computed with.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest

import lvjax
from lvjax.cli.main import main
from lvjax.core.errors import InputError
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.rollout.method import stream
from lvjax.run import open_wan
from lvjax.run.bundle import Bundle, specs
from lvjax.run.defaults import Defaults
from lvjax.run.request import Request
from lvjax.run.session import _steps, open_session
from lvjax.run.weights import save
from tests.drawn import drawn
from tests.tiny import relative, tiny_bundle

DIT = DiTConfig(32, 2, 3, 48, text_dim=8, text_len=4, freq_dim=16, dtype="float32")
VAE = VAEConfig(4, 16, (1, 1, 2), 1, (True, True), 1, (0.0,) * 16, (1.0,) * 16)
DEFAULTS = Defaults(size=(16, 16), steps=4, method="wan", guidance=(2.0, 3.0), boundary=0.9)
PROMPT = "a red circle moves"
FFN = (3, 32, 48)  # of one expert


@cache
def experts() -> Bundle:
    """Two experts and the embeddings of a prompt; no part is on the disk."""
    rows = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    shell = Bundle("tiny-a14b", DIT, VAE, None, DEFAULTS, {}, parts={"dit": None, "dit_low": None},
                   embeddings={PROMPT: rows[0], "": rows[1]})  # fmt: skip
    params = {k: drawn(s, i) for i, (k, s) in enumerate(specs(shell).items())}
    for part in shell.experts:
        head = params[part]["head"]["linear"]
        head["kernel"] = 0.05 * jax.random.normal(jax.random.key(9), head["kernel"].shape)
    return replace(shell, params=params)


def request(frames, rows=1):
    return Request((((0.0, PROMPT),),) * rows, frames)


def videos(bundle, wanted, offload, clips=None):
    """Latents and frames of each clip."""
    session = open_session(replace(bundle, offload=offload), wanted)
    made = zip(session.run(), range(session.num_clips if clips is None else clips), strict=False)
    return [jax.device_get((clip.latents, clip.frames)) for clip, _ in made]


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.ptp(y) > 0
        np.testing.assert_array_equal(x, y)


def live(shape) -> int:
    """Arrays of a shape in the device's memory."""
    there = (a for a in jax.live_arrays() if a.shape == shape)
    return sum(a.sharding.memory_kind == "device" for a in there)


def test_a_session_makes_what_the_one_program_makes():
    """It runs a program for each part; `Session.method` is all of them in one."""
    session = open_session(experts(), request(9))
    (_, ours), (_, wanted) = (
        next(steps(session.state(), session.clips(0)))
        for steps in (partial(_steps, session.step), partial(stream, session.method))
    )
    for a, b in zip(ours, wanted, strict=True):
        assert relative(a, b) <= 5e-5  # measured: 0; with all optimisations of the compiler 4e-6


def test_an_expert_comes_for_its_steps(monkeypatch):
    """One after the other, each with its own weights, and the video is that of a session whose
    weights are on the device."""
    bundle, came = experts(), []
    own = live(FFN)

    def place(tree, mesh):
        before = live(FFN)
        there = jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.P()))
        came.append((before - own, live(FFN) - own))
        assert tree["blocks"]["ffn"]["fc1"]["kernel"].sharding.memory_kind == "pinned_host"
        return there

    monkeypatch.setattr(open_wan, "place", place)
    same(videos(bundle, request(9), "expert"), videos(bundle, request(9), "none"))
    assert came == [(0, 1), (0, 1)]


def test_layers_of_two_experts():
    bundle = experts()
    same(videos(bundle, request(9), "layers"), videos(bundle, request(9), "none"))


def test_layers_with_a_memory():
    """Error-Free, whose layers have a memory in part, over two devices of a mesh."""
    bundle = tiny_bundle()
    layers = videos(bundle, request(17, 2), "layers", 2)
    same(layers, videos(bundle, request(17, 2), "none", 2))


def test_an_expert_without_steps_does_not_come(monkeypatch):
    def place(tree, mesh):
        raise AssertionError

    monkeypatch.setattr(open_wan, "place", place)
    late = replace(experts(), defaults=replace(DEFAULTS, boundary=0.001))
    session = open_session(replace(late, offload="expert"), request(9))
    with pytest.raises(AssertionError):  # all steps are the first expert's
        next(session.run())


def test_a_method_with_one_expert_refuses():
    with pytest.raises(InputError, match="'expert'; the method error_free allows none, layers"):
        open_session(replace(tiny_bundle(), offload="expert"), request(9))
    with pytest.raises(InputError, match="'disk'; the method wan allows none, expert, layers"):
        open_session(replace(experts(), offload="disk"), request(9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save(path, tiny_bundle(), "float32")
    return path


def kinds(bundle):
    tree = bundle.params["dit"]
    return [a.sharding.memory_kind for a in (tree["blocks"]["norm3"]["scale"],
                                             tree["head"]["modulation"])]  # fmt: skip


def test_where_load_keeps_weights(folder, monkeypatch):
    """On the host when asked for, or when they would fill more than half of the device."""
    assert kinds(lvjax.load(folder)) == kinds(lvjax.load(folder, offload="none")) == ["device"] * 2
    held = lvjax.load(folder, offload="layers")
    assert kinds(held) == ["pinned_host", "device"] and held.offload == "layers"
    assert held.hashes == lvjax.load(folder).hashes
    total = sum(a.nbytes for a in jax.tree.leaves(held.params))
    for memory, kind in ((2 * total, "device"), (2 * total - 1, "pinned_host")):
        monkeypatch.setattr("lvjax.api.device_memory", lambda memory=memory: memory)
        assert kinds(lvjax.load(folder)) == [kind, "device"]
    for wrong, says in ((True, "offload is True; give one of"), ("expert", "allows none, layers")):
        with pytest.raises(InputError, match=says):
            lvjax.load(folder, offload=wrong)


def test_generate_from_the_host(folder):
    made = [
        lvjax.generate(lvjax.load(folder, offload=there), PROMPT, num_frames=17, **how)
        for there, how in (("none", {}), ("layers", {"offload": "layers"}), ("layers", {}))
    ]
    for video in made[1:]:
        np.testing.assert_array_equal(video.latents, made[0].latents)
    with pytest.raises(InputError, match="offload is 'disk'; give one of"):
        lvjax.generate(lvjax.load(folder), PROMPT, offload="disk")


def test_the_command_line(folder, tmp_path, capsys):
    """The videos are equal byte for byte, cards included; the plan says where weights wait."""
    common = ["generate", "--model", str(folder), "--prompt", PROMPT, "--frames", "17"]
    for name, option in (("a", []), ("b", ["--offload", "layers"])):
        assert main([*common, *option, "--out", str(tmp_path / f"{name}.mp4")]) == 0
    said = capsys.readouterr().out
    assert "offload none, everything fits" in said and "offload layers, as asked" in said
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert main([*common, "--offload", "expert", "--out", str(tmp_path / "c.mp4")]) == 2
    assert "allows none, layers" in capsys.readouterr().err
