# SPDX-License-Identifier: Apache-2.0
"""Small datasets of latents without videos or models, for tests."""

import numpy as np

from lvjax.data.captioned import Source
from lvjax.data.latent_writer import LatentWriter
from lvjax.data.latents import Head, Layout, Sample, Text, open_latents

LAYOUT = Layout(8, (16, 16), 9, (3, 2, 2, 16), 1, 10, 2)
PROMPTS = ("", "waves", "clouds", "a cat")
IDS = {"kind": "ids", "length": 16, "vocabulary": 36}


def write_latents(folder, clips=(4, 1, 10, 3), text=IDS, **layout):
    """A dataset of videos of so many clips, each one sample.  The latents of clip i of video v are
    100 v + i, its tails with m latent frames m more; prompts change with every third clip.
    """
    layout = Layout(**{**LAYOUT.__dict__, **layout})
    writer = LatentWriter(folder / "set", Head("tiny", "0" * 64, text, layout))
    rng = np.random.default_rng(0)
    texts = {}
    for n, prompt in enumerate(PROMPTS):
        ids = np.arange(16, dtype=np.int32) % (n + 1)
        rows = ids if text["kind"] == "ids" else rng.standard_normal((n + 1, 16)).astype("float16")
        texts[prompt] = Text(rows, np.eye(4, dtype=np.float32)[n] + np.float32(0.1))
    writer.put_texts(texts)
    for v, count in enumerate(clips):
        path = folder / f"{v}.mp4"
        path.write_bytes(b"")
        source = Source(path.name, path, ((0.0, "waves"),))
        marks = [np.float16(100 * v + i) for i in range(count)]
        tails = [np.concatenate([np.full(m, x + m) for m in range(1, layout.tails + 1)])
                 for x in marks if layout.tails]  # fmt: skip
        cells = np.ones(layout.latent, np.float16)
        sample = Sample(
            0,
            [PROMPTS[1 + i // 3 % 3] for i in range(count)],
            [1 if i and i % 3 == 0 else 0 for i in range(count)],
            [x * cells for x in marks],
            [(t[:, None, None, None] * cells[:1]).astype(np.float16) for t in tails],
        )
        writer.finish(source, [writer.put_sample(source, 0, sample)])
    writer.complete([])
    return open_latents(folder / "set")


def names(data) -> dict[int, str]:
    """The sample of each video."""
    return {
        int(data.read(name, range(1), False).latents[0].flat[0]) // 100: name
        for name in data.samples
    }
