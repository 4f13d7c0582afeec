# SPDX-License-Identifier: Apache-2.0
"""Training a video-extension model of anybody's weights: what a config asks for, and the state that
it begins with.

Stage 1 of "Towards Error-Free Long Video Generation" moves all parameters of a transformer, which
gets a projection of given frames that begins with zeros, so that step 0 is the model itself.  Stage
2 moves adapters of the layers that remember (arXiv:2606.22370, sections on video extension and on
inter-clip causal attention).  Neither the autoencoder nor a large text encoder takes memory: the
data are latents and rows of text (`lvjax encode`); the autoencoder's file is read for its checksum,
and for samples on the way.
Does not own: losses, steps and checkpoints (lvjax/train), what is written at the end (trained.py).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.checkpoint import Stored
from lvjax.core.errors import InputError
from lvjax.core.fields import FLAG, check_fields, one_of, optional, real, whole
from lvjax.core.mesh import make_mesh, shardings
from lvjax.core.params import Spec, abstract, flatten, init, unflatten
from lvjax.methods.error_free import memory_layers
from lvjax.models.config import DiTConfig
from lvjax.models.dit import dit_spec
from lvjax.models.lora import lora_spec, within
from lvjax.models.pocket_text import PocketTextConfig, encode_text, text_spec
from lvjax.rollout.condition import MASK
from lvjax.run.bundle import Bundle, outline, typed
from lvjax.run.defaults import TYPES
from lvjax.run.plan import COMPILING, RUNTIME
from lvjax.train.extension import TRAINED_FILLS, ExtensionTask, extension_loss
from lvjax.train.state import (
    TrainOptions,
    init_state,
    make_optimizer,
    make_step,
    split,
    state_shardings,
)


@dataclass(frozen=True)
class Adapters:
    """LoRA on the self-attention of the layers that remember.

    rank: of each product.  targets: some of "q", "k", "v", "o"; the paper's are "k" and "v".
    Raises: InputError naming the field.
    """

    rank: int = 64
    targets: tuple[str, ...] = ("k", "v")

    def __post_init__(self):
        check_fields(self, "adapters", {"rank": whole()})
        if not self.targets or not set(self.targets) <= set("qkvo"):
            raise InputError(f"adapters.targets is {self.targets}; give some of q, k, v, o")


RANGES = {
    "batch": whole(),
    "clips": whole(),
    "dtype": optional(one_of(TYPES)),
    "sample_seconds": real(1e-3, 86_400),
    "tensorboard": FLAG,
}


@dataclass(frozen=True)
class Training:
    """What `lvjax train` needs to train a transformer.

    model: "pocket" or a folder, as `lvjax.load` takes it.  data: a folder that `lvjax encode
      --videos` wrote.  Both may be empty until `open_training`, so that a config need not know
      them.  batch: samples per step.  clips: of each sample, in order of time; with more
      than one, clips attend to earlier ones in the latter half of the layers, or where
      `task.memory_layers` says.
    adapters: None to move all parameters.  dtype: of the activations, None for the model's own;
      what moves is float32 always.
    mesh: devices for rows, parameters and tokens: (data, fsdp, seq).
    samples: prompts of the data that are shown every `options.sample_every` steps.
    sample_seconds: length of these videos.  tensorboard: write its files too.
    Raises: InputError naming the field.
    """

    model: str
    data: str
    options: TrainOptions
    task: ExtensionTask = ExtensionTask()
    batch: int = 8
    clips: int = 1
    adapters: Adapters | None = None
    dtype: str | None = None
    mesh: tuple[int, int, int] = (1, 1, 1)
    samples: tuple[str, ...] = ()
    sample_seconds: float = 5.0
    tensorboard: bool = False

    def __post_init__(self):
        check_fields(self, "", RANGES)
        if len(self.mesh) != 3 or any(type(n) is not int or n < 1 for n in self.mesh):
            raise InputError(f"mesh is {self.mesh}; give devices for (rows, parameters, tokens)")
        if self.clips == 1 and self.task.memory_layers is not None:
            raise InputError("task.memory_layers is given, but clips is 1; give clips=2 or more")
        if self.task.object_weight:
            raise InputError(
                "task.object_weight is given; only rendered clips say where objects are"
            )


@dataclass(frozen=True)
class Open:
    """A training, ready to begin but for its weights.

    bundle: in outline; its transformer takes given frames.  spec: of all parameters that the loss
    needs, by part.  fixed: paths of those that do not move.  layers: that remember, None for none.
    """

    training: Training
    bundle: Bundle
    spec: Spec
    fixed: tuple[str, ...]
    layers: tuple[int, int] | None
    mesh: Any = field(repr=False)

    @property
    def cfg(self) -> DiTConfig:
        """The transformer's sizes."""
        return self.bundle.dit


