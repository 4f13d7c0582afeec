# SPDX-License-Identifier: Apache-2.0
"""The report of a folder of the lab: tables with the paper's orderings beside them, plots, and
contact sheets.  Everything in it follows from the figures and videos in the folder.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lvjax.core.checkpoint import atomic, write_atomic
from lvjax.io.video import read_video
from lvjax.lab import claims as c
from lvjax.lab.error_free import (
    CELLS,
    REFERENCE,
    SEED,
    UPSCALE,
    Run,
    Settings,
    rows_of,
    runs,
)
from lvjax.lab.rows import METRICS, WINDOWS
from lvjax.lab.timelines import Timeline, draw_timelines

SHEET = ("full", "baseline")  # below the world
ACROSS, DOWN = 12, 3  # frames of one video on a contact sheet
LINES = ("sharpness", "saturation", "colour_cast", "background_truth")


def write_report(folder: Path, settings: Settings, about: dict[str, Any]) -> list[Path]:
    """Write the report of a folder whose runs are all done; the files, in order.

    Raises: CheckpointError for damaged figures; StorageError.
    """
    values: c.Values = {cell: [] for cell in settings.cells}
    for run in runs(settings):
        values[run.cell] += rows_of(folder, run, settings)
    reference = rows_of(folder, Run(REFERENCE, 0), settings)
    judged = c.judged_claims(values)
    timelines = draw_timelines(settings.timelines, settings.frames)
    sheets = [_sheet(folder, settings, i, t) for i, t in enumerate(timelines)]
    plot = _plot(folder, values, reference)
    text = _text(settings, about, timelines, values, reference, judged, sheets, plot)
    write_atomic(folder / "report.md", text.encode())
    figures = {
        "about": about,
        "timelines": [{"moments": t.moments, "gone": t.gone} for t in timelines],
        "rows": values,
        "reference": reference,
        "claims": [claim._asdict() | verdict._asdict() for claim, verdict in judged],
    }
    write_atomic(folder / "report.json", json.dumps(figures, indent=1).encode() + b"\n")
    made = [folder / "report.md", folder / "report.json", *sheets]
    return made + ([] if plot is None else [plot])


# The text


def _text(settings, about, timelines, values, reference, judged, sheets, plot) -> str:
    parts = [
        _head(settings, about, timelines),
        _summary(judged),
        _table2(values, reference, judged),
        _table3(values, judged),
        _table4(values, reference, judged),
        _pictures(sheets, plot),
        _metrics(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(settings: Settings, about: dict, timelines: list[Timeline]) -> str:
    pairs, sampler = settings.seeds * settings.timelines, about["sampler"]
    quick = (
        "**This is the quick version: short videos and few pairs. Take its verdicts as a trial of "
        "the method, not as a result.**\n\n"
    )
    cells = "\n".join(f"- `{name}`: {CELLS[name].words}" for name in settings.cells)
    prompts = "; ".join(f'{t:g} s "{prompt}"' for t, prompt in timelines[0].moments[:4])
    full = Settings().seeds * Settings().timelines
    few = (
        f"**{pairs} videos per cell, where the full run has {full}: verdicts of so few pairs say "
        "little.**\n\n"
    )
    return (
        "# Error-Free long video: the ablations on the pocket world\n\n"
        + quick * settings.quick
        + few * (pairs < full and not settings.quick)
        + f"Model `{about['model']}`, {settings.frames} frames ({settings.seconds:g} s) per video, "
        f"{settings.timelines} held-out timelines x {settings.seeds} sampling seeds (from {SEED}) "
        f"= {pairs} videos per cell; {sampler['steps']} {sampler['solver']} steps, shift "
        f"{sampler['shift']:g}, guidance {sampler['guidance']:g}; a bank of "
        f"{sampler['capacity']} clips where there is memory, placed by the whole timeline.\n\n"
        f"{cells}\n\n"
        "Every timeline repeats two clips each of: the camera leaves, comes back, an object comes "
        f"in, the object leaves. The first one begins: {prompts}. The first frame is the world's."
        "\n\nFigures are mean ± standard deviation over the videos of a cell. A difference is the "
        "mean over pairs of videos of one timeline and one noise, ± the standard deviation of "
        "these differences, then the number of pairs; it is positive where the paper's ordering "
        "holds. "
        f'"{c.REPRODUCED}": positive by more than one standard deviation; "{c.REFUTED}": '
        f"negative by more; else \"{c.WITHIN}\". The paper's figures come from VBench's networks "
        "and a model of 1.3 B parameters; only orderings are compared."
    )


def _summary(judged) -> str:
    lines = ["| | " + " | ".join(c.VERDICTS) + " |", "|" + "---|" * (1 + len(c.VERDICTS))]
    for table in (2, 3, 4):
        found = [v.verdict for claim, v in judged if claim.table == table]
        if found:
            counts = " | ".join(str(found.count(verdict)) for verdict in c.VERDICTS)
            lines.append(f"| orderings of Table {table} | {counts} |")
    return "## Verdicts\n\n" + "\n".join(lines) if len(lines) > 2 else ""


def _table2(values, reference, judged) -> str:
    if not any(claim.table == 2 for claim, _ in judged):
        return ""
    cells = [name for name in values if name != "low_window"]
    head = "With and without memory, with and without T-RFlow (the paper's Table 2)"
    names = [m for group in c.TABLE2 for m in group] + ["ghosts", "clipped", "sharpness"]
    return _by_metric(head, names, cells, values, judged, 2, reference)


def _table3(values, judged) -> str:
    if not any(claim.table == 3 for claim, _ in judged):
        return ""
    cells = [name for name in ("no_trflow", "low_window", "full") if name in values]
    head = "Three windows of T-RFlow, with memory (the paper's Table 3)"
    names = [*c.PICTURE, "sharpness", "frequency", "saturation"]
    note = (
        "The paper's Table 3 has the figures of its rows without memory in Table 2; here the "
        "windows are compared with memory."
    )
    return _by_metric(head, names, cells, values, judged, 3) + f"\n\n{note}"


def _by_metric(head, names, cells, values, judged, table, reference=None) -> str:
    columns = (["world"] if reference else []) + [f"`{cell}`" for cell in cells]
    lines = [f"| figure | {' | '.join(columns)} | the paper's ordering | here |"]
    lines.append("|" + "---|" * (len(columns) + 3))
    for name in names:
        own = [(claim, v) for claim, v in judged if (claim.table, claim.metric) == (table, name)]
        figures = [_figure(c.spread(reference, name))] if reference else []
        figures += [_figure(c.spread(values[cell], name)) for cell in cells]
        said = "<br>".join(f"{k.better} over {k.worse} ({k.paper})" for k, _ in own)
        here = "<br>".join(_verdict(v) for _, v in own)
        lines.append(f"| {_label(name)} | {' | '.join(figures)} | {said} | {here} |")
    return f"## {head}\n\n" + "\n".join(lines)


def _table4(values, reference, judged) -> str:
    if not any(claim.table == 4 for claim, _ in judged):
        return ""
    cells = ("baseline", "full")
    head = f"## Quality in {WINDOWS} equal parts of the video (the paper's Table 4)"
    columns = " | ".join(str(i + 1) for i in range(WINDOWS))
    lines = [f"| figure | | {columns} | last less first |", "|" + "---|" * (WINDOWS + 3)]
    places = (*range(WINDOWS), c.LOSS)
    for name in (*c.TABLE4, "sharpness", "frequency", "saturation"):
        for cell in cells:
            row = [_figure(c.spread(values[cell], name, where)) for where in places]
            lines.append(f"| {_label(name)} | `{cell}` | {' | '.join(row)} |")
        found = {k.where: v for k, v in judged if (k.table, k.metric) == (4, name)}
        if found:
            lines.append(f"| | here | {' | '.join(_verdict(found[w]) for w in places)} |")
    said = "; ".join(
        f"{'last less first' if where == c.LOSS else f'part {where + 1}'}: {paper}"
        for where, paper in c.PAPER4.items()
    )
    return f"{head}\n\nThe paper's ordering, full over baseline in every part: {said}.\n\n" + (
        "\n".join(lines)
    )


def _pictures(sheets: list[Path], plot: Path | None) -> str:
    lines = ["## Pictures\n"]
    if plot is not None:
        lines.append(f"![Six parts of the video, by cell]({plot.name})\n")
    else:
        lines.append("No plot: matplotlib is not installed.\n")
    lines.append(
        f"Contact sheets, {ACROSS * DOWN} frames at equal distances, of the first sampling seed:\n"
    )
    lines += [f"![Timeline {i}]({path.name})" for i, path in enumerate(sheets)]
    return "\n".join(lines)


def _metrics() -> str:
    better = {"high": "higher is better", "low": "lower is better", "": "1 is the world's"}
    lines = [f"- **{_label(k)}**: {m.words}; {better[m.better]}." for k, m in METRICS.items()]
    return "## What is measured\n\n" + "\n".join(lines)


def _label(name: str) -> str:
    return name.replace("_", " ")


def _figure(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} ± {found[1]:.3f}"


def _verdict(v: c.Verdict) -> str:
    if v.difference is None:
        return v.verdict
    spread = "" if v.std is None else f" ± {v.std:.4f}"
    return f"{v.verdict} ({v.difference:+.4f}{spread}, {v.pairs})"


# Pictures


def _sheet(folder: Path, settings: Settings, row: int, timeline: Timeline) -> Path:
    """Frames at equal distances of the world's video, of `SHEET`'s cells, or of all that there
    are, one below the other.
    """
    runs = [Run(REFERENCE, 0)]
    cells = [cell for cell in SHEET if cell in settings.cells] or settings.cells
    runs += [Run(cell, SEED) for cell in cells]
    at = np.linspace(0, settings.frames - 1, min(ACROSS * DOWN, settings.frames)).round()
    videos = [read_video(r.video(folder, row))[0] for r in runs]
    names = ["world", *cells]
    parts = [_strip(v, n, at.astype(int)) for v, n in zip(videos, names, strict=True)]
    path = folder / f"sheet-{row:02d}.jpg"
    with atomic(path) as f:
        Image.fromarray(np.concatenate(parts)).save(f, "JPEG", quality=85)
    return path


def _strip(frames: np.ndarray, name: str, at: np.ndarray) -> np.ndarray:
    """Chosen frames in lines of `ACROSS`, under a line of text: uint8 [h, w, 3]."""
    chosen = frames[at, ::UPSCALE, ::UPSCALE]
    empty = -len(chosen) % ACROSS
    chosen = np.concatenate([chosen, np.full((empty, *chosen.shape[1:]), 255, np.uint8)])
    lines = [np.concatenate(list(line), 1) for line in chosen.reshape(-1, ACROSS, *chosen[0].shape)]
    title = Image.new("RGB", (lines[0].shape[1], 14), "white")
    ImageDraw.Draw(title).text((2, 1), name, fill="black")
    return np.concatenate([np.asarray(title), *lines])


def _plot(folder: Path, values: c.Values, reference: list[dict]) -> Path | None:
    """Four figures over the six parts, a line per cell; None where matplotlib is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    places = np.arange(1, WINDOWS + 1)
    for axes, name in zip(figure.subplots(2, 2).flat, LINES, strict=True):
        for i, (cell, rows) in enumerate([("world", reference), *values.items()]):
            found = [c.spread(rows, name, w) or (np.nan, 0.0) for w in range(WINDOWS)]
            mean, std = np.transpose(found)
            style = {"color": "k", "linestyle": "--"} if i == 0 else {"color": f"C{i}"}
            axes.errorbar(places + 0.05 * i, mean, std, label=cell, capsize=2, **style)
        axes.set(title=_label(name), xlabel="part of the video")
    axes.legend(fontsize="small")
    path = folder / "windows.png"
    with atomic(path) as f:
        figure.savefig(f, format="png", dpi=110, metadata={"Software": None})
    return path
