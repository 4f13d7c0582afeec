# SPDX-License-Identifier: Apache-2.0
"""How extension training begins: words that reach the video, near tokens first, and only frames
that the prompt rules.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.data.clips import (
    CLIP_FRAMES,
    camera_words,
    comes_into_view,
    continues,
    coverage,
    prompt_ids,
)
from lvjax.data.prompts import Action, encode
from lvjax.data.world import CLIP_STRIDE, Video
from lvjax.lab.batches import latent_batches
from lvjax.lab.recipe import Recipe, Stage
from lvjax.models.config import DiTConfig
from lvjax.models.dit import dit_spec
from lvjax.models.pocket_text import encode_text, text_spec
from lvjax.nn.embed import cell_waves
from lvjax.nn.rope import grid_table, rotate
from lvjax.rollout.condition import condition
from lvjax.train.extension import ExtensionTask, condition_of, extension_loss, local_start
from lvjax.train.state import TrainOptions
from tests.drawn import drawn
from tests.tiny import DIT, TEXT


def encoded(params, ids):
    return encode_text(params["text"], ids, TEXT)


HEADS = DiTConfig(256, 2, 1, 64, condition_channels=20, patch=(1, 1, 1), text_dim=16, text_len=16)


def test_every_row_of_a_prompt_differs_from_the_same_row_of_another():
    params = drawn(text_spec(TEXT), 0)
    ids = [encode(p)[0] for p in ("the camera pans left", "the camera pans right", "a red circle")]
    text = np.asarray(encode_text(params, np.stack([*ids, np.zeros_like(ids[0])]), TEXT))
    rows = np.sqrt(np.square(text[:, None] - text[None]).mean(-1))
    assert rows[np.triu_indices(4, 1)].min() > 0.01  # all pairs of prompts, all rows


def test_a_clip_continues_when_only_the_scene_goes_unnamed():
    said = (
        "the camera pans left over a landscape, a red circle moves up",
        "the camera pans left, a red circle moves up",
        "the camera pans left, a red circle moves down",
        "the camera pans left over clouds, a red circle moves down",
    )
    ids = np.stack([encode(p)[0] for p in said])
    assert continues(ids).tolist() == [True, True, False, True]
    assert continues(np.stack([ids, ids[::-1]])).shape == (2, 4)


@pytest.mark.parametrize("index", range(6))
def test_clips_continue_exactly_where_the_world_goes_on(index):
    video = Video(index)
    ids = np.stack([prompt_ids(video, i) for i in range(6)])
    for i, goes_on in enumerate(continues(ids)):
        frames = range(CLIP_STRIDE * i, CLIP_STRIDE * i + CLIP_FRAMES)
        assert goes_on == (len({video.action(f) for f in frames}) == 1)


def test_frames_of_another_prompt_are_always_given():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 5, 4, 4, 16)).astype(np.float16)
    ids = np.stack([[encode(f"the camera pans {d}")[0] for d in row] for row in
                    (("left", "left", "up", "up"), ("in", "in", "in", "out"))])  # fmt: skip
    new = {(0, 2), (1, 3)}
    for frames, memory in ((2, 0), (5, 0), (5, 1)):
        stage = Stage("s", 64, frames, TrainOptions(1, 1.0), memory=memory)
        store = SimpleNamespace(ids=ids, objects=np.full((2, 4, 17, 2), np.nan, np.float32))
        batch = latent_batches(stage, latents, store, stride=3)(0)
        names = {latents[v, c].tobytes()[:64]: (v, c) for v in range(2) for c in range(4)}
        found = [names[x.tobytes()[:64]] for x in batch["latents"][:, -1]]
        assert [least == 2 for least in batch["least"][:, -1]] == [x in new for x in found]
        assert any(x in new for x in found) == (frames == 5)


def test_the_loss_counts_no_frame_below_the_least():
    params = {"dit": drawn(dit_spec(DIT), 0),
              "text": drawn(text_spec(TEXT), 1)}  # fmt: skip
    z = np.random.default_rng(0).standard_normal((2, 5, 4, 4, 16)).astype(np.float32)
    loss = jax.jit(extension_loss(DIT, encoded, Recipe().task))

    def gradient(least):
        batch = {"text": np.ones((2, 1, 16), np.int32), "null": np.zeros((2, 16), np.int32),
                 "least": np.full((2, 1), least)}  # fmt: skip
        f = jax.grad(lambda z: loss(params, batch | {"latents": z}, jax.random.key(3))[0])
        return np.asarray(f(jnp.asarray(z[:, None])))[:, 0]

    assert not gradient(np.int32(4))[:, 0].any() and gradient(np.int32(0))[:, 4].any()


def test_coverage_is_where_the_object_is():
    action = Action("still", "", "red", "circle", "right")
    video = Video(3, first=action, enters=True)
    poses = [video.pose(f) for f in range(CLIP_FRAMES)]
    places = np.array([[(p.object_x, p.object_y) for p in poses]], np.float32)
    found = coverage(np.concatenate([places, np.full_like(places, np.nan)]), (5, 8, 8))
    still = Video(3, first=replace(action, colour=None, shape=None, motion=None), enters=True)
    changed = np.abs(video.frames(0, 17).astype(int) - still.frames(0, 17)).max(-1) > 20
    cells = changed.reshape(17, 8, 8, 8, 8).mean((2, 4))
    truth = np.concatenate([cells[:1], cells[1:].reshape(4, 4, 8, 8).mean(1)])
    assert truth[4].max() > 0.9 and np.abs(found[0] - truth).max() < 0.25
    assert not found[1].any()


def test_training_and_sampling_give_the_same_condition():
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((2, 5, 4, 4, 16)), jnp.float32)
    for fill in ("latent", "position"):
        for given, frames in (
            (0, None),
            (1, np.zeros((2, 1, 32, 32, 3))),
            (2, np.zeros((2, 5, 32, 32, 3))),
        ):
            known = condition(lambda x: latents[:, :given], frames, latents.shape, fill)  # noqa: B023
            trained = condition_of(latents, jnp.full((2,), given, jnp.int32), fill)
            np.testing.assert_array_equal(known, trained)


def test_every_cell_knows_its_place():
    for h, w in ((8, 8), (6, 10)):
        waves = cell_waves(h, w, 16).reshape(h * w, 16)
        apart = np.square(waves[:, None] - waves[None]).sum(-1) + 9 * np.eye(h * w)
        assert waves.dtype == np.float32 and apart.min() > 0.1 and np.abs(waves).max() <= 1
    np.testing.assert_allclose(cell_waves(8, 8, 6), cell_waves(8, 8, 16)[..., :6])
    np.testing.assert_allclose(cell_waves(4, 8, 16)[1, 2], cell_waves(12, 24, 16)[4, 7], atol=1e-6)


def test_an_object_comes_into_view():
    right = Action("still", "", "red", "circle", "right")
    video, stays = Video(3, first=right, enters=True), Video(3, first=right, enters=False)
    places = np.array([[(p.object_x, p.object_y) for p in (v.pose(f) for f in range(CLIP_FRAMES))]
                       for v in (video, stays)])  # fmt: skip
    gone = np.full_like(places[:1], np.nan)
    assert comes_into_view(np.concatenate([places, gone])).tolist() == [True, False, False]


def test_a_balanced_stage_shows_every_camera_move_as_often():
    said = ["the camera is still, a red circle moves up"] * 17 + [
        "the camera is still over clouds"
    ] * 4
    said += ["the camera pans left", "the camera zooms in", "the camera zooms out over waves"]
    ids = np.stack([encode(x)[0] for x in said]).reshape(4, 6, 16)
    assert len(np.unique(camera_words(ids).reshape(24, 2), axis=0)) == 4
    latents = np.arange(24, dtype=np.float16).reshape(4, 6, 1, 1, 1, 1) * np.ones((5, 4, 4, 16))
    places = np.full((4, 6, CLIP_FRAMES, 2), np.nan, np.float32)
    store = SimpleNamespace(ids=ids, objects=places)
    stage = Stage("s", 2000, 5, TrainOptions(1, 1.0), balanced=True)
    rows = latent_batches(stage, latents, store, stride=3)(0)["latents"][:, -1, 0, 0, 0, 0]
    for row in (21, 22, 23):
        assert 0.2 < (rows == row).mean() < 0.3


def test_a_stage_may_ask_for_objects_that_enter():
    places = np.full((4, 6, CLIP_FRAMES, 2), np.nan, np.float32)
    places[1, 0], places[3, 4] = (
        np.linspace(-11, 21, 17)[:, None] * [1, 0] + [0, 30] for _ in "ab"
    )
    latents = np.arange(24, dtype=np.float16).reshape(4, 6, 1, 1, 1, 1) * np.ones((5, 4, 4, 16))
    store = SimpleNamespace(ids=np.ones((4, 6, 16), np.int32), objects=places)
    stage = Stage("s", 256, 5, TrainOptions(1, 1.0), enters=0.5)
    rows = latent_batches(stage, latents, store, stride=3)(0)["latents"][:, -1, 0, 0, 0, 0]
    assert 0.35 < np.isin(rows, [6, 22]).mean() < 0.75 and len(np.unique(rows)) == 24
    remembers = latent_batches(replace(stage, memory=1, enters=1.0), latents, store, stride=3)(0)
    assert np.unique(remembers["latents"][:, -1]).tolist() == [22]
    assert (np.unique(remembers["latents"][:, 0]) < 22).all() and (remembers["frame"] < 1).all()


def test_errors_on_an_object_count_more():
    params = {"dit": drawn(dit_spec(DIT), 0),
              "text": drawn(text_spec(TEXT), 1)}  # fmt: skip
    covered = np.zeros((2, 5, 4, 4), np.float32)
    covered[:, 2:, 1, 1] = 1
    loud = np.where(covered[..., None] > 0, 3.0, 0.1) * np.ones(16, np.float32)
    batch = {"latents": loud[:, None], "text": np.ones((2, 1, 16), np.int32),
             "null": np.zeros((2, 16), np.int32), "least": np.zeros((2, 1), np.int32),
             "covered": covered[:, None]}  # fmt: skip
    plain, weighted = (
        float(extension_loss(DIT, encoded, ExtensionTask(object_weight=w))(
            params, batch, jax.random.key(3))[0]) for w in (0.0, 8.0)
    )  # fmt: skip
    assert weighted > 1.5 * plain


def test_attention_begins_near_and_cross_attention_silent():
    params = local_start(drawn(dit_spec(HEADS), 0), HEADS)
    attention = jax.tree.map(lambda a: a[0], params["blocks"]["self_attn"])
    bias = {n: attention[n]["bias"].reshape(1, 1, 2, 128) for n in ("q", "k")}
    table = grid_table(np.arange(3, dtype=np.int32), 5, 5, 128)
    q, k = (rotate(jnp.tile(bias[n], (1, 75, 1, 1)), table) for n in ("q", "k"))
    score = np.asarray(jnp.einsum("blnd,bmnd->bnlm", q, k)).reshape(2, 75, 3, 5, 5)
    middle = score[:, 37]  # frame 1, row 2, column 2
    assert (middle.reshape(2, -1).argmax(-1) == 37).all()
    for line in (middle[:, 1, 2, 2:], middle[:, 1, 2:, 2], middle[:, 1:, 2, 2]):
        assert (np.diff(line, axis=-1) < -1).all()
    assert not params["blocks"]["cross_attn"]["o"]["kernel"].any()
