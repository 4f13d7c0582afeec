# SPDX-License-Identifier: Apache-2.0
"""`lvjax encode`: prompts read on one machine, videos made on another."""

import shutil

import numpy as np
import pytest
import torch

from lvjax.cli import drive
from lvjax.cli.main import main
from lvjax.core.checkpoint import load_arrays, open_arrays
from lvjax.io.video import read_video
from lvjax.run import encoders
from lvjax.run.encoders import load_embeddings
from lvjax.run.presets import PRESETS
from tests.tiny import relative
from tests.wan_folder import TEXT_DIM, save_modules, wan_modules, wan_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers
PROMPT, OTHER = "A red fox runs over the snow", "Two children walk, cinematic light."
SMALL = ("--frames", "1", "--size", "48x32", "--steps", "2", "--quiet")
NEGATIVES = {d.negative for d in PRESETS.values()}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """(models, their folder)."""
    modules = wan_modules("t2v")
    return modules, save_modules(modules, tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def text_only(wan, tmp_path_factory):
    """A folder with the text encoder and its tokenizer alone."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(wan[1] / name, folder / name)
    return folder


@pytest.fixture
def no_text(wan, tmp_path):
    """A folder without a text encoder."""
    for name in ("transformer", "vae"):
        shutil.copytree(wan[1] / name, tmp_path / "no_text" / name)
    return tmp_path / "no_text"


def encode(folder, out, *args) -> int:
    return main(["encode", "--model", str(folder), "--out", str(out), *args])


def fails(capsys, code, folder, out, *args) -> str:
    capsys.readouterr()
    assert encode(folder, out, *args) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


def wanted(model, text):
    """Rows of transformers' own encoder."""
    ids = wan_tokenizer()([text], return_tensors="pt")
    with torch.no_grad():
        return model(ids.input_ids, ids.attention_mask).last_hidden_state[0].numpy()


def test_rows_are_those_of_transformers(wan, text_only, tmp_path, capsys):
    out, lines = tmp_path / "p.safetensors", tmp_path / "lines.txt"
    lines.write_text(f"# a comment\n{OTHER}\n\n{PROMPT}\n")
    given = ("--prompt", PROMPT, "--prompt-file", str(lines), "--negative-prompt", "a dog")
    assert encode(text_only, out, *given) == 0
    said = capsys.readouterr()
    assert not said.out and f": {out}" in said.err and "3 prompts (20, " in said.err
    found = load_embeddings(out, TEXT_DIM)
    assert found.keys() == {PROMPT, OTHER, "a dog"} | NEGATIVES
    for text, rows in found.items():
        want = wanted(wan[0]["text_encoder"], text)
        assert rows.shape == want.shape and rows.dtype == np.float32
        assert relative(rows, want) < 2e-2  # of bfloat16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lines.txt", "p.safetensors"]


def test_many_prompts_are_read_in_groups_as_few_are(text_only, tmp_path, monkeypatch):
    texts = [f"{PROMPT} {i}" for i in range(3)]
    given = [word for text in texts for word in ("--prompt", text)]
    monkeypatch.setattr(encoders, "GROUP", 4)
    assert encode(text_only, tmp_path / "a.safetensors", *given) == 0
    monkeypatch.setattr(encoders, "GROUP", 100)
    assert encode(text_only, tmp_path / "b.safetensors", *given) == 0
    a, b = (load_embeddings(tmp_path / f"{name}.safetensors", TEXT_DIM) for name in "ab")
    assert a.keys() == b.keys() and set(texts) < a.keys()
    assert max(relative(a[text], b[text]) for text in a) < 1e-2


def test_another_machine_makes_the_same_video(
    wan, text_only, no_text, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "p.safetensors"
    assert encode(text_only, out, "--prompt", PROMPT) == 0
    command = ["generate", "--prompt", PROMPT, *SMALL, "--seed", "2"]
    there = [*command, "--model", str(no_text), "--embeddings", str(out)]
    assert main([*there, "--out", str(tmp_path / "a.mp4")]) == 0
    assert main([*command, "--model", str(wan[1]), "--out", str(tmp_path / "b.mp4")]) == 0
    a, b = (read_video(tmp_path / f"{name}.mp4")[0].astype(int) for name in "ab")
    assert a.std() > 10 and np.abs(a - b).mean() < 1
    capsys.readouterr()
    monkeypatch.setattr(drive, "filled", None)  # no weights are read in vain
    unknown = [PROMPT + "s" if word == PROMPT else word for word in there]
    assert main([*unknown, "--out", str(tmp_path / "d.mp4")]) == 2
    assert "no embedding of the prompt" in capsys.readouterr().err
    assert not (tmp_path / "d.mp4").exists()


def test_what_was_converted_can_encode(wan, text_only, tmp_path, capsys):
    for name, more in (("whole", ()), ("part", ("--part", "text"))):
        assert main(["convert", str(wan[1]), str(tmp_path / name), *more]) == 0
        assert encode(tmp_path / name, tmp_path / f"{name}.safetensors", "--prompt", PROMPT) == 0
    assert encode(text_only, tmp_path / "plain.safetensors", "--prompt", PROMPT) == 0
    one, two, three = (
        load_arrays(tmp_path / f"{name}.safetensors")[0] for name in ("whole", "part", "plain")
    )
    assert one.keys() == two.keys() == three.keys()
    for name, rows in one.items():
        np.testing.assert_array_equal(rows, two[name])
        np.testing.assert_array_equal(rows, three[name])


def test_a_cut_prompt_is_a_notice(text_only, tmp_path, capsys):
    long = " ".join(["snow"] * 600)
    assert encode(text_only, tmp_path / "p.safetensors", "--prompt", long) == 0
    assert "has more than 512 tokens" in capsys.readouterr().err
    assert len(load_embeddings(tmp_path / "p.safetensors", TEXT_DIM)[long]) == 512


def test_embeddings_of_another_model_are_refused(model, text_only, tmp_path, capsys):
    out = tmp_path / "p.safetensors"
    assert encode(text_only, out, "--prompt", PROMPT) == 0
    capsys.readouterr()
    command = ["generate", "--model", model, "--prompt", PROMPT, "--embeddings", str(out)]
    assert main([*command, "--frames", "5", "--quiet", "--out", str(tmp_path / "a.mp4")]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "32] for the prompt 'A red" in said
    assert "the model takes [tokens, 16]" in said
    assert not (tmp_path / "a.mp4").exists()


def test_what_is_there_is_kept(text_only, tmp_path, capsys, monkeypatch):
    out, own = tmp_path / "p.safetensors", ("--prompt", PROMPT)
    assert encode(text_only, out, *own) == 0
    before = out.read_bytes()
    assert "already exists" in fails(capsys, 2, text_only, out, *own)
    assert out.read_bytes() == before
    with monkeypatch.context() as patch:  # a disk that is full in the end
        patch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
        assert "cannot write" in fails(capsys, 6, text_only, out, *own, "--overwrite")
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [out.name]
    assert encode(text_only, out, "--prompt", OTHER, "--overwrite") == 0
    assert OTHER in open_arrays(out).meta["prompts"] and out.read_bytes() != before
    weights = tmp_path / "vae.safetensors"
    weights.write_bytes(b"somebody's weights")
    assert "no prompts of ours" in fails(capsys, 2, text_only, weights, *own, "--overwrite")
    assert weights.read_bytes() == b"somebody's weights"


def test_empty_names_and_those_of_several_lines(text_only, tmp_path, capsys):
    out, own = tmp_path / "a\nb.safetensors", ("--prompt", PROMPT)
    for option in ("--model", "--out", "--prompt-file"):
        assert f"{option} is empty" in fails(capsys, 2, text_only, out, *own, option, "")
    assert not list(tmp_path.iterdir()) and encode(text_only, out, *own) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("/a\\nb.safetensors\n")


def test_what_cannot_be_encoded(wan, text_only, no_text, tmp_path, model, capsys):
    out, own = tmp_path / "p.safetensors", ("--prompt", PROMPT)
    assert "no prompt is given" in fails(capsys, 2, text_only, out)
    assert "a prompt is empty" in fails(capsys, 2, text_only, out, "--prompt", " ")
    assert "must end in .safetensors" in fails(capsys, 2, text_only, tmp_path / "p.txt", *own)
    assert "is no folder" in fails(capsys, 2, text_only, tmp_path / "a" / "p.safetensors", *own)
    assert "no part 'text'" in fails(capsys, 3, no_text, out, *own)
    assert "no such folder" in fails(capsys, 3, tmp_path / "none", out, *own)
    for pocket in ("pocket", model):
        assert "needs no embeddings" in fails(capsys, 2, pocket, out, *own)
    vae = wan[1] / "vae" / "diffusion_pytorch_model.safetensors"
    assert "is an autoencoder" in fails(capsys, 3, vae, out, *own)
    shutil.copytree(wan[1] / "text_encoder", tmp_path / "bare")
    assert "no tokenizer in" in fails(capsys, 3, tmp_path / "bare", out, *own)
    missing = ("--prompt-file", str(tmp_path / "none.txt"))
    assert "cannot read" in fails(capsys, 2, text_only, out, *missing)
    assert not out.exists() and not list(tmp_path.glob("*.lock"))
