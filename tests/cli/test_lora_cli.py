# SPDX-License-Identifier: Apache-2.0
"""LoRAs on the command line: generate, resume and replay, and what is said of files that are bad,
changed or gone.
"""

import json
import shutil

import numpy as np
import pytest

from lvjax.cli.main import main
from lvjax.core.checkpoint import save_arrays
from lvjax.io.video import read_card
from lvjax.run.card import card_path, file_hash
from lvjax.run.loras import with_lora
from lvjax.run.weights import load
from tests.cli.commands import PROMPTS, generate, interrupted
from tests.lora_files import PROMPT, TWO, deltas, draw, lora_arrays, write_lora, write_two_experts

SHORT = (*PROMPTS, "--frames", "29", "--seed", "3")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "a.safetensors", lora_arrays() | deltas())
    write_lora(folder / "b.safetensors", lora_arrays(seed=50))
    return folder


@pytest.fixture(scope="module")
def made(model, files, tmp_path_factory):
    """A video made with two LoRAs that are in a folder of their own."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(files, folder / "loras")
    loras = [f"{folder}/loras/a.safetensors=0.5", f"{folder}/loras/b.safetensors"]
    args = [part for lora in loras for part in ("--lora", lora)]
    assert generate(model, folder / "v.mp4", *SHORT, *args, "--quiet") == 0
    return folder


def error(capsys) -> str:
    """What was said; the last line, which is the only one that is no note."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("lvjax: ") for line in lines) == 1, lines
    return lines[-1]


def digest(path) -> str:
    return json.loads(card_path(path).read_text())["latents"]


def test_the_card_holds_them_and_they_matter(model, made, tmp_path):
    card = read_card(made / "v.mp4")
    path = made / "loras" / "a.safetensors"
    assert card["options"]["lora"] == [
        {"path": str(path), "sha256": file_hash(path), "strength": 0.5, "expert": None},
        {
            "path": str(made / "loras" / "b.safetensors"),
            "sha256": file_hash(made / "loras" / "b.safetensors"),
            "strength": 1.0,
            "expert": None,
        },
    ]
    assert card["options"]["merge_lora"] is False
    asked = [(path, 0.5), made / "loras" / "b.safetensors"]
    assert card["weights"] == with_lora(load(model), asked).hashes
    assert generate(model, tmp_path / "plain.mp4", *SHORT, "--quiet") == 0
    assert digest(tmp_path / "plain.mp4") != digest(made / "v.mp4")
    assert read_card(tmp_path / "plain.mp4")["options"]["lora"] == []


def test_replay_uses_them_wherever_they_are(made, tmp_path, capsys):
    out = tmp_path / "again.mp4"
    again = ["replay", str(made / "v.mp4"), "--out", str(out), "--quiet", "--overwrite"]
    assert main(again) == 0 and out.read_bytes() == (made / "v.mp4").read_bytes()
    assert "differ" not in capsys.readouterr().err
    moved = shutil.move(made / "loras" / "b.safetensors", tmp_path / "moved.safetensors")
    try:
        assert main(again) == 3
        assert "b.safetensors" in (said := error(capsys)) and "--lora" in said
        assert main([*again, "--lora", str(moved)]) == 0
        assert digest(out) == digest(made / "v.mp4")
        assert read_card(out)["options"]["lora"][1]["path"] == str(moved)
        capsys.readouterr()
        other = write_lora(tmp_path / "other.safetensors", lora_arrays(seed=9))
        assert main([*again, "--lora", str(moved), "--lora", other]) == 2
        assert "other.safetensors is none of the run's 2 LoRAs" in error(capsys)
    finally:
        shutil.move(moved, made / "loras" / "b.safetensors")


def test_a_lora_that_changed_is_named(made, tmp_path, capsys):
    path = made / "loras" / "a.safetensors"
    before = path.read_bytes()
    write_lora(path, lora_arrays(seed=1) | deltas())
    try:
        assert main(["replay", str(made / "v.mp4"), "--out", str(tmp_path / "x.mp4")]) == 3
        assert f"{path} is not the LoRA that the run was begun with" in error(capsys)
        assert not list(tmp_path.iterdir())
    finally:
        path.write_bytes(before)


