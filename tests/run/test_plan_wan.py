# SPDX-License-Identifier: Apache-2.0
"""The plan for Wan's models: operations against the published formula, memory against XLA's own
account of the compiled programs, and where weights should wait.
"""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lvjax.core.errors import DoesNotFitError, InputError
from lvjax.models import config
from lvjax.models.config import WAN_VAE_2_1, WAN_VAE_2_2, DiTConfig
from lvjax.run import costs
from lvjax.run import plan as plans
from lvjax.run.bundle import Bundle, specs
from lvjax.run.defaults import Defaults
from lvjax.run.plan import make_plan, propose, work_of
from lvjax.run.weights import save
from tests.drawn import drawn
from tests.full import full_compiler  # noqa: F401
from tests.run.test_plan import MEASURE
from tests.tiny import TEXT
from tests.wan_shell import peak, request, shell

SMALL = DiTConfig(256, 2, 4, 1024, text_dim=64, text_len=64)
VAE, VAE_2_2 = replace(WAN_VAE_2_1, base=16), replace(WAN_VAE_2_2, base=16, decoder_base=24)
IMAGE = replace(SMALL, condition_channels=20)
TI2V = replace(SMALL, in_channels=48, out_channels=48)
PICTURE = np.zeros((96, 96, 3), np.float32)
A14B, GB = shell(config.WAN_T2V_14B, WAN_VAE_2_1, experts=2), 1e9


@pytest.mark.parametrize(
    "dit, tokens, teraflops",
    [
        (config.WAN_T2V_1_3B, 32760, 283),
        (config.WAN_T2V_14B, 32760, 1678),
        (config.WAN_T2V_14B, 75600, 6523),
        (config.WAN_I2V_14B, 75600, 6540),
        (config.WAN_2_2_TI2V_5B, 27280, 517),
    ],
    ids=["1.3b-480p", "14b-480p", "14b-720p", "i2v-14b-720p", "ti2v-5b"],
)
def test_operations_of_a_pass(dit, tokens, teraflops):
    assert costs.transformer_flops(dit, tokens) == pytest.approx(1e12 * teraflops, rel=0.005)


def own(plan) -> int:
    """What XLA accounts for."""
    return plan.device_bytes - plan.memory["scratch"]


@pytest.mark.parametrize(
    "dit, vae, experts, wanted",
    [
        (SMALL, VAE, 1, request(21, (128, 192))),
        (replace(SMALL, ffn_dim=4480), replace(VAE, base=4), 1, request(41, (256, 256))),
        (replace(IMAGE, dtype="float32"), VAE, 2, request(13, (96, 96), start=PICTURE)),
        (TI2V, VAE_2_2, 1, request(21, (128, 192), guidance=1.0)),
    ],
    ids=["autoencoder", "transformer", "image-experts-float32", "ti2v"],
)
def test_memory_is_within_15_percent_of_the_programs(dit, vae, experts, wanted):
    bundle = shell(dit, vae, experts)
    found, plan = peak(bundle, wanted), make_plan(bundle, work_of(wanted, bundle))
    print(f"{found / 1e6:.1f} MB, planned {own(plan) / 1e6:.1f} MB: {plan.memory}")
    assert own(plan) == pytest.approx(found, rel=0.15)


@pytest.mark.long
@pytest.mark.parametrize(
    "dit, vae, frames, size",
    [
        (config.WAN_T2V_1_3B, WAN_VAE_2_1, 81, (480, 832)),
        (config.WAN_T2V_14B, WAN_VAE_2_1, 81, (720, 1280)),
        (config.WAN_I2V_14B, WAN_VAE_2_1, 81, (480, 832)),
        (config.WAN_2_2_TI2V_5B, WAN_VAE_2_2, 121, (704, 1280)),
    ],
    ids=["1.3b-480p", "14b-720p", "i2v-14b-480p", "ti2v-5b"],
)
def test_memory_of_the_published_models(dit, vae, frames, size):
    """Compiled at full size, not run."""
    bundle = shell(dit, vae)
    start = np.zeros((*size, 3), np.float32) if dit.condition_channels else None
    wanted = request(frames, size, start=start)
    found, plan = peak(bundle, wanted), make_plan(bundle, work_of(wanted, bundle))
    print(f"{found / 1e9:.2f} GB, planned {own(plan) / 1e9:.2f} GB: {plan.memory}")
    assert own(plan) == pytest.approx(found, rel=0.1)


def test_what_the_autoencoder_remembers():
    """By the published count: 944,286,720 numbers at 480p."""
    assert costs._remembered(WAN_VAE_2_1, "decoder") * 60 * 104 == 4 * 944_286_720


