# SPDX-License-Identifier: Apache-2.0
"""Which clips a training step sees: functions of the step, so that a resumed run sees the same."""

import numpy as np

from lvjax.core.errors import InputError
from lvjax.data.clips import (
    CLIP_FRAMES,
    ClipStore,
    camera_words,
    comes_into_view,
    continues,
    coverage,
)
from lvjax.lab.recipe import Stage


def video_batches(stage: Stage, store: ClipStore):
    """step -> uint8 [B, frames, H, W, 3], a function of the step."""

    def batch(n: int):
        rng = np.random.default_rng([stage.options.seed, stage.frames, n])
        videos, clips = (
            rng.integers(0, store.videos, stage.batch),
            rng.integers(0, store.clips, stage.batch),
        )
        starts = rng.integers(0, CLIP_FRAMES - stage.frames + 1, stage.batch)
        return np.stack(
            [
                store.frames[v, c, s : s + stage.frames]
                for v, c, s in zip(videos, clips, starts, strict=True)
            ]
        )

    return batch


def latent_batches(stage: Stage, latents: np.ndarray, store: ClipStore, stride: int):
    """step -> what `extension_loss` needs, with `stage.memory` clips before each; a function of the
    step.

    A clip whose prompt is new begins with frames of another one: these must be given (`least`).
    The gap to each earlier clip is its true one or, in half the batches, longer by up to 500 latent
    frames, as a rollout of minutes has it.
    """
    if stage.memory and latents.shape[1] <= stage.memory:
        raise InputError(
            f"{latents.shape[1]} clips per video are too few for {stage.memory} earlier ones"
        )
    ids, objects = (np.asarray(a[: len(latents)]) for a in (store.ids, store.objects))
    least = np.where(continues(ids), 0, latents.shape[2] - stride).astype(np.int32)
    videos, clips = np.nonzero(least < stage.frames)
    entering = comes_into_view(objects[videos, clips])
    share = (
        1 / _times_seen(camera_words(ids[videos, clips])) if stage.balanced else np.ones(len(clips))
    )

    def batch(n: int):
        rng = np.random.default_rng([stage.options.seed, stage.memory, n])
        back = _distances(rng, stage.memory, latents.shape[1])
        allowed = np.flatnonzero(clips >= back.max(initial=0))
        pick = _draw(rng, allowed, share, stage.batch)
        if stage.enters:
            other = _draw(rng, allowed[entering[allowed]], share, stage.batch)
            pick = np.where(rng.random(stage.batch) < stage.enters, other, pick)
        v, c = videos[pick], clips[pick]
        c = np.where(rng.random(stage.batch) < stage.first, 0, c)
        each = c[:, None] - np.append(back, 0)[None, :]  # [B, K]
        them = v[:, None], each
        out = {
            "latents": latents[them][:, :, : stage.frames],
            "text": ids[them],
            "null": np.zeros_like(ids[v, c]),
            "least": least[them],
            "covered": np.stack([covered(v, at) for at in each.T], axis=1),
        }
        if not stage.memory:
            return out
        far = int(np.exp(rng.uniform(0, np.log(500)))) if rng.random() < 0.5 else 0
        places = np.append(-(back * stride + far), 0).astype(np.int32)
        seen = np.tri(len(places), k=-1, dtype=bool)
        return out | {
            "frame": np.tile(places, (stage.batch, 1)),
            "given": np.where(each == 0, 0, latents.shape[2] - stride).astype(np.int32),
            "visible": np.tile(seen, (stage.batch, 1, 1)),
        }

    def covered(v, c):
        return coverage(objects[v, c], latents.shape[2:5])[:, : stage.frames]

    return batch


def _draw(rng, these: np.ndarray, share: np.ndarray, count: int) -> np.ndarray:
    """`count` of `these` indices, each as likely as its share says.

    Raises: InputError when there are none.
    """
    if not len(these):
        raise InputError("no clip is as this stage asks for; give more videos, or enters=0")
    return rng.choice(these, count, p=share[these] / share[these].sum())


def _times_seen(rows: np.ndarray) -> np.ndarray:
    """How often each row of an integer array [N, M] is in it, [N]."""
    _, which, times = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    return times[which.ravel()]


def _distances(rng, memory: int, clips: int) -> np.ndarray:
    """How many clips back the remembered ones are, equally spaced, the farthest first; int [K]."""
    gap = int(rng.integers(1, 1 + (clips - 1) // memory)) if memory else 0
    return np.arange(memory, 0, -1) * gap
