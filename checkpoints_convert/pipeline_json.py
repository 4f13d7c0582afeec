# SPDX-License-Identifier: Apache-2.0
"""The small files that make the parts of a model one that diffusers loads: `model_index.json`, the
scheduler, the tokenizer, and how CLIP takes pictures.

Does not own: the config.json of each part (hf_config.py), the weights (export.py).
Source: huggingface/diffusers, src/diffusers/pipelines/wan/; huggingface/transformers,
src/transformers/models/clip/image_processing_clip.py.
"""

import json
from collections.abc import Mapping
from typing import Any

from lvjax.models.image_encoder import ImageEncoderConfig

INDEX = "model_index.json"
TOKENIZER = "PreTrainedTokenizerFast"  # takes a tokenizer.json as it is, whatever it is
END, END_ID = "</s>", 1
LIBRARIES = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", TOKENIZER),
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}


def text(value: Any) -> bytes:
    """JSON for a file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def pipeline_texts(
    configs: Mapping[str, Any], tokenizer: bool, shift: float, boundary: float | None, impose: bool
) -> dict[str, bytes]:
    """What lies beside the parts of a model, by path.

    configs: sizes by part, a transformer and an autoencoder among them.  tokenizer: whether it has
      one.  shift: of the schedule.  boundary: where the experts change.  impose: whether a picture
      is put into the latents, as TI2V has it.
    """
    there = {"scheduler": True, "tokenizer": tokenizer, "transformer": "dit" in configs}
    there |= {"transformer_2": "dit_low" in configs, "text_encoder": "text" in configs}
    there |= {"vae": "vae" in configs}
    image = configs["dit"].condition_channels > 0
    libraries = dict(LIBRARIES)
    if "image" in configs and configs["image"].projection_dim is not None:
        libraries["image_encoder"] = ("transformers", "CLIPVisionModelWithProjection")
    if image:
        there |= dict.fromkeys(("image_encoder", "image_processor"), "image" in configs)
    index = {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "boundary_ratio": boundary,
        "expand_timesteps": impose,
    }
    index |= {name: libraries[name] if is_there else (None, None) for name, is_there in
              there.items()}  # fmt: skip
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }
    files = {INDEX: index, "scheduler/scheduler_config.json": scheduler}
    if "image" in configs:
        files["image_processor/preprocessor_config.json"] = _pictures(configs["image"])
    return {name: text(value) for name, value in files.items()}


def _pictures(cfg: ImageEncoderConfig) -> dict:
    """For `CLIPImageProcessor`."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": cfg.size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": cfg.size, "width": cfg.size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }


def tokenizer_texts(tokenizer: str, folder: str, length: int) -> dict[str, bytes]:
    """A tokenizer.json, and what transformers asks for beside it, below `folder`.

    length: tokens of a text at most.  lvjax puts the end of a text behind it itself; here the
    tokenizer does, where it does nothing yet.
    """
    content = json.loads(tokenizer)
    if content.get("post_processor") is None:
        end = {"SpecialToken": {"id": END, "type_id": 0}}
        one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [one, end],
            "pair": [one, end, other, end],
            "special_tokens": {END: {"id": END, "ids": [END_ID], "tokens": [END]}},
        }
    config = {
        "tokenizer_class": TOKENIZER,
        "model_max_length": length,
        "pad_token": "<pad>",
        "eos_token": END,
        "unk_token": "<unk>",
    }
    files = {"tokenizer.json": content, "tokenizer_config.json": config}
    return {f"{folder}/{name}": text(value) for name, value in files.items()}
