# SPDX-License-Identifier: Apache-2.0
"""Videos to a dataset of latents, by a model's autoencoder and text encoder; and whether a dataset
is of a model.

Clips are cut and encoded as a rollout makes them: each alone, the first `overlap` latent frames of
the same pixels as the end of the clip before.
Does not own: the files (data/latent_writer.py), reading videos (data/captioned.py).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lvjax.core.errors import CheckpointError, InputError, NonFiniteError
from lvjax.data import prompts as pocket
from lvjax.data.captioned import Skipped, Source, frames_of
from lvjax.data.latent_writer import LatentWriter, Written
from lvjax.data.latents import NULL, Head, Latents, Layout, Sample, Text, open_latents
from lvjax.methods.error_free import ErrorFree
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.rollout.condition import pixel_frames
from lvjax.run.bundle import Bundle
from lvjax.run.encoders import open_prompts
from lvjax.run.opening import encoder
from lvjax.run.pictures import as_frames
from lvjax.run.request import check_frames, check_size
from lvjax.run.timeline import Cuts
from lvjax.run.weights import part_hash, read_part, stored_hash

CLIPS, TAILS = 32, 3
TEXTS_EACH = 64  # prompts that pass through the text encoder together, and lie in one file


def plan_layout(
    bundle: Bundle,
    *,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    overlap: int | None = None,
    clips: int = CLIPS,
    tails: int | None = None,
) -> Layout:
    """How videos are cut for a model; what is None is as its defaults have it.

    size: (height, width).  frames: pixel frames of a clip, 1 + 4m.  overlap, tails, clips: as
      `Layout` has them; both overlap and tails may be fewer where clips are short.  A model of
      another method has no clips that follow from each other yet: where None, its overlap is that
      of `methods.ErrorFree`, which it is trained for.
    Raises: InputError with what is allowed.
    """
    d, stride = bundle.defaults, bundle.vae.spatial_stride
    size = check_size(d.size if size is None else size, bundle)
    frames = check_frames(pixel_frames(d.clip_latents) if frames is None else frames)
    latents = 1 + (frames - 1) // bundle.vae.temporal_stride
    if latents < 2:
        raise InputError(f"clips of {frames} frame are asked for; give 5 or more")
    if overlap is None:
        usual = d.overlap if d.method == "error_free" else ErrorFree.overlap
        overlap = min(usual, latents - 1)
    tails = min(TAILS, latents - 1) if tails is None else tails
    for name, value, least, most in (
        ("overlap", overlap, 1, latents - 1),
        ("tails", tails, 0, latents),
        ("clips", clips, 1, 10_000),
    ):
        if not least <= value <= most:
            raise InputError(
                f"{name} is {value}; with clips of {frames} frames, which are {latents} latent "
                f"ones, give {least} to {most}"
            )
    latent = (latents, *(n // stride for n in size), bundle.vae.z)
    return Layout(d.fps, size, frames, latent, overlap, clips, tails)


def encode_folder(
    bundle: Bundle,
    videos: list[Source],
    skipped: list[Skipped],
    folder,
    layout: Layout,
    report: Callable[[Source, int], None] = lambda source, clips: None,
) -> tuple[dict[str, int], list[Skipped]]:
    """Write, or go on with, the dataset of some videos.

    bundle: the model in outline; its transformer is not read.  skipped: videos that cannot be used
      anyway.  report: called after every clip with the video, and how many of its clips are done.
    A kill costs the video in flight, and nothing that is finished is made again.
    Returns: how many {"videos", "samples", "clips", "skipped"} there are, and which are left out.
    Raises: CheckpointError when no video can be used; InputError when `folder` holds something
      else; NonFiniteError; StorageError.
    """
    vae, vae_hash = read_part(bundle, "vae")
    head = Head(bundle.name, vae_hash, text_kind(bundle), layout)
    writer = LatentWriter(folder, head)
    _put_texts(bundle, writer, [NULL, *(text for v in videos for _, text in v.timeline)])
    model, skipped = dataclasses.replace(bundle, params={"vae": vae}), list(skipped)
    for source in videos:
        try:
            if not writer.has(source):
                writer.finish(source, _put_samples(model, writer, source, layout, report))
        except InputError as e:
            skipped.append(Skipped.of(source.name, source.path, e))
    skipped.sort()
    return writer.complete(skipped), skipped


def text_kind(bundle: Bundle) -> dict:
    """What the text of a model's dataset is, see `Head`."""
    if isinstance(bundle.text, PocketTextConfig):
        return {"kind": "ids", "length": bundle.text.length, "vocabulary": bundle.text.vocabulary}
    stored = bundle.parts.get("text")
    made = None if stored is None else stored_hash(stored)
    return {"kind": "rows", "dim": bundle.dit.text_dim, "encoder": made}