def test_merged_is_another_run_that_replays_too(model, files, tmp_path):
    args = (*SHORT, "--lora", str(files / "a.safetensors"), "--quiet")
    assert generate(model, tmp_path / "beside.mp4", *args) == 0
    assert generate(model, tmp_path / "merged.mp4", *args, "--merge-lora") == 0
    cards = [read_card(tmp_path / f"{name}.mp4") for name in ("beside", "merged")]
    assert [c["options"]["merge_lora"] for c in cards] == [False, True]
    assert cards[0]["weights"].keys() == cards[1]["weights"].keys()
    assert [k for k in cards[0]["weights"] if cards[0]["weights"][k] != cards[1]["weights"][k]] == [
        "lora 1"
    ]
    assert main(["replay", str(tmp_path / "merged.mp4"), "--quiet"]) == 0
    again = tmp_path / "merged-replay.mp4"
    assert again.read_bytes() == (tmp_path / "merged.mp4").read_bytes()


def test_resume_goes_on_with_the_same_or_not_at_all(model, files, tmp_path, capsys):
    """Another strength, another file, none, merged; a file that is gone, moved, or changed."""
    path, moved = tmp_path / "a.safetensors", tmp_path / "moved.safetensors"
    shutil.copy(files / "a.safetensors", path)
    args = (*SHORT, "--lora", f"{path}=0.5")
    assert generate(model, tmp_path / "whole.mp4", *args) == 0
    out = tmp_path / "cut.mp4"
    interrupted(model, out, 1, *args)
    before = {p: p.read_bytes() for p in tmp_path.glob("cut.mp4*")}
    bare = ["generate", "--resume", "--out", str(out), "--quiet"]
    others = (
        [*SHORT, "--lora", f"{path}=0.75"],
        ["--lora", f"{path}=0.75"],
        ["--lora", f"{files}/b.safetensors=0.5"],
        [*SHORT, "--lora", f"{path}=0.5", "--merge-lora"],
        ["--lora", f"{path}=0.5", "--lora", f"{files}/b.safetensors"],
        list(SHORT),
    )
    capsys.readouterr()
    for other in others:
        assert main([*bare, "--model", model, *other]) == 2
        said = error(capsys)
        assert f"begun with --lora {path}=0.5; give the same" in said
    path.rename(moved)
    assert main(bare) == 3 and str(path) in error(capsys)
    shutil.copy(files / "b.safetensors", path)
    assert main(bare) == 3
    assert f"{path} is not the LoRA that the run was begun with" in error(capsys)
    assert {p: p.read_bytes() for p in tmp_path.glob("cut.mp4*")} == before
    assert main([*bare, "--lora", f"{moved}=0.5"]) == 0
    assert digest(out) == digest(tmp_path / "whole.mp4")


def test_merged_is_no_place(model, files, tmp_path, capsys):
    """A LoRA that has moved stays merged; --merge-lora is a setting, and needs a LoRA."""
    path, moved = tmp_path / "a.safetensors", tmp_path / "moved.safetensors"
    shutil.copy(files / "a.safetensors", path)
    args = (*SHORT, "--lora", f"{path}=0.5", "--merge-lora", "--quiet")
    out = tmp_path / "cut.mp4"
    interrupted(model, out, 1, *args)
    path.rename(moved)
    bare = ["generate", "--resume", "--out", str(out), "--quiet"]
    lora = ["--lora", f"{moved}=0.5"]
    capsys.readouterr()
    assert main([*bare, "--merge-lora"]) == 2
    assert "no LoRA is given to be merged" in error(capsys)
    assert main([*bare, *lora, "--merge-lora"]) == 2
    assert "must be all those of the run" in error(capsys)
    assert main([*bare, *lora]) == 0
    assert generate(model, tmp_path / "new.mp4", *SHORT, "--merge-lora") == 2
    assert "no LoRA is given to be merged" in error(capsys)
    assert not list(tmp_path.glob("new*"))


