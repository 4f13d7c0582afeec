# SPDX-License-Identifier: Apache-2.0
"""What a file or a folder is, from its headers alone, and which command takes it.

Owns: `about`, lines of (word, text) for people.  No array is read, so that a model of 57 GB takes a
moment; damage inside arrays is found when they are used.
"""

import dataclasses
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.about_lora import lora_facts
from checkpoints_convert.files import HEAD, opened
from checkpoints_convert.keys_lora import is_lora
from checkpoints_convert.lora_file import open_lora
from checkpoints_convert.read import open_tensors
from checkpoints_convert.recognise import KINDS
from checkpoints_convert.sources import INDEX, Source, checkpoints, find_sources
from lvjax.core.checkpoint import Slot, Stored
from lvjax.core.errors import CheckpointError
from lvjax.core.params import count
from lvjax.core.streaming import open_stored
from lvjax.data.tokenizer import FILES, FOLDERS
from lvjax.io.video import read_card
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.image_encoder import ImageEncoderConfig
from lvjax.models.parts import EXPERTS, check_part, kind_of, misfits, part_spec, stored_part
from lvjax.models.umt5 import UMT5Config
from lvjax.run import bundle as bundles
from lvjax.run import card as cards
from lvjax.run import job
from lvjax.run.defaults import Defaults
from lvjax.run.presets import MODELS, PRESETS, preset_of, presets_of
from lvjax.run.session import OPENINGS
from lvjax.run.timeline import short

STATE = ".state"  # at the end of the name of a run's state
SHOWN = 4  # prompts
PICTURES = {"start": "--image photo.jpg", "last": "--last-image end.jpg"}

Lines = list[tuple[str, str]]
"""What is known: a word and a text each."""


class Part(NamedTuple):
    """A part of a model on the disk.

    path: of its file or folder.  naming: of its arrays.  types: how many arrays have which type.
    size: bytes of all.  places: how many arrays have a place in the model, in words.
    wrong: why it cannot be used, None when it can.
    """

    path: Path
    naming: str
    cfg: Any
    types: Counter
    size: int
    places: str
    wrong: str | None


def about(path: Path) -> tuple[Lines, list[str]]:
    """What lies at `path`, and what is wrong with it, in a line each.

    Raises: CheckpointError when it is damaged or nothing that lvjax can read.
    """
    if path.is_dir():
        return _own_part(open_stored(path)) if bundles.is_own(path) else _folder(path)
    with opened(path) as f:
        head = f.read(HEAD)
    if head[4:8] == b"ftyp":
        return _video(path, read_card(path)), []
    if path.suffix == ".json" and not path.name.endswith(INDEX):
        return _video(path, cards.read_json(path)), []
    if bundles.is_own(path):
        return _own_file(path)
    if is_lora(open_tensors(path)):
        return _lora(path), []
    source = find_sources(path)[0][0]
    return _alone(source.part, _foreign(source), source.model.tensors.chosen)


# ---- one part ----------------------------------------------------------------------


def _own(stored: Stored, cfg) -> Part:
    """A part that lvjax wrote."""
    fit = stored.slots.keys() - misfits(stored, cfg).keys()
    places, wrong = f"{len(fit)} of {len(stored.slots)} arrays have their place", None
    try:
        check_part(stored, cfg)
    except CheckpointError as e:
        wrong = str(e)
    types = Counter(str(slot.dtype) for slot in stored.slots.values())
    return Part(stored.path, "lvjax", cfg, types, sum(map(_size, stored.slots.values())), places,
                wrong)  # fmt: skip


def _size(slot: Slot) -> int:
    return math.prod(slot.shape) * slot.dtype.itemsize


def _foreign(source: Source) -> Part:
    """A part as its publishers wrote it."""
    model, tensors, wrong = source.model, source.model.tensors, None
    try:
        unused = len(model.plan().unused)
        places = f"{len(tensors)} of {len(tensors)} arrays have their place"
        places += f", {unused} of them unused" if unused else ""
    except CheckpointError as e:
        places, wrong = "not all arrays have a place", str(e)
    types = Counter(str(tensors.dtype(name)) for name in tensors)
    size = sum(tensors.nbytes(name) for name in tensors)
    return Part(source.path, model.layout, model.cfg, types, size, places, wrong)


