# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert`: what is not converted, and what is said of it.  Files that lie are in
test_bad_conversions.py.
"""

import json
import struct

import numpy as np
import pytest

from checkpoints_convert import convert as converter
from checkpoints_convert.convert import part_kinds
from checkpoints_convert.recognise import recognise
from checkpoints_convert.tensors import Entry, Tensors
from lvjax.core.streaming import total_bytes
from tests.checkpoints_convert.convert_shell import (
    DIT,
    VAE,
    convert,
    fails,
    weights,
)
from tests.checkpoints_convert.tiny_checkpoints import (
    opened,
    tiny,
    write,
)

# ---- what is not converted ---------------------------------------------------------------


def _later(key):
    return {key: np.zeros((2, 2), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (_later("blocks.0.self_attn.q.lora_A.weight"), "is a LoRA, or a file of"),
        (
            _later("blocks.0.norm3.diff"),
            "a LoRA, or a file of weight differences: give it with --lora",
        ),
        (_later("vace_blocks.0.x"), "is a VACE model"),
        (_later("model.embed_tokens.weight"), "is neither a diffusion transformer nor"),
        (weights() | _later("blocks.0.extra.weight"), "x.safetensors: 1 arrays have no place in"),
        (weights() | _later("blocks.0.ffn.0.scale_weight"), "scales of quantised weights"),
        (weights() | _later("scaled_fp8"), "scales of quantised weights (scaled_fp8)"),
        ({k: v for k, v in weights(VAE).items() if "middle.1" not in k}, "are missing"),
        ({k: v for k, v in weights().items() if k != "head.head.bias"}, "1 arrays are missing"),
        ({k: v[..., :96] for k, v in weights().items()}, "does the configuration fit"),
        ({k: v * np.float32(np.nan) for k, v in weights().items()}, "is not finite"),
    ],
)
def test_what_is_not_converted(tmp_path, capsys, arrays, says):
    arrays = {k: np.ascontiguousarray(a) for k, a in arrays.items()}
    path = write(arrays, tmp_path, "x", "file")
    assert says in fails(capsys, 3, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_wrong_part(tmp_path, src, capsys):
    says = fails(capsys, 3, src, tmp_path / "out", "--part", "vae")
    assert "is a diffusion transformer; leave --part vae out" in says
    assert "holds no part 'vae'" in fails(capsys, 3, src.parent, tmp_path / "out", "--part", "vae")
    assert convert(src, tmp_path / "out", "--part", "dit_low") == 0
    assert opened(tmp_path / "out", "dit_low").meta["part"] == "dit_low"


def test_configurations_that_contradict_the_weights(tmp_path, capsys):
    name = "wan2.1-t2v-14b.diffusers"
    path = write(weights(name), tmp_path, "x", "file")
    for config, says in (
        ({"num_attention_heads": 3}, "config.json says 3 heads"),
        ({"num_attention_heads": 1, "attention_head_dim": 128}, "1 heads of 128, the width is 256"),
        ({"num_attention_heads": "many"}, "are not those of a Wan model"),
        ({"num_layers": 30}, "config.json says num_layers 30, the arrays say 2"),
        ([1], "is damaged"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert says in fails(capsys, 3, path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    assert "twice" in fails(capsys, 3, path, tmp_path / "out")


def test_damaged_files(tmp_path, capsys):
    path = write(weights(), tmp_path, "x", "file")
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = next(k for k in header if k != "__metadata__")

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed[name])
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    for bad, says in (
        (data[:-7], "cut short or damaged"),
        (data + b"\0", "cut short or damaged"),
        (data[:100], "cut short"),
        (b"", "is empty"),
        (b"<html>not found</html>", "is a web page"),
        (struct.pack("<Q", 2**40) + data[8:], "is not a safetensors file, or cut short"),
        (data[:8] + b"x" + data[9:], "is neither safetensors, nor a PyTorch file"),
        (with_header(lambda e: e.update(dtype="F99")), "as 'F99'; lvjax reads"),
        (with_header(lambda e: e.update(shape=[-1])), "impossible dtype, shape or place"),
        (with_header(lambda e: e.update(data_offsets=[8, 4])), "impossible dtype"),
        (with_header(lambda e: e.clear()), "impossible dtype, shape or place"),
    ):
        path.write_bytes(bad)
        assert says in fails(capsys, 3, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there(tmp_path, capsys):
    assert "no such file or folder" in fails(capsys, 3, tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no part of a Wan model" in fails(capsys, 3, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "model.pth").touch()
    assert "is empty" in fails(capsys, 3, tmp_path / "model.pth", tmp_path / "out")
    assert "is empty" in fails(capsys, 3, tmp_path, tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "is a GGUF file" in fails(capsys, 3, tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "link").symlink_to("gone")
    assert "a link that leads nowhere" in fails(capsys, 3, tmp_path / "link", tmp_path / "out")


def test_the_total_of_a_plan_is_what_is_written():
    shapes = tiny(DIT)[0]
    entries = {k: Entry("none", "F32", shape, 0) for k, shape in shapes.items()}
    model = recognise(Tensors(entries), {}, "x")
    narrow = total_bytes(part_kinds(model, model.plan(), "bfloat16"))
    assert (
        narrow
        < total_bytes(part_kinds(model, model.plan()))
        == 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    )
    assert converter.SAMPLE >= 1024
