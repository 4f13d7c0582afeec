# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are no Wan model that lvjax can use: `CASES`, each a folder with what is wrong
with it, and the arguments of `lvjax convert`.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from lvjax.models.config import WAN_VAE_2_2_MEAN
from tests.checkpoints_convert.bad_files import Case
from tests.checkpoints_convert.tiny_checkpoints import draw, part_of, tiny, tokenizer, usual, write

DIT, BIG, I2V = "wan2.1-t2v-1.3b.official", "wan2.1-t2v-14b.official", "wan2.1-i2v-14b.official"
THEIRS, PAIR = "wan2.1-t2v-1.3b.diffusers", "wan2.2-t2v-a14b.official"
VAE, VAE_2_2, VAE_THEIRS = "wan2.1-vae.official", "wan2.2-vae.official", "wan2.1-vae.diffusers"
TEXT, CLIP = "umt5-xxl-encoder.transformers", "clip-vith14-vision.transformers"
PLACES = {"dit": "transformer", "vae": "vae", "text": "text_encoder", "image": "image_encoder"}

Change = Callable[[dict], dict]
Arrays = dict[str, np.ndarray]


@cache
def _drawn(name: str) -> Arrays:
    return draw(tiny(name)[0])


def same(arrays: Arrays) -> Arrays:
    return arrays


def case(
    title: str,
    says: str,
    changes: dict[str, Change],
    configs: dict[str, dict] | None = None,
    options: tuple[str, ...] = (),
    src: str = "src",
    after: Callable[[Path], None] = lambda folder: None,
) -> Case:
    """A folder of parts, each in a folder of its own.

    changes: by manifest, what is wrong with the arrays.  configs: a config.json beside them.
    options: of the command.  after: what is done to the folder in the end.
    """

    def make(folder: Path) -> Path:
        for name, change in changes.items():
            place = folder / "src" / PLACES[part_of(name)]
            stem, how = usual(name)
            own = {k: np.array(a, order="C") for k, a in change(dict(_drawn(name))).items()}
            write(own, place, stem, "file" if how == "pth" else how)
            if name in (configs or {}):
                (place / "config.json").write_text(json.dumps(configs[name]))
        after(folder / "src")
        if folder.joinpath("src").is_dir():
            (folder / "src" / "tokenizer.json").write_text(tokenizer())
        (folder / "arguments.json").write_text(json.dumps([src, *options]))
        return folder

    return Case(title, make, says)


def without(*words: str) -> Change:
    return lambda arrays: {k: a for k, a in arrays.items() if not any(w in k for w in words)}


def plus(**more) -> Change:
    return lambda arrays: arrays | {k: np.zeros(s, np.float32) for k, s in more.items()}


def at(key: str, change: Callable) -> Change:
    """One array changed."""
    return lambda arrays: arrays | {key: change(arrays[key])}


def every(change: Callable) -> Change:
    return lambda arrays: {key: change(a) for key, a in arrays.items()}


def put(value: float) -> Callable:
    def change(a):
        a = a.copy()
        a.reshape(-1)[-1] = value
        return a

    return change


def narrow(a: np.ndarray) -> np.ndarray:
    """Width 96 instead of 128."""
    return a[tuple(slice({128: 96, 768: 576}.get(n, n)) for n in a.shape)]


def renamed(old: str, new: str) -> Change:
    return lambda arrays: {k.replace(old, new): a for k, a in arrays.items()}


def quantised(dtype) -> Change:
    return lambda arrays: {k: a.astype(dtype) if a.ndim == 2 else a for k, a in arrays.items()}


def lora(arrays: Arrays) -> Arrays:
    key = "diffusion_model.blocks.0.self_attn.q"
    return {f"{key}.lora_{x}.weight": np.zeros((4, 4), np.float32) for x in "AB"}


def second_half_of(name: str) -> Change:
    """Half of the arrays under the names of the other side."""
    return lambda arrays: dict([*arrays.items()][::2]) | dict([*_drawn(name).items()][1::2])


