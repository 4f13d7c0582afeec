# SPDX-License-Identifier: Apache-2.0
"""Inter-clip causal attention in training: the same as one long sequence with a mask, no gradient
to the clips that are remembered, and given frames at either end.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.kernels import attention_reference
from lvjax.models import dit_block
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.models.lora import adapters, lora_spec, within
from lvjax.nn.rope import grid_table
from lvjax.rollout.condition import MASK, condition, frame_mask
from lvjax.train import extension
from lvjax.train.extension import ExtensionTask, condition_of, draw_given, extension_loss
from lvjax.train.state import TrainOptions, init_state, make_optimizer, make_step, split
from tests.drawn import drawn
from tests.tiny import DIT, relative

K, T, SIDE = 3, 4, 4
LAYERS = (1, 2)
TASK = ExtensionTask(given=(1.0,), memory_layers=LAYERS, trained=K, forget=0.0, drop_text=0.0)
ALL, SOME = np.tri(K, k=-1, dtype=bool), np.zeros((K, K), bool)
SOME[2, 0] = SOME[1, 0] = True  # clip 2 sees the first, and not the second


def embeddings(params, rows):
    return rows


def params(seed=0):
    tree = drawn(dit_spec(DIT), seed)
    tree["head"]["linear"] = drawn(dit_spec(replace(DIT, dim=32))["blocks"]["ffn"], 1)["fc1"] | {
        "kernel": 0.1 * np.random.default_rng(3).standard_normal((32, 16)).astype(np.float32),
        "bias": np.zeros(16, np.float32),
    }
    tree["condition_embedding"]["kernel"] = jnp.asarray(
        0.1 * np.random.default_rng(4).standard_normal((20, 32)), jnp.float32
    )
    return {"dit": tree}


def batch(visible=ALL, rows=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((rows, K, T, SIDE, SIDE, 16)).astype(np.float32),
        "text": rng.standard_normal((rows, K, 5, 16)).astype(np.float32),
        "null": np.zeros((rows, 5, 16), np.float32),
        "least": np.zeros((rows, K), np.int32),
        "frame": np.tile(np.arange(K) * 3, (rows, 1)).astype(np.int32),
        "given": np.tile([0, 1, 1], (rows, 1)).astype(np.int32),
        "visible": np.tile(visible, (rows, 1, 1)),
    }


def brute_force(p, given, noisy, sigma, monkeypatch):
    """All clips, clean and noisy, as one sequence with one mask: [clean 0..K-1, noisy 0..K-1].

    Velocities [B, K, T, h, w, C] of the noisy ones.  Layers without memory keep each clip to
    itself; there and in cross-attention and modulation each clip has its own text and timestep.
    """
    b = len(given["latents"])
    tokens = T * SIDE * SIDE
    clean = jnp.asarray(given["latents"])
    both = jnp.concatenate([clean, noisy], axis=1).reshape(b, 2 * K * T, SIDE, SIDE, 16)
    known = [
        condition_of(clean[:, i], jnp.asarray(given["given"][:, i]), "latent") for i in range(K)
    ]
    known += [condition_of(clean[:, i], jnp.zeros(b, jnp.int32), "latent") for i in range(K)]
    times = jnp.repeat(
        jnp.concatenate([jnp.zeros((b, K)), jnp.tile(1000 * sigma[:, :, None], 1)[..., 0]], axis=1),
        T, axis=1,
    )  # fmt: skip
    frames = (given["frame"][0][:, None] + np.arange(T)).reshape(-1)
    table = grid_table(np.concatenate([frames, frames]), SIDE, SIDE, DIT.head_dim)

    who = np.repeat(np.arange(2 * K), tokens)
    own = np.equal.outer(who, who)
    seen = np.zeros((2 * K, 2 * K), bool)
    seen[:K, :K] = seen[K:, :K] = given["visible"][0]
    later = own | seen[who][:, who]
    masks = iter([own, later])

    def cross(p, x, context, cfg):
        parts = [
            original(p, part, jax.tree.map(lambda a, i=i: a[i % K], context), cfg)
            for i, part in enumerate(jnp.split(x, 2 * K, axis=1))
        ]
        return jnp.concatenate(parts, axis=1)

    def attend(q, k, v, mask=None):
        if k.shape[1] == len(who):
            mask = jnp.asarray(next(masks))[None, None]
        return attention_reference.attend_reference(q, k, v, mask)

    original = dit_block.cross_attention
    contexts = [embed_context(p["dit"], given["text"][:, i], DIT) for i in range(K)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a, axis=1), *contexts)
    with monkeypatch.context() as patch:
        patch.setattr(dit_block, "attend", attend)
        patch.setattr(dit_block, "cross_attention", cross)
        # without the loop over layers, so that each has its own mask
        patch.setattr(jax.lax, "scan", unrolled)
        patch.setattr(jax, "checkpoint", lambda f, **_: f)  # it would trace all layers as one
        v, _, _ = dit(p["dit"], both, times, stacked, DIT,
                      condition=jnp.concatenate(known, axis=1), rotation=table)  # fmt: skip
    return v.reshape(b, 2 * K, T, SIDE, SIDE, 16)[:, K:]


def unrolled(f, carry, xs, length=None, **_):
    outs = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, out = f(carry, jax.tree.map(lambda a, i=i: a[i], xs))
        outs.append(out)
    return carry, None if outs[0] is None else jax.tree.map(lambda *a: jnp.stack(a), *outs)


@pytest.mark.parametrize("visible", [ALL, SOME], ids=["all", "some"])
def test_the_loss_is_that_of_one_long_sequence_with_a_mask(monkeypatch, visible):
    p, given, seen = params(), batch(visible), {}

    def noted(params, x, timestep, *args, **kwargs):
        found = dit(params, x, timestep, *args, **kwargs)
        if len(jax.typeof(timestep).shape) == 1 and kwargs.get("remat") is False:
            jax.debug.callback(lambda *a: seen.setdefault(len(seen), a), x, timestep, found[0])
        return found

    monkeypatch.setattr(extension, "dit", noted)
    value = extension_loss(DIT, embeddings, TASK)(p, given, jax.random.key(1))[0]
    jax.effects_barrier()
    assert len(seen) == K and np.isfinite(value)
    x, times, v = (np.stack([seen[i][j] for i in range(K)], axis=1) for j in range(3))
    wanted = brute_force(p, given, jnp.asarray(x), jnp.asarray(times) / 1000, monkeypatch)
    assert relative(v, wanted) < 1e-5
    other = brute_force(p, given | {"visible": np.zeros_like(given["visible"])}, jnp.asarray(x),
                        jnp.asarray(times) / 1000, monkeypatch)  # fmt: skip
    assert relative(v[:, 1:], other[:, 1:]) > 1e-2 and relative(v[:, :1], other[:, :1]) < 1e-5


def test_no_gradient_reaches_what_is_remembered():
    p, given, task = params(), batch(), replace(TASK, trained=1)

    def value(latents, task, scale=1.0):
        rows = given | {"latents": latents}
        return extension_loss(DIT, embeddings, task)(p, rows, jax.random.key(1))[0]

    latents = jnp.asarray(given["latents"])
    found, grads = jax.jit(jax.value_and_grad(value), static_argnums=1)(latents, task)
    assert grads[:, -1].any() and not grads[:, :-1].any()
    assert found != value(latents.at[:, 0].multiply(2), task)
    forgotten = [value(latents.at[:, 0].multiply(s), replace(task, forget=1.0)) for s in (1, 2)]
    assert forgotten[0] == forgotten[1]


@pytest.mark.long
def test_remat_changes_nothing():
    p, given = params(), batch()
    values = [
        jax.jit(jax.value_and_grad(
            lambda p, r=r: extension_loss(DIT, embeddings, replace(TASK, remat=r))(
                p, given, jax.random.key(1))[0]))(p)
        for r in (False, True)
    ]  # fmt: skip
    (a, ga), (b, gb) = values
    assert relative(a, b) < 1e-6
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_untrained_adapters_change_nothing_and_alone_are_trained():
    spec = lora_spec(dit_spec(DIT), ["blocks/self_attn/k", "blocks/self_attn/v"], rank=4)
    base = params()
    new = drawn(adapters(spec), 5)
    both = {"dit": jax.tree.map(lambda a: a, base["dit"])}
    attention = both["dit"]["blocks"]["self_attn"]
    for name, more in new["blocks"]["self_attn"].items():
        attention[name] = attention[name] | more
    both["dit"] = within(both["dit"], range(*LAYERS))
    loss = extension_loss(DIT, embeddings, TASK)
    assert loss(base, batch(), jax.random.key(1))[0] == loss(both, batch(), jax.random.key(1))[0]
    paths = [f"dit/{path}" for path in base["dit"] if path != "blocks"]
    paths += [f"dit/blocks/{path}" for path in base["dit"]["blocks"] if path != "self_attn"]
    for name, leaf in both["dit"]["blocks"]["self_attn"].items():
        linear = isinstance(leaf, dict)
        names = [f"{name}/{n}" for n in leaf if n != "lora"] if linear else [name]
        names += [f"{name}/lora/scale"] if linear and "lora" in leaf else []
        paths += [f"dit/blocks/self_attn/{n}" for n in names]
    trained, fixed = split(both, paths)
    assert {k.split("/")[-1] for k in extension_names(trained)} == {"a", "b"}
    o = TrainOptions(5, 1e-2, 1)
    step, state = make_step(loss, make_optimizer(o), o), init_state(trained, make_optimizer(o))
    losses = []
    for _ in range(3):
        state, metrics = step(state, fixed, batch())
        losses.append(float(metrics["loss"]))
    b = state.params["dit"]["blocks"]["self_attn"]["k"]["lora"]["b"]
    assert b[1].any() and not b[0].any()  # only in the layers with memory


def extension_names(tree):
    return [jax.tree_util.keystr(p, simple=True, separator="/")
            for p, _ in jax.tree_util.tree_leaves_with_path(tree)]  # fmt: skip


@pytest.mark.parametrize("last", range(4))
@pytest.mark.parametrize("first", (0, 1))
def test_frames_given_at_either_end(first, last):
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((1, 6, 2, 2, 16)), jnp.float32)
    tails = jnp.asarray(rng.standard_normal((1, 3, 3, 2, 2, 16)), jnp.float32)
    one = (jnp.array([n], jnp.int32) for n in (first, last))
    first_given, last_given = one
    made = condition_of(z, first_given, "latent", last=last_given, tails=tails)[0]
    pixels = np.zeros(21, bool)
    pixels[: 1 if first else 0] = True
    if last:
        pixels[-(1 + 4 * (last - 1)) :] = True
    mask = np.concatenate([pixels[:1].repeat(4), pixels[1:]]).reshape(-1, MASK)
    np.testing.assert_array_equal(
        made[..., :MASK], np.broadcast_to(mask[:, None, None], (6, 2, 2, 4))
    )
    wanted = np.zeros((6, 2, 2, 16), np.float32)
    wanted[:first] = z[0, :first]
    if last:
        wanted[-last:] = tails[0, last - 1, :last]
    np.testing.assert_array_equal(made[..., MASK:], wanted)
    if last == 1:
        np.testing.assert_array_equal(mask, frame_mask(6, first, last=True))


def test_a_picture_to_end_with_is_masked_as_in_sampling():
    z = jnp.zeros((1, 3, 2, 2, 16))
    tail = jnp.zeros((1, 1, 1, 2, 2, 16))
    one = jnp.ones((1,), jnp.int32)
    trained = condition_of(z, one, "latent", last=one, tails=tail)
    frames = jnp.zeros((1, 1, 16, 16, 3))
    sampled = condition(lambda x: z, frames, z.shape, "pixel", last=frames[:, 0])
    np.testing.assert_array_equal(trained[..., :MASK], sampled[..., :MASK])


def test_where_frames_are_given_follows_the_shares():
    task = ExtensionTask(given=(0.1, 0.3, 0.3, 0.3), last=0.1, both=0.2)
    first, last = draw_given(jax.random.key(0), task, jnp.zeros(20_000, jnp.int32), 6)
    start, end = first > 0, last > 0
    shares = [np.mean(x) for x in (start & ~end, ~start & end, start & end, ~start & ~end)]
    np.testing.assert_allclose(shares, [0.63, 0.09, 0.18, 0.1], atol=0.01)
    first, last = draw_given(jax.random.key(0), task, jnp.full(1000, 2, jnp.int32), 6)
    assert first.min() == 2 and not last.any()
    ends = replace(task, last=0.0, both=1.0)
    first, last = draw_given(jax.random.key(0), ends, jnp.zeros(1000, jnp.int32), 5)
    assert set(zip(first.tolist(), last.tolist(), strict=True)) == {(0, 0), (1, 1), (2, 2), (3, 2)}


def test_the_noise_is_on_what_is_given_at_either_end():
    rng = np.random.default_rng(0)
    z, noise = (jnp.asarray(rng.standard_normal((1, 5, 2, 2, 16)), jnp.float32) for _ in "ab")
    tails = jnp.asarray(rng.standard_normal((1, 2, 2, 2, 2, 16)), jnp.float32)
    one, two = jnp.full(1, 1, jnp.int32), jnp.full(1, 2, jnp.int32)
    made = condition_of(z, one, "latent", noise=noise, last=two, tails=tails)[0, ..., MASK:]
    np.testing.assert_array_equal(made[0], (z + noise)[0, 0])
    np.testing.assert_array_equal(made[3:], tails[0, 1] + noise[0, 3:])
    assert not made[1:3].any()


def test_clips_that_are_given_as_a_whole_teach_nothing():
    task = ExtensionTask(given=(1.0,), drop_text=0.0)
    whole = {k: v[:, :1] if k != "null" else v for k, v in batch().items()}
    whole["least"] = np.full((2, 1), T, np.int32)
    loss = extension_loss(DIT, embeddings, task)
    grads = jax.grad(lambda p: loss(p, whole, jax.random.key(0))[0])(params())
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))


def test_a_dropped_prompt_is_dropped_in_the_memory_too():
    """Then no prompt of the sample matters."""
    task = replace(TASK, drop_text=1.0, trained=1)
    loss, own = jax.jit(extension_loss(DIT, embeddings, task)), batch()
    other = own | {"text": own["text"] + 1}
    values = [float(loss(params(), b, jax.random.key(0))[0]) for b in (own, other)]
    assert values[0] == values[1]
    kept = jax.jit(extension_loss(DIT, embeddings, replace(task, drop_text=0.0)))
    earlier = own | {"text": np.concatenate([own["text"][:, :2] + 1, own["text"][:, 2:]], axis=1)}
    values = [float(kept(params(), b, jax.random.key(0))[0]) for b in (own, earlier)]
    assert values[0] != values[1]


def test_refusals():
    with pytest.raises(InputError, match="last is 0.7, both 0.5"):
        ExtensionTask(last=0.7, both=0.5)
    with pytest.raises(InputError, match="samples have 3 clips, 4 of them"):
        extension_loss(DIT, embeddings, replace(TASK, trained=4))(params(), batch(), None)
    with pytest.raises(InputError, match="memory layers None"):
        task = replace(TASK, memory_layers=None)
        extension_loss(DIT, embeddings, task)(params(), batch(), None)
    with pytest.raises(InputError, match="up to 4 latent frames, clips have 4"):
        task = replace(TASK, given=(0.2,) * 5)
        extension_loss(DIT, embeddings, task)(params(), batch(), None)
    with pytest.raises(InputError, match="task.fill is None"):
        extension_loss(DIT, embeddings, replace(TASK, fill=None))(params(), batch(), None)
    for wrong, says in (
        ({"fill": "pixel"}, "task.fill is 'pixel'; give None or one of latent, position"),
        ({"fill": "postion"}, "task.fill is 'postion'"),
        ({"trained": 0}, "task.trained is 0; give a whole number from 1"),
        ({"forget": 1.5}, "task.forget is 1.5; give a number from 0 to 1"),
        ({"shift": float("nan")}, "task.shift is nan; give a number from 0.001 to 1000"),
        ({"remat": 1}, "task.remat is 1; give True or False"),
    ):
        with pytest.raises(InputError, match=says):
            ExtensionTask(**wrong)
    for wrong, says in (
        ({"save_every": None}, "options.save_every is None; give a number from 0"),
        ({"ema": 1.1}, "options.ema is 1.1; give a number from 0 to 1"),
        ({"clip": 0}, "options.clip is 0; give a number from "),
        ({"seed": -1}, "options.seed is -1; give a whole number from 0 to 2147483647"),
        ({"learning_rate": "1e-3"}, "options.learning_rate is '1e-3'"),
    ):
        with pytest.raises(InputError, match=says):
            TrainOptions(**{"steps": 3, "learning_rate": 1e-3} | wrong)
