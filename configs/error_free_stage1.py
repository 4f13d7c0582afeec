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

from lvjax.run.training import Training
from lvjax.train.extension import PUBLISHED
from lvjax.train.state import TrainOptions


def get_config() -> ConfigDict:
    options = TrainOptions(10_000, 1e-5, 200, 1.0, ema=0.9999, save_every=900.0, sample_every=1000)
    training = Training("", "", options, PUBLISHED, batch=8, dtype="bfloat16")
    return ConfigDict(dataclasses.asdict(training), convert_dict=True)
