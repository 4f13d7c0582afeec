# SPDX-License-Identifier: Apache-2.0
"""Key maps of the text and the image encoder on the names and shapes of the released files."""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints_convert.keys_clip import clip_config, clip_layout, clip_rules
from checkpoints_convert.keys_umt5 import umt5_config, umt5_layout, umt5_rules
from checkpoints_convert.rules import make_plan, source_array, sources_of
from lvjax.core.errors import CheckpointError
from lvjax.core.mesh import partition
from lvjax.core.params import flatten
from lvjax.models.image_encoder import ImageEncoderConfig, image_encoder_spec
from lvjax.models.umt5 import UMT5Config, umt5_spec
from tests.checkpoints_convert.in_memory import convert

MANIFESTS = Path(__file__).parent / "manifests"
UMT5 = (umt5_layout, umt5_config, lambda names, layout, cfg: umt5_rules(names, layout), umt5_spec)
CLIP = (clip_layout, clip_config, clip_rules, image_encoder_spec)
RELEASED = {  # manifest: (functions, naming, the sizes that must be found)
    "umt5-xxl-encoder.official": (UMT5, "official", UMT5Config()),
    "umt5-xxl-encoder.transformers": (UMT5, "transformers", UMT5Config()),
    "clip-xlmr-vith14.official": (CLIP, "official", ImageEncoderConfig(projection_dim=1024)),
    "clip-vith14-vision.transformers": (
        CLIP,
        "transformers",
        ImageEncoderConfig(projection_dim=1024),
    ),
}
SMALL = UMT5Config(16, 8, 4, 2, 12, 2, num_buckets=8, max_distance=9)


def manifest(name):
    """(shapes by name, what config.json says) of a released checkpoint."""
    facts = json.loads((MANIFESTS / f"{name}.json").read_text())
    shapes = dict(facts["tensors"])
    for group in facts["repeated"]:
        for i in range(group["layers"]):
            prefix = group["prefix"].replace("{i}", str(i))
            shapes |= {prefix + key: shape for key, shape in group["per_layer"].items()}
    assert len(shapes) == facts["n_tensors"]
    return {key: tuple(shape) for key, shape in shapes.items()}, facts["config"]


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_array_has_its_place(name):
    (layout, config, rules, spec), naming, cfg = RELEASED[name]
    shapes, said = manifest(name)
    assert layout(shapes) == naming
    assert config(shapes, said) == cfg == config(shapes, {})
    plan = make_plan(shapes, rules(shapes, naming, cfg), spec(cfg))
    used = {source for place in plan.places for source in place.sources}
    rest = set(plan.unused) | {copy for copy, _ in plan.copies}
    assert used | rest == shapes.keys() and not used & rest
    assert rest == {k for k in shapes if k.startswith(("textual.", "log_scale", "encoder.embed"))}
    assert sources_of(rules(shapes, naming, cfg), spec(cfg)).keys() == used


@pytest.mark.parametrize("name", RELEASED)
def test_an_array_more_or_less_is_refused(name):
    (_, _, rules, spec), naming, cfg = RELEASED[name]
    shapes, _ = manifest(name)
    more = shapes | {"visual.transformer.0.attn.norm.weight": (4,)}
    with pytest.raises(CheckpointError, match="1 arrays have no place"):
        make_plan(more, rules(more, naming, cfg), spec(cfg))
    key = next(k for k in shapes if ".7." in k and "textual" not in k)
    with pytest.raises(CheckpointError, match="some are missing"):
        make_plan(
            {k: v for k, v in shapes.items() if k != key}, rules(shapes, naming, cfg), spec(cfg)
        )


def text_arrays(**more):
    """A small text encoder by transformers' names, and arrays beside it."""
    spec, rng = umt5_spec(SMALL), np.random.default_rng(0)
    flat = {path: rng.normal(size=p.shape) for path, p in flatten(spec).items()}
    arrays = {
        name: source_array(rule, layer, lambda p, i: flat[p] if i is None else flat[p][i])
        for name, (rule, layer) in sources_of(umt5_rules((), "transformers"), spec).items()
    }
    return arrays | more


@pytest.mark.parametrize("found", ("first", "second", "both"))
def test_the_table_of_words_under_either_name(found):
    arrays = text_arrays(spiece_model=np.zeros(9, np.uint8))
    words = arrays["shared.weight"]
    if found != "first":
        arrays["encoder.embed_tokens.weight"] = words.copy()
    if found == "second":
        del arrays["shared.weight"]
    assert umt5_layout(arrays) == "transformers"
    rules = umt5_rules(arrays, "transformers")
    np.testing.assert_array_equal(convert(arrays, rules, umt5_spec(SMALL))["embedding"], words)


def test_sizes_of_a_text_encoder():
    shapes = {k: a.shape for k, a in text_arrays().items()}
    said = {"relative_attention_max_distance": 9, "layer_norm_epsilon": 1e-6, "d_model": 8}
    assert umt5_config(shapes, said) == SMALL

    def refused(says, shapes=shapes, **said):
        with pytest.raises(CheckpointError, match=says):
            umt5_config(shapes, said)

    refused("config.json says num_heads 4, the arrays say 2", num_heads=4)
    refused("feed_forward_proj 'relu', the arrays say 'gated-gelu'", feed_forward_proj="relu")
    refused("has no shared.weight", {k: v for k, v in shapes.items() if k != "shared.weight"})
    refused(r"shape \[8\]; expected are 2 axes", shapes | {"shared.weight": (8,)})
    assert umt5_layout({"shared.weight": 0}) is None is clip_layout({"visual.head": 0})
    with pytest.raises(ValueError, match="layout='diffusers'"):
        umt5_rules((), "diffusers")
    with pytest.raises(ValueError, match="layout='diffusers'"):
        clip_rules((), "diffusers", ImageEncoderConfig())


def test_sizes_of_an_image_encoder():
    shapes, said = manifest("clip-vith14-vision.transformers")

    def refused(says, shapes=shapes, **changed):
        with pytest.raises(CheckpointError, match=says):
            clip_config(shapes, said | changed)

    refused("hidden_act 'quick_gelu', the arrays say 'gelu'", hidden_act="quick_gelu")
    refused("image_size 336, the arrays say 224", image_size=336)
    place = "vision_model.embeddings.position_embedding.weight"
    refused("has 258 rows, which is no square and one", shapes | {place: (258, 1280)})
    found = clip_config(shapes, said | {"num_attention_heads": 8})
    assert found.num_heads == 8


def test_every_axis_has_a_place_on_the_mesh():
    for spec in (umt5_spec(SMALL), image_encoder_spec(ImageEncoderConfig(projection_dim=3))):
        for p in flatten(spec).values():
            assert len(partition(p.axes)) == len(p.shape)
