# SPDX-License-Identifier: Apache-2.0
"""For files whose tests take their time in the compiler: programs that are made sooner and run
slower.  Import the fixture; it is for all tests of the file.
"""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """XLA without most of its optimisations, as long as the tests of one file run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
