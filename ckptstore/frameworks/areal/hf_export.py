"""What a Hugging Face export holds, and whether its names and bytes are those that AReaL's FSDP engine trains."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptstore import native
from ckptstore.errors import IntegrityError, RefusedError, from_os_error
from ckptstore.formats import FormatError, safetensors, streaming
from ckptstore.formats.reading import parse_json, read_exactly
from ckptstore.model import FileInfo

Path = str | os.PathLike[str]
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
CONFIG = "config.json"
HEAD = "lm_head.weight"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "BOOL": "bool",
}
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in|word_embeddings)\.weight")
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|audio_tower)\.")
_ADAPTER = re.compile(r"^base_model\.model\.|\.lora_[AB]\.")


class Weight(NamedTuple):
    """One tensor: its dtype by torch's name, and where its bytes begin in the file of that number."""

    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class Export:
    """The weights of an export. `aliases`: names that the model has and the files leave out → the name that holds them."""

    files: tuple[FileInfo, ...]  #: those that hold weights
    weights: Mapping[str, Weight]
    aliases: Mapping[str, str]
    tied: bool | None  #: whether the embedding is also the head; None: the configuration leaves it to the architecture
    unused: tuple[streaming.Range, ...]  #: bytes of the files that are no weight: headers, and what the index leaves out
    notes: tuple[str, ...]

    @property
    def parameters(self) -> list[str]:
        """Each distinct parameter once, in the files' order: a tied head is the embedding, buffers of integers are none."""
        tied = self.tied and any(_EMBEDDING.fullmatch(name) for name in self.weights)
        return [name for name, weight in self.weights.items() if weight.dtype in FLOATS and not (tied and name == HEAD)]


def read(source: Path, files: Sequence[FileInfo], expected: Mapping[str, Sequence[int]] | None = None) -> Export:
    """The export in `source` whose files are `files`. RefusedError where AReaL's FSDP engine would not take its names or
    dtypes; IntegrityError where the files contradict themselves, or the JSON read here differs from `expected`.
    """
    present = {info.name: info for info in files}
    reader = Reader(source, present, expected or {})
    config = reader.json(CONFIG)
    refuse_config(present, config)
    index = reader.json(INDEX) if WHOLE not in present and INDEX in present else None
    weight_map = index.get("weight_map") if index is not None else None
    if index is not None and not isinstance(weight_map, dict):
        raise IntegrityError(f"{INDEX} has no weight_map")
    names = list(dict.fromkeys(weight_map.values())) if weight_map else [WHOLE]
    missing = [name for name in names if name not in present]
    if missing:
        raise RefusedError(
            f"the export has no {missing[0]}" + ("" if index is not None else f" and no {INDEX}"),
            hint="Only whole safetensors exports are converted; use another checkpoint.",
        )
    weights: dict[str, Weight] = {}
    unused: list[streaming.Range] = []
    for number, name in enumerate(names):
        info = present[name]
        header = reader.header(info)
        begin = info.size_bytes - max((tensor.end for tensor in header.values()), default=0)
        unused.append(streaming.Range(number, 0, begin))
        for key, tensor in sorted(header.items(), key=lambda item: item[1].begin):
            if weight_map and weight_map.get(key) != name:
                unused.append(streaming.Range(number, begin + tensor.begin, tensor.end - tensor.begin))
                continue
            if tensor.dtype not in DTYPES:
                raise RefusedError(f"{key} is {tensor.dtype}: a quantised export is not what the trainer trains")
            weights[key] = Weight(DTYPES[tensor.dtype], tensor.shape, number, begin + tensor.begin)
    if weight_map and (lost := weight_map.keys() - weights.keys()):
        raise IntegrityError(f"{INDEX} places {min(lost)} where it is not")
    refuse_names(weights)
    tied = config.get("tie_word_embeddings")
    aliases, notes = _tie(weights, config, tied)
    return Export(
        tuple(present[name] for name in names),
        weights,
        aliases,
        bool(tied) if isinstance(tied, bool) else True if aliases else None,
        tuple(unused),
        notes,
    )


def refuse_config(names: Mapping[str, object], config: Mapping[str, Any]) -> None:
    """RefusedError for what a folder's names and its config.json tell: LoRA, vision, quantised."""
    if any(name.startswith("adapter_") for name in names):
        raise RefusedError("a LoRA adapter: the trainer's state has other names, and the base weights are not in it")
    architectures = config.get("architectures") or []
    if "vision_config" in config or "audio_config" in config or any("ConditionalGeneration" in str(a) for a in architectures):
        raise RefusedError("a vision or audio model: its files name the weights otherwise than the trainer's modules do")
    if "quantization_config" in config:
        raise RefusedError("a quantised export is not what the trainer trains")


def refuse_names(keys: Mapping[str, object]) -> None:
    """RefusedError for weights whose names only another kind of model has."""
    for key in keys:
        if _ADAPTER.search(key):
            raise RefusedError(f"{key}: a LoRA adapter's weights")
        if _VISION.search(key):
            raise RefusedError(f"{key}: a vision or audio model, whose files name the weights otherwise than the modules")


def _tie(weights: Mapping[str, Weight], config: Mapping[str, Any], tied: object) -> tuple[dict[str, str], tuple[str, ...]]:
    causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or [])
    if HEAD in weights or not causal:
        return {}, ()
    embeddings = [name for name in weights if _EMBEDDING.fullmatch(name)]
    if tied is False or len(embeddings) != 1:
        why = "its config.json does not tie it to the embedding" if tied is False else "no single embedding stands for it"
        raise RefusedError(f"the export has no {HEAD}, and {why}", hint="Use another checkpoint.")
    return {HEAD: embeddings[0]}, (f"{HEAD} is {embeddings[0]} (tied): written as a second name of the same bytes",)


class Reader:
    """Reads small things of a folder whose files are known; RefusedError, IntegrityError and those of native."""

    def __init__(self, source: Path, present: Mapping[str, FileInfo], expected: Mapping[str, Sequence[int]]) -> None:
        self.source = source
        self.present = present
        self.expected = expected

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """A model.ReadAt."""
        path = os.path.join(self.source, name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                return os.pread(fd, length, offset)
            finally:
                os.close(fd)
        except OSError as error:
            raise from_os_error(error, doing="reading", path=path) from error

    def json(self, name: str) -> Mapping[str, Any]:
        """A JSON object, checked against the expected digest."""
        if name not in self.present:
            raise RefusedError(f"the export has no {name}", hint="Only whole Hugging Face exports are converted.")
        try:
            data = read_exactly(self.read_at, name, 0, self.present[name].size_bytes)
            content = parse_json(data, strict=False)
        except FormatError as error:
            raise IntegrityError(f"{name}: {error.problem}") from None
        # Larger files than a chunk are checked when they are copied; no JSON of interest here is one.
        if len(crcs := self.expected.get(name, ())) == 1 and native.crc64(data) != crcs[0]:
            raise streaming.mismatch(name, 0)
        if not isinstance(content, dict):
            raise IntegrityError(f"{name} is not a JSON object")
        return content

    def header(self, info: FileInfo) -> Mapping[str, safetensors.Tensor]:
        """The header of a safetensors file."""
        try:
            return safetensors.read_header(self.read_at, info.name, info.size_bytes)
        except FormatError as error:
            raise IntegrityError(f"{info.name}: {error.problem}") from None
