# SPDX-License-Identifier: Apache-2.0
"""What a safetensors header says beside the arrays, and which settings of a LoRA are taken."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save, save_file

from checkpoints_convert.lora import METADATA
from checkpoints_convert.lora_file import TRAINER, open_lora
from checkpoints_convert.read import open_checkpoint, open_tensors
from lvjax.core.errors import CheckpointError

ARRAYS = {"model.a": np.ones(3, np.float32)}
TEXTS = {"format": "pt", "long": "x" * 100_000, 'ü "\\\n\t☃ 🦊': '{"a": [1, "b"]}', "empty": ""}


def test_metadata_are_handed_through(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(ARRAYS, path, metadata=TEXTS)
    tensors = open_tensors(path)
    assert tensors.metadata == TEXTS and list(tensors) == ["a"]
    assert tensors.without("a").metadata == TEXTS
    assert open_checkpoint(tmp_path)[0].metadata == TEXTS
    save_file(ARRAYS, path)
    assert open_tensors(path).metadata == {}


@pytest.mark.parametrize(
    "notes, says",
    (
        (b'{"a":"1","b":"2","a":"1"}', "a line of its metadata stands there twice"),
        (b'{"a":"1",}', "makes no sense"),
        (b'{"a":"\\x"}', "Invalid"),
        (b'{"a":["1"]}', "makes no sense"),
        (b'"a"', "makes no sense"),
    ),
)
def test_metadata_that_are_none(tmp_path, notes, says):
    data = save(ARRAYS, metadata={"x": "y"})
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'{"x":"y"}', notes)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with pytest.raises(CheckpointError, match=says) as e:
        open_tensors(path)
    assert "\n" not in str(e.value)


BESIDE = {"lora_alpha": 1, "peft_type": "LORA"}


@pytest.mark.parametrize(
    "header, config, files",
    (
        ({}, BESIDE, 2),
        ({"format": "pt", "ss_network_alpha": "8"}, BESIDE, 2),
        ({METADATA: '{"transformer.lora_alpha": 2}'}, None, 1),
        ({TRAINER: '{"rank": 2, "lora_alpha": 3}'}, {"rank": 2, "lora_alpha": 3}, 1),
        ({"lora_alpha": "4", "use_dora": "False"}, {"lora_alpha": "4"}, 1),
    ),
)
def test_settings_in_the_file_come_first(tmp_path, header, config, files):
    path = tmp_path / "adapter_model.safetensors"
    save_file(ARRAYS, path, metadata=header)
    (tmp_path / "adapter_config.json").write_text(json.dumps(BESIDE))
    (tmp_path / "config.json").write_text("{")  # of the model; it is not read
    for source in (path, tmp_path):
        found = open_lora(source)
        assert found.config == (header if config is None else config)
        assert found.path == path and len(found.files) == files


def test_settings_that_are_damaged(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(ARRAYS, path, metadata={TRAINER: "{"})
    with pytest.raises(CheckpointError, match=f"its entry {TRAINER} is damaged"):
        open_lora(path)
    save_file(ARRAYS, path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json is damaged"):
        open_lora(path)


def test_several_sets_in_one_file(tmp_path):
    """As trainings leave them: the LoRA is meant, not what lies with it; options that LoRAs do not
    have are not named.
    """
    sets = {
        name: {"blocks.0.self_attn.q.lora_A.weight": torch.full((2, 3), float(i))}
        for i, name in enumerate(
            ("generator_ema", "generator_ema_lora", "generator_lora", "critic")
        )
    }
    path = tmp_path / "a.pt"

    def chosen(*names):
        torch.save({name: sets[name] for name in names}, path)
        return open_lora(path).tensors.chosen

    assert chosen(*sets) == "generator_lora"
    assert chosen("generator_ema", "generator_ema_lora", "critic") == "generator_ema_lora"
    assert chosen("generator_ema", "critic") == "generator_ema"
    assert open_tensors(path).chosen == "generator_ema"
    chosen(*sets)
    assert open_tensors(path).chosen == "generator_ema"  # of a model
    torch.save({"critic": sets["critic"], "other": sets["critic"]}, path)
    with pytest.raises(CheckpointError, match="holds several sets of weights") as e:
        open_lora(path)
    assert "--" not in str(e.value)


def test_an_entry_of_lvjax_that_is_damaged(tmp_path):
    path = tmp_path / "a.safetensors"
    for said, expert in (('{"kind": "lora", "expert": "low"}', "low"), ('{"expert": "low"}', None),
                         ('{"kind": "lora", "expert": "mid"}', None), ("[1]", None)):  # fmt: skip
        save_file(ARRAYS, path, metadata={"meta": said})
        assert open_lora(path).expert == expert
    save_file(ARRAYS, path, metadata={"meta": "{"})
    with pytest.raises(CheckpointError, match="its entry 'meta' is damaged"):
        assert open_lora(path).expert
