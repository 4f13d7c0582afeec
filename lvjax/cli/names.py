# SPDX-License-Identifier: Apache-2.0
"""The names of files and folders on the command line."""

from lvjax.core.errors import InputError


def check_names(**given) -> None:
    """given: by option what stands there for a file or folder, or a list; None for nothing.

    Raises: InputError for an empty name, which would be the current folder: most often it is a
      variable of the shell that is not set.
    """
    for option, names in given.items():
        if "" in (names if isinstance(names, (list, tuple)) else (names,)):
            raise InputError(f"{option} is empty; give the name of a file or folder")