def _own_part(stored: Stored) -> tuple[Lines, list[str]]:
    part, cfg = stored_part(stored)
    return _alone(part, _own(stored, cfg))


def _alone(name: str, part: Part, chosen: str | None = None) -> tuple[Lines, list[str]]:
    """One part of a model, by itself.  chosen: which weights of the file."""
    title, where = KINDS[kind_of(name)].title, shlex.quote(str(part.path))
    weights = "" if chosen is None else f", the weights {chosen!r}"
    model = f"{_model(part.cfg)}, " if isinstance(part.cfg, DiTConfig) else ""
    lines = [
        ("part", f"{name}: {title}, {part.naming} naming{weights}"),
        ("model", f"{model}{parameters(part.cfg)}: {_sizes(part.cfg)}"),
        ("arrays", _stored(part)),
    ]
    if part.wrong is not None:
        return lines, [part.wrong]
    if part.naming == "lvjax":
        folder = shlex.quote(str(part.path.parent))
        return [*lines, ("use", f"its folder, with the other parts: lvjax info {folder}")], []
    return [*lines, ("use", f"lvjax convert {where} FOLDER, as the other parts of its model")], []


def parameters(cfg) -> str:
    """How many parameters a part has, in words."""
    n = count(part_spec(cfg))
    return f"{n / 1e9:.2f} B parameters" if n >= 1e9 else f"{n / 1e6:.1f} M parameters"


def _model(dit: DiTConfig) -> str:
    """Which released model a transformer is, or is built like."""
    same = [n for n, cfg in MODELS.items() if dataclasses.replace(dit, dtype=cfg.dtype) == cfg]
    one = [f"one expert of {name}" if name.endswith("a14b") else name for name in same]
    return " or ".join(one) if same else f"built like {preset_of(dit, 1)}"


def _sizes(cfg) -> str:
    """The sizes of a part, in words."""
    if isinstance(cfg, DiTConfig):
        condition = f" + {cfg.condition_channels}" if cfg.condition_channels else ""
        tokens = ", image tokens" if cfg.image_dim is not None else ""
        heads = f"width {cfg.dim}, {cfg.num_heads} heads, {cfg.num_layers} layers"
        return f"{heads}, {cfg.in_channels}{condition} channels{tokens}"
    if isinstance(cfg, VAEConfig):
        side = cfg.spatial_stride
        return f"{cfg.z} latent channels, strides {cfg.temporal_stride}x{side}x{side}"
    if isinstance(cfg, ImageEncoderConfig):
        return f"width {cfg.dim}, {cfg.num_layers} layers, pictures of {cfg.size} pixels"
    if isinstance(cfg, UMT5Config):
        return f"width {cfg.dim}, {cfg.num_layers} layers, {cfg.vocab} words"
    return f"width {cfg.dim}, {cfg.vocabulary - 1} words"


def _stored(part: Part) -> str:
    """How the arrays of a part lie on the disk, in words."""
    return f"{_types(part.types)}, {_bytes(part.size)}; {part.places}"


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


# ---- a model -----------------------------------------------------------------------


def _folder(path: Path) -> tuple[Lines, list[str]]:
    """A model, or some of its parts."""
    if own := bundles.open_parts(path, others=True):
        if {"dit", "vae"} <= own.keys() and (path / bundles.MODEL).is_file():
            model = bundles.described(path)
            parts = {name: _own(stored, model.config(name)) for name, stored in own.items()}
            return _model_lines(path, parts, model.name, model.defaults)
        parts = {name: _own(s, stored_part(s)[1]) for name, s in own.items()}
        lines, wrong = _model_lines(path, parts)
        if "missing" not in dict(lines):
            wrong.append(f"{path} has no {bundles.MODEL}: its conversion was stopped; run it again")
        return [line for line in lines if line[0] != "use" or not wrong], wrong
    found = checkpoints(path)
    if len(found) == 1 and is_lora(open_tensors(found[0])):
        return _lora(found[0]), []
    sources, left = find_sources(path)
    parts = {s.part: _foreign(s) for s in sources}
    if len(parts) == 1 and "text" not in parts:
        (source,), (part,) = sources, parts.values()
        return _alone(source.part, part, source.model.tensors.chosen)
    lines, wrong = _model_lines(path, parts)
    return [*lines, *(("note", line) for line in left)], wrong


