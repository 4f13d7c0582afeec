# SPDX-License-Identifier: Apache-2.0
"""`make gpu`: correctness and speed of lvjax's kernels and models on the device at hand.

    python -m lvjax.bench.gpu --minutes 9 --out DIR [--tiny] [--only WORD]

Leaves DIR/results.jsonl (one line per case, written as it is measured) and DIR/report.md.  The
clock is looked at before each case; cases that no longer fit are named.  Exit code 1 when a case
fails.  Needs jax, flax, einops, numpy and safetensors; torch, where it is there and sees the same
device, is the rival.  Without an accelerator sizes are tiny.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax

from lvjax.bench import cases_attention as attention
from lvjax.bench import cases_models as models
from lvjax.bench.measure import Case, machine, run_case

RESERVE = 5.0  # seconds kept for the report
RIVAL_SECONDS = {True: 8.0, False: 60.0}  # about what the rival takes, by `tiny`
RIVALS = ("gpu", "cpu")  # the platforms on which there is one


def all_cases(tiny: bool) -> list[Case]:
    """Every case, the most important first: when time is short the last ones are left out."""
    checks = [*attention.checks(), *models.block_checks(tiny), *models.decode_checks(tiny)]
    timed = [*attention.gemms(tiny), *attention.sheet(tiny), *models.blocks(tiny)]
    return [*checks, *timed, *models.decodes(tiny), *models.forwards(tiny)]


class Report:
    """Rows as they come, to a file and to the terminal, and the table at the end."""

    def __init__(self, folder: Path, facts: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.facts, self.rows, self.left_out = folder, facts, [], []
        self._lines = (folder / "results.jsonl").open("w")

    def add(self, row: dict) -> None:
        self.rows.append(row)
        print(json.dumps(row | self.facts), file=self._lines, flush=True)
        print(f"{_name(row)}: {_outcome(row)}", file=sys.stderr, flush=True)

    def close(self, note: str = "") -> str:
        """The Markdown report, also written to report.md."""
        self._lines.close()
        versions = " · ".join(f"{k} {v}" for k, v in self.facts["versions"].items())
        device = f"{self.facts['device_kind']} ({self.facts['platform']})"
        head = f"{device} · {versions} · commit {self.facts['commit'] or 'unknown'}"
        text = "\n".join([head, "", table(self.rows), "", *self._remarks(note)]) + "\n"
        (self.folder / "report.md").write_text(text)
        return text

    def _remarks(self, note: str) -> list[str]:
        failed = [r for r in self.rows if r["status"] == "failed"]
        out = [f"Failed: {_name(r)}: {r['note']}." for r in failed] or ["No case failed."]
        if self.left_out:
            out.append(f"Left out, the time was up: {'; '.join(self.left_out)}.")
        return out + ([note] if note else [])


def _name(row: dict) -> str:
    return f"{row['case']} {_sizes(row)} {row['dtype']} {row['impl']}"


def _sizes(row: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in row["shape"].items())


def _outcome(row: dict) -> str:
    parts = [row["status"]]
    if "median_seconds" in row:
        parts.append(f"{1e3 * row['median_seconds']:.3f} ms")
    if "relative_error" in row:
        parts.append(f"relative error {row['relative_error']:.1e}")
    return ", ".join(parts + ([row["note"]] if "note" in row else []))


def table(rows: list[dict]) -> str:
    """A Markdown table; rates are also given in percent of the first matrix product's."""
    gemm = next((r["tflops"] for r in rows if r["case"] == "gemm" and "tflops" in r), None)
    columns = {
        "case": lambda r: r["case"],
        "shape": _sizes,
        "dtype": lambda r: r["dtype"],
        "implementation": lambda r: r["impl"],
        "compile s": lambda r: _number(r.get("compile_seconds"), ".1f"),
        "median ms": lambda r: _number(r.get("median_seconds"), ".3f", 1e3),
        "IQR ms": lambda r: _number(r.get("iqr_seconds"), ".3f", 1e3),
        "TFLOP/s": lambda r: _number(r.get("tflops"), ".3g"),
        "% of gemm": lambda r: _number(r.get("tflops"), ".0f", 100 / gemm if gemm else None),
        "peak GB": lambda r: _number(r.get("peak_bytes"), ".3g", 1e-9),
        "rel. error": lambda r: _number(r.get("relative_error"), ".1e"),
        "status": lambda r: r["status"],
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(r) for cell in columns.values()) + " |" for r in rows]
    return "\n".join(lines)


def _number(value, form: str, scale: float | None = 1.0) -> str:
    return "–" if value is None or scale is None else format(value * scale, form)


def rival(report: Report, tiny: bool, seconds: float, calls: int) -> str:
    """Torch's attention at the same shapes, in a child process; why there are no rows, or ""."""
    platform = jax.default_backend()
    if importlib.util.find_spec("torch") is None or platform not in RIVALS:
        return "No torch beside this run."
    shapes = attention.SHEET_TINY if tiny else attention.SHEET
    job = json.dumps({"platform": platform, "shapes": shapes, "calls": calls})
    command = [sys.executable, "-m", "lvjax.bench.torch_sdpa", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"torch took more than {seconds:.0f} s and was stopped."
    for line in done.stdout.splitlines():
        row = json.loads(line)
        if "case" not in row:
            return row["note"] + "."
        report.add(row)
    if done.returncode:
        return f"torch ended with {(done.stderr.strip() or 'no message').splitlines()[-1][:200]}."
    return ""


def run(folder: Path, seconds: float, tiny: bool, only: str = "", calls: int = 7) -> int:
    """Measure what fits into `seconds`; 1 when a case failed."""
    end = time.monotonic() + seconds - RESERVE
    report = Report(folder, machine())
    for case in all_cases(tiny):
        if only not in case.name:
            continue
        if time.monotonic() + case.seconds > end:
            report.left_out.append(f"{case.name} {_sizes(vars(case))} {case.dtype} {case.impl}")
            continue
        report.add(run_case(case, calls))
    note = ""
    if only in "attention":
        left = end - time.monotonic()
        if left >= RIVAL_SECONDS[tiny]:
            note = rival(report, tiny, left, calls)
        else:
            report.left_out.append("torch's attention")
    print(report.close(note))
    return 1 if any(r["status"] == "failed" for r in report.rows) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lvjax.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="stop in time (default: 9)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu"), help="folder for results.jsonl and report.md"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, as without an accelerator"
    )
    parser.add_argument("--only", default="", help="only cases whose name holds this word")
    args = parser.parse_args(argv)
    # before jax touches the device: the rival needs some of its memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    tiny = args.tiny or jax.default_backend() == "cpu"
    if tiny and not args.tiny:
        print("no accelerator here: tiny sizes", file=sys.stderr)
    return run(args.out, 60 * args.minutes, tiny, args.only)


if __name__ == "__main__":
    sys.exit(main())
