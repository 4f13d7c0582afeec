# SPDX-License-Identifier: Apache-2.0
"""Which bundles can be written as a folder, and the type of the activations of what is loaded."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import lvjax
from lvjax.cli.main import main
from lvjax.core.checkpoint import open_arrays, save_arrays
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.params import flatten
from lvjax.models.umt5 import UMT5Config, umt5_spec
from lvjax.run.bundle import outline, typed
from lvjax.run.text_folder import open_text
from lvjax.run.weights import load, read_weights, save, stored_hash
from tests.drawn import drawn
from tests.lora_files import write_two_experts
from tests.tiny import tiny_bundle


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "a", tiny_bundle(), "float32")
    found, was = load(tmp_path / "a"), tiny_bundle().params
    np.testing.assert_array_equal(
        found.params["dit"]["head"]["linear"]["kernel"], was["dit"]["head"]["linear"]["kernel"]
    )


@pytest.mark.parametrize("kind", ["umt5", "no text", "outline", "two experts", "lora"])
def test_other_bundles_are_not_written(tmp_path, kind):
    bundle = tiny_bundle()
    replace = dataclasses.replace
    two = {**bundle.params, "dit_low": bundle.params["dit"]}
    bundle = {
        "umt5": replace(bundle, text=UMT5Config(dim=16)),
        "no text": replace(bundle, text=None),
        "outline": replace(bundle, params={}),
        "two experts": replace(bundle, params=two),
        "lora": replace(bundle, loras=("a LoRA beside the weights",)),
    }[kind]
    with pytest.raises(InputError) as e:
        save(tmp_path / "a", bundle)
    assert "\n" not in str(e.value) and not (tmp_path / "a").exists()


def test_the_type_of_the_activations_is_a_default(tmp_path):
    bundle = tiny_bundle()
    assert typed(bundle, None) is bundle and bundle.defaults.dtype is None
    half = typed(bundle, "bfloat16")
    assert half.dit.dtype == half.defaults.dtype == "bfloat16"
    assert typed(half, "float32").dit.dtype == "float32"
    save(tmp_path / "a", dataclasses.replace(bundle, defaults=half.defaults))
    assert outline(tmp_path / "a").dit.dtype == "float32"  # as the model says
    for found in (load(tmp_path / "a"), lvjax.load(tmp_path / "a")):
        assert found.dit.dtype == found.defaults.dtype == "bfloat16"
    wide = lvjax.load(tmp_path / "a", dtype="float32")
    assert wide.dit.dtype == wide.defaults.dtype == "float32"
    for wrong in ("float16", 3):
        with pytest.raises(InputError, match="defaults.dtype is .*float32, bfloat16"):
            typed(bundle, wrong)


def test_the_hashes_are_of_what_is_in_memory_and_of_an_image_encoder(tmp_path):
    save(tmp_path / "a", tiny_bundle())
    plain = outline(tmp_path / "a")
    hashes = read_weights(plain).hashes
    assert hashes.keys() == {"dit", "vae", "text", "model"}
    save_arrays(tmp_path / "image", {"x": np.arange(3, dtype=np.float32)}, {})
    image = open_arrays(tmp_path / "image")
    more = dataclasses.replace(plain, parts={**plain.parts, "image": image})
    assert read_weights(more).hashes == hashes | {"image": stored_hash(image)}
    bare = {name: slot._replace(pieces=()) for name, slot in image.slots.items()}  # as published
    bare = dataclasses.replace(image, slots=bare)
    more = dataclasses.replace(plain, parts={**plain.parts, "image": bare})
    assert read_weights(more).hashes == hashes


def _without(name):
    return lambda arrays: {k: a for k, a in arrays.items() if k != name}


def _one_layer(arrays):
    return {k: a[:1] if k.startswith("blocks/") else a for k, a in arrays.items()}


WRONG = {
    "a layer less": (_one_layer, r"blocks/.* has shape \(1, .*, expected \(2, "),
    "no norm": (_without("norm"), "norm is missing"),
    "one more": (lambda arrays: arrays | {"x": arrays["norm"]}, "x is not of this model"),
    "whole numbers": (
        lambda arrays: arrays | {"norm": arrays["norm"].astype(np.int32)}, "norm is int32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_text_encoder_that_is_another_than_it_says(tmp_path, wrong, capsys):
    """It is read when a prompt is encoded; that it does not fit is told before."""
    change, says = WRONG[wrong]
    folder = Path(write_two_experts(tmp_path))
    cfg = UMT5Config(vocab=40, dim=8, num_heads=2, head_dim=4, ffn_dim=16, num_layers=2)
    arrays = {k: np.asarray(a) for k, a in flatten(drawn(umt5_spec(cfg), 0)).items()}
    meta = {"part": "text", "config": dataclasses.asdict(cfg)}
    save_arrays(folder / "text.safetensors", arrays, meta)
    assert outline(folder).text == cfg
    save_arrays(folder / "text.safetensors", change(arrays), meta)
    for use in (outline, load, open_text):
        with pytest.raises(CheckpointError, match=says):
            use(folder)
    (tmp_path / "alone").mkdir()
    alone = Path(shutil.copy(folder / "text.safetensors", tmp_path / "alone"))
    for path in (alone, alone.parent):  # the encoder without the rest of its model
        with pytest.raises(CheckpointError, match=says):
            open_text(path)
    assert (
        main(
            [
                "encode",
                "--model",
                str(folder),
                "--prompt",
                "a",
                "--out",
                str(tmp_path / "p.safetensors"),
            ]
        )
        == 3
    )
    err = capsys.readouterr().err
    assert "text.safetensors: " in err and err.count("\n") == 1
    assert main(["info", str(folder)]) == 3
    said = capsys.readouterr()
    assert said.err == err and "arrays have their place" in said.out
