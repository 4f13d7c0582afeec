# SPDX-License-Identifier: Apache-2.0
"""Inter-clip causal attention after "Towards Error-Free Long Video Generation": the model of stage
1 learns to remember earlier clips, by adapters on keys and values in the latter half of its layers.

Run:      lvjax train --config error_free_stage2 --set model=stage1/bundle --set data=data
            --folder stage2   (on one line)
Expects:  stage2/bundle and stage2/lora.safetensors: lvjax generate --model … --lora …
Source:   arXiv:2606.22370, section on inter-clip causal attention; rank and learning rate are ours.
"""

import dataclasses

from ml_collections import ConfigDict

from lvjax.run.training import Adapters, Training
from lvjax.train.extension import PUBLISHED
from lvjax.train.state import TrainOptions


def get_config() -> ConfigDict:
    options = TrainOptions(3_000, 1e-4, 100, 1.0, ema=0.999, sample_every=500)
    training = Training(
        *("", "", options, PUBLISHED),
        batch=4,
        clips=4,
        adapters=Adapters(),
        dtype="bfloat16",
        sample_seconds=20.0,
    )
    return ConfigDict(dataclasses.asdict(training), convert_dict=True)
