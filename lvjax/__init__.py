# SPDX-License-Identifier: Apache-2.0
"""Long video from the Wan family in pure-functional JAX."""

__version__ = "0.1.0"
__all__ = [
    "generate",
    "load",
    "prepare",
    "stream",
    "with_lora",
    "with_strength",
    "without_lora",
]


def __getattr__(name: str):
    """The Python face, imported when first used, so that `import lvjax.core` needs nothing but jax
    and numpy.
    """
    if name in __all__:
        from lvjax import api

        return getattr(api, name)
    raise AttributeError(f"module 'lvjax' has no attribute {name!r}; it has {__all__}")
