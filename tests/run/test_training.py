# SPDX-License-Identifier: Apache-2.0
"""Training of a Wan model, tiny: it begins as the model that it is of, what it leaves can be loaded
and makes a video, and adapters come back as a LoRA.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lvjax
from lvjax.cli.main import main
from lvjax.core.errors import InputError
from lvjax.core.params import flatten
from lvjax.data.latents import Layout
from lvjax.models.dit import dit, embed_context
from lvjax.run import trained
from lvjax.run.bundle import outline
from lvjax.run.trained import save_trained
from lvjax.run.training import Adapters, Training, begin, compiled_step, open_training
from lvjax.train.extension import ExtensionTask
from lvjax.train.loop import Indexed, fit
from lvjax.train.state import TrainOptions, joined
from tests.tiny import relative
from tests.wan_folder import TEXT_DIM, wan_folder

LAYOUT = Layout(fps=8, size=(32, 32), frames=9, latent=(3, 4, 4, 16), overlap=1, clips=2, tails=0)
OPTIONS = TrainOptions(3, 1e-2, 1, ema=0.5, log_every=1)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A text-to-video model, converted."""
    folder = tmp_path_factory.mktemp("wan")
    source = wan_folder(folder / "source", "t2v")
    assert main(["convert", str(source), str(folder / "wan")]) == 0
    return folder / "wan"


def batches(clips):
    def batch(n):
        rng = np.random.default_rng(n)
        return {
            "latents": rng.standard_normal((2, clips, 3, 4, 4, 16)).astype(np.float16),
            "text": rng.standard_normal((2, clips, 5, TEXT_DIM)).astype(np.float32),
            "null": np.zeros((2, 5, TEXT_DIM), np.float32),
            "least": np.zeros((2, clips), np.int32),
            "frame": np.tile(2 * np.arange(clips), (2, 1)).astype(np.int32),
            "given": np.tile(np.minimum(np.arange(clips), 1), (2, 1)).astype(np.int32),
            "visible": np.tile(np.tri(clips, k=-1, dtype=bool), (2, 1, 1)),
        }

    return batch


def training(model, **changes):
    fields = {"options": OPTIONS, "batch": 2, "dtype": "float32"} | changes
    return Training(str(model), "data", **fields)


def run(opened, folder):
    batch = batches(opened.training.clips)
    step, plan = compiled_step(opened, batch(0))
    state, fixed = begin(opened)
    state = fit(step, state, Indexed(batch), OPTIONS, folder, fixed=fixed, mesh=opened.mesh)
    return state, fixed, plan


def velocity(params, cfg, condition=None):
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((1, 3, 4, 4, cfg.in_channels)), jnp.float32)
    text = jnp.asarray(rng.standard_normal((1, 5, cfg.text_dim)), jnp.float32)
    context = embed_context(params, text, cfg)
    return dit(params, x, jnp.full(1, 500.0), context, cfg, condition=condition)[0]


@pytest.fixture(scope="module")
def stage1(wan, tmp_path_factory):
    """A model after three steps of all parameters, and what was trained."""
    folder = tmp_path_factory.mktemp("stage1")
    opened = open_training(training(wan))
    state, fixed, plan = run(opened, folder)
    place = save_trained(opened, state, fixed, LAYOUT, folder)
    return place, opened, state, plan


def test_step_0_is_the_model_itself(wan):
    opened = open_training(training(wan))
    state, fixed = begin(opened)
    given = jnp.asarray(np.random.default_rng(8).standard_normal((1, 3, 4, 4, 20)), jnp.float32)
    model = lvjax.load(wan, dtype="float32")
    found = velocity(joined(state.params, fixed)["dit"], opened.cfg, given)
    np.testing.assert_array_equal(found, velocity(model.params["dit"], model.dit))
    kernel = state.params["dit"]["condition_embedding"]["kernel"]
    moved = {"kernel": kernel + 0.1 * jax.random.normal(jax.random.key(0), kernel.shape)}
    tree = state.params["dit"] | {"condition_embedding": moved}
    assert relative(velocity(tree, opened.cfg, given), found) > 1e-2


