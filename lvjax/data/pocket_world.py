# SPDX-License-Identifier: Apache-2.0
"""The pocket world as a TensorFlow Datasets builder; TensorFlow itself is not needed.

    builder = PocketWorld(data_dir="data", config="short")
    builder.download_and_prepare()
    source = builder.as_data_source("held_out")   # random access, no TensorFlow

The plain generator underneath is `examples`; clips for training come straight from `data.clips`.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from lvjax.data.prompts import CAMERAS, COLOURS, SHAPES
from lvjax.data.world import FPS, SIZE, SPLITS, Video


def examples(split: str, videos: int, frames: int, seed: int = 0) -> Iterator[tuple[int, dict]]:
    """(index, example) of `videos` videos of `frames` frames, with the prompt and the exact ground
    truth of every frame.
    """
    for index in range(videos):
        video = Video(index, split=split, seed=seed)
        poses = [video.pose(f) for f in range(frames)]
        actions = [video.action(f) for f in range(frames)]
        starts = [
            f for f in range(frames) if f == 0 or video.segment(f) is not video.segment(f - 1)
        ]
        yield (
            index,
            {
                "video": video.frames(0, frames),
                "prompts": [actions[f].prompt() for f in starts],
                "prompt_times": np.array(starts, np.float32) / FPS,
                "scene": video.scene,
                "camera": np.array([CAMERAS.index(a.camera) for a in actions], np.int32),
                "view": np.array([(p.x, p.y, p.scale) for p in poses], np.float32),
                "colour": np.array(
                    [list(COLOURS).index(a.colour) if a.colour else -1 for a in actions], np.int32
                ),
                "shape": np.array(
                    [SHAPES.index(a.shape) if a.shape else -1 for a in actions], np.int32
                ),
                "object": np.array([(p.object_x, p.object_y) for p in poses], np.float32),
            },
        )


class PocketWorldConfig(tfds.core.BuilderConfig):
    """videos: per split ("held_out" has an eighth).  frames: pixel frames per video, 1 + 4m."""

    def __init__(self, *, videos: int, frames: int, seed: int = 0, **kwargs):
        super().__init__(version=tfds.core.Version("1.0.0"), **kwargs)
        self.videos, self.frames, self.seed = videos, frames, seed


class PocketWorld(tfds.core.GeneratorBasedBuilder):
    """Endless single-shot videos with prompts and exact ground truth."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        PocketWorldConfig(name="short", videos=512, frames=77, description="about ten seconds"),
        PocketWorldConfig(name="long", videos=64, frames=961, description="two minutes"),
        PocketWorldConfig(name="tiny", videos=8, frames=17, description="for tests"),
    ]

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        frames = self.builder_config.frames
        per_frame = {
            k: tfds.features.Tensor(shape=(frames,), dtype=np.int32)
            for k in ("camera", "colour", "shape")
        }
        features = {
            "video": tfds.features.Tensor(
                shape=(frames, SIZE, SIZE, 3), dtype=np.uint8, encoding="zlib"
            ),
            "prompts": tfds.features.Sequence(tfds.features.Text()),
            "prompt_times": tfds.features.Sequence(tfds.features.Scalar(np.float32)),
            "scene": tfds.features.Text(),
            "view": tfds.features.Tensor(shape=(frames, 3), dtype=np.float32),
            "object": tfds.features.Tensor(shape=(frames, 2), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features | per_frame),
        )

    def _split_generators(self, dl_manager):
        c = self.builder_config
        counts = {"train": c.videos, "held_out": max(1, c.videos // 8)}
        return {split: examples(split, counts[split], c.frames, c.seed) for split in SPLITS}

    def _generate_examples(self, split: str, videos: int):
        return examples(split, videos, self.builder_config.frames, self.builder_config.seed)
