# SPDX-License-Identifier: Apache-2.0
"""`lvjax generate` end to end on a tiny random model: files, inputs, exit codes, errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lvjax.cli.main import main
from lvjax.core.errors import InputError
from lvjax.data.captions import moment
from lvjax.io.video import read_card, read_video
from lvjax.run import job
from lvjax.run.card import card_path
from lvjax.run.state import state_path
from lvjax.run.weights import load, save
from tests.cli.commands import PROMPTS, generate


def test_a_run_writes_a_playable_video_with_its_card(model, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    assert generate(model, out, *PROMPTS, "--seconds", "5") == 0
    frames, fps = read_video(out)
    assert frames.shape == (41, 32, 32, 3) and fps == 8
    card = read_card(out)
    assert card["options"]["timelines"][0][1] == [2.5, "a red circle moves up"]
    assert json.loads(card_path(out).read_text())["weights"].keys() == {
        "dit",
        "model",
        "text",
        "vae",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.mp4.json"]
    printed = capsys.readouterr()
    assert "plan: 41 frames in 3 clips" in printed.out and "3/3" in printed.err
    assert re.search(r"disk \d+ MB; about \d+ s \(estimate: ", printed.out)


def test_a_batch_is_one_file_per_prompt_and_video(model, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "the camera pans left\n\n# a comment\na red circle moves up\n"
    )
    assert (
        generate(
            model,
            tmp_path / "b.mp4",
            "--prompt-file",
            str(tmp_path / "prompts.txt"),
            "--num-videos",
            "2",
            "--frames",
            "17",
        )
        == 0
    )
    videos = [read_video(tmp_path / f"b-{i:03d}.mp4")[0] for i in range(4)]
    assert all(v.shape == (17, 32, 32, 3) for v in videos) and (videos[0] != videos[1]).any()
    assert read_card(tmp_path / "b-003.mp4")["row"] == 3


def test_continue_a_video(model, tmp_path):
    assert generate(model, tmp_path / "a.mp4", *PROMPTS, "--frames", "17") == 0
    assert (
        generate(
            model,
            tmp_path / "b.mp4",
            *PROMPTS,
            "--frames",
            "25",
            "--video",
            str(tmp_path / "a.mp4"),
        )
        == 0
    )
    seen, made = (read_video(tmp_path / f"{name}.mp4")[0] for name in "ab")
    given = job.request_of(read_card(tmp_path / "b.mp4")["options"]).start
    given = job.enlarge((given + 1) * 127.5, 2)
    last, first = (np.abs(given - part).mean() for part in (seen[-5:], seen[:5]))
    assert made.shape[0] == 25 and given.shape[0] == 5 and last < first


NAMES = ("--model", "--embeddings", "--lora", "--image", "--last-image", "--video", "--config",
         "--out", "--timeline", "--prompt-file")  # fmt: skip


@pytest.mark.parametrize("option", NAMES)
def test_an_empty_name_is_not_the_current_folder(model, tmp_path, option, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(model, tmp_path / "a.mp4", *PROMPTS, "--frames", "5", option, "") == 2
    assert capsys.readouterr().err.startswith(f"lvjax: {option} is empty; give the name of")
    assert main(["generate", "--resume", "--out", "a.mp4", option, ""]) == 2
    assert f"{option} is empty" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_config_may_name_no_empty_file(tmp_path, capsys):
    (tmp_path / "c.py").write_text("def get_config():\n    return dict(prompt='a', image='')\n")
    assert main(["generate", "--config", str(tmp_path / "c.py")]) == 2
    assert "--image is empty" in capsys.readouterr().err


def test_a_name_of_several_lines_is_told_in_one(model, tmp_path, capsys):
    out = tmp_path / "a\nb.mp4"
    for more in ((), ("--resume",)):
        assert generate(model, out, *PROMPTS[:2], "--frames", "5", *more) == 0
        assert f"{tmp_path}/a\\nb.mp4" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--image", "--video", "--size", "--timeline", "--prompt-file"])
def test_an_empty_value_is_not_ignored(model, tmp_path, option, capsys):
    prompts = () if option in ("--timeline", "--prompt-file") else PROMPTS
    assert generate(model, tmp_path / "a.mp4", *prompts, "--frames", "17", option, "") == 2
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting",
    ["frames='17'", "frames=17.0", "seed='a'", "seed=True", "seconds='5'", "steps='8'", "prompt=3",
     "defaults=3", "seed=2**70", "steps=2000", "guidance=float('nan')", "method='magic'"],
)  # fmt: skip
def test_a_config_value_that_cannot_be(model, tmp_path, setting, capsys):
    config = tmp_path / "c.py"
    config.write_text(
        f"def get_config():\n    return dict(dict(prompt='a red circle'), {setting})\n"
    )
    assert generate(model, tmp_path / "a.mp4", "--config", str(config)) == 2
    said = capsys.readouterr().err.strip()
    assert setting.split("=")[0] in said and "\n" not in said
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["c.py"]


def test_more_videos_than_open_files(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("resource.getrlimit", lambda what: (256, 1024))
    many = ("--frames", "17", "--num-videos", "1000")
    assert generate(model, tmp_path / "a.mp4", "--prompt", "a red circle", *many) == 2
    assert "at most 462" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_picture_that_no_file_holds(model, tmp_path, capsys):
    assert generate(model, tmp_path / "a.mp4", *PROMPTS, "--size", "16384x16") == 2
    assert "16384" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(model, tmp_path):
    """No file may grow: the lock is the first that cannot be written."""
    code = (
        "import resource, signal, sys\n"
        "from lvjax.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "a.mp4"
    args = ("generate", "--model", model, "--out", str(out), "--prompt", "a red circle")
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 6 and done.stderr.count("\n") == 1 and "free space" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("3.5 the camera pans left", (3.5, "the camera pans left")),
        ("4: the camera pans left", (4.0, "the camera pans left")),
        ("4s,a red circle", (4.0, "a red circle")),
        ("1:30 a red circle", (90.0, "a red circle")),
        ("0:07.5, 2 circles", (7.5, "2 circles")),
    ],
)
def test_lines_of_a_timeline(line, found):
    assert moment(line, "story.txt") == found


@pytest.mark.parametrize("line", ["1:75 a red circle", "1:30", "a red circle", "-1 x", "1:2:30 x"])
def test_lines_that_are_nomoment(line):
    with pytest.raises(InputError, match="1:30 the camera"):
        moment(line, "story.txt")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_command_is_read(number, code, monkeypatch, capsys):
    monkeypatch.setattr(
        "lvjax.cli.main.build_parser", lambda argv: os.kill(os.getpid(), number) or time.sleep(9)
    )
    assert main(["generate"]) == code
    assert capsys.readouterr().err.strip() == "lvjax: interrupted"


def test_config_and_set_reach_everything(model, tmp_path):
    config = tmp_path / "c.py"
    config.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        '    return ConfigDict({"prompt": ["the camera pans up"], "frames": 17,'
        ' "defaults": {"shift": 5.0}})\n'
    )
    assert (
        generate(
            model,
            tmp_path / "a.mp4",
            "--config",
            str(config),
            "--set",
            "defaults.upscale=1",
            "--set",
            "frames=21",
        )
        == 0
    )
    card = read_card(tmp_path / "a.mp4")
    assert card["options"]["defaults"]["shift"] == 5.0 and card["options"]["frames"] == 21
    own = ("--config", str(config), "--prompt", "the camera zooms in", "--seconds", "1")
    assert generate(model, tmp_path / "b.mp4", *own) == 0
    assert read_card(tmp_path / "b.mp4")["options"]["timelines"] == [[[0, "the camera zooms in"]]]
    assert read_video(tmp_path / "a.mp4")[0].shape == (21, 16, 16, 3)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--prompt", " "], 2, "empty"),
        ([], 2, "no prompt"),
        (["--prompt", "x", "--frames", "18"], 2, "17 and 21"),
        (["--prompt", "x", "--size", "100x64"], 2, "96 and 104"),
        (["--prompt", "x", "--size", "big"], 2, "WIDTHxHEIGHT"),
        (["--prompt", "x", "--seconds", "0"], 2, "positive"),
        (["--prompt", "x", "--seconds", "nan"], 2, "positive"),
        (["--prompt", "x", "--seconds", "soon"], 2, "invalid float"),
        (["--prompt", "x", "--image", "nowhere.png"], 2, "nowhere.png"),
        (["--prompt", "x", "--video", "nowhere.mp4"], 2, "nowhere.mp4"),
        (["--prompt", "x", "--image", "a" * 5000], 2, "no such image file"),
        (["--prompt", "x", "--image", "a\nb.png"], 2, "a\\nb.png"),
        (["--prompt", "x", "--video", "a" * 5000], 2, "no such video file"),
        (["--prompt", "x", "--num-videos", "99999999999999"], 2, "several runs"),
        (["--prompt", "x", "--size", "999999x64"], 2, "at most 16384"),
        (["--prompt", "x", "--set", "defaults.shift=" + "-" * 5000 + "1"], 2, "shift"),
        (["--prompt", "x", "--config", ""], 2, "config"),
        (["--prompt", "x", "--steps", "0"], 2, "steps"),
        (["--prompt", "x", "--num-videos", "0"], 2, "num-videos"),
        (["--prompt", "x", "--seed", "-1"], 2, "seed"),
        (["--prompt", "x", "--seconds", "1e308"], 2, "positive"),
        (["--prompt", "x", "--set", "defaults.window=(0.7,0.3)"], 2, "window"),
        (["--prompt", "x", "--config", "nowhere/demo.py"], 2, "nowhere/demo.py"),
        (["--prompt", "x", "--set", "defaults.shft=1"], 2, "'shift'"),
        (["--prompt", "x", "--config", "nothing"], 2, "pocket"),
        (["--prompt", "x", "--size", "8192x8192"], 4, "fit"),
        (["--prompt", "x", "--model", "nowhere"], 3, "no model"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(model, tmp_path, capsys, args, code, message):
    out = tmp_path / "a.mp4"
    try:
        found = generate(model, out, *args)
    except SystemExit as e:
        found = e.code
    err = capsys.readouterr().err.strip()
    assert (
        found == code and message in err and len(err.splitlines()) == 1 and "Traceback" not in err
    )
    assert not out.exists() and not list(tmp_path.glob("*.lock"))


def test_what_is_no_plain_file_is_not_replaced(model, tmp_path, capsys):
    (tmp_path / "dir.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    os.symlink(tmp_path / "loop.mp4", tmp_path / "loop.mp4")
    for name in ("dir", "fifo", "loop"):
        assert generate(model, tmp_path / f"{name}.mp4", *PROMPTS, "--overwrite") == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not state_path(tmp_path / f"{name}.mp4").exists()


def test_notices_stay_short(model, tmp_path, capsys):
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 8))) for _ in range(3000)]
    began = time.monotonic()
    prompts = ("--prompt", " ".join(words) + " " + "x" * 100_000, "--prompt", "\u200b")
    assert generate(model, tmp_path / "a.mp4", *prompts, "--frames", "5") == 0
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert max(map(len, notes)) < 1000 and "and 2991 more" in "".join(notes)
    assert any("holds no word" in x for x in notes) and time.monotonic() - began < 20


def test_an_existing_video_is_not_lost(model, tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"precious")
    assert generate(model, tmp_path / "a.mp4", *PROMPTS, "--frames", "5") == 2
    assert (
        "--overwrite" in capsys.readouterr().err
        and (tmp_path / "a.mp4").read_bytes() == b"precious"
    )
    assert generate(model, tmp_path / "a.mp4", *PROMPTS, "--frames", "5", "--overwrite") == 0


def test_a_place_that_is_no_folder(model, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert generate(model, tmp_path / "file" / "a.mp4", *PROMPTS) == 6
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_weights_that_overflow_stop_the_run(model, tmp_path, capsys):
    """Finite weights whose products are not: nothing of it is reported as a video."""
    bundle = load(model)
    head = bundle.params["dit"]["head"]["linear"]
    head["kernel"] = np.sign(head["kernel"]) * np.float32(3e38)
    save(tmp_path / "broken", bundle, "float32")
    out = tmp_path / "a.mp4"
    assert generate(str(tmp_path / "broken"), out, *PROMPTS, "--frames", "53") == 5
    printed = capsys.readouterr()
    assert "latents of clip 0" in printed.err and "wrote" not in printed.out


def test_the_plan_comes_before_the_weights(model, tmp_path, capsys):
    """With damaged weights the plan is printed all the same."""
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut" / "dit.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 4
    weights.write_bytes(data)
    assert generate(str(tmp_path / "cut"), tmp_path / "a.mp4", *PROMPTS) == 3
    printed = capsys.readouterr()
    assert printed.out.startswith("plan: ") and "dit.safetensors" in printed.err
    weights.write_bytes(data[:1000])  # sizes that cannot be read come before any plan
    assert generate(str(tmp_path / "cut"), tmp_path / "a.mp4", *PROMPTS) == 3
    printed = capsys.readouterr()
    assert not printed.out and "dit.safetensors" in printed.err


def test_a_json_file_of_the_user_is_not_touched(model, tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"mine": 1}')
    out = tmp_path / "a.mp4"
    assert generate(model, out, *PROMPTS, "--frames", "5") == 0
    card_path(out).write_text('{"mine": 2}')
    assert generate(model, out, *PROMPTS, "--frames", "5", "--overwrite") == 2
    assert "a.mp4.json" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_text() == '{"mine": 1}'
    assert card_path(out).read_text() == '{"mine": 2}'


def test_info_and_help(capsys, model):
    assert main(["info", model]) == 0
    assert "T-RFlow" in capsys.readouterr().out and load(model).name == "tiny"
    with pytest.raises(SystemExit) as e:
        main(["generate", "--help"])
    assert e.value.code == 0