def test_a_trained_model_is_a_folder_that_makes_videos(stage1, wan):
    place, opened, state, _ = stage1
    model = lvjax.load(place)
    assert model.dit.condition_channels == 20 and model.defaults.method == "error_free"
    assert model.defaults.size == (32, 32) and model.defaults.capacity == 1
    for (name, leaf), (_, own) in zip(
        flatten(model.params["dit"]).items(), flatten(state.ema["dit"]).items(), strict=True
    ):
        np.testing.assert_array_equal(leaf, own, err_msg=name)
    assert (place / "vae.safetensors").samefile(wan / "vae.safetensors")  # no second copy
    video = lvjax.generate(model, "a red fox", num_frames=13, num_inference_steps=2)
    assert video.frames.shape == (1, 13, 32, 32, 3) and len(video.latents) == 2


def test_adapters_come_back_as_a_lora(stage1, tmp_path):
    asked = training(stage1[0], clips=2, adapters=Adapters(rank=2))
    opened = open_training(asked)
    state, fixed, plan = run(opened, tmp_path)
    assert {k.split("/")[-1] for k in flatten(state.params)} == {"a", "b"}
    assert opened.layers == (1, 2) and plan.memory["state"] < plan.memory["weights that stay"]
    place = save_trained(opened, state, fixed, LAYOUT, tmp_path)
    model = lvjax.load(place, lora=tmp_path / trained.LORA)
    assert model.defaults.capacity == 6 and model.defaults.layers == (1, 2)
    given = jnp.zeros((1, 3, 4, 4, 20))
    own = velocity(joined(state.ema, fixed)["dit"], opened.cfg, given)
    base = velocity(lvjax.load(place).params["dit"], model.dit, given)
    assert relative(velocity(model.params["dit"], model.dit, given), own) < 1e-6
    assert relative(base, own) > 1e-4


def test_weights_that_stay_keep_their_type(stage1):
    opened = open_training(training(stage1[0], clips=2, adapters=Adapters(2), dtype="bfloat16"))
    small = replace(opened, bundle=replace(opened.bundle, dit=replace(opened.cfg, dtype="float32")))
    state, fixed = begin(opened)
    wide, _ = begin(small)
    jax.tree.map(np.testing.assert_array_equal, state, wide)
    assert {a.dtype.name for a in jax.tree.leaves(state.params)} == {"float32"}
    assert {a.dtype.name for a in jax.tree.leaves(fixed)} == {"float32"}  # as the folder has them


def test_what_is_not_given_looks_as_the_model_knows_it(wan, stage1, tmp_path):
    def fill(model, **changes):
        return open_training(training(model, **changes)).training.task.fill

    asked, lora = ExtensionTask(fill=None), {"clips": 2, "adapters": Adapters(2)}
    other = replace(asked, fill="position")
    assert fill(wan, task=asked) == "latent" and fill(wan, task=other) == "position"
    assert fill("pocket", task=asked) == "position"
    assert fill(stage1[0], task=asked, **lora) == "latent"
    assert fill(stage1[0], task=other) == "position"
    with pytest.raises(InputError, match="'position', .* was trained with 'latent'; leave it None"):
        fill(stage1[0], task=other, **lora)


def test_refusals(wan, stage1, tmp_path):
    for wrong, says in (
        ({"clips": 0}, "clips is 0"),
        ({"mesh": (1, 2)}, "mesh is"),
        ({"task": ExtensionTask(memory_layers=(0, 1))}, "clips is 1"),
    ):
        with pytest.raises(InputError, match=says):
            replace(training(wan), **wrong)
    for name in ("model", "data"):
        with pytest.raises(InputError, match=f"{name} is not given; add --set {name}=FOLDER"):
            open_training(replace(training(wan), **{name: ""}))
    with pytest.raises(InputError, match="batch is 2; give a multiple of 4, for options.acc"):
        opened = open_training(
            training(wan, mesh=(2, 1, 1), options=replace(OPTIONS, accumulate=2))
        )
        compiled_step(opened, batches(1)(0))
    with pytest.raises(InputError, match="clips have 12 tokens; .* not 8"):
        compiled_step(open_training(training(wan, mesh=(1, 1, 8))), batches(1)(0))
    with pytest.raises(InputError, match="does not take given frames yet"):
        open_training(training(wan, clips=2, adapters=Adapters(2)))
    with pytest.raises(InputError, match="lvjax convert"):
        open_training(training(wan.parent / "source"))
    with pytest.raises(InputError, match="two experts"):
        open_training(training(wan_folder(tmp_path, "t2v-a14b")))
    with pytest.raises(InputError, match="some of q, k, v, o"):
        Adapters(targets=("x",))
    assert outline(wan).dit.condition_channels == 0
