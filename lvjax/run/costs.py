# SPDX-License-Identifier: Apache-2.0
"""What the parts of a model cost, by arithmetic: bytes that are held while one computes, and
floating-point operations.

The constants are fitted to XLA's memory analysis of programs compiled for the CPU, at widths from
tiny to Wan's own; tests hold them to it.  They have not been compared with a GPU's yet: there,
fused attention needs less than what is counted here.
Does not own: what a run is made of, and whether it fits (plan.py).
"""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp

from lvjax.core.compat import SLICES_WIDEN
from lvjax.core.params import abstract, flatten
from lvjax.kernels.attention import score_bytes
from lvjax.memory.cache import init_cache
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.image_encoder import ImageEncoderConfig
from lvjax.models.umt5 import UMT5Config
from lvjax.models.vae import decode_start, encode_start, vae_spec
from lvjax.rollout.condition import MASK
from lvjax.run.bundle import Bundle, specs
from lvjax.run.weights import leaf_bytes

# Bytes per token of a block, by the width of an activation in bytes: per channel of the stream
# while queries, keys and values are made, and while they attend, beside the scores; per channel of
# the feed-forward layer, beside the stream's own 4 per channel.
PROJECTING = {2: 33, 4: 37}
ATTENDING = {2: 24, 4: 30}
FEEDING = {2: 6, 4: 8}
SCORES = 2  # chunks of scores that attention holds
LAYERS_AHEAD = 3  # of weights that wait: one on its way, one that is computed with and its copy
# Of a step over one latent frame, in its pictures of the channels of the decoder's last or the
# encoder's first stage: what the decoder holds, what it holds while its kernels are laid out anew,
# and what the encoder holds.
DECODING, LAYING_OUT, ENCODING = 1.4, 1.9, 5.85
# Pictures that a convolution on the CPU allocates for itself, as products do their result; XLA's
# account leaves it out.  Measured as resident memory.
SCRATCH = 4
RGB = 3 * 4  # bytes of a pixel of a frame in float32


def width(dit: DiTConfig) -> int:
    """Bytes of an activation."""
    return jnp.dtype(dit.dtype).itemsize


def image_tokens(dit: DiTConfig) -> int:
    """Rows of image tokens that cross-attention sees beside the text."""
    return 0 if dit.image_dim is None else dit.image_pos_len or ImageEncoderConfig().num_tokens


def context_bytes(dit: DiTConfig, rows: int) -> int:
    """Cross-attention's keys and values of `rows` prompts in all layers."""
    tokens = dit.text_len + image_tokens(dit)
    return 2 * dit.num_layers * rows * tokens * dit.dim * width(dit)


def bank_bytes(dit: DiTConfig, rows: int, frames: int, grid, layers: tuple[int, int]) -> int:
    """Keys and values of remembered frames, as the cache itself lays them out."""
    bank = jax.eval_shape(lambda: init_cache(dit, rows, frames, grid, layers))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(bank))


def block_bytes(dit: DiTConfig, rows: int, tokens: int, keys: int) -> int:
    """What a block holds: for `rows` of `tokens`, attending to `keys`; without its weights."""
    size, stream = width(dit), rows * tokens * dit.dim
    scores = SCORES * score_bytes(rows, dit.num_heads, tokens, keys)
    feeding = rows * tokens * (FEEDING[size] * dit.ffn_dim + 4 * dit.dim)
    return max(PROJECTING[size] * stream, ATTENDING[size] * stream + scores, feeding)


def block_scratch(dit: DiTConfig, rows: int, tokens: int) -> int:
    """What the largest product of a block allocates on the CPU beside XLA's account."""
    return 4 * dit.ffn_dim * rows * tokens


def waits(dit: DiTConfig) -> bool:
    """Whether blocks are read as if they were on the host, wherever they are."""
    return SLICES_WIDEN and jax.default_backend() == "cpu" and dit.dtype == "bfloat16"


# ---- the autoencoder ---------------------------------------------------------------


@lru_cache
def _remembered(vae: VAEConfig, part: str) -> int:
    """What "decoder" or "encoder" remembers of the frames before, float32, for one latent cell."""
    stride = vae.spatial_stride
    shape, start = (
        ((1, 1, 2, 2, vae.z), decode_start)
        if part == "decoder"
        else ((1, 1, 2 * stride, 2 * stride, 3), encode_start)
    )
    given = jax.ShapeDtypeStruct(shape, jnp.float32)
    state, _ = jax.eval_shape(partial(start, cfg=vae), abstract(vae_spec(vae)), given)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)) // 4


def decoding(vae: VAEConfig, latents: int, size: tuple[int, int]) -> int:
    """What decoding one video of `latents` frames of `size` (h, w) holds, without the weights.

    The loop over frames has what is remembered of the frames before twice, old and new.
    """
    remembered, picture, pixels = _step_bytes(vae, "decoder", size)
    turning = min(2, latents - 1) * remembered + DECODING * picture + RGB * pixels * MASK * latents
    laying_out = _kernel_bytes(vae, "decoder") + remembered + LAYING_OUT * picture
    return round(max(turning, laying_out))


