# SPDX-License-Identifier: Apache-2.0
"""Does the pocket model do what the prompt says?  200 held-out prompts, judged by `data.judge`,
beside its controls.

Each case is a held-out scene (a photograph or texture never trained on) whose first frame is
given, with a prompt; an object, when there is one, is out of sight in that frame and its colour,
shape and motion were never trained together. 100 cases move the camera (pans and zooms, an object
in half of them), 100 hold it still and move an object.

Run: python -m lvjax.lab.obedience [--model pocket] [--cases 200] [--seed 0] [--out figures.json]
  [--sheet sheet.png]
"""

import argparse
import dataclasses
import json
import time
from typing import NamedTuple

import jax
import numpy as np

from lvjax.core.params import init
from lvjax.data.judge import camera_of, colour_of, object_direction
from lvjax.data.prompts import DIRECTIONS, Action
from lvjax.data.world import SIZE, Video, combinations
from lvjax.models.vae import decode, encode
from lvjax.run.bundle import Bundle, specs
from lvjax.run.card import versions
from lvjax.run.request import Request
from lvjax.run.session import open_session, to_uint8
from lvjax.run.weights import load

CLIP = 17
BATCH = 20
FIRST_VIDEO = 100_000  # indices of the held-out split that no other check uses


class Case(NamedTuple):
    """action: what the prompt says.  truth: uint8 [17, 64, 64, 3], what the world shows.  moves:
    "camera" or "object", what the direction is judged on.
    """

    action: Action
    truth: np.ndarray
    moves: str


