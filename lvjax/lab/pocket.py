# SPDX-License-Identifier: Apache-2.0
"""Training the pocket model from nothing: autoencoder, latents, video-extension DiT, decoder, and
the package's weights.

One folder holds the whole run: rendered clips, one subfolder per stage with its checkpoints and
metrics, and the bundle.  Every stage resumes from its newest checkpoint, so the same call goes on
where it stopped; a stage that is done is skipped.  `lvjax train` calls it; gpu_train.py does the
same in pieces whose state travels in a few small files.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import CheckpointError
from lvjax.core.mesh import make_mesh
from lvjax.core.params import init
from lvjax.data.clips import CLIP_FRAMES, ClipStore, open_array, read_mark
from lvjax.data.world import SIZE
from lvjax.lab.batches import latent_batches, video_batches
from lvjax.lab.recipe import Recipe, Stage
from lvjax.methods.error_free import memory_layers
from lvjax.models.config import VAEConfig
from lvjax.models.dit import dit_spec
from lvjax.models.pocket_text import encode_text, text_spec
from lvjax.models.vae import encode_moments, normalise, vae_spec
from lvjax.run.bundle import Bundle
from lvjax.run.weights import load, save
from lvjax.train.autoencoder import autoencoder_loss, inflate
from lvjax.train.checkpoints import Checkpoints, is_begun
from lvjax.train.extension import extension_loss, local_start
from lvjax.train.loop import Indexed, Outside, fit
from lvjax.train.state import TrainState, init_state, joined, make_optimizer, make_step, split


@dataclass
class Run:
    """Where a run lives and how much of it to do now.

    seconds: at most this long from here on, all stages together.  devices: for the batch.
    """

    folder: Path
    seconds: float = math.inf
    devices: int = 1
    report: Callable[[str, dict], None] = field(default=lambda stage, line: None)

    def __post_init__(self):
        self._end = time.monotonic() + self.seconds

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
    """The bundle of a run that may still be going on: the EMA of the newest checkpoints.

    A DiT that has not been trained with memory yet gets a bank of one clip, its own.
    Raises: CheckpointError when a part has no checkpoint yet.
    """
    folder = Path(folder)
    begun = load(recipe.start).params if recipe.start else {}
    vae = newest(folder, recipe.autoencoder + recipe.decoder, first_vae(recipe, begun), begun)
    dit = newest(folder, recipe.extension, first_dit(recipe, begun), begun)
    stats = json.loads((folder / "latents.json").read_text())
    cfg = dataclasses.replace(recipe.vae, mean=tuple(stats["mean"]), std=tuple(stats["std"]))
    remembers = any(stage.memory and is_begun(folder / stage.name) for stage in recipe.extension)
    defaults = dataclasses.replace(
        recipe.defaults,
        layers=memory_layers(recipe.dit),
        capacity=recipe.defaults.capacity if remembers else 1,
    )
    return Bundle("pocket", recipe.dit, cfg, recipe.text, defaults, {"vae": vae, **dit})


def first_vae(recipe: Recipe, begun=None):
    """The autoencoder before its first stage, or that of `begun`."""
    return begun["vae"] if begun else inflate(init(vae_spec(recipe.vae), _key(recipe, 0)))


def first_dit(recipe: Recipe, begun=None):
    """{"dit", "text"} before the first stage, or those of `begun`."""
    if begun:
        return {part: begun[part] for part in ("dit", "text")}
    spec = {"dit": dit_spec(recipe.dit), "text": text_spec(recipe.text)}
    params = init(spec, _key(recipe, 1))
    return params | {"dit": local_start(params["dit"], recipe.dit)}


def _key(recipe: Recipe, part: int):
    return jax.random.key(recipe.seed + part)


def begin(stage: Stage, params) -> tuple[TrainState, dict]:
    """The state before a stage, and the parameters that it does not move."""
    trained, fixed = split(params, stage.frozen)
    return init_state(trained, make_optimizer(stage.options), stage.options.seed), fixed


def newest(folder: Path, stages: tuple[Stage, ...], params, begun=None):
    """The parameters after the stages that have a checkpoint, each as its average has them.

    Raises: CheckpointError when none has, and there is nothing that was begun with.
    """
    there = [stage for stage in stages if is_begun(folder / stage.name)]
    if not there and not begun:
        names = [stage.name for stage in stages]
        raise CheckpointError(f"no checkpoint of {names} in {folder}; train first")
    for stage in there:
        params = _after(stage, params, folder)
    return params


def _like(stage: Stage, params) -> TrainState:
    """The shapes of a stage's state."""
    return jax.eval_shape(lambda params: begin(stage, params)[0], params)


