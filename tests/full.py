# SPDX-License-Identifier: Apache-2.0
"""For files that look at the programs which users run: how much memory they take, and whether two
of them agree to the last bit.  Import the fixture; it is for all tests of the file.
"""

import os

import jax
import pytest

QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"  # as conftest.py leaves it


@pytest.fixture(scope="module", autouse=True)
def full_compiler():
    """XLA with all its optimisations, as long as the tests of one file run."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICK)
