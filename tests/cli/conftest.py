# SPDX-License-Identifier: Apache-2.0
"""The model of the command-line tests."""

import pytest

from lvjax.run.weights import save
from tests.tiny import tiny_bundle


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """The folder of a tiny random model; do not write into it."""
    folder = tmp_path_factory.mktemp("model")
    save(folder, tiny_bundle())
    return str(folder)