def open_training(training: Training) -> Open:
    """What is to be trained; no weights are read.

    Raises: InputError for a model that this cannot train; CheckpointError as `outline`.
    """
    for name in ("model", "data"):
        if not getattr(training, name):
            raise InputError(f"{name} is not given; add --set {name}=FOLDER")
    bundle = typed(outline(training.model), training.dtype)
    if len(bundle.experts) > 1:
        raise InputError(f"{bundle.name} has two experts; give a model with one transformer")
    if bundle.dit.image_dim is not None:
        raise InputError(f"{bundle.name} needs image tokens; give a text-to-video model")
    if not all(isinstance(part, Stored) for part in bundle.parts.values()):
        raise InputError(
            f"{bundle.folder} is as its publishers lay it out; bring it into a folder of lvjax's "
            "first: lvjax convert SRC FOLDER"
        )
    channels = MASK + bundle.vae.z
    if bundle.dit.condition_channels not in (0, channels):
        raise InputError(
            f"{bundle.name} takes {bundle.dit.condition_channels} channels of given frames, video "
            f"extension {channels}; give a text-to-video model"
        )
    if training.adapters is not None and not bundle.dit.condition_channels:
        raise InputError(
            f"{bundle.name} does not take given frames yet; train all parameters first, without "
            "adapters, and give the bundle that this leaves"
        )
    training = replace(training, task=replace(training.task, fill=_fill(training, bundle)))
    bundle = replace(bundle, dit=replace(bundle.dit, condition_channels=channels))
    layers = training.task.memory_layers
    if training.clips > 1 and layers is None:
        layers = memory_layers(bundle.dit)
    spec = {"dit": dit_spec(bundle.dit)}
    if isinstance(bundle.text, PocketTextConfig):
        spec["text"] = text_spec(bundle.text)
    fixed = ()
    if training.adapters is not None:
        targets = [f"blocks/self_attn/{name}" for name in training.adapters.targets]
        spec["dit"] = lora_spec(spec["dit"], targets, training.adapters.rank)
        fixed = tuple(k for k in flatten(spec) if not k.endswith(("/lora/a", "/lora/b")))
    return Open(training, bundle, spec, fixed, layers, make_mesh(*training.mesh))


def _fill(training: Training, bundle: Bundle) -> str:
    """What stands for frames that are not given: as the model knows it, if it takes given frames.

    Raises: InputError for another under adapters, which cannot learn it, and for one that training
      has not.
    """
    fill, own = training.task.fill, bundle.defaults.fill
    if not bundle.dit.condition_channels:
        return fill or "latent"
    if training.adapters is not None and own in TRAINED_FILLS and fill not in (None, own):
        raise InputError(
            f"task.fill is {fill!r}, {bundle.name} was trained with {own!r}; leave it None"
        )
    if (fill or own) not in TRAINED_FILLS:
        raise InputError(
            f"{bundle.name} fills what is not given with {own!r} frames, which needs its "
            f"autoencoder; give task.fill={TRAINED_FILLS[0]!r}"
        )
    return fill or own


def loss_of(opened: Open) -> Callable:
    """The loss of `extension_loss`, for the model's kind of text."""
    task = replace(opened.training.task, memory_layers=opened.layers)
    text = opened.bundle.text
    if isinstance(text, PocketTextConfig):
        return extension_loss(
            opened.cfg, lambda params, ids: encode_text(params["text"], ids, text), task
        )
    return extension_loss(opened.cfg, lambda params, rows: rows.astype(jnp.float32), task)


# ---- the state before the first step -----------------------------------------------


def begin(opened: Open):
    """(state, fixed): what moves, in float32, from the model's weights, and what does not, as it is
    stored where the activations are as narrow; each array goes to its devices as it is read.
    """
    trained, fixed = split(unflatten(_read(opened)), opened.fixed)
    state = init_state(trained, make_optimizer(opened.training.options), _seed(opened))
    return jax.device_put(state, _places(opened, state)), fixed


def begin_fixed(opened: Open):
    """What does not move, as `begin` gives it, for a run whose state is in a checkpoint."""
    return unflatten(_read(opened, opened.fixed))


