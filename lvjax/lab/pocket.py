# SPDX-License-Identifier: Apache-2.0
"""Training the pocket model from nothing: autoencoder, latents, video-extension DiT, and the
package's weights.

One folder holds the whole run: rendered clips, one subfolder per stage with its snapshot and
metrics, and the bundle. Every stage resumes from its newest snapshot, so the same call goes on
where it stopped; a stage that is done is skipped. `make train-pocket` is `lvjax train --config
configs/pocket.py`; `make gpu-train` is `python -m lvjax.lab.pocket`, the same in pieces whose
state travels in a few small files (gpu_train.py).
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.checkpoint import load_arrays, restore_tree, write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.params import abstract, init
from lvjax.data.clips import (
    CLIP_FRAMES,
    ClipStore,
    camera_words,
    comes_into_view,
    continues,
    coverage,
)
from lvjax.data.prompts import VOCABULARY
from lvjax.data.world import SIZE
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec
from lvjax.models.pocket_text import PocketTextConfig, text_spec
from lvjax.models.vae import encode_moments, normalise, vae_spec
from lvjax.run.bundle import Bundle, Defaults, load, save
from lvjax.train.autoencoder import autoencoder_loss, inflate
from lvjax.train.extension import ExtensionTask, extension_loss, local_start
from lvjax.train.loop import TrainOptions, fit, init_state, load_snapshot, make_optimizer, make_step


@dataclass(frozen=True)
class Stage:
    """name: its folder.  batch: clips per step.  frames: pixel frames (autoencoder) or latent
    frames (DiT) per clip.

    frozen: subtrees that do not move, by path.  memory: earlier clips seen (DiT).  given:
      probability of 0, 1, 2, ... given latent frames, None for the recipe's.  first: share of the
      batch that are first clips of a video, beyond their natural share (DiT without memory): there
      objects come into view, and the prompt alone says which.  enters: share of the batch in which
      an object comes into view.  object_weight: by how much more the error counts where an object
      is.  shift: of the noise level, None for the recipe's.  balanced: whether all camera moves are
      drawn equally often.
    """

    name: str
    batch: int
    frames: int
    options: TrainOptions
    frozen: tuple[str, ...] = ()
    memory: int = 0
    given: tuple[float, ...] | None = None
    first: float = 0.0
    enters: float = 0.0
    object_weight: float = 0.0
    shift: float | None = None
    balanced: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that `train` needs; the defaults made the weights in the package.

    start: a bundle ("pocket" or a folder) to go on from: its autoencoder stays as it is but for the
      decoder stage, and the extension stages begin with its DiT and text encoder.
    """

    dit: DiTConfig = DiTConfig(
        256,
        2,
        4,
        512,
        condition_channels=20,
        patch=(1, 1, 1),
        text_dim=128,
        text_len=16,
        dtype="float32",
    )
    vae: VAEConfig = VAEConfig(32, 16, (1, 2, 2), 1, (True, True), 2, (0.0,) * 16, (1.0,) * 16)
    text: PocketTextConfig = PocketTextConfig(len(VOCABULARY) + 1)
    task: ExtensionTask = ExtensionTask()
    defaults: Defaults = Defaults()
    videos: int = 3500
    clips: int = 6
    autoencoder: tuple[Stage, ...] = (
        Stage("vae_image", 16, 1, TrainOptions(2400, 3e-3, 80, 0.4, ema=0.998)),
        Stage("vae_clip5", 4, 5, TrainOptions(1200, 2e-3, 80, 0.3, ema=0.998)),
        Stage("vae_clip17", 2, CLIP_FRAMES, TrainOptions(1500, 1.2e-3, 80, 0.2, ema=0.998)),
    )
    decoder: tuple[Stage, ...] = (
        Stage(
            "vae_decoder",
            2,
            CLIP_FRAMES,
            TrainOptions(3000, 1e-3, 80, 0.2, ema=0.998),
            ("encoder", "quant"),
        ),
    )
    extension: tuple[Stage, ...] = (
        # one latent frame after a given one, and the text fixed: first the motion that words name
        Stage(
            "dit_pair",
            12,
            2,
            TrainOptions(1500, 1.5e-3, 150, 1.0, weight_decay=0.01),
            frozen=("text", "dit/text_embedding"),
            given=(0.1, 0.9),
        ),
        Stage("dit_short", 12, 3, TrainOptions(1000, 1.2e-3, 100, 1.0, weight_decay=0.01)),
        Stage("dit", 8, 5, TrainOptions(1400, 1.2e-3, 100, 1.0, weight_decay=0.01)),
        Stage("dit_first", 8, 5, TrainOptions(2500, 1.2e-3, 50, 0.5, weight_decay=0.01), first=0.5),
        Stage(
            "dit_object",
            8,
            5,
            TrainOptions(2200, 1e-3, 50, 0.6, weight_decay=0.01),
            first=0.6,
            object_weight=8.0,
        ),
        Stage(
            "dit_enter",
            8,
            5,
            TrainOptions(3500, 1.2e-3, 50, 0.4, weight_decay=0.01),
            enters=0.7,
            object_weight=8.0,
            shift=4.0,
        ),
        Stage(
            "dit_memory",
            8,
            5,
            TrainOptions(900, 8e-4, 50, 0.4, weight_decay=0.01),
            memory=1,
            enters=0.5,
            object_weight=8.0,
            shift=4.0,
            balanced=True,
        ),
        # fewer arrivals: objects that are in view stay whole, and zooms get their share of steps
        Stage(
            "dit_settle",
            8,
            5,
            TrainOptions(1800, 8e-4, 50, 0.5, weight_decay=0.01, seed=1),
            memory=1,
            enters=0.25,
            object_weight=4.0,
            shift=4.0,
            balanced=True,
        ),
    )
    seed: int = 0
    start: str | None = None


