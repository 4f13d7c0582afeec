# SPDX-License-Identifier: Apache-2.0
"""`attend`: one attention call, several implementations, chosen by name or by predicate.

An implementation that is named runs or raises; only "auto" chooses.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from lvjax.core.errors import InputError
from lvjax.kernels.attention_reference import attend_reference

SMALL = 2**22
"""Up to this many scores (B*N*L*S; 16 MiB in float32) "auto" takes the plain form."""

ROWS = 512
"""Query rows per chunk: one head's scores against a few thousand keys stay near the core."""


def attend_chunked(q, k, v, mask=None, rows: int = ROWS):
    """The reference, head by head and `rows` queries at a time, so that no [N, L, S] array exists.

    The backward pass recomputes the scores of a chunk instead of keeping them.
    """
    length = q.shape[1]
    chunks = -(-length // rows)
    rows = -(-length // chunks)
    tail = chunks * rows - length
    queries = jnp.pad(q, ((0, 0), (0, tail), (0, 0), (0, 0)))
    queries = rearrange(queries, "b (c r) n d -> n c b r 1 d", c=chunks)
    keys, values = (rearrange(a, "b s n d -> n b s 1 d") for a in (k, v))
    if mask is not None:
        per_query = mask.shape[2] > 1
        rest = ((0, 0), (0, 0), (0, tail if per_query else 0), (0, 0))
        mask = jnp.pad(mask, rest, constant_values=True)
        mask = rearrange(mask, "b n (c r) s -> n c b 1 r s", c=chunks if per_query else 1)

    def head(index, queries, keys, values):
        def chunk(at, queries):
            part = None if mask is None else mask[index % mask.shape[0], at % mask.shape[1]]
            return attend_reference(queries, keys, values, part)

        return lax.map(lambda xs: jax.checkpoint(chunk)(*xs), (jnp.arange(chunks), queries))

    out = lax.map(lambda xs: head(*xs), (jnp.arange(q.shape[2]), queries, keys, values))
    return rearrange(out, "n c b r 1 d -> b (c r) n d")[:, :length]


def attend_cudnn(q, k, v, mask=None):
    """cuDNN's fused attention; never given a mask, which it would materialise."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _always(q, k, v, mask) -> bool:
    return True


def _cudnn_supports(q, k, v, mask) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16) and q.dtype == k.dtype == v.dtype
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return jax.default_backend() == "gpu" and half and fits and mask is None


IMPLEMENTATIONS = {
    "reference": (attend_reference, _always),
    "chunked": (attend_chunked, _always),
    "cudnn": (attend_cudnn, _cudnn_supports),
}


def choose(q, k, v, mask=None) -> str:
    """What "auto" means for these arrays on this machine."""
    if _cudnn_supports(q, k, v, mask):
        return "cudnn"
    batch, length, heads, _ = q.shape
    return "reference" if batch * heads * length * k.shape[1] <= SMALL else "chunked"


def score_bytes(batch: int, heads: int, length: int, keys: int) -> int:
    """Bytes of scores that "auto" holds at once, where nothing fused is chosen."""
    scores = batch * heads * length * keys
    return 4 * (scores if scores <= SMALL else batch * min(length, ROWS) * keys)


def attend(q, k, v, *, mask=None, impl: str = "auto"):
    """softmax(q k^T / sqrt(D)) v.

    q: [B, L, N, D]; k, v: [B, S, N, D].
    mask: bool [B|1, 1|N, L|1, S], True = attend; every query needs at least one key.
    impl: "auto" or a name in `IMPLEMENTATIONS`.
    Returns: [B, L, N, D] in q's dtype; softmax is float32.
    Raises: InputError when the named implementation does not exist or does not support the arrays.
    """
    name = choose(q, k, v, mask) if impl == "auto" else impl
    if name not in IMPLEMENTATIONS:
        raise InputError(f"impl={impl!r}; use 'auto' or one of {list(IMPLEMENTATIONS)}")
    run, supports = IMPLEMENTATIONS[name]
    if not supports(q, k, v, mask):
        given = f"q{q.shape} {q.dtype} {'with' if mask is not None else 'without'} mask"
        where = jax.default_backend()
        raise InputError(f"impl={impl!r} does not support {given} on {where}; use impl='auto'")
    return run(q, k, v, mask)