def _model_lines(
    path: Path, parts: Mapping[str, Part], name: str | None = None, d: Defaults | None = None
) -> tuple[Lines, list[str]]:
    """name, d: of the model, where it is described; else they follow from its transformer."""
    wrong = [part.wrong for part in parts.values() if part.wrong is not None]
    if name is None and "dit" in parts:
        name = preset_of(parts["dit"].cfg, len(bundles.transformers(parts)))
        d = PRESETS[name]
    naming = " + ".join(sorted({part.naming for part in parts.values()}))
    size = _bytes(sum(part.size for part in parts.values()))
    lines = [("model", f"{name or 'parts of a model'}: {naming} naming, {size}")]
    for part, facts in parts.items():
        said = f"{parameters(facts.cfg)}: {_sizes(facts.cfg)}; {_stored(facts)}"
        lines.append((part, said))
    umt5 = "text" in parts and isinstance(parts["text"].cfg, UMT5Config)
    places = (path / folder / file for file in FILES for folder in FOLDERS)
    tokenizer = next((str(p.relative_to(path)) for p in places if p.is_file()), None)
    if umt5:
        lines.append(("tokenizer", tokenizer or "none; put tokenizer.json there to read prompts"))
    two = (d is not None and d.boundary is not None) or EXPERTS["low"] in parts
    needed = [*(EXPERTS.values() if two else ("dit",)), "vae"]
    if missing := [part for part in needed if part not in parts]:
        lines.append(("missing", f"{' and '.join(missing)}, to make videos with it"))
    if d is not None:
        lines.append(("settings", settings(d)))
    if others := _other_presets(name, parts):
        lines.append(("preset", f"{name}; of this structure is also {others}: lvjax convert "
                                "--preset names it"))  # fmt: skip
    if not wrong:
        reads = "text" in parts and (not umt5 or tokenizer is not None)
        lines += [("use", line) for line in _uses(path, parts, None if missing else d, reads)]
    return lines, wrong


def _other_presets(name: str | None, parts: Mapping[str, Part]) -> str:
    """The presets that fit these parts beside the one in use, in words."""
    if "dit" not in parts or name not in PRESETS:
        return ""
    fits = presets_of(parts["dit"].cfg, len(bundles.transformers(parts)))
    return " or ".join(other for other in fits if other != name)


def settings(d: Defaults) -> str:
    """The defaults of a model, in words."""
    return (
        f"{d.size[1]}x{d.size[0]} at {d.fps} frames/s, {d.steps} steps of {d.solver}, "
        f"guidance {d.guidance}, {OPENINGS[d.method].words(d)}"
    )


def _uses(path: Path, parts: Mapping[str, Part], d: Defaults | None, reads: bool) -> list[str]:
    """The commands that take a folder with these parts.  d: None where it makes no videos.
    reads: whether it can read prompts.
    """
    where, prompt, uses = shlex.quote(str(path)), '--prompt "..."', []
    if d is not None:
        needed = OPENINGS[d.method].pictures(parts["dit"].cfg)
        image = "".join(f"{PICTURES[name]} " for name in needed)
        known = "" if reads else " --embeddings prompts.safetensors"
        uses.append(f"lvjax generate --model {where} {image}{prompt}{known}")
    if reads and isinstance(parts["text"].cfg, UMT5Config):
        uses.append(f"lvjax encode --model {where} {prompt} --out prompts.safetensors")
    if any(part.naming != "lvjax" for part in parts.values()):
        uses.append(f"lvjax convert {where} FOLDER")
    return uses


# ---- other files -------------------------------------------------------------------


