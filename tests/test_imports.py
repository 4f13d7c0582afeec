# SPDX-License-Identifier: Apache-2.0
"""House rules that a file can break alone: import floors, packages, licence line, paths.

A file imports only from floors below its own, or from its own package.  Imports inside functions
count: they decide what must be installed just the same.
"""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("core",),
    ("kernels",),
    ("nn", "memory"),
    ("models", "flow"),
    ("rollout",),
    ("methods",),
    ("data", "io", "train"),
    ("run",),
    ("lab", "api", "linen", "bench"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
BESIDE = {("memory", "nn"), ("data", "io")}  # on one floor: the first may use the second
NUMERIC = {"jax", "flax", "optax", "orbax", "einops", "numpy", "safetensors", "ml_dtypes"}
FILES = {"av", "PIL"}  # pictures and video
PACKAGES = {
    "train": NUMERIC | {"tensorboardX"},
    "data": NUMERIC | {"PIL", "tensorflow_datasets", "tokenizers", "ftfy", "grain"},
    "io": NUMERIC | FILES,
    "run": NUMERIC | {"PIL", "checkpoints_convert"},
    "lab": NUMERIC | {"PIL", "matplotlib"},
    "api": NUMERIC | FILES,
    "cli": NUMERIC | FILES | {"ml_collections", "tqdm", "checkpoints_convert"},
}
# The rival of a benchmark, a process of its own that nothing imports; and the dataset builder.
EXCEPTIONS = {"lvjax/bench/torch_sdpa.py": {"torch"}}
SOURCES = sorted((ROOT / "lvjax").rglob("*.py"))
CONVERT = sorted((ROOT / "checkpoints_convert").rglob("*.py"))
TEXT = (".py", ".md", ".toml", ".ipynb", ".cfg", ".yml", ".json", ".txt", "")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package(path: Path) -> str:
    """The first name below lvjax: a folder, or a module."""
    return path.relative_to(ROOT / "lvjax").parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of everything that a file imports, at any depth in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports by a relative name"
            whole = node.module == "lvjax"
            found |= {f"lvjax.{a.name}" for a in node.names} if whole else {node.module}
    return frozenset(found)


def outside(path: Path) -> set[str]:
    """Packages that a file imports, the standard library and lvjax left out."""
    tops = {module.split(".")[0] for module in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"lvjax"}


def test_what_is_imported_is_declared():
    """With the extras for plots and logs, what a file of the wheel imports is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["plot"] + extras["log"]
    declared = {re.match(r"[\w-]+", d)[0].replace("-", "_") for d in needed}
    own = {"PIL": "pillow", "orbax": "orbax_checkpoint"}
    rest = set().union(*map(outside, (*SOURCES, *CONVERT))) - {"torch", "checkpoints_convert"}
    assert {own.get(package, package) for package in rest} <= declared


def test_every_package_has_a_floor():
    assert {package(p) for p in SOURCES} - {"__init__", "configs"} == set(LEVEL)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_imports_from_floors_below(path):
    own = package(path)
    if own in ("__init__", "configs"):
        return
    for module in imports(path):
        other = module.split(".")[1] if module.startswith("lvjax.") else None
        if other in LEVEL and other != own:
            below = LEVEL[other] < LEVEL[own] or (own, other) in BESIDE
            assert below, f"{name(path)} ({own}) imports {module}, which is not below it"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_imports_only_what_its_package_may(path):
    allowed = PACKAGES.get(package(path), NUMERIC) | EXCEPTIONS.get(name(path), set())
    assert outside(path) <= allowed, f"{name(path)} imports {sorted(outside(path) - allowed)}"


@pytest.mark.parametrize("folder", ["core", "nn", "models", "rollout", "train", "bench"])
@pytest.mark.parametrize(
    "text",
    ["import torch", "def f():\n    from PIL import Image", "if False:\n    import av.error as e"],
)
def test_a_forbidden_import_is_found_wherever_it_hides(tmp_path, folder, text):
    (tmp_path / "file.py").write_text(f"import jax\n{text}\n")
    assert len(outside(tmp_path / "file.py") - PACKAGES.get(folder, NUMERIC)) == 1


def test_models_know_no_method_and_the_rival_is_not_imported():
    for path in SOURCES:
        assert "lvjax.bench.torch_sdpa" not in imports(path), name(path)
        if package(path) == "models":
            assert not any(m.startswith("lvjax.methods") for m in imports(path)), name(path)


def test_the_converter_needs_neither_torch_nor_the_command_line():
    for path in CONVERT:
        assert outside(path) <= NUMERIC | {"checkpoints_convert"}, name(path)
        floors = {m.split(".")[1] for m in imports(path) if m.startswith("lvjax.")}
        assert floors <= {"core", "models", "__version__"}, f"{name(path)} imports {sorted(floors)}"


def test_package_files_hold_no_logic():
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != ROOT / "lvjax":
            kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
            body = ast.parse(path.read_text()).body
            assert all(isinstance(node, kinds) for node in body), name(path)
    for path in SOURCES + CONVERT:
        for node in ast.walk(ast.parse(path.read_text())):
            star = isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
            assert not star, f"{name(path)} imports *"


def texts() -> list[Path]:
    """The project's own text files."""
    folders = (".ci", "benchmarks", "checkpoints_convert", "configs", "docs", "lvjax")
    found = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in TEXT]
    for folder in (*folders, "notebooks", "tests"):
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in TEXT]
    return sorted(p for p in found if "__pycache__" not in p.parts and p.name != "demo.json")


def test_the_licence_comes_first():
    missing = []
    for path in texts():
        if path.suffix == ".py" and (text := path.read_text()):
            lines = text.splitlines()
            first = lines[1] if lines[0].startswith("#!") else lines[0]
            if first != "# SPDX-License-Identifier: Apache-2.0":
                missing.append(name(path))
    assert not missing


def test_no_file_names_a_path_of_one_machine():
    folders = ("w.rk", "t.p", "r..t", "h.me", "Us.rs", "m.t")  # not to name them itself
    absolute = re.compile(rf"(?<![\w.:/}}~*-])/(?:{'|'.join(folders)})\b")
    for folder in folders:
        assert absolute.search(f'see "/{folder.replace(".", "x")}/model"')
    found = []
    for path in texts():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if absolute.search(line):
                found.append(f"{name(path)}:{number}: {line.strip()[:80]}")
    assert not found


BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not part of this test", name=name)

sys.meta_path.insert(0, Refuse())
import lvjax.bench.gpu, lvjax.lab.gpu_train, lvjax.lab.pocket
import lvjax.data.clips, lvjax.run.session, lvjax.run.bundle, lvjax.train.loop
"""


def test_the_accelerator_programs_need_only_the_numeric_packages():
    """`make gpu` and `make gpu-train` run where nothing else is installed."""
    refused = "av PIL ml_collections tensorflow_datasets tqdm tokenizers ftfy diffusers torch grain"
    code = f"REFUSED = {set(refused.split())}\n{BLOCKED}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