def encoding(vae: VAEConfig, latents: int, size: tuple[int, int]) -> int:
    """As `decoding`, with the frames rearranged, but without the frames as they are given."""
    remembered, picture, pixels = _step_bytes(vae, "encoder", size)
    picture *= 1 if latents > 1 else 1 / MASK
    held = min(2, latents - 1) * remembered + ENCODING * picture + RGB * pixels * MASK * latents
    return round(_kernel_bytes(vae, "encoder") + held)


def coding_scratch(vae: VAEConfig, part: str, size: tuple[int, int]) -> int:
    """What a convolution of "decoder" or "encoder" allocates on the CPU beside XLA's account."""
    return round(SCRATCH * _step_bytes(vae, part, size)[1])


def _step_bytes(vae: VAEConfig, part: str, size: tuple[int, int]) -> tuple[int, float, int]:
    """What is remembered of the frames before; the pictures of a step, of as many channels as there
    are at full size; the pixels of a frame.
    """
    cells = math.prod(size)
    pixels = cells * vae.spatial_stride**2
    channels = vae.decoder_widths[-1] if part == "decoder" else vae.encoder_widths[0]
    picture = 4 * MASK * channels * pixels / vae.patch**2
    return _remembered(vae, part) * cells, picture, pixels


def _kernel_bytes(vae: VAEConfig, part: str) -> int:
    return sum(4 * math.prod(p.shape) for p in flatten(vae_spec(vae)[part]).values())


# ---- weights -----------------------------------------------------------------------


def stacks(bundle: Bundle) -> dict[str, int]:
    """Bytes of the blocks of each transformer."""
    found = {}
    for part in bundle.experts:
        leaves = leaf_bytes(bundle, part, specs(bundle)[part])
        blocks = (leaf for name, leaf in leaves.items() if name.startswith("blocks/"))
        found[part] = sum(math.prod(shape) * width for shape, width in blocks)
    return found


def in_flight(bundle: Bundle, offload: str) -> int:
    """Bytes of weights that sampling holds beside those that are kept on the device."""
    stack = max(stacks(bundle).values())
    leaves = leaf_bytes(bundle, "dit", specs(bundle)["dit"])
    wide = sum(  # what computes in float32 is converted once, ahead of the loops
        4 * math.prod(shape)
        for name, (shape, width) in leaves.items()
        if name.startswith(("time_", "head/")) and width == 2
    )
    ahead = offload == "layers" or waits(bundle.dit)
    layers = LAYERS_AHEAD if ahead else 1
    whole = stack if offload == "expert" else 0
    return round(whole + layers * stack / bundle.dit.num_layers + wide)


def _stored(bundle: Bundle, part: str) -> dict[str, int]:
    """Bytes of the arrays of a part on the disk."""
    slots = bundle.parts[part].slots if part in bundle.parts else {}
    return {name: math.prod(s.shape) * s.dtype.itemsize for name, s in slots.items()}


def encoders(bundle: Bundle, rows: int) -> dict[str, int]:
    """Bytes while the encoders that are not kept are in use: one layer of UMT5, as it is read and
    as it computes, and the rows that pass through it; or the image encoder.
    """
    found, text = {}, bundle.text
    if isinstance(text, UMT5Config) and (stored := _stored(bundle, "text")):
        blocks = sum(size for name, size in stored.items() if name.startswith("blocks/"))
        passing = rows * text.length * (24 * text.dim + 8 * text.ffn_dim)
        found["text encoder"] = 2 * blocks // text.num_layers + passing
    if stored := _stored(bundle, "image"):
        found["image encoder"] = 2 * sum(stored.values())
    return found


def reading(bundle: Bundle) -> int:
    """Bytes beside the weights while the largest array of them is read: itself, and what of it is
    finite.
    """
    sizes = [0]
    for part, spec in specs(bundle).items():
        for shape, width in leaf_bytes(bundle, part, spec).values():
            sizes.append(math.prod(shape) * (width + 1))
    return max(sizes)


# ---- operations --------------------------------------------------------------------


def transformer_flops(dit: DiTConfig, tokens: int, remembered: int = 0) -> float:
    """Operations of one pass over one row: of `tokens`, which see as many as they are, the context,
    and, summed over layers, `remembered` more.
    """
    context = dit.text_len + image_tokens(dit)
    seen = dit.num_layers * (tokens + context) + remembered
    products = dit.num_layers * (6 * dit.dim + 2 * dit.ffn_dim)
    return float(tokens * dit.dim * (2 * products + 4 * seen))


def vae_flops(vae: VAEConfig, part: str, latents: int, size: tuple[int, int]) -> float:
    """Operations of the convolutions of one video through "encoder" or "decoder".

    latents: frames of the latent video; size: (h, w) of it.
    """
    last, decoder = len(vae.dim_mult) - 1, part == "decoder"
    stages = {f"stage{i}": i for i in range(last + 1)}
    stages |= {"conv_in": 0, "mid": 0 if decoder else last, "head": last}
    total = 0.0
    for name, weight in flatten(vae_spec(vae)[part]).items():
        if len(weight.shape) >= 4:  # a kernel
            i = stages[name.split("/")[0]]
            slowed = vae.temporal_down[::-1][:i] if decoder else vae.temporal_down[i:]
            frames = 1 + (latents - 1) * 2 ** sum(slowed)
            pixels = math.prod(size) * 4 ** (i if decoder else last - i)
            total += 2.0 * math.prod(weight.shape) * frames * pixels
    return total
