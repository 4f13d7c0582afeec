# SPDX-License-Identifier: Apache-2.0
"""The pocket model, trained from nothing on the pocket world.

Run:      lvjax train --config configs/pocket.py --folder runs/pocket
Expects:  the autoencoder, the latents, the video-extension DiT and runs/pocket/bundle, a folder
          that `lvjax generate --model runs/pocket/bundle` loads.  The model card says what it took
          and what it gave.
"""

import dataclasses

from ml_collections import ConfigDict

from lvjax.lab.recipe import Recipe


def get_config() -> ConfigDict:
    return ConfigDict(dataclasses.asdict(Recipe()), convert_dict=True)
