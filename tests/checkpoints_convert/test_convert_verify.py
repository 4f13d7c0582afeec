# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert --verify`: what a part computes is noted, compared when asked for again, and is
what the models compute when they are called as a whole.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.cli.main import main
from lvjax.core.checkpoint import Stored, save_arrays
from lvjax.core.params import unflatten
from lvjax.models import umt5
from lvjax.models.dit import dit, embed_context
from lvjax.models.image_encoder import encode_image
from lvjax.models.parts import stored_part
from lvjax.run import fingerprint
from tests.checkpoints_convert.tiny_checkpoints import draw, family, opened, tiny, usual, write
from tests.tiny import relative

# What is run layer by layer, and CLIP; an autoencoder is run by its own functions.
PARTS = (
    "wan2.1-flf2v-14b.official",  # which has everything that a transformer can have
    "umt5-xxl-encoder.official",
    "clip-xlmr-vith14.official",
)


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def part(tmp_path, name, dtype="mixed", *options) -> tuple[Stored, str]:
    src = write(draw(tiny(name)[0], dtype), tmp_path / "src", *usual(name))
    assert convert(src, tmp_path / "dst", *options) == 0
    (report,) = (tmp_path / "dst").glob("*.report.json")
    return opened(tmp_path / "dst", kind := report.name.split(".")[0]), kind


def whole(stored: Stored, kind: str) -> np.ndarray:
    """The same run with all weights in memory and the models' own functions."""
    cfg = dataclasses.replace(stored_part(stored)[1], dtype="float32")
    params = unflatten({k: jnp.asarray(stored[k].astype(np.float32)) for k in stored})
    rng = np.random.default_rng(0)
    if kind == "dit":
        given = fingerprint.dit_inputs(cfg)

        @jax.jit
        def run(params, given):
            context = embed_context(params, given["text"], cfg, given["image"])
            x, condition = given["latents"], given["condition"]
            return dit(params, x, given["timestep"], context, cfg, condition=condition)[0]

        return run(params, given)
    if kind == "text":
        ids = fingerprint.text_ids(cfg)
        run = jax.jit(umt5.encode_text, static_argnames="cfg")
        return run(params, ids, np.ones(ids.shape, bool), cfg=cfg)
    pixels = rng.standard_normal((1, cfg.size, cfg.size, cfg.channels)).astype(np.float32)
    return jax.jit(encode_image, static_argnames="cfg")(params, pixels, cfg=cfg)


@pytest.mark.parametrize("name", PARTS)
def test_it_is_what_the_model_computes(tmp_path, name):
    stored, kind = part(tmp_path, name)
    cfg = dataclasses.replace(stored_part(stored)[1], dtype="float32")
    found, wanted = fingerprint.RUNS[kind](stored, cfg), np.asarray(whole(stored, kind))
    assert found.std() > 1e-3 and relative(found.reshape(-1), wanted.reshape(-1)) < 1e-5
    numbers = fingerprint.fingerprint(stored)
    assert len(numbers) == 16 and len(set(numbers)) == 16 and np.isfinite(numbers).all()


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b.official", "umt5-xxl-encoder.official"])
def test_one_layer_is_read_at_a_time(tmp_path, name, monkeypatch):
    stored, kind = part(tmp_path, name, "mixed")
    read = []
    layer, array = Stored.layer, Stored.__getitem__

    def note_layer(self, name, index):
        read.append((name, index))
        return layer(self, name, index)

    def note_array(self, name):
        read.append((name, None))
        return array(self, name)

    monkeypatch.setattr(Stored, "layer", note_layer)
    monkeypatch.setattr(Stored, "__getitem__", note_array)
    fingerprint.fingerprint(stored)
    stacked = [i for n, i in read if n.startswith("blocks/")]
    assert None not in stacked and stacked == sorted(stacked) and set(stacked) == {0, 1}
    assert ("embedding", None) not in read


@pytest.mark.parametrize("fmt", ["safetensors", "orbax"])
def test_noted_and_compared(tmp_path, fmt, capsys):
    """Both experts and all kinds of parts; the next run finds the same."""
    noted = {}
    for model in ("wan2.2-i2v-a14b", "wan2.1-i2v-14b"):
        src, dst = family(tmp_path, model, "official"), tmp_path / f"{model}.dst"
        assert convert(src, dst, "--format", fmt) == 0
        reports = {p.name.split(".")[0]: p for p in dst.glob("*.report.json")}
        before = {k: json.loads(p.read_text()) for k, p in reports.items()}
        assert convert(src, dst, "--format", fmt, "--verify") == 0
        after = {k: json.loads(p.read_text()) for k, p in reports.items()}
        for kind, facts in after.items():
            assert len(facts["fingerprint"]) == 16
            assert {k: v for k, v in facts.items() if k != "fingerprint"} == before[kind]
        assert convert(src, dst, "--format", fmt, "--verify") == 0
        assert {k: json.loads(p.read_text()) for k, p in reports.items()} == after
        noted |= {(model, kind): facts["fingerprint"] for kind, facts in after.items()}
    kinds = {kind for _, kind in noted}
    assert kinds == {"dit", "dit_low", "vae", "text", "image"}
    one, two = (noted["wan2.2-i2v-a14b", kind] for kind in ("dit", "dit_low"))
    assert relative(one, two) > 0.1