def _lora(path: Path) -> Lines:
    file = open_lora(path)
    tensors = file.tensors
    facts = lora_facts(tensors.shapes(), MODELS, str(path))
    ranks = " and ".join(map(str, facts.ranks[:SHOWN])) + (" ..." * (len(facts.ranks) > SHOWN))
    what = f"rank {ranks} beside {_many(facts.modules, 'weight')}" if facts.modules else ""
    more = _many(facts.differences, "difference") if facts.differences else ""
    width = "of unknown width" if facts.width is None else f"{facts.width} wide"
    fits = f"; fits {', '.join(facts.models)}" if facts.models else "; of no released size"
    known = {name: f"the {name}-noise expert" for name in EXPERTS}
    expert = (known | {"both": "both experts"}).get(file.expert)
    types = Counter(str(tensors.dtype(name)) for name in tensors)
    size = sum(tensors.nbytes(name) for name in tensors)
    unused = f", {facts.unused} of them for no transformer" if facts.unused else ""
    lines = [
        ("lora", f"{facts.family}: {' and '.join(filter(None, (what, more)))}"),
        ("model", f"a transformer {width}, {_many(facts.layers, 'layer')} or more{fits}"),
        ("arrays", f"{_types(types)}, {_bytes(size)}{unused}"),
    ]
    if expert:
        lines.append(("expert", f"for {expert}, as it says"))
    where = shlex.quote(str(path))
    return [*lines, ("use", f'lvjax generate --model FOLDER --lora {where} --prompt "..."')]


def _own_file(path: Path) -> tuple[Lines, list[str]]:
    """A file of arrays that lvjax wrote."""
    stored = open_stored(path)
    meta, where = stored.meta, shlex.quote(str(path))
    if "part" in meta:
        return _own_part(stored)
    if meta.get("kind") == "lora":
        return _lora(path), []
    if meta.get("kind") == "embeddings":
        prompts = [str(text) for text in meta.get("prompts", ())]
        width = {slot.shape[-1:] for slot in stored.slots.values()}
        sizes = " or ".join(str(*shape) for shape in sorted(width))
        lines = [("prompts", f"{len(prompts)}, encoded by {meta.get('model')}, {sizes} wide")]
        lines += _prompts(prompts)
        use = f'lvjax generate --model FOLDER --embeddings {where} --prompt "..."'
        return [*lines, ("use", use)], []
    if "card" in meta and path.name.endswith(STATE):
        output = path.with_name(path.name.removesuffix(STATE))
        clip, frame = job.position(output)
        lines = _video(output, meta["card"])[:-1]
        use = f"lvjax generate --resume --out {shlex.quote(str(output))}"
        made = f"{_many(clip, 'clip')}, {_many(frame, 'frame')} made"
        return [("state", made), *lines, ("use", use)], []
    types = Counter(str(slot.dtype) for slot in stored.slots.values())
    size = _bytes(sum(map(_size, stored.slots.values())))
    return [("arrays", f"of lvjax's: {_types(types)}, {size}")], []


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _types(types: Counter) -> str:
    return " + ".join(f"{n} {kind}" for kind, n in types.most_common())


def _video(path: Path, card) -> Lines:
    """A video by its run card."""
    options = cards.check_card(card, path)["options"]
    asked = job.request_of(options)
    height, width = asked.size
    rows = f"{len(asked.timelines)} videos of " if len(asked.timelines) > 1 else ""
    made = ", ".join(f"{k} {v}" for k, v in card["versions"].items() if k in ("lvjax", "jax"))
    return [
        ("video", f"{rows}{_many(asked.frames, 'frame')} of {width}x{height}, seed {asked.seed}"),
        ("model", f"{options.get('model')}, {made}"),
        *_prompts(text for row in asked.timelines for _, text in row),
        ("use", f"lvjax replay {shlex.quote(str(path))}"),
    ]


def _prompts(texts: Iterable[str]) -> Lines:
    texts = list(dict.fromkeys(texts))
    more = f" (and {len(texts) - SHOWN} more)" if len(texts) > SHOWN else ""
    shown = [short(text) for text in texts[:SHOWN]]
    return [("prompt", text + more * (i == SHOWN - 1)) for i, text in enumerate(shown)]
