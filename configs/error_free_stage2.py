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

from lvjax.run.training import Adapters
from lvjax.train.extension import ExtensionTask
from lvjax.train.state import TrainOptions


def get_config() -> ConfigDict:
    task = ExtensionTask(
        given=(0.1, 0.3, 0.3, 0.3), last=1 / 9, both=1 / 9, shift=5.0, fill="latent", remat=True
    )
    options = TrainOptions(3_000, 1e-4, 100, 1.0, ema=0.999, sample_every=500)
    config = {
        "model": "",
        "data": "",
        "batch": 4,
        "clips": 4,
        "task": dataclasses.asdict(task),
        "adapters": dataclasses.asdict(Adapters()),
        "options": dataclasses.asdict(options),
        "dtype": "bfloat16",
        "mesh": (1, 1, 1),
        "samples": (),
        "sample_seconds": 20.0,
        "tensorboard": False,
    }
    return ConfigDict(config, convert_dict=True)