def held_out_cases(count: int = 200) -> list[Case]:
    """The judged prompts, a fixed function of their number."""
    things = [c for c in combinations(held_out=True) if c[2] in DIRECTIONS]
    moves = ("pan left", "pan right", "pan up", "pan down") * 2 + ("zoom in", "zoom out")
    cases = []
    for i in range(count):
        camera = moves[(i // 2) % len(moves)] if i % 2 == 0 else "still"
        thing = (
            things[(i // 4 if camera != "still" else i // 2) % len(things)]
            if camera == "still" or i % 4 == 0
            else (None,) * 3
        )
        video = Video(
            FIRST_VIDEO + i,
            split="held_out",
            kind=("photo", "texture")[(i // 2) % 2],
            first=Action(camera, "", *thing),
            enters=True,
        )
        cases.append(
            Case(
                video.action(0), video.frames(0, CLIP), "object" if camera == "still" else "camera"
            )
        )
    return cases


def judge(cases: list[Case], clips: np.ndarray) -> dict[str, float]:
    """Shares of right answers over uint8 clips [n, 17, H, W, 3]; the given first frame is not
    judged except as the origin of motion.
    """
    right: dict[str, list[bool]] = {"direction": [], "camera": [], "object": [], "colour": []}
    for case, clip in zip(cases, clips, strict=True):
        if case.moves == "camera":
            right["camera"].append(camera_of(clip) == case.action.camera)
            right["direction"].append(right["camera"][-1])
        else:
            right["object"].append(object_direction(clip[1:]) == case.action.motion)
            right["direction"].append(right["object"][-1])
        if case.action.colour:
            right["colour"].append(colour_of(clip[1:]) == case.action.colour)
    return {k: float(np.mean(v)) for k, v in right.items()}


def generate_clips(
    bundle: Bundle, prompts: list[str], starts: np.ndarray, seed: int, **knobs
) -> np.ndarray:
    """One clip per prompt from its own given frames uint8 [n, P, H, W, 3]; uint8 [n, 17, H, W, 3],
    the given frames included.
    """
    out = []
    for at in range(0, len(prompts), BATCH):
        rows = list(range(at, min(at + BATCH, len(prompts))))
        rows += [rows[-1]] * (BATCH - len(rows))
        given = starts[rows].astype(np.float32) / 127.5 - 1
        request = Request(
            tuple(((0.0, prompts[r]),) for r in rows),
            CLIP - starts.shape[1] + 1,
            start=given,
            seed=seed + at,
            **knobs,
        )
        frames = next(open_session(bundle, request).run()).frames
        out.append(
            np.concatenate([starts[rows][:, :-1], frames], axis=1)[: min(BATCH, len(prompts) - at)]
        )
    return np.concatenate(out)


def round_trip(bundle: Bundle, clips: np.ndarray) -> np.ndarray:
    """uint8 clips through the autoencoder."""
    both = jax.jit(
        lambda x: to_uint8(
            decode(bundle.params["vae"], encode(bundle.params["vae"], x, bundle.vae), bundle.vae)
        )
    )
    return np.concatenate(
        [
            np.asarray(both(clips[i : i + BATCH].astype(np.float32) / 127.5 - 1))
            for i in range(0, len(clips), BATCH)
        ]
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between uint8 arrays [n, ...]: mean over the n of -10 log10 of the mean squared error,
    peak 255.
    """
    error = ((a.astype(np.float32) - b.astype(np.float32)) / 255) ** 2
    return float(np.mean(-10 * np.log10(np.maximum(error.reshape(len(a), -1).mean(1), 1e-10))))


def continuation(bundle: Bundle, count: int, seed: int) -> dict[str, float]:
    """Held-out pans: 5 frames given, the next second (8 frames) against the truth, beside repeating
    the last given frame.
    """
    pans = [f"pan {d}" for d in DIRECTIONS]
    videos = [
        Video(
            2 * FIRST_VIDEO + i,
            split="held_out",
            kind=("photo", "texture")[i % 2],
            first=Action(pans[i % 4], ""),
        )
        for i in range(count)
    ]
    truth = np.stack([v.frames(0, CLIP) for v in videos])
    made = generate_clips(bundle, [v.action(0).prompt() for v in videos], truth[:, :5], seed)
    ahead = slice(5, 13)
    model = psnr(made[:, ahead], truth[:, ahead])
    repeat = psnr(np.repeat(truth[:, 4:5], 8, axis=1), truth[:, ahead])
    ceiling = psnr(round_trip(bundle, truth)[:, ahead], truth[:, ahead])
    return {
        "model_db": model,
        "repeat_db": repeat,
        "gain_db": model - repeat,
        "autoencoder_db": ceiling,
    }


def untrained(bundle: Bundle) -> Bundle:
    """The same model with its DiT and text encoder as `init` draws them."""
    fresh = {k: init(s, jax.random.key(0)) for k, s in specs(bundle).items()}
    return dataclasses.replace(bundle, params=fresh | {"vae": bundle.params["vae"]})


def evaluate(
    bundle: Bundle, count: int = 200, seed: int = 0, report=lambda text: None
) -> tuple[dict, np.ndarray]:
    """All figures, and clips for a contact sheet [n, 2, 17, H, W, 3]: truth and model."""
    started = time.monotonic()
    cases = held_out_cases(count)
    truth = np.stack([c.truth for c in cases])
    prompts = [c.action.prompt() for c in cases]
    shuffled = [prompts[(i + len(prompts) // 2 + 7) % len(prompts)] for i in range(len(prompts))]
    clips = generate_clips(bundle, prompts, truth[:, :1], seed)
    figures = {
        "cases": count,
        "seed": seed,
        "ground_truth": judge(cases, truth),
        "autoencoder": judge(cases, round_trip(bundle, truth)),
    }
    for name, made in (
        ("model", clips),
        ("prompt_shuffled", generate_clips(bundle, shuffled, truth[:, :1], seed)),
        ("untrained", generate_clips(untrained(bundle), prompts, truth[:, :1], seed)),
    ):
        figures[name] = judge(cases, made)
        report(f"{name}: {figures[name]}")
    figures["autoencoder_psnr_db"] = psnr(round_trip(bundle, truth), truth)
    figures["continuation"] = continuation(bundle, max(count // 2, 4), seed)
    figures["weights"], figures["versions"] = bundle.hashes, versions()
    figures["sampler"] = dataclasses.asdict(bundle.defaults) | {"size": [SIZE, SIZE]}
    figures["seconds"] = time.monotonic() - started
    return figures, np.stack([truth, clips], 1)


def contact_sheet(pairs: np.ndarray, rows: int = 12) -> np.ndarray:
    """uint8 picture: per case two strips, truth above model, every other frame."""
    step = max(1, len(pairs) // rows)
    return np.concatenate(
        [np.concatenate(list(clip[::2]), axis=1) for pair in pairs[::step][:rows] for clip in pair]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    parser.add_argument("--sheet")
    args = parser.parse_args()
    figures, pairs = evaluate(load(args.model), args.cases, args.seed, report=print)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.out:
        with open(args.out, "w") as f:
            f.write(text + "\n")
    if args.sheet:
        from PIL import Image

        Image.fromarray(contact_sheet(pairs)).save(args.sheet)


if __name__ == "__main__":
    main()
