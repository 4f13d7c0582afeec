# SPDX-License-Identifier: Apache-2.0
"""What the pocket model is trained by: sizes, stages and their options, as frozen values."""

from dataclasses import dataclass

from lvjax.core.errors import InputError
from lvjax.core.fields import check_fields, whole
from lvjax.data.clips import CLIP_FRAMES
from lvjax.data.prompts import VOCABULARY
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.run.defaults import Defaults
from lvjax.train.extension import ExtensionTask
from lvjax.train.state import TrainOptions

KINDS = ("autoencoder", "extension", "decoder")
"""The fields of a recipe that hold stages, in the order of training."""


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
    """Everything that `train` needs; the defaults are the recipe of the weights in the package, but
    for the points that their model card names.

    stride: new latent frames per clip.
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
    stride: int = 3
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

    def __post_init__(self):
        counts = (self.videos, self.clips)
        if not all(type(n) is int and n > 0 for n in counts):
            raise InputError(f"videos is {self.videos}, clips {self.clips}; give 1 or more of each")
        check_fields(self, "", {"seed": whole(0, 2**31 - 1), "stride": whole()})