@dataclass
class Run:
    """Where a run lives and how much of it to do now.

    seconds: at most this long from here on, all stages together, None for no limit.  devices: for
      the batch.
    """

    folder: Path
    seconds: float | None = None
    devices: int = 1
    report: Callable[[str, dict], None] = field(default=lambda stage, line: None)

    def __post_init__(self):
        self._end = math.inf if self.seconds is None else time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds that are left, infinite without a limit."""
        return self._end - time.monotonic()


def train(recipe: Recipe, run: Run) -> Bundle | None:
    """Do or continue the whole recipe; returns the bundle (also saved in folder/"bundle"), None
    when the time was up first.

    Raises: NonFiniteError, StorageError, CheckpointError as their stages do.
    """
    store = ClipStore(Path(run.folder) / "clips", recipe.videos, recipe.clips, seed=recipe.seed)
    if not store.fill(run.left):
        return None
    begun = None if recipe.start is None else load(recipe.start)
    vae = begun.params["vae"] if begun else train_autoencoder(recipe, run, store)
    if vae is None:
        return None
    encoded = encode_store(recipe, run, store, vae, begun and begun.vae)
    if encoded is None:
        return None
    latents, cfg = encoded
    dit = train_extension(recipe, run, store, latents, begun and begun.params)
    if dit is None or train_decoder(recipe, cfg, run, store, vae) is None:
        return None
    bundle = assemble(recipe, run.folder)
    save(Path(run.folder) / "bundle", bundle)
    return bundle


def assemble(recipe: Recipe, folder) -> Bundle:
    """The bundle of a run that may still be going on: the EMA of the newest snapshot of each part.

    A DiT that has not been trained with memory yet gets a bank of one clip, its own.
    Raises: CheckpointError when a part has no snapshot yet.
    """
    folder = Path(folder)
    begun = load(recipe.start).params if recipe.start else {}
    vae = newest(
        folder, recipe.autoencoder + recipe.decoder, vae_spec(recipe.vae), begun.get("vae")
    )
    dit = newest(
        folder,
        recipe.extension,
        {"dit": dit_spec(recipe.dit), "text": text_spec(recipe.text)},
        begun and {"dit": begun["dit"], "text": begun["text"]},
    )
    stats = json.loads((folder / "latents.json").read_text())
    cfg = dataclasses.replace(recipe.vae, mean=tuple(stats["mean"]), std=tuple(stats["std"]))
    remembers = any(
        stage.memory and (folder / stage.name / "snapshot.safetensors").exists()
        for stage in recipe.extension
    )
    defaults = dataclasses.replace(
        recipe.defaults,
        layers=memory_layers(recipe.dit),
        capacity=recipe.defaults.capacity if remembers else 1,
    )
    return Bundle("pocket", recipe.dit, cfg, recipe.text, defaults, {"vae": vae, **dit})


def newest(folder: Path, stages: tuple[Stage, ...], spec, begun=None):
    """EMA parameters of the last of `stages` that has a snapshot, else `begun`."""
    paths = [p for stage in stages if (p := folder / stage.name / "snapshot.safetensors").exists()]
    if not paths and begun:
        return begun
    if not paths:
        raise CheckpointError(f"no snapshot of {[s.name for s in stages]} in {folder}; train first")
    arrays, _ = load_arrays(paths[-1])
    return restore_tree(
        abstract(spec),
        {k[4:]: v for k, v in arrays.items() if k.startswith("ema/")},
        str(paths[-1]),
    )


def memory_layers(cfg: DiTConfig) -> tuple[int, int]:
    """The latter half of the blocks."""
    return cfg.num_layers // 2, cfg.num_layers


def _stages(stages, params, make_loss, make_batches, run: Run):
    """Run stages in order, each from the EMA of the one before; the final EMA, or None when the
    time was up.
    """
    for stage in stages:
        folder, o = Path(run.folder) / stage.name, stage.options
        optimizer = make_optimizer(o)
        state = init_state(params, optimizer)
        step = make_step(make_loss(stage), optimizer, o, stage.frozen)
        report = partial(run.report, stage.name)
        if not (folder / "done").exists():
            state = fit(
                step,
                state,
                make_batches(stage),
                o,
                folder,
                seconds=run.left(),
                devices=run.devices,
                report=report,
            )
            if int(state.step) < o.steps:
                return None
            (folder / "done").touch()
        params = load_snapshot(folder / "snapshot.safetensors", state).ema
    return params


def train_autoencoder(recipe: Recipe, run: Run, store: ClipStore):
    """Images, then short clips, then whole clips; returns the parameters or None."""
    params = inflate(init(vae_spec(recipe.vae), jax.random.key(recipe.seed)))

    def loss(stage: Stage):
        return autoencoder_loss(recipe.vae, latent_noise=0.1 if stage.frames > 1 else 0.0)

    return _stages(recipe.autoencoder, params, loss, lambda stage: video_batches(stage, store), run)


def train_decoder(recipe: Recipe, cfg: VAEConfig, run: Run, store: ClipStore, params):
    """The decoder alone, on latents as noisy as a generator's; encoder and latents stay as they
    are.
    """

    def loss(stage: Stage):
        return autoencoder_loss(cfg, latent_noise=0.3)

    return _stages(recipe.decoder, params, loss, lambda stage: video_batches(stage, store), run)


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


def encode_store(
    recipe: Recipe, run: Run, store: ClipStore, params, cfg: VAEConfig | None = None
) -> tuple[np.ndarray, VAEConfig] | None:
    """Latents float16 [videos, clips, T, h, w, z] of every rendered clip, normalised, and the
    config with their statistics: those of `cfg`, else measured on 200 videos.  Goes on where it
    stopped; None when the time was up first.
    """

    @jax.jit
    def means(video):
        return encode_moments(params, video.astype(jnp.float32) / 127.5 - 1, recipe.vae)[0]

    folder = Path(run.folder)
    head, mark, path = (folder / f"latents.{end}" for end in ("json", "ready", "npy"))
    if not head.exists():
        stats = {"mean": cfg.mean, "std": cfg.std} if cfg else _statistics(store, means)
        write_atomic(head, json.dumps(stats).encode())
        mark.unlink(missing_ok=True)
    stats = json.loads(head.read_text())
    cfg = dataclasses.replace(recipe.vae, mean=tuple(stats["mean"]), std=tuple(stats["std"]))
    ready = int(mark.read_text()) if mark.exists() else 0
    out = _latents_file(path, (store.videos, store.clips), recipe, fresh=ready == 0)
    for v in range(ready, store.videos):
        if run.left() <= 0:
            return None
        out[v] = normalise(means(store.frames[v]), cfg)
        if v % 50 == 49 or v == store.videos - 1:
            out.flush()
            write_atomic(mark, str(v + 1).encode())
    return out, cfg


def _statistics(store: ClipStore, means) -> dict[str, list[float]]:
    every = max(1, store.videos // 200)
    sample = np.concatenate(
        [np.asarray(means(store.frames[v])) for v in range(0, store.videos, every)]
    )
    found = {"mean": sample.mean((0, 1, 2, 3)), "std": sample.std((0, 1, 2, 3))}
    return {k: [round(float(x), 4) for x in v] for k, v in found.items()}


def _latents_file(path: Path, lead: tuple[int, int], recipe: Recipe, fresh: bool) -> np.ndarray:
    side = SIZE // recipe.vae.spatial_stride
    shape = (*lead, 1 + (CLIP_FRAMES - 1) // recipe.vae.temporal_stride, side, side, recipe.vae.z)
    if fresh:
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    return np.load(path, mmap_mode="r+")


def train_extension(recipe: Recipe, run: Run, store: ClipStore, latents: np.ndarray, begun=None):
    """The video-extension model: alone first, then with the memory of earlier clips; {"dit",
    "text"} or None.  begun: parameters to start from, None for new ones.
    """
    params = {"dit": dit_spec(recipe.dit), "text": text_spec(recipe.text)}
    if begun:
        params = {part: begun[part] for part in params}
    else:
        params = init(params, jax.random.key(recipe.seed + 1))
        params["dit"] = local_start(params["dit"], recipe.dit)

    def loss(stage: Stage):
        layers = memory_layers(recipe.dit) if stage.memory else None
        task = dataclasses.replace(
            recipe.task,
            memory_layers=layers,
            given=stage.given or recipe.task.given,
            object_weight=stage.object_weight,
            shift=stage.shift or recipe.task.shift,
            fill=recipe.defaults.fill,
        )
        return extension_loss(recipe.dit, recipe.text, task)

    return _stages(
        recipe.extension,
        params,
        loss,
        lambda stage: latent_batches(stage, latents, store, recipe.task.stride),
        run,
    )


def latent_batches(stage: Stage, latents: np.ndarray, store: ClipStore, stride: int):
    """step -> {"latents", "ids", "least", "covered"} and, with memory, clips before them; a
    function of the step.

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
        out = {
            "latents": latents[v, c][:, : stage.frames],
            "ids": ids[v, c],
            "least": least[v, c],
            "covered": coverage(objects[v, c], latents.shape[2:5])[:, : stage.frames],
        }
        if not stage.memory:
            return out
        far = int(np.exp(rng.uniform(0, np.log(500)))) if rng.random() < 0.5 else 0
        past = v[:, None], c[:, None] - back[None, :]
        return out | {
            "history": latents[past][:, :, : stage.frames],
            "history_ids": ids[past],
            "history_gap": np.tile((back * stride + far).astype(np.int32), (stage.batch, 1)),
        }

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


def main(argv: list[str] | None = None) -> int:
    """`python -m lvjax.lab.pocket`: one piece of the training; see gpu_train.py."""
    from lvjax.lab import gpu_train  # it imports this module

    return gpu_train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
