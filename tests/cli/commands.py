# SPDX-License-Identifier: Apache-2.0
"""The commands that the tests of the command line give."""

from lvjax.cli.main import main
from lvjax.run import job
from lvjax.run.state import state_path

PROMPTS = ("--prompt", "the camera pans left", "--prompt", "a red circle moves up")


def generate(model, out, *args) -> int:
    return main(["generate", "--model", model, "--out", str(out), *args])


def interrupted(model, out, clips: int, *args) -> None:
    """Run until `clips` clips are done, and stop as a signal would."""
    options = ["generate", "--model", model, "--out", str(out), *args]
    done = []
    original = job.proceed

    def proceed(bundle, output, stop, **kwargs):
        for p in original(bundle, output, stop=lambda: len(done) >= clips, **kwargs):
            done.append(p)
            yield p

    job.proceed = proceed
    try:
        main(options)
    finally:
        job.proceed = original
    assert state_path(out).exists() and len(done) == clips
