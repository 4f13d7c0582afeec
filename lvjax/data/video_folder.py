# SPDX-License-Identifier: Apache-2.0
"""A folder of videos with captions as a TensorFlow Datasets builder; TensorFlow itself is not
needed.

    builder = VideoFolder(folder="videos", fps=16, size=(480, 832), data_dir="data")
    builder.download_and_prepare()
    source = builder.as_data_source("train")   # random access, no TensorFlow

The plain generator underneath is `examples`.  To train on latents, which needs neither these
frames nor the autoencoder: `lvjax encode --videos` (run/dataset.py).
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import tensorflow_datasets as tfds

from lvjax.core.errors import InputError
from lvjax.data.captioned import Skipped, Source, find_videos, frames_of

FRAMES = 512  # of an example, at most


def examples(
    folder,
    fps: int,
    size: tuple[int, int],
    frames: int = FRAMES,
    skip: Callable[[Skipped], None] = lambda skipped: None,
) -> Iterator[tuple[str, dict]]:
    """(key, example) of the videos in a folder; a video of more than `frames` frames is several
    examples, each with the prompts that rule it.

    size: (height, width).  skip: called with each video that has no caption or cannot be read; of
      one that breaks off, the examples before that stay.
    """
    found, without = find_videos(folder)
    for skipped in without:
        skip(skipped)
    for source in found:
        source = source._replace(name=_letters(source.name))
        shown, begin = frames_of(source.path, fps, size), 0
        try:
            while piece := list(islice(shown, frames)):
                yield f"{source.name}@{begin}", _example(source, np.stack(piece), begin, fps)
                begin += len(piece)
        except InputError as e:
            skip(Skipped.of(source.name, source.path, e))


def _letters(name: str) -> str:
    """A name as text that can be stored: bytes in it that are no letters are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def _example(source: Source, video: np.ndarray, begin: int, fps: int) -> dict:
    """An example of the frames from number `begin` on."""
    start, end = begin / fps, (begin + len(video)) / fps
    ruling = [t for t, _ in source.timeline if t <= start][-1]
    prompts = [(max(t - start, 0.0), text) for t, text in source.timeline if ruling <= t < end]
    return {
        "video": video,
        "prompts": [text for _, text in prompts],
        "prompt_times": np.array([t for t, _ in prompts], np.float32),
        "name": source.name,
        "first": np.int64(begin),
    }


class VideoFolder(tfds.core.GeneratorBasedBuilder):
    """Videos of a folder with their captions, resampled and cropped.

    folder, fps, size, frames: as `examples`.  Videos that could not be used are listed in
    `info.metadata["skipped"]`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        folder,
        fps: int,
        size: tuple[int, int],
        frames: int = FRAMES,
        config=None,
        **kwargs,
    ):
        self._source = str(folder), fps, tuple(size), frames
        if config is None:  # what is prepared for other settings has another name
            name = f"{fps}fps_{size[1]}x{size[0]}_{frames}_" + hashlib.sha256(
                self._source[0].encode()
            ).hexdigest()[:8]  # fmt: skip
            config = tfds.core.BuilderConfig(name=name, version=self.VERSION)
        super().__init__(file_format="array_record", config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        height, width = self._source[2]
        features = {
            "video": tfds.features.Tensor(
                shape=(None, height, width, 3), dtype=np.uint8, encoding="zlib"
            ),
            "prompts": tfds.features.Sequence(tfds.features.Text()),
            "prompt_times": tfds.features.Sequence(tfds.features.Scalar(np.float32)),
            "name": tfds.features.Text(),
            "first": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(skipped=[]),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        folder, fps, size, frames = self._source
        skipped = self.info.metadata["skipped"]
        return examples(folder, fps, size, frames, lambda s: skipped.append(s._asdict()))
