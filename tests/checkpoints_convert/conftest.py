# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder share."""

import pytest

from tests.checkpoints_convert.convert_shell import weights
from tests.checkpoints_convert.tiny_checkpoints import write


@pytest.fixture
def src(tmp_path):
    """A transformer in one file."""
    return write(weights(), tmp_path / "src", "x", "file")