def changed(dst, kind: str, name: str, change, report: bool) -> None:
    """Change one weight of a part, with the right checksums in the part, and in its report."""
    path = dst / f"{kind}.safetensors"
    stored = opened(dst, kind)
    arrays, meta = {k: np.array(stored[k]) for k in stored}, stored.meta
    flat = arrays[name].reshape(-1)
    flat[flat.size // 2] = change(flat[flat.size // 2])
    save_arrays(path, arrays, meta)
    if report:
        facts = json.loads((dst / f"{kind}.report.json").read_text())
        facts["arrays"][name]["crc32"] = f"{opened(dst, kind).slots[name].crc:08x}"
        (dst / f"{kind}.report.json").write_text(json.dumps(facts))


CHANGES = {
    "wan2.1-t2v-1.3b.official": ("dit", "blocks/self_attn/v/bias", "head/linear/bias"),
    "wan2.1-vae.official": ("vae", "encoder/mid/attn/norm", "post_quant/bias"),
    "umt5-xxl-encoder.official": ("text", "blocks/norm2", "norm", "blocks/attn/relative_bias"),
    "clip-xlmr-vith14.official": ("image", "pre_norm/bias", "class_embedding"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_weight(tmp_path, name, capsys):
    """One number, one larger; every checksum was made to fit."""
    src = write(draw(tiny(name)[0], "float32"), tmp_path / "src", *usual(name))
    assert convert(src, tmp_path / "good", "--verify") == 0
    kind, *paths = CHANGES[name]
    for i, path in enumerate(paths):
        dst = tmp_path / str(i)
        for report, code, says in (
            (False, 2, "is not of this conversion"),
            (True, 3, "computes something else than when it was converted"),
        ):
            shutil.rmtree(dst, ignore_errors=True)
            shutil.copytree(tmp_path / "good", dst)
            changed(dst, kind, path, lambda x: x + 1, report)
            capsys.readouterr()
            assert convert(src, dst, "--verify") == code, path
            err = capsys.readouterr().err
            assert says in err and err.count("\n") == 1
        noted = json.loads((dst / f"{kind}.report.json").read_text())["fingerprint"]
        good = json.loads((tmp_path / "good" / f"{kind}.report.json").read_text())["fingerprint"]
        assert noted == good  # what was computed now is not taken over
        assert convert(src, dst, "--verify", "--overwrite") in (0, 3)


def test_what_it_computes_must_be_finite(tmp_path, capsys):
    name = "wan2.1-t2v-1.3b.official"
    own = draw(tiny(name)[0])
    own["head.head.weight"] *= np.float32(3e38)
    src = write(own, tmp_path / "src", *usual(name))
    assert convert(src, tmp_path / "dst", "--verify") == 3
    assert "what it computes is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("noted", [[1.0, 2.0], ["a"] * 16, "x", {}])
def test_a_fingerprint_that_is_none(tmp_path, noted, capsys):
    """In a report that somebody has changed: one line, and no traceback."""
    name = "wan2.1-vae.official"
    src = write(draw(tiny(name)[0]), tmp_path / "src", *usual(name))
    assert convert(src, tmp_path / "dst") == 0
    report = tmp_path / "dst" / "vae.report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"fingerprint": noted}))
    capsys.readouterr()
    assert convert(src, tmp_path / "dst", "--verify") == 3
    err = capsys.readouterr().err
    assert "fingerprint" in err and err.count("\n") == 1


@pytest.mark.parametrize("lost", ["naming", "parameters", "config", "used"])
def test_a_report_that_lacks_something_is_written_again(tmp_path, lost):
    name = "wan2.1-vae.official"
    src = write(draw(tiny(name)[0]), tmp_path / "src", *usual(name))
    assert convert(src, tmp_path / "dst", "--verify") == 0
    report = tmp_path / "dst" / "vae.report.json"
    good = json.loads(report.read_text())
    bad = json.loads(report.read_text())
    del (bad["source"] if lost == "used" else bad)[lost]
    report.write_text(json.dumps(bad))
    before = (tmp_path / "dst" / "vae.safetensors").stat().st_mtime_ns
    assert convert(src, tmp_path / "dst") == 0 and json.loads(report.read_text()) == good
    assert (tmp_path / "dst" / "vae.safetensors").stat().st_mtime_ns == before