# ---- where weights wait ------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """A machine whose device has memory of its own; a function that says how much, in GB."""

    def has(gigabytes, host=256):
        monkeypatch.setattr(plans, "shares_memory", lambda: False)
        monkeypatch.setattr(plans, "device_memory", lambda: int(gigabytes * GB))
        monkeypatch.setattr(plans, "host_memory", lambda: int(host * GB))

    return has


WORK = work_of(request(81, (480, 832)), A14B)


@pytest.mark.parametrize(
    "memory, place, reason",
    [
        (80, "none", "everything fits"),
        (64, "expert", r"73\.3 GB of the device's 64\.0 GB"),
        (24, "layers", r"73\.3 GB of the device's 24\.0 GB"),
    ],
)
def test_the_first_place_that_fits_is_taken(device, memory, place, reason):
    device(memory)
    plan = propose(A14B, WORK)
    assert plan.offload == place and plans.fits(plan)
    line = plans.describe(plan, 1e12)
    assert f"offload {place}, " in line and re.search(reason, line)
    assert ("weights that wait on the host 56233 MB" in line) == (place != "none")
    plans.check_memory(plan, A14B, WORK)


def test_what_waits_is_on_the_host():
    none, expert, layers = (make_plan(A14B, WORK, place) for place in ("none", "expert", "layers"))
    stack = none.memory["weights"] - layers.memory["weights"]
    d, f = A14B.dit.dim, A14B.dit.ffn_dim
    blocks = 40 * (8 * (d * d + d) + 2 * d * f + f + 13 * d)
    assert stack == layers.waiting == expert.waiting == pytest.approx(2 * 2 * blocks, rel=1e-3)
    assert layers.host - none.host == layers.waiting and none.waiting == 0
    one = expert.memory["transformer"] - layers.memory["transformer"]
    assert one == pytest.approx(stack / 2, rel=0.1)
    assert layers.device_bytes < expert.device_bytes < none.device_bytes
    assert none.flops == expert.flops == layers.flops and none.disk == layers.disk


def test_a_host_that_is_too_small_for_them(device):
    device(64, host=40)
    plan = propose(A14B, WORK)
    assert not plans.fits(plan)
    with pytest.raises(DoesNotFitError, match="one video of [0-9]+x[0-9]+ would fit"):
        plans.check_memory(plan, A14B, WORK)


def test_a_place_that_is_asked_for_is_kept(device):
    device(80)
    assert propose(A14B, WORK, "layers").offload == "layers"
    assert "as asked" in plans.describe(propose(A14B, WORK, "expert"), 1e12)
    device(24)
    with pytest.raises(DoesNotFitError, match="45.2 GB on each device"):
        plans.check_memory(propose(A14B, WORK, "expert"), A14B, WORK, "expert")
    with pytest.raises(InputError, match="'expert'; the method error_free allows none, layers"):
        propose(A14B, replace(WORK, method="error_free"), "expert")


def test_weights_on_the_device_stay_there(device):
    """A model that was loaded onto the device has nothing to gain."""
    device(24)
    loaded = replace(A14B, params={"dit": {}})
    assert propose(loaded, WORK).offload == "none"
    assert propose(replace(loaded, offload="layers"), WORK).offload == "layers"


def test_nothing_waits_where_memory_is_one():
    """On the CPU the host's memory is the device's."""
    assert propose(A14B, WORK).offload == "none"


@pytest.mark.long
def test_planned_memory_is_within_15_percent_of_the_peak(tmp_path):
    """A real run of a random model on one device, its programs compiled by the run before it."""
    dit = DiTConfig(768, 6, 4, 4480, text_dim=TEXT.dim, text_len=16)
    vae = replace(WAN_VAE_2_1, base=48)
    outline = Bundle("random", dit, vae, TEXT, Defaults(method="wan", steps=2), {})
    params = {k: drawn(s, i) for i, (k, s) in enumerate(specs(outline).items())}
    save(tmp_path, replace(outline, params=params), "bfloat16")
    command = [sys.executable, "-m", "lvjax.cli.main", "generate", "--model", str(tmp_path)]
    command += ["--prompt", "a red circle", "--frames", "9", "--size", "320x256", "--overwrite"]
    command += ["--out", str(tmp_path / "a.mp4"), "--set", "defaults.upscale=1"]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    planned = 1e9 * float(re.search(r"memory ([\d.]+) GB", line)[1])
    measure = [sys.executable, "-c", MEASURE, *command]
    peak = float(subprocess.run(measure, check=True, capture_output=True, text=True).stdout)
    print(f"planned {planned / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert planned == pytest.approx(peak, rel=0.15)
