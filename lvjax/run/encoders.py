# SPDX-License-Identifier: Apache-2.0
"""Prompts and pictures as a transformer takes them: rows of text, and image tokens.

The pocket model's text encoder is held in memory with the rest.  UMT5 has 5.7 billion parameters
and is needed for a moment, so it is read from the disk layer by layer while the prompts pass
through it, and is never held; the image encoder is loaded, used and dropped.  Rows that were
computed once can be saved, and then neither is needed.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.checkpoint import Stored, layers, load_arrays, save_arrays
from lvjax.core.errors import CheckpointError, InputError, system_told
from lvjax.core.params import unflatten
from lvjax.data import prompts as pocket
from lvjax.models import pocket_text, umt5
from lvjax.models.image_encoder import encode_image
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.run.bundle import Bundle
from lvjax.run.sentence import features
from lvjax.run.timeline import short, word_notices
from lvjax.run.weights import stored_hash


class Prompts(NamedTuple):
    """The prompts of a run.

    rows(texts): float32 [B, M, D], zeros behind the tokens of a text where the model wants that.
    feature(text): float32 [E], what clip selection compares; it does not depend on a batch.
    dim: E.
    """

    rows: Callable[[tuple[str, ...]], jax.Array]
    feature: Callable[[str], np.ndarray]
    dim: int


def open_prompts(bundle: Bundle, texts: Iterable[str]) -> Prompts:
    """Get ready for these texts; what clip selection compares is of the bundle's sentence encoder
    where it has one.

    Raises: InputError for a text that has no embedding where there is no text encoder either.
    """
    own = _pocket(bundle) if isinstance(bundle.text, PocketTextConfig) else _known(bundle, texts)
    if (encoder := bundle.sentence) is None:
        return own
    return own._replace(feature=lambda text: features(encoder, (text,))[0], dim=encoder.cfg.dim)


def _known(bundle: Bundle, texts: Iterable[str]) -> Prompts:
    known = {**bundle.embeddings}
    if missing := [text for text in dict.fromkeys(texts) if text not in known]:
        known |= encode_prompts(bundle, missing)

    def rows(texts: tuple[str, ...]):
        longest = max(len(known[text]) for text in texts)
        return jnp.stack([jnp.pad(known[t], ((0, longest - len(known[t])), (0, 0))) for t in texts])

    dim = bundle.dit.text_dim
    return Prompts(rows, lambda text: known[text].sum(0), dim)


def _pocket(bundle: Bundle) -> Prompts:
    params, cfg = bundle.params["text"], bundle.text

    def rows(texts: tuple[str, ...]):
        return _pocket_rows(params, np.stack([pocket.encode(t).ids for t in texts]), cfg)

    def feature(text: str) -> np.ndarray:
        return np.asarray(_pooled(params, pocket.encode(text).ids[None], cfg))[0]

    return Prompts(rows, feature, cfg.dim)


_pocket_rows = jax.jit(pocket_text.encode_text, static_argnums=2)


@partial(jax.jit, static_argnums=2)
def _pooled(params, ids, cfg):
    """ids int32 [B, M] -> the sum of the text features over the words, float32 [B, E]: what clip
    selection compares.  A prompt without words has the sum over all rows.
    """
    words = (ids > 0) | ~(ids > 0).any(-1, keepdims=True)
    return jnp.where(words[..., None], pocket_text.encode_text(params, ids, cfg), 0).sum(1)


# ---- UMT5 --------------------------------------------------------------------------

_block = jax.jit(umt5.block, static_argnames="cfg")
GROUP = 8  # texts that pass through a layer together, so that many need no more memory


def encode_prompts(bundle: Bundle, texts: Iterable[str]) -> dict[str, np.ndarray]:
    """Rows of each text, float32 [its tokens, D]; the encoder is read from its files and not kept.

    Raises: InputError where the model has no text encoder; CheckpointError when it is damaged.
    """
    texts = list(dict.fromkeys(texts))
    stored, cfg = bundle.parts.get("text"), bundle.text
    if stored is None:
        raise InputError(
            f"{bundle.name} has no text encoder and no embedding of the prompt {short(texts[0])}; "
            "convert the text encoder into its folder, or give embeddings of its prompts"
        )
    ids, mask, _ = _tokens(bundle, texts)
    longest = int(mask.sum(1).max())
    ids, mask = ids[:, :longest], mask[:, :longest]
    groups = [slice(i, i + GROUP) for i in range(0, len(texts), GROUP)]
    x = [jnp.asarray(_words(stored, ids[group])) for group in groups]
    for layer in layers(stored, "blocks"):
        params = jax.tree.map(jnp.asarray, unflatten(layer))
        x = [_block(params, part, mask[g], cfg=cfg) for part, g in zip(x, groups, strict=True)]
    x, norm = jnp.concatenate(x), jnp.asarray(stored["norm"])
    rows = np.asarray(umt5.final_norm(norm, x, mask, cfg), np.float32)
    return {text: row[: int(m.sum())] for text, row, m in zip(texts, rows, mask, strict=True)}


def _tokens(bundle: Bundle, texts: list[str]):
    """Ids, mask, and which texts were cut."""
    from lvjax.data.tokenizer import FILES, FOLDERS, tokenize

    folder, cfg = bundle.folder, bundle.text
    places = [folder / below / name for below in FOLDERS for name in FILES]
    stamps = tuple((str(p), p.stat().st_mtime_ns) for p in places if p.is_file())
    return tokenize(_tokenizer(folder, cfg.vocab, stamps), texts, cfg.length)


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, vocab: int, stamps: tuple):
    """The tokenizer of a folder, read once; stamps: its files and when they were changed."""
    from lvjax.data.tokenizer import load_tokenizer

    return load_tokenizer(folder, vocab)


def _words(stored, ids: np.ndarray) -> np.ndarray:
    """Rows of the table of words for ids [B, M], float32; the table is not held."""
    stored.check(["embedding"])
    table = {int(i): stored.layer("embedding", int(i)).astype(np.float32) for i in np.unique(ids)}
    return np.stack([[table[int(i)] for i in row] for row in ids])


def notices(bundle: Bundle, texts: Iterable[str]) -> list[str]:
    """What the user should know about prompts that are not followed as they are written; of those
    that are embedded it was said then.
    """
    if isinstance(bundle.text, PocketTextConfig):
        return word_notices(texts)
    texts = [text for text in dict.fromkeys(texts) if text not in bundle.embeddings]
    if bundle.text is None or not texts:
        return []
    _, _, cut = _tokens(bundle, texts)
    return [
        f"the prompt {short(text)} has more than {bundle.text.length} tokens; the rest is left out"
        for text, is_cut in zip(texts, cut, strict=True)
        if is_cut
    ]


# ---- embeddings in a file ----------------------------------------------------------


def save_embeddings(
    path: Path, embeddings: Mapping[str, np.ndarray], model: str, encoder: Stored | None = None
) -> None:
    """Write rows by prompt.

    model: the name of the model whose text encoder made them, for people; they serve every model
      with the same encoder.  encoder: that; its sha256 is kept where it has checksums.
    """
    arrays = {_name(i): rows for i, rows in enumerate(embeddings.values())}
    meta = {"prompts": list(embeddings), "model": model, "kind": "embeddings"}
    save_arrays(path, arrays, meta | {"encoder": None if encoder is None else stored_hash(encoder)})


def _name(index: int) -> str:
    return f"{index:06d}"


@system_told()
def load_embeddings(path, dim: int, encoder: Stored | None = None) -> dict[str, np.ndarray]:
    """Rows by prompt, for a model that takes rows `dim` wide.

    encoder: the model's own where it is there; where it has checksums, as the one had
      that made the rows, they must be the same.
    Raises: CheckpointError when the file is damaged, holds something else, or is of another model.
    """
    arrays, meta = load_arrays(path)
    prompts = meta.get("prompts")
    of_text = isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)
    names = {_name(i) for i in range(len(prompts))} if of_text else None
    if meta.get("kind") != "embeddings" or names != arrays.keys():
        raise CheckpointError(f"{path} holds no prompt embeddings; make them with `lvjax encode`")
    found = {text: arrays[_name(i)] for i, text in enumerate(prompts)}
    for text, rows in found.items():
        if wrong := _wrong_rows(rows, dim):
            raise CheckpointError(
                f"{path} holds {wrong} for the prompt {short(text)}, the model takes [tokens, "
                f"{dim}]; encode the prompts with the model's own text encoder"
            )
    made, own = meta.get("encoder"), None if encoder is None else stored_hash(encoder)
    if None not in (made, own) and made != own:
        raise CheckpointError(
            f"{path} was made by another text encoder than that of the model; encode the prompts "
            "with the model's own"
        )
    return found


def _wrong_rows(rows: np.ndarray, dim: int) -> str | None:
    """What keeps rows from being those of a prompt, if anything."""
    if rows.ndim != 2 or rows.shape[1] != dim or not len(rows):
        return f"rows {list(rows.shape)}"
    if rows.dtype != np.float32:
        return f"rows of {rows.dtype}, not float32,"
    return None if np.isfinite(rows).all() else "rows that are not finite"


def rows_hash(bundle: Bundle, texts: Iterable[str]) -> str | None:
    """sha256 of these prompts and their rows; None where they are made of weights in memory.

    The rows must be among the bundle's embeddings.
    """
    if isinstance(bundle.text, PocketTextConfig):
        return None
    found = hashlib.sha256()
    for text in texts:
        rows = np.ascontiguousarray(bundle.embeddings[text], np.float32)
        found.update(repr((text, rows.shape)).encode())
        found.update(rows)
    return found.hexdigest()


# ---- image tokens ------------------------------------------------------------------


def encode_pictures(bundle: Bundle, pictures: list[np.ndarray]) -> np.ndarray:
    """Image tokens float32 [1, n * 257, D] of n pictures float32 [H, W, 3] in [-1, 1].

    Raises: InputError where the model needs an image encoder that is not there.
    """
    if "image" not in bundle.parts:
        raise InputError(
            f"{bundle.name} needs an image encoder; convert it into the model's folder too"
        )
    from lvjax.io.clip_image import clip_pixels

    stored = bundle.parts["image"]
    params = unflatten({name: jnp.asarray(stored[name]) for name in stored})
    pixels = jnp.stack([clip_pixels(picture, size=bundle.image.size) for picture in pictures])
    tokens = jax.jit(encode_image, static_argnums=2)(params, pixels, bundle.image)
    return np.asarray(tokens).reshape(1, -1, tokens.shape[-1])
