# SPDX-License-Identifier: Apache-2.0
"""What `lvjax convert` writes beside the parts, model.json, and parts put together by hand."""

import dataclasses
import json
import random
import shutil

import pytest

import lvjax
from lvjax.cli.main import main
from lvjax.core.errors import CheckpointError, InputError
from lvjax.run.bundle import outline
from tests.checkpoints_convert.tiny_checkpoints import draw, tiny, usual, write


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folders of parts by manifest, and one of a whole model."""
    root = tmp_path_factory.mktemp("models")
    for name in ("wan2.1-t2v-1.3b", "wan2.1-vae", "wan2.2-vae", "umt5-xxl-encoder"):
        own = f"{name}.official"
        src = write(draw(tiny(own, 1)[0], "mixed"), root / "src" / name, *usual(own))
        assert main(["convert", str(src), str(root / name)]) == 0
        if name in ("wan2.1-t2v-1.3b", "wan2.1-vae"):
            assert main(["convert", str(src), str(root / "whole")]) == 0
    return root


def test_a_bit_of_model_json(converted):
    """Each is found, or changes nothing of what the file says (a letter of an exponent)."""
    folder = converted / "whole"
    path, wanted = folder / "model.json", outline(folder)
    data, unseen = path.read_bytes(), 0
    bits = [(at, bit) for at in range(len(data)) for bit in range(8)]
    for at, bit in random.Random(0).sample(bits, 1000):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        try:
            found = outline(folder)
        except CheckpointError as e:
            assert "model.json" in str(e) and "\n" not in str(e)
            continue
        unseen += 1
        assert (found.name, found.defaults) == (wanted.name, wanted.defaults), (at, bit)
    path.write_bytes(data)
    assert unseen < 5 and outline(folder).defaults == wanted.defaults


def test_a_person_may_change_it(converted, tmp_path):
    shutil.copytree(converted / "whole", tmp_path / "own")
    path = tmp_path / "own" / "model.json"
    head = json.loads(path.read_text())
    head["defaults"]["steps"] = 7
    path.write_text(json.dumps(head))
    with pytest.raises(CheckpointError, match="remove the line 'crc32' if somebody changed it"):
        outline(tmp_path / "own")
    del head["crc32"]
    path.write_text(json.dumps(head))
    assert outline(tmp_path / "own").defaults.steps == 7
    # a further conversion keeps it
    src = converted / "src" / "umt5-xxl-encoder" / "models_t5_umt5-xxl-enc-bf16.pth"
    assert main(["convert", str(src), str(tmp_path / "own")]) == 0
    assert outline(tmp_path / "own").defaults.steps == 7
    for change in ({"more": 1}, {"defaults": []}, {"name": None, "dit": {}}):
        path.write_text(json.dumps(head | change))
        with pytest.raises(CheckpointError, match="model.json"):
            outline(tmp_path / "own")


def test_parts_of_two_models(converted, tmp_path):
    """Put together by hand, each part sound and with its checksums."""
    folder = tmp_path / "mixed"
    shutil.copytree(converted / "whole", folder)
    shutil.copy(converted / "wan2.2-vae" / "vae.safetensors", folder / "vae.safetensors")
    with pytest.raises(CheckpointError, match="48 latent channels, the transformer takes 16"):
        lvjax.load(folder)


def test_the_packaged_model_needs_no_checksum():
    bundle = outline("pocket")
    assert bundle.name == "pocket"
    with pytest.raises(InputError):
        dataclasses.replace(bundle.defaults, steps=0)
