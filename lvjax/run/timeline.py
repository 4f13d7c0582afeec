# SPDX-License-Identifier: Apache-2.0
"""Prompts over time: which frames a clip shows, which prompt it follows, and what the user should
know about prompts that are not followed as they are written.

A prompt holds for whole clips: a clip follows the last prompt that has begun, to the nearest frame,
when its first own frame is shown.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from lvjax.data.prompts import MAX_WORDS, VOCABULARY, encode

SHOWN = 10  # words or prompts in one notice

Timeline = tuple[tuple[float, str], ...]
"""((seconds, prompt), ...) in order, the first at 0."""


@dataclass(frozen=True)
class Cuts:
    """How a video is made of clips, in pixel frames.

    frames: shown in all.  first, new: of its own, those of clip 0 and those of every later clip.
    """

    frames: int
    first: int
    new: int
    fps: int

    @property
    def clips(self) -> int:
        """Clips in all."""
        return 1 + max(0, -(-(self.frames - self.first) // self.new))

    def begin(self, clip: int) -> int:
        """The first frame that clip number `clip` shows, which is the frames shown before it."""
        return 0 if clip == 0 else min(self.frames, self.first + (clip - 1) * self.new)

    def prompt(self, timeline: Timeline, clip: int) -> str:
        """The prompt that a clip follows."""
        return timeline[self._moment(timeline, clip)][1]

    def missed(self, timeline: Timeline) -> list[tuple[float, str]]:
        """The moments of a timeline that no clip follows."""
        firsts = (bisect_left(range(self.clips), t, key=self._until) for t, _ in timeline)
        return [
            timeline[j]
            for j, clip in enumerate(firsts)
            if clip == self.clips or self._moment(timeline, clip) != j
        ]

    def _until(self, clip: int) -> float:
        """The last second that counts as begun when a clip begins."""
        return (self.begin(clip) + 0.5) / self.fps

    def _moment(self, timeline: Timeline, clip: int) -> int:
        return bisect_right(timeline, self._until(clip), key=lambda moment: moment[0]) - 1


def word_notices(texts: Iterable[str]) -> list[str]:
    """What the user should know about words that the pocket model does not know or read."""
    unknown, cut, wordless = {}, {}, []
    for text in dict.fromkeys(texts):
        encoded = encode(text)
        if text and not encoded.ids.any() and not encoded.unknown:
            wordless.append(text)
        unknown |= dict(encoded.unknown)
        cut |= {text: encoded.cut} if encoded.cut else {}
    return _wordless(wordless) + _unknown(unknown) + _cut(cut)


def missed_notices(timelines: Iterable[Timeline], cuts: Cuts) -> list[str]:
    """What the user should know about prompts that are never shown."""
    timelines = dict.fromkeys(timelines)
    return _missed(list(dict.fromkeys(m for row in timelines for m in cuts.missed(row))), cuts)


def _wordless(texts: list[str]) -> list[str]:
    if not texts:
        return []
    more = _and(len(texts) - 1)
    return [f"the prompt {short(texts[0])}{more} holds no word, so the model follows none"]


def _unknown(words: dict[str, str | None]) -> list[str]:
    if not words:
        return []
    shown = [f"{short(w)} (nearest: {near!r})" if near else short(w) for w, near in words.items()]
    listed = ", ".join(sorted(shown)[:SHOWN]) + _and(len(shown) - SHOWN)
    return [f"the model does not know {listed}; `lvjax info` lists its {len(VOCABULARY)} words"]


def _cut(prompts: dict[str, list[str]]) -> list[str]:
    if not prompts:
        return []
    (text, words), others = next(iter(prompts.items())), len(prompts) - 1
    listed = ", ".join(map(short, words[:SHOWN])) + _and(len(words) - SHOWN)
    return [
        f"the model reads {MAX_WORDS} words that it knows; of the prompt {short(text)}"
        f"{_and(others)} the rest is left out ({listed}); say less"
    ]


def _missed(moments: list[tuple[float, str]], cuts: Cuts) -> list[str]:
    if not moments:
        return []
    (second, text), others = moments[0], len(moments) - 1
    begins = ", ".join(f"{cuts.begin(i) / cuts.fps:g}" for i in range(min(cuts.clips, 4)))
    return [
        f"the prompt {short(text)} at {second:g} s{_and(others)} will not be shown: a prompt "
        f"holds for whole clips, and they begin at {begins}{' ...' if cuts.clips > 4 else ''} s in "
        f"{cuts.frames / cuts.fps:g} s of video; move it, or make the video longer"
    ]


def _and(others: int) -> str:
    return f" (and {others} more)" if others > 0 else ""


def short(text: str) -> str:
    """A text for a message."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
