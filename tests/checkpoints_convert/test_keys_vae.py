# SPDX-License-Identifier: Apache-2.0
"""Key maps of autoencoders of full size, and sizes read from names, shapes and config.json."""

from functools import cache

import pytest
import torch

from checkpoints_convert.keys_vae import vae_config, vae_layout, vae_rules
from checkpoints_convert.rules import make_plan, sources_of
from lvjax.core.errors import CheckpointError
from lvjax.models.config import WAN_VAE_2_1, WAN_VAE_2_2, VAEConfig
from lvjax.models.vae import vae_spec
from tests.parity.vae_oracle import build, official_name

PUBLISHED = {"2.1": (WAN_VAE_2_1, 194), "2.2": (WAN_VAE_2_2, 196)}
OTHER = VAEConfig(
    base=8,
    z=3,
    dim_mult=(2, 4, 4),
    res_blocks=1,
    temporal_down=(True, False),
    patch=2,
    mean=(0.0, 0.5, -1.0),
    std=(1.0, 2.0, 0.5),
    decoder_base=12,
    residual=True,
)


@cache
def described(cfg, layout):
    """Names and shapes of diffusers' model, without its arrays, and its config.json."""
    with torch.device("meta"):
        model = build(cfg)
    names = (lambda name: name) if layout == "diffusers" else (lambda n: official_name(n, cfg))
    shapes = {names(name): tuple(a.shape) for name, a in model.state_dict().items()}
    return shapes, {k: v for k, v in model.config.items() if not k.startswith("_")}


layouts = pytest.mark.parametrize("layout", ["diffusers", "official"])


@layouts
@pytest.mark.parametrize("version", PUBLISHED)
def test_a_published_autoencoder_is_known_by_its_shapes(version, layout):
    cfg, count = PUBLISHED[version]
    shapes, config = described(cfg, layout)
    assert vae_layout(shapes) == layout and len(shapes) == count
    assert vae_config(shapes, layout, {}) == cfg
    assert vae_config(shapes, layout, config) == cfg
    rules, spec = vae_rules(cfg, layout), vae_spec(cfg)
    plan = make_plan(shapes, rules, spec)
    assert sum(len(place.sources) for place in plan.places) == count
    assert plan.unused == plan.copies == ()
    assert sources_of(rules, spec).keys() == shapes.keys()


def test_an_autoencoder_of_other_sizes():
    shapes, config = described(OTHER, "diffusers")
    assert vae_config(shapes, "diffusers", config) == OTHER
    make_plan(shapes, vae_rules(OTHER, "diffusers"), vae_spec(OTHER))
    with pytest.raises(CheckpointError, match="3 latent channels .* put its config.json"):
        vae_config(shapes, "diffusers", {})


@pytest.mark.parametrize(
    ("name", "said", "held"),
    [
        ("base_dim", 96, "160"),
        ("decoder_base_dim", 160, "256"),
        ("z_dim", 16, "48"),
        ("dim_mult", [1, 2, 4], "[1, 2, 4, 4]"),
        ("num_res_blocks", 3, "2"),
        ("temperal_downsample", [True, True, False], "[False, True, True]"),
        ("is_residual", False, "True"),
        ("patch_size", 1, "2"),
        ("in_channels", 3, "12"),
        ("out_channels", 3, "12"),
    ],
)
def test_a_config_that_contradicts_the_arrays(name, said, held):
    shapes, config = described(WAN_VAE_2_2, "diffusers")
    with pytest.raises(CheckpointError) as e:
        vae_config(shapes, "diffusers", config | {name: said})
    assert name in str(e.value) and repr(said) in str(e.value) and held in str(e.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latents_std": None}, "latents_std None, the arrays have 48"),
        ({"latents_mean": [0.0] * 16}, "latents_mean 16 values, the arrays have 48"),
        ({"latents_std": [0.0] * 48}, "give 48 numbers above 0"),
        ({"latents_mean": [float("nan")] * 48}, "latents_mean 48 values"),
        ({"latents_mean": ["0.1"] * 48}, "latents_mean 48 values"),
        ({"latents_mean": "mean"}, "latents_mean 'mean'"),
    ],
)
def test_statistics_that_cannot_be_used(change, says):
    shapes, config = described(WAN_VAE_2_2, "diffusers")
    with pytest.raises(CheckpointError, match=says):
        vae_config(shapes, "diffusers", config | change)


RESNET = "encoder.down_blocks.1.resnets.1.conv1.weight"


@layouts
@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("encoder.conv_in.weight", None, "the checkpoint has no encoder"),
        ("encoder.conv_in.weight", (160, 12, 3, 3), "expected are 5 axes"),
        ("encoder.conv_in.weight", (160, 9, 3, 3, 3), "9 input channels"),
        ("encoder.conv_in.weight", (150, 12, 3, 3, 3), "multiples of the 150"),
        ("encoder.conv_in.weight", (0, 12, 3, 3, 3), "multiples of the 0"),
        ("decoder.conv_in.weight", (1023, 48, 3, 3, 3), "a decoder of 1023 to 12 channels"),
        ("decoder.conv_out.weight", (3, 256, 3, 3, 3), "to 3 channels"),
        (RESNET, None, r"stages have \[2, 1"),
        (RESNET, (0, 320, 3, 3, 3), "multiples of the 160"),
        (RESNET, (480, 320, 3, 3, 3), r"VAEConfig.dim_mult is \(1, 3, 4, 4\)"),
    ],
)
def test_arrays_that_do_not_fit_together(layout, name, shape, says):
    shapes = dict(described(WAN_VAE_2_2, layout)[0])
    name = name if layout == "diffusers" else official_name(name, WAN_VAE_2_2)
    del shapes[name]
    if shape is not None:
        shapes[name] = shape
    with pytest.raises(CheckpointError, match=says):
        vae_config(shapes, layout, {})


def test_what_is_no_autoencoder():
    assert vae_layout({"blocks.0.attn1.to_q.weight": (4, 4)}) is None
    # Stable Diffusion's, of pictures, has other norms
    assert vae_layout({f"{c}.conv_norm_out.weight": (4,) for c in ("encoder", "decoder")}) is None