def _after(stage: Stage, params, folder: Path):
    """The parameters after a stage; of `params` only what it did not move is used."""
    with Checkpoints(folder / stage.name) as saved:
        state, _ = saved.restore(_like(stage, params))
    return joined(state.ema, split(params, stage.frozen)[1])


def _placed(stage: Stage, params, folder: Path, place) -> tuple[TrainState, dict]:
    """`begin` on its devices; the state is shapes alone where a checkpoint has it."""
    if not is_begun(folder / stage.name):
        return jax.device_put(begin(stage, params), place)
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), _like(stage, params)
    )
    return state, jax.device_put(split(params, stage.frozen)[1], place)


def _stages(stages, params, make_loss, make_batches, run: Run):
    """Run stages in order, each from the EMA of the one before; the final EMA, or None when the
    time was up.
    """
    for stage in stages:
        folder, o = Path(run.folder), stage.options
        if not (folder / stage.name / "done").exists():
            mesh = make_mesh(data=run.devices)
            state, fixed = _placed(stage, params, folder, NamedSharding(mesh, PartitionSpec()))
            stays = split(params, stage.frozen)[1]
            params = joined(_like(stage, params).params, stays)  # what moves, `fit` has
            state = fit(
                make_step(make_loss(stage), make_optimizer(o), o),
                state,
                Indexed(make_batches(stage)),
                o,
                folder / stage.name,
                fixed=fixed,
                mesh=mesh,
                outside=Outside(run.left(), partial(run.report, stage.name)),
            )
            if int(state.step) < o.steps:
                return None
            (folder / stage.name / "done").touch()
        params = _after(stage, params, folder)
    return params


def train_autoencoder(recipe: Recipe, run: Run, store: ClipStore):
    """Images, then short clips, then whole clips; returns the parameters or None."""

    def loss(stage: Stage):
        return autoencoder_loss(recipe.vae, latent_noise=0.1 if stage.frames > 1 else 0.0)

    def batches(stage: Stage):
        return video_batches(stage, store)

    return _stages(recipe.autoencoder, first_vae(recipe), loss, batches, run)


def train_decoder(recipe: Recipe, cfg: VAEConfig, run: Run, store: ClipStore, params):
    """The decoder alone, on latents as noisy as a generator's; encoder and latents stay as they
    are.
    """

    def loss(stage: Stage):
        return autoencoder_loss(cfg, latent_noise=0.3)

    return _stages(recipe.decoder, params, loss, lambda stage: video_batches(stage, store), run)


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
    ready = read_mark(mark, store.videos)
    if ready == 0:
        path.unlink(missing_ok=True)  # of another autoencoder
    out = open_array(path, _latents_shape(store, recipe), np.float16)
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


def _latents_shape(store: ClipStore, recipe: Recipe) -> tuple[int, ...]:
    frames, side = (
        1 + (CLIP_FRAMES - 1) // recipe.vae.temporal_stride,
        SIZE // recipe.vae.spatial_stride,
    )
    return store.videos, store.clips, frames, side, side, recipe.vae.z


def train_extension(recipe: Recipe, run: Run, store: ClipStore, latents: np.ndarray, begun=None):
    """The video-extension model: alone first, then with the memory of earlier clips; {"dit",
    "text"} or None.  begun: parameters to start from, None for new ones.
    """

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
        return extension_loss(recipe.dit, text, task)

    def text(params, ids):
        return encode_text(params["text"], ids, recipe.text)

    return _stages(
        recipe.extension,
        first_dit(recipe, begun),
        loss,
        lambda stage: latent_batches(stage, latents, store, recipe.stride),
        run,
    )
