# SPDX-License-Identifier: Apache-2.0
"""Which bundles can be written as a folder, and the type of the activations of what is loaded."""

import dataclasses

import numpy as np
import pytest

import lvjax
from lvjax.core.checkpoint import open_arrays, save_arrays
from lvjax.core.errors import InputError
from lvjax.models.umt5 import UMT5Config
from lvjax.run.bundle import outline, typed
from lvjax.run.weights import load, read_weights, save, stored_hash
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
