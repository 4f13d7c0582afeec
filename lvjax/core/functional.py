# SPDX-License-Identifier: Apache-2.0
"""Functions with bound settings that compare by value, so that jit recognises a program it has
compiled.
"""

from functools import partial


class bound(partial):  # noqa: N801  used like functools.partial
    """`functools.partial`, equal to another when function and arguments are equal; all of them must
    be hashable.
    """

    def _key(self):
        return self.func, self.args, tuple(sorted(self.keywords.items()))

    def __eq__(self, other):
        return type(other) is bound and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())
