# SPDX-License-Identifier: Apache-2.0
"""Video extension after "Towards Error-Free Long Video Generation": a text-to-video model learns to
go on from given frames, all parameters.

Run:      lvjax encode --model wan --videos clips --out data
          lvjax train --config error_free_stage1 --set model=wan --set data=data --folder stage1
Expects:  stage1/bundle, a folder for `lvjax generate --model`.
Source:   arXiv:2606.22370, section on video extension: 0 to 9 given frames, condition dropped in
          one of ten; the shares of first, last and both ends, and the learning rate, are ours.
"""

import dataclasses

from ml_collections import ConfigDict

from lvjax.train.extension import ExtensionTask
from lvjax.train.state import TrainOptions


def get_config() -> ConfigDict:
    task = ExtensionTask(
        given=(0.1, 0.3, 0.3, 0.3), last=1 / 9, both=1 / 9, shift=5.0, fill="latent", remat=True
    )
    options = TrainOptions(10_000, 1e-5, 200, 1.0, ema=0.9999, sample_every=1000)
    config = {
        "model": "",
        "data": "",
        "batch": 8,
        "clips": 1,
        "task": dataclasses.asdict(task),
        "options": dataclasses.asdict(options),
        "dtype": "bfloat16",
        "mesh": (1, 1, 1),
        "samples": (),
        "sample_seconds": 5.0,
        "tensorboard": False,
    }
    return ConfigDict(config, convert_dict=True)
