# SPDX-License-Identifier: Apache-2.0
"""The built wheel, in an environment of its own outside the clone: contents and commands.

Dependencies come from the environment that runs the tests, through a path file; path files in
there, the editable install among them, have no effect in the new environment.
"""

import json
import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
PROMPT = "the camera pans left over a landscape, a red circle moves up"


def succeed(command, cwd, **env) -> str:
    """Output of a command that must end with 0, run away from the clone and without its paths."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", folder]
    succeed([*PIP, "wheel", *options, ROOT], folder)
    (built,) = folder.glob("lvjax-*.whl")
    return built


@pytest.fixture(scope="module")
def bin(wheel, tmp_path_factory) -> Path:
    """The folder of commands of an environment that holds the wheel."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "env", with_pip=False, symlinks=os.name != "nt")
    (own,) = (home / "env").glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = home / "env" / "bin" / "python"
    succeed([*PIP, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], home)
    where = Path(succeed([python, "-c", "import lvjax; print(lvjax.__file__)"], home).strip())
    assert where.is_relative_to(own), f"{where} is not the installed wheel"
    return python.parent


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for top in ("lvjax", "checkpoints_convert"):
        sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / top).rglob("*.py")}
        assert sources <= names
    assert {f"lvjax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")} <= names
    photos = {f"lvjax/assets/photos/{p.name}" for p in (ROOT / "lvjax/assets/photos").iterdir()}
    assert photos <= names and "lvjax/assets/photos/LICENSES.md" in photos
    parts = ("model.json", "dit.safetensors", "vae.safetensors", "text.safetensors")
    assert {f"lvjax/assets/pocket/{part}" for part in parts} <= names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {"lvjax", "checkpoints_convert"}
    assert wheel.stat().st_size < 60e6


@pytest.mark.parametrize("command", ["generate", "replay", "convert", "encode", "train", "info"])
def test_help(bin, tmp_path, command):
    assert f"usage: lvjax {command}" in succeed([bin / "lvjax", command, "--help"], tmp_path)


def test_info(bin, tmp_path):
    said = succeed([bin / "lvjax", "info"], tmp_path)
    assert "model     pocket" in said and "circle" in said


def test_a_named_config(bin, tmp_path):
    """`--config pocket` is found in the package; no time is left, so nothing is rendered."""
    small = ["--set", "videos=1", "--set", "clips=2", "--minutes", "1e-6", "--folder", "run"]
    said = succeed([bin / "lvjax", "train", "--config", "pocket", *small], tmp_path)
    assert "stopped by the time limit" in said
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["videos"] == 1


@pytest.mark.long
def test_generate(bin, tmp_path):
    command = [bin / "lvjax", "generate", "--prompt", PROMPT, "--seconds", "1", "--out", "x.mp4"]
    succeed(command, tmp_path)
    assert (tmp_path / "x.mp4").stat().st_size > 10_000