def shapes(opened: Open):
    """(state, fixed) as `begin` gives them, without any array."""
    kinds = {
        path: jax.ShapeDtypeStruct(leaf.shape, _dtype(opened, path), sharding=place)
        for (path, leaf), place in zip(
            flatten(abstract(opened.spec)).items(), _layout(opened).values(), strict=True
        )
    }
    trained, fixed = split(unflatten(kinds), opened.fixed)
    optimizer = make_optimizer(opened.training.options)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, _seed(opened)), trained)
    placed = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        state,
        _places(opened, state),
    )
    return placed, fixed


def _seed(opened: Open) -> int:
    return opened.training.options.seed


def _layout(opened: Open) -> dict:
    """Where each parameter lies, by path."""
    return flatten(shardings(opened.spec, opened.mesh))


def _places(opened: Open, state):
    trained = {k: p for k, p in _layout(opened).items() if k not in opened.fixed}
    return state_shardings(state, unflatten(trained), opened.mesh)


def _dtype(opened: Open, path: str):
    """As a parameter is held: float32 where it moves, and where activations are."""
    part, _, name = path.partition("/")
    slot = opened.bundle.parts[part].slots.get(name)
    if path not in opened.fixed or slot is None or opened.cfg.dtype == "float32":
        return np.dtype(np.float32)
    return np.dtype(jnp.bfloat16) if np.dtype(slot.dtype).itemsize == 2 else np.dtype(np.float32)


def _read(opened: Open, wanted: Collection[str] | None = None) -> dict:
    """Every parameter, on its devices: of the model, or new.  wanted: the paths of only some."""
    found, key = {}, jax.random.key(_seed(opened))
    for (path, param), place in zip(
        flatten(opened.spec).items(), _layout(opened).values(), strict=True
    ):
        if wanted is not None and path not in wanted:
            continue
        part, _, name = path.partition("/")
        if name in opened.bundle.parts[part].slots:
            array = opened.bundle.parts[part][name]
        else:
            array = flatten(init(unflatten({path: param}), key))[path]
        found[path] = jax.device_put(np.asarray(array, _dtype(opened, path)), place)
    if opened.training.adapters is not None:
        layers = opened.layers or memory_layers(opened.cfg)
        tree = unflatten(found)
        found = flatten(tree | {"dit": within(tree["dit"], range(*layers))})
    return found


# ---- the step, and what it needs ---------------------------------------------------


@dataclass(frozen=True)
class TrainingPlan:
    """memory: bytes on one device, by purpose: state (what moves, its average and moments), weights
    that stay, the batch, and scratch, by XLA's account of the compiled step.  devices: how many.
    """

    memory: dict[str, int]
    devices: int = 1

    @property
    def device_bytes(self) -> int:
        """Peak on one device."""
        return sum(self.memory.values())

    @property
    def host_bytes(self) -> int:
        """Peak of a process whose devices are its own cores: theirs, and what JAX and its compiler
        take.
        """
        return round(self.device_bytes * self.devices + RUNTIME + COMPILING)


def compiled_step(opened: Open, batch) -> tuple[Callable, TrainingPlan]:
    """The step, compiled before any weight is read, and what it takes.

    batch: one of the data's, as arrays or their shapes.
    Raises: InputError for rows, or tokens of a clip, that the mesh does not divide.
    """
    o = opened.training.options
    _check_mesh(opened, batch["latents"].shape)
    state, fixed = shapes(opened)
    places = jax.tree.map(lambda a: a.sharding, state)
    step = make_step(loss_of(opened), make_optimizer(o), o, places)
    rows = jax.sharding.NamedSharding(opened.mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), batch)
    with jax.set_mesh(opened.mesh):
        compiled = step.lower(state, fixed, batch).compile()
    needs = {
        "state": _held(state),
        "weights that stay": _held(fixed),
        "batch": _held(batch),
        "scratch": int(compiled.memory_analysis().temp_size_in_bytes),
    }
    return compiled, TrainingPlan(needs, opened.mesh.size)


def _check_mesh(opened: Open, shape: tuple[int, ...]) -> None:
    (b, _, *clip, _), parts = shape, opened.training.options.accumulate
    tokens = math.prod(n // p for n, p in zip(clip, opened.cfg.patch, strict=True))
    rows, _, seq = opened.training.mesh
    if b % (parts * rows):
        raise InputError(
            f"batch is {b}; give a multiple of {parts * rows}, for options.accumulate={parts} and "
            f"mesh[0]={rows}"
        )
    if tokens % seq:
        raise InputError(f"clips have {tokens} tokens; give a mesh[2] that divides them, not {seq}")


def _held(tree) -> int:
    """Bytes on one device of arrays that are laid out."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