def test_a_run_without_any_is_not_resumed_with_one(model, files, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    interrupted(model, out, 1, *SHORT)
    capsys.readouterr()
    lora = ("--lora", str(files / "a.safetensors"))
    assert main(["generate", "--resume", "--out", str(out), "--model", model, *lora]) == 2
    assert "begun with no LoRA; give the same" in error(capsys)


def test_two_experts(files, tmp_path, capsys):
    folder = write_two_experts(tmp_path / "two")
    arrays = lora_arrays(TWO, seed=5) | deltas(dim=TWO.dim)
    high = write_lora(tmp_path / "high.safetensors", arrays)
    low = write_lora(tmp_path / "low.safetensors", lora_arrays(TWO, seed=6))
    common = ("--prompt", PROMPT, "--frames", "5", "--quiet")
    common += ("--embeddings", f"{folder}/prompts.safetensors")
    loras = ("--lora", f"high:{high}=1.0", "--lora", f"low:{low}=0.8")
    assert generate(folder, tmp_path / "a.mp4", *common, *loras) == 0
    found = read_card(tmp_path / "a.mp4")["options"]["lora"]
    assert [(e["path"], e["strength"], e["expert"]) for e in found] == [
        (high, 1.0, "high"),
        (low, 0.8, "low"),
    ]
    for merged in ((), ("--merge-lora",)):
        for place in ("none", "expert"):  # where the weights wait
            args = (*common, *loras, *merged, "--offload", place)
            assert generate(folder, tmp_path / f"{place}.mp4", *args, "--overwrite") == 0
        assert digest(tmp_path / "none.mp4") == digest(tmp_path / "expert.mp4")
    swapped = ("--lora", f"low:{high}=1.0", "--lora", f"high:{low}=0.8")
    assert generate(folder, tmp_path / "b.mp4", *common, *swapped) == 0
    assert digest(tmp_path / "a.mp4") != digest(tmp_path / "b.mp4")


def test_what_is_left_out_is_one_line(model, tmp_path, capsys):
    extra = {f"lora_te_{i}.lora_down.weight": draw(i, 2, 3) for i in range(7)}
    path = write_lora(tmp_path / "x.safetensors", lora_arrays() | extra)
    out = tmp_path / "a.mp4"
    assert generate(model, out, *PROMPTS[:2], "--frames", "5", "--lora", path) == 0
    (note,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    total = len(lora_arrays()) + 7
    assert note.startswith("note: the LoRA x.safetensors has no place in this model for 7 of its")
    assert f"7 of its {total} arrays" in note and "lora_te_0.lora_down.weight" in note
    assert main(["replay", str(out)]) == 0
    assert capsys.readouterr().err.count("has no place in this model") == 1


def bad(folder):
    """Files that cannot be used, by name."""
    at = "diffusion_model.blocks.0.self_attn.q"
    halves = {f"{at}.lora_down.weight": draw(0, 2, 64), f"{at}.lora_up.weight": draw(1, 64, 2)}
    write_lora(folder / "width.safetensors", halves)
    write_lora(folder / "dora.safetensors", lora_arrays() | {f"{at}.dora_scale": draw(2, 32, 1)})
    write_lora(folder / "half.safetensors", dict(list(lora_arrays().items())[:1]))
    write_lora(folder / "none.safetensors", {"lora_te_0.lora_down.weight": draw(3, 2, 3)})
    nan = {k: a * np.float32(np.nan) for k, a in lora_arrays().items()}
    write_lora(folder / "nan.safetensors", nan)
    (folder / "page.safetensors").write_text("<!doctype html>")
    (folder / "empty").mkdir()
    save_arrays(folder / "checkpoint.safetensors", {"patch_embedding.weight": draw(4, 8, 8)})


@pytest.mark.parametrize(
    "lora, code, says",
    (
        ("gone.safetensors", 3, "no such file or folder: "),
        ("gone.safetensors=0.5", 3, "no such file or folder: "),
        ("empty", 3, "holds no .safetensors"),
        ("width.safetensors", 3, "use a LoRA of this size and kind of model"),
        ("dora.safetensors", 3, "DoRA"),
        ("half.safetensors", 3, "without its"),
        ("none.safetensors", 3, "none of its 1 arrays belongs to this model"),
        ("checkpoint.safetensors", 3, "is it a LoRA"),
        ("nan.safetensors", 3, "not finite"),
        ("page.safetensors", 3, "a web page"),
        ("width.safetensors=strong", 2, "the strength is 'strong'"),
        ("width.safetensors=nan", 2, "the strength is 'nan'"),
        ("high:width.safetensors", 2, "the model has one transformer"),
        ("width.safetensors=1_0", 2, "the strength is '1_0'"),
        ("", 2, "--lora is empty"),
    ),
)
def test_what_cannot_be_used_is_one_line(model, tmp_path, monkeypatch, capsys, lora, code, says):
    bad(tmp_path / "loras")
    monkeypatch.chdir(tmp_path / "loras")
    out = tmp_path / "a.mp4"
    assert generate(model, out, *SHORT, "--lora", lora) == code
    err = capsys.readouterr().err.strip()
    assert says in err and len(err.splitlines()) == 1 and "unexpected" not in err
    assert not list(tmp_path.glob("a.mp4*"))


@pytest.mark.parametrize(
    "change",
    (
        {"lora": 5},
        {"lora": ["a.safetensors"]},
        {"lora": [{"path": "a"}]},
        {"lora": [{"path": "a", "sha256": "0", "strength": "1", "expert": None}]},
        {"lora": [{"path": "a", "sha256": "0", "strength": 1, "expert": "mid"}]},
        {"lora": [{"path": "a", "sha256": 0, "strength": 1, "expert": None}]},
        {"lora": [{"path": "a", "sha256": "0", "strength": 10**400, "expert": None}]},
        {"lora": [{"path": "a\0", "sha256": "0", "strength": 1, "expert": None}]},
        {"merge_lora": "yes"},
    ),
    ids=str,
)
def test_a_card_whose_loras_cannot_be_read(made, tmp_path, capsys, change):
    card = json.loads(card_path(made / "v.mp4").read_text())
    path = tmp_path / "x.mp4.json"
    path.write_text(json.dumps(card | {"options": card["options"] | change}))
    assert main(["replay", str(path)]) == 3
    err = capsys.readouterr().err.strip()
    assert "the LoRAs in the run card cannot be read" in err and len(err.splitlines()) == 1


def test_an_older_card_has_none(made, model, tmp_path):
    assert generate(model, tmp_path / "a.mp4", *PROMPTS, "--frames", "5", "--quiet") == 0
    path = card_path(tmp_path / "a.mp4")
    card = json.loads(path.read_text())
    card["options"] = {k: v for k, v in card["options"].items() if "lora" not in k}
    path.write_text(json.dumps(card))
    assert main(["replay", str(path), "--quiet"]) == 0
    assert digest(tmp_path / "a-replay.mp4") == digest(tmp_path / "a.mp4")


def test_a_config_names_them(model, made, tmp_path, capsys):
    lines = [f"{made}/loras/a.safetensors=0.5", f"{made}/loras/b.safetensors"]
    text = "def get_config():\n    return dict(prompt={!r}, frames=29, seed=3, lora={!r})\n"
    config = tmp_path / "c.py"
    config.write_text(text.format(list(PROMPTS[1::2]), lines))
    common = ("--config", str(config), "--quiet")
    assert generate(model, tmp_path / "a.mp4", *common) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (made / "v.mp4").read_bytes()
    assert generate(model, tmp_path / "b.mp4", *common, "--lora", lines[0]) == 0
    assert len(read_card(tmp_path / "b.mp4")["options"]["lora"]) == 1
    for value, says in ((5, "give text, or a list"), ([5], "a lora is 5; give text")):
        config.write_text(text.format(list(PROMPTS[1::2]), value))
        capsys.readouterr()
        assert generate(model, tmp_path / "c.mp4", *common) == 2
        assert says in error(capsys)
    config.write_text("def get_config():\n    return dict(prompt='x', merge_lora=1)\n")
    assert generate(model, tmp_path / "c.mp4", *common) == 2
    assert "merge_lora is 1; give True or False" in error(capsys)