def copied(folder: Path) -> None:
    for file in sorted((folder / "transformer").iterdir()):
        (folder / f"copy_{file.name}").write_bytes(file.read_bytes())


def one_expert(folder: Path) -> None:
    (folder / "transformer").rename(folder / "high_noise_model")


def cut(name: str, share: float) -> Callable[[Path], None]:
    def after(folder: Path) -> None:
        (file,) = folder.rglob(name)
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return after


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(name)).unlink()


SAID = {name: tiny(name)[1] for name in (DIT, BIG, THEIRS, TEXT, CLIP, VAE_THEIRS)}
Q, FFN = "blocks.1.self_attn.q.weight", "blocks.1.ffn.0.weight"
SHAPES, PLACE, MISSING = "have other shapes", "have no place in this model", "are missing"
MODEL = {DIT: same, VAE: same}  # what is whole


def on(name: str, change: Change) -> dict[str, Change]:
    """A whole model, with another part, or one changed."""
    return MODEL | {name: change}


CASES = [
    # an array that is not there, or one too many
    case(
        "a missing array",
        f"1 arrays {MISSING}: head/linear/bias",
        on(DIT, without("head.head.bias")),
    ),
    case("a layer without an array", "has layers [1]; some", on(DIT, without("blocks.0.ffn.2.b"))),
    case(
        "no first layer",
        "holds only some arrays of a diffusion transformer",
        on(DIT, without("blocks.0.")),
    ),
    case("a missing array of the autoencoder", MISSING, on(VAE, without("middle.1.proj.weight"))),
    case(
        "a missing array of the text encoder",
        "some are missing",
        on(TEXT, without("block.0.layer.1.DenseReluDense.wo")),
    ),
    case(
        "a missing array of the image encoder",
        MISSING,
        {I2V: same, VAE: same, CLIP: without("pre_layrnorm.bias")},
    ),
    case("image tokens without their norm", MISSING, {I2V: without("norm_k_img"), VAE: same}),
    case(
        "an array too many",
        f"1 arrays {PLACE}: blocks.0.extra.weight",
        on(DIT, plus(**{"blocks.0.extra.weight": (2,)})),
    ),
    case(
        "an array of another model",
        f"{PLACE}: img_emb.proj.7.bias",
        on(DIT, plus(**{"img_emb.proj.7.bias": (2,)})),
    ),
    case(
        "a layer too many",
        "layers [0, 1, 7]; some are missing",
        MODEL
        | {
            DIT: lambda a: (
                a
                | renamed("blocks.1.", "blocks.7.")(
                    {k: v for k, v in a.items() if k.startswith("blocks.1.")}
                )
            )
        },
    ),
    case(
        "a layer with a zero before its number", PLACE, on(DIT, renamed("blocks.1.", "blocks.01."))
    ),
    case(
        "layers missing in the middle",
        "some are missing",
        on(DIT, renamed("blocks.1.", "blocks.3.")),
    ),
    case(
        "half of it by other names",
        "the checkpoint has no head.head.weight",
        on(DIT, second_half_of(THEIRS)),
    ),
    # shapes
    case("a transposed array", f"1 arrays {SHAPES}: {FFN}", on(DIT, at(FFN, np.transpose))),
    case(
        "all matrices transposed",
        "condition_channels is -16",
        on(DIT, every(lambda a: a.T if a.ndim == 2 else a)),
    ),
    case(
        "a transposed convolution",
        SHAPES,
        on(VAE, at("encoder.downsamples.3.residual.2.weight", lambda a: a.swapaxes(0, 1))),
    ),
    case("a flat array", SHAPES, on(DIT, at(Q, np.ravel))),
    case(
        "a bias of another length",
        SHAPES,
        on(DIT, at("blocks.0.self_attn.q.bias", lambda a: a[:64])),
    ),
    case("an empty array", SHAPES, on(DIT, at("blocks.0.self_attn.q.bias", lambda a: a[:0]))),
    case(
        "patches as rows",
        "expected are 5 axes",
        on(DIT, at("patch_embedding.weight", lambda a: a.reshape(128, -1))),
    ),
    case(
        "a width without heads",
        "put its config.json, which tells the heads",
        on(DIT, every(narrow)),
    ),
    case(
        "no square of patches",
        "which is no square and one",
        {
            I2V: same,
            VAE: same,
            CLIP: at("vision_model.embeddings.position_embedding.weight", lambda a: a[:4]),
        },
    ),
    # values
    case("NaN", f"array '{FFN}' is not finite", on(DIT, at(FFN, put(np.nan)))),
    case("infinity", "is not finite", on(DIT, at("head.head.weight", put(-np.inf)))),
    case("NaN everywhere", "is not finite", on(DIT, every(lambda a: a * np.float32(np.nan)))),
    case(
        "NaN in the autoencoder", "'conv2.bias' is not finite", {VAE: at("conv2.bias", put(np.nan))}
    ),
    case(
        "the table of words is two",
        "must be equal and are not",
        {TEXT: at("shared.weight", put(9.0))},
    ),
    # types
    case(
        "fp8",
        "holds float8_e4m3fn arrays; lvjax reads weights in",
        on(DIT, quantised(ml_dtypes.float8_e4m3fn)),
    ),
    case("int8", "holds int8 arrays; lvjax reads weights in", on(DIT, quantised(np.int8))),
    case(
        "fp8 with scales",
        "scales of quantised weights",
        on(DIT, plus(**{"blocks.0.ffn.0.scale_weight": ()})),
    ),
    case("int8 text encoder", "holds int8 arrays", on(TEXT, quantised(np.int8))),
    case(
        "layers of two types",
        "use --dtype float32",
        on(DIT, at(Q, lambda a: a.astype(ml_dtypes.bfloat16))),
    ),
    case(
        "more than float16 holds",
        "more than float16 holds; use",
        {DIT: at(Q, put(1e6))},
        options=("--dtype", "float16"),
    ),
    # a config.json that says something else
    case(
        "config.json of the smaller model",
        "config.json says num_layers 30",
        {BIG: same, VAE: same},
        {BIG: SAID[BIG] | {"num_layers": 30}},
    ),
    case(
        "config.json of the smaller model, as deep",
        "config.json says ffn_dim 40, the arrays say 48",
        {BIG: same, VAE: same},
        {BIG: SAID[DIT]},
    ),
    case(
        "config.json of the larger model",
        "config.json says ffn_dim 48, the arrays say 40",
        MODEL,
        {DIT: SAID[BIG]},
    ),
    case(
        "heads that do not divide",
        "config.json says 3 heads",
        MODEL,
        {DIT: SAID[DIT] | {"num_heads": 3}},
    ),
    case(
        "heads of another width",
        "config.json says 2 heads of 128",
        {THEIRS: same, VAE: same},
        {THEIRS: SAID[THEIRS] | {"num_attention_heads": 2}},
    ),
    case(
        "heads of an odd width",
        "heads of an even width",
        MODEL,
        {DIT: SAID[DIT] | {"num_heads": 128}},
    ),
    case("heads in words", "are not those of a Wan model", MODEL, {DIT: {"num_heads": "twelve"}}),
    case("no heads", "are not those of a Wan model", MODEL, {DIT: {"num_heads": 0}}),
    case("an epsilon in words", "eps is 'small'", MODEL, {DIT: SAID[DIT] | {"eps": "small"}}),
    case(
        "another text width",
        "config.json says text_dim 4096",
        MODEL,
        {DIT: SAID[DIT] | {"text_dim": 4096}},
    ),
    case(
        "text heads",
        "config.json says num_heads 8, the arrays say 4",
        on(TEXT, same),
        {TEXT: SAID[TEXT] | {"num_heads": 8}},
    ),
    case(
        "another activation",
        "hidden_act 'quick_gelu', the arrays say 'gelu'",
        {I2V: same, VAE: same, CLIP: same},
        {CLIP: SAID[CLIP] | {"hidden_act": "quick_gelu"}},
    ),
    case(
        "statistics of another autoencoder",
        "config.json says latents_mean 48 values",
        {THEIRS: same, VAE_THEIRS: same},
        {
            VAE_THEIRS: SAID[VAE_THEIRS]
            | {"latents_mean": list(WAN_VAE_2_2_MEAN), "latents_std": [1.0] * 48}
        },
    ),
    case(
        "a deviation of 0",
        "config.json says latents_std",
        {THEIRS: same, VAE_THEIRS: same},
        {VAE_THEIRS: SAID[VAE_THEIRS] | {"latents_mean": [0.0] * 16, "latents_std": [0.0] * 16}},
    ),
    # parts that are not those of one model
    case(
        "the autoencoder of Wan 2.2",
        "gives 48 latent channels, the transformer takes 16",
        {DIT: same, VAE_2_2: same},
    ),
    case(
        "the transformer of Wan 2.2",
        "gives 16 latent channels, the transformer takes 48",
        {"wan2.2-ti2v-5b.official": same, VAE: same},
    ),
    case(
        "a narrower text encoder",
        "gives 16 numbers a token, the transformer takes 32",
        MODEL
        | {
            TEXT: lambda a: {
                k: v[:16]
                if v.shape[0] == 32 and ".o." in k or ".wo." in k or v.ndim == 1
                else v[..., :16]
                if v.shape[-1] == 32 and ".o." not in k and "bias" not in k
                else v
                for k, v in a.items()
            }
        },
    ),
    case("two transformers", "holds a diffusion transformer twice", MODEL, after=copied),
    case("one expert of two", "holds one expert of two", {PAIR: same, VAE: same}, after=one_expert),
    # the wrong thing
    case("a LoRA", "is a LoRA, or a file of", {DIT: lora}, src="src/transformer"),
    case(
        "differences of weights",
        "weight differences: give it with --lora",
        {DIT: renamed(".weight", ".diff")},
    ),
    case(
        "a VACE model",
        "is a VACE model",
        on(DIT, plus(**{"vace_blocks.0.x": (1,)})),
        src="src/transformer",
    ),
    case(
        "another kind of model",
        "is neither a diffusion transformer nor",
        {DIT: renamed("blocks", "layers")},
    ),
    case(
        "--part of something else",
        "is a diffusion transformer; leave --part vae out",
        {DIT: same},
        options=("--part", "vae"),
        src="src/transformer/diffusion_pytorch_model.safetensors",
    ),
    case("--part that is not there", "holds no part 'text'", MODEL, options=("--part", "text")),
    case(
        "--part that is damaged",
        "cut short or damaged",
        MODEL,
        options=("--part", "vae"),
        after=cut("Wan2.1_VAE*", 0.9),
    ),
    # files
    case("a part cut short", "cut short or damaged", MODEL, after=cut("Wan2.1_VAE*", 0.99)),
    case(
        "a shard cut short",
        "cut short or damaged",
        {BIG: same, VAE: same},
        after=cut("*-00002-of-*", 0.5),
    ),
    case("a shard that is gone", "cannot read", {BIG: same, VAE: same}, after=gone("*-00002-of-*")),
    case(
        "shards without their index",
        "holds only some arrays of a diffusion transformer; give all of it",
        {BIG: same, VAE: same},
        after=gone("*.index.json"),
    ),
    case("an empty file", "is empty", MODEL, after=cut("Wan2.1_VAE*", 0)),
    case(
        "an empty folder", "holds no part of a Wan model", {}, after=lambda folder: folder.mkdir()
    ),
]
