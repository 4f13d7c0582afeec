# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder share: a model with one transformer, one with two, and LoRAs."""

import dataclasses

import pytest

import lvjax
from lvjax.run.encoders import load_embeddings
from lvjax.run.weights import save
from tests.lora_files import TWO, deltas, lora_arrays, write_lora, write_two_experts
from tests.tiny import tiny_bundle

TOLERANCE = 1e-4
NOTICED = 1e-2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and LoRAs; `two` is for a model with two experts."""
    folder = tmp_path_factory.mktemp("loras")
    save(folder / "model", tiny_bundle(), dtype="float32")
    write_two_experts(folder / "two")
    write_lora(folder / "a.safetensors", lora_arrays() | deltas())
    write_lora(folder / "b.safetensors", lora_arrays(seed=50))
    write_lora(folder / "high.safetensors", lora_arrays(TWO, seed=5))
    write_lora(folder / "low.safetensors", lora_arrays(TWO, seed=6))
    halves = lora_arrays(TWO, 5, "transformer."), lora_arrays(TWO, 6, "transformer_2.")
    write_lora(folder / "both.safetensors", halves[0] | halves[1])
    write_lora(folder / "second.safetensors", halves[1])
    return folder


@pytest.fixture(scope="module")
def plain(files):
    return lvjax.load(files / "model")


@pytest.fixture(scope="module")
def two(files):
    embeddings = load_embeddings(files / "two" / "prompts.safetensors", TWO.text_dim)
    return dataclasses.replace(lvjax.load(files / "two"), embeddings=embeddings)