def _put_texts(bundle: Bundle, writer: LatentWriter, texts: Iterable[str]) -> None:
    """Write the prompts that are not there yet, some at a time."""
    missing = [text for text in dict.fromkeys(texts) if text not in writer.texts]
    is_pocket = isinstance(bundle.text, PocketTextConfig)
    if is_pocket and missing:
        bundle = dataclasses.replace(bundle, params={"text": read_part(bundle, "text")[0]})
    for i in range(0, len(missing), TEXTS_EACH):
        group = missing[i : i + TEXTS_EACH]
        prompts = open_prompts(bundle, group)
        rows = {
            text: pocket.encode(text).ids if is_pocket else _half(prompts.rows((text,))[0], text)
            for text in group
        }
        writer.put_texts({text: Text(rows[text], prompts.feature(text)) for text in group})


def _put_samples(
    model: Bundle, writer: LatentWriter, source: Source, layout: Layout, report: Callable
) -> Written:
    """Encode a video into samples.

    Raises: InputError when it cannot be read, or is too short; nothing of it is left then.
    """
    written: Written = []
    held: list[tuple] = []  # the clips of the sample in flight

    def put(end: int) -> None:
        first = end - len(held)
        prompts, least = _prompts(source, range(first, end), layout)
        latents, tails = [z for z, _ in held], [rows for _, rows in held if layout.tails]
        sample = Sample(first, prompts, least, latents, tails)
        written.append(writer.put_sample(source, len(written), sample))
        held.clear()

    count = 0
    try:
        for bits in _clips(source, layout):
            held.append(_encoded(model, bits, layout, f"{source.name}, clip {count}"))
            count += 1
            report(source, count)
            if len(held) == layout.clips:
                put(count)
    except InputError:
        writer.drop(written)
        raise
    if held:
        put(count)
    if not written:
        raise InputError(
            f"{source.path} is shorter than a clip of {layout.frames} frames, which are "
            f"{layout.frames / layout.fps:.3g} s"
        )
    return written


def _clips(source: Source, layout: Layout) -> Iterator[np.ndarray]:
    """The clips of a video as uint8 [P, H, W, 3]; what is left at its end is no clip."""
    shown, held = frames_of(source.path, layout.fps, layout.size), []
    new = layout.frames - pixel_frames(layout.overlap)
    while len(held) < layout.frames and (frame := next(shown, None)) is not None:
        held.append(frame)
        if len(held) == layout.frames:
            yield np.stack(held)
            del held[:new]


def _encoded(
    model: Bundle, bits: np.ndarray, layout: Layout, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Latents of a clip, float16 [T, h, w, z], and of its last frames, [R (R + 1) / 2, h, w, z]."""
    encode, video = encoder(model), as_frames(bits)[None]
    ends = [encode(video[:, -pixel_frames(m) :])[0] for m in range(1, layout.tails + 1)]
    tails = [_half(end, what) for end in ends]
    none = np.zeros((0, *layout.latent[1:]), np.float16)
    return _half(encode(video)[0], what), np.concatenate([none, *tails])


def _prompts(source: Source, clips: range, layout: Layout) -> tuple[list[str], list[int]]:
    """The prompts of some clips, and how many latent frames each must be given: those before its
    own, where its prompt is new.
    """
    end = layout.frames * clips.stop  # no clip begins behind it
    cuts = Cuts(end, layout.frames, layout.frames - pixel_frames(layout.overlap), layout.fps)
    prompts = [cuts.prompt(source.timeline, i) for i in clips]
    before = [cuts.prompt(source.timeline, max(i - 1, 0)) for i in clips]
    pairs = zip(before, prompts, strict=True)
    return prompts, [0 if old == new else layout.overlap for old, new in pairs]


def _half(a, what: str) -> np.ndarray:
    """As float16.  Raises: NonFiniteError when that is not finite."""
    with np.errstate(over="ignore"):
        half = np.asarray(a).astype(np.float16)
    if not np.isfinite(half).all():
        raise NonFiniteError(f"what the model makes of {what} is not finite; check its weights")
    return half


# ---- a dataset of a model ----------------------------------------------------------


def open_dataset(bundle: Bundle, folder) -> Latents:
    """Open a dataset to train a model on it.

    bundle: in outline; its autoencoder is read once for its hash, and not held.
    Raises: CheckpointError when the dataset is damaged, not finished, or of another model.
    """
    data = open_latents(folder)
    head, made, own = data.head, dict(data.head.text), text_kind(bundle)
    encoders = made.pop("encoder", None), own.pop("encoder", None)
    if made != own or (None not in encoders and len(set(encoders)) > 1):
        raise CheckpointError(
            f"{folder} has text for another text encoder than that of {bundle.name}; encode the "
            "videos with the model that is trained"
        )
    if head.vae != part_hash(bundle, "vae"):
        raise CheckpointError(
            f"{folder} was made by another autoencoder (of {head.model}) than that of "
            f"{bundle.name}; encode the videos with the model that is trained"
        )
    if any(n % p for n, p in zip(head.layout.latent[:3], bundle.dit.patch, strict=True)):
        raise CheckpointError(
            f"{folder} has latents of {list(head.layout.latent[:3])}, the model takes multiples of "
            f"{list(bundle.dit.patch)}; encode the videos with another --size"
        )
    return data
