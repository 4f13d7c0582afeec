# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr: a bar on a terminal, elsewhere lines."""

import sys

from tqdm import tqdm

from lvjax.core.errors import one_line


class Bar:
    """To be used by `with`, and called with what is done so far.

    total: how many there are, None where nobody knows.  unit: what they are.
    """

    def __init__(self, total: int | None, unit: str):
        self._bar = tqdm(total=total, unit=unit, disable=not sys.stderr.isatty())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()

    def __call__(self, done: int, text: str, line: str | None) -> None:
        """text: what stands behind the bar.  line: what is printed where there is no bar, if
        anything.
        """
        if not self._bar.disable:
            self._bar.set_postfix_str(one_line(text), refresh=False)
            self._bar.update(done - self._bar.n)
        elif line is not None:
            print(one_line(line), file=sys.stderr, flush=True)
