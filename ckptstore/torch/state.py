"""A state dict as JSON and tensors, without pickle: what `save` writes into a step, and `load` gives back.

    state.json             everything but the tensors: {"format": "ckptstore.state", "version": 1, "state": …}
    {key}.safetensors      the tensors below the state's first key of that name (model, optimizer, …), by their dotted path;
                           `tensors.safetensors` where a tensor has no key above it

In the JSON, an object with one key that begins with "$" is something that JSON lacks: $tensor (file and name), $dict (pairs,
for keys that are not text), $ordered, $counter, $tuple, $float (nan, inf, -inf), $bytes, $dtype, $device, $size. A tensor that
is met twice, or whose memory is (tied weights), is stored once, and is one tensor again when it is loaded.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ckptstore.errors import IntegrityError, UsageError
from ckptstore.torch.memory import checked, plain

FORMAT = "ckptstore.state"
VERSION = 1
LOOSE = "tensors"  #: the file of tensors that no key stands above
_MOST_DEPTH = 64
_KINDS: dict[str, type] = {"$ordered": OrderedDict, "$counter": Counter}
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")

Take = Callable[[torch.Tensor], torch.Tensor]
"""Makes a contiguous tensor on the CPU of any that `checked` lets through."""

Tensors = dict[str, dict[str, torch.Tensor]]
"""File (without suffix) → name → tensor."""


class Encoder:
    """Takes a state dict apart: `document` for JSON, `tensors` for files. One use."""

    def __init__(self, state: Mapping[str, Any], take: Take = plain) -> None:
        self.tensors: Tensors = {}
        self._take = take
        self._seen: dict[tuple[object, ...], tuple[str, str]] = {}
        self._held: list[torch.Tensor] = []  # a mapping may make its tensors as it is read: no other may get their memory
        if not isinstance(state, Mapping):
            raise UsageError(f"a state dict is saved, and this is a {type(state).__name__}")
        self.document = {"format": FORMAT, "version": VERSION, "state": self._encode(state, ())}

    def _encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _MOST_DEPTH:
            raise UsageError(f"{_shown(path)[:200]} is nested more than {_MOST_DEPTH} deep; does it contain itself?")
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):  # numpy.float64 is one: schedules put it into the optimizer's state
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, torch.Tensor):
            return {"$tensor": list(self._tensor(value, path))}
        if type(value) is list:
            return [self._encode(item, (*path, str(i))) for i, item in enumerate(value)]
        if isinstance(value, torch.Size):
            return {"$size": list(value)}
        if type(value) is tuple:
            return {"$tuple": [self._encode(item, (*path, str(i))) for i, item in enumerate(value)]}
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if type(value) is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        raise UsageError(
            f"{_shown(path)} is a {type(value).__module__}.{type(value).__qualname__}, which is saved only as a pickle could",
            hint="Put its state_dict(), numbers, text, lists and dicts of these, and tensors into the state. "
            "Of numpy: torch.from_numpy(array), and number.item().",
        )

    def _mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        plain_keys = all(type(key) is str for key in value) and not any(key.startswith("$") for key in value)
        kind = next((kind for kind, known in _KINDS.items() if isinstance(value, known)), "$dict")
        if plain_keys and kind == "$dict":
            return {key: self._encode(item, (*path, key)) for key, item in value.items()}
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int, bool, float, tuple):
                raise UsageError(f"{_shown(path)} has a key that is a {type(key).__name__}", hint="Use text or numbers.")
            pairs.append([self._encode(key, path), self._encode(item, (*path, str(key)))])
        return {kind: pairs}

    def _tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> tuple[str, str]:
        checked(tensor, _shown(path))
        storage = tensor.untyped_storage()
        key = (
            storage.data_ptr() if storage.nbytes() else id(tensor),
            tensor.device,
            tensor.storage_offset(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        if key in self._seen:
            return self._seen[key]
        self._held.append(tensor)
        values = self._take(tensor)
        file = path[0] if len(path) > 1 and _FILE.fullmatch(path[0]) else LOOSE
        # Names that differ in case alone would be one file on some file systems.
        file = next((known for known in self.tensors if known.lower() == file.lower()), file)
        inside = self.tensors.setdefault(file, {})
        name = ".".join(path[1:] if file == path[0] else path)
        name = stem = "_metadata" if name == "__metadata__" else name
        number = 2
        while name in inside:  # {"a.b": …, "a": {"b": …}}
            name, number = f"{stem}#{number}", number + 1
        inside[name] = values
        self._seen[key] = (file, name)
        return file, name


def read(text: bytes) -> tuple[dict[str, Any], dict[str, set[str]]]:
    """The document in a state.json, and the tensors that it names, by file. IntegrityError for anything else."""
    try:
        document = json.loads(text)
        return document, tensors_in(document)
    except UsageError:  # a ValueError too: of a newer torch
        raise
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"state.json cannot be understood: {error!r:.80}", hint="Load another step.") from error


def tensors_in(document: Any) -> dict[str, set[str]]:
    """The tensors that a document names, by file. IntegrityError for a document of another kind."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise IntegrityError("state.json is not a state that ckptstore saved", hint="Was the step saved by something else?")
    if document.get("version") != VERSION:
        raise IntegrityError(f"state.json is of version {document.get('version')!r:.20}", hint="Upgrade ckptstore.")
    if not isinstance(document.get("state"), dict):
        raise IntegrityError("state.json holds no state", hint="Load another step.")
    found: dict[str, set[str]] = {}

    def note(file: str, name: str) -> None:
        found.setdefault(file, set()).add(name)

    _decode(document["state"], note)
    return found


def decode(document: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Any:
    """The state again."""
    return _decode(document["state"], lambda file, name: tensors[file][name])


def _decode(value: Any, tensor: Callable[[str, str], Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: _decode(item, tensor) for key, item in value.items()}
    ((kind, content),) = value.items()
    try:
        match kind:
            case "$tensor":
                file, name = content
                return tensor(str(file), str(name))
            case "$dict":
                return {_decode(key, tensor): _decode(item, tensor) for key, item in content}
            case "$ordered":
                return OrderedDict((_decode(key, tensor), _decode(item, tensor)) for key, item in content)
            case "$counter":  # MultiStepLR's milestones
                return Counter({_decode(key, tensor): _decode(item, tensor) for key, item in content})
            case "$tuple":
                return tuple(_decode(item, tensor) for item in content)
            case "$float":
                return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
            case "$bytes":
                return base64.b64decode(content, validate=True)
            case "$dtype":
                return _dtype(content)
            case "$device":
                return torch.device(content)
            case "$size":
                return torch.Size(content)
    except UsageError:  # a ValueError too
        raise
    except (TypeError, ValueError, LookupError, OverflowError, RuntimeError, binascii.Error) as error:
        if isinstance(error, RecursionError):
            raise
        raise IntegrityError(f"state.json: {kind} holds {content!r:.80}: {error!r:.80}") from error
    raise IntegrityError(f"state.json: {kind!r:.40} is not known to this ckptstore", hint="Upgrade ckptstore.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if found is None:
        raise UsageError(f"this torch ({torch.__version__}) has no dtype {name}", hint="The state was saved with a newer one.")
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return found


def _shown(path: tuple[str, ...]) -> str:
    return "state" + "".join(f"[{part!r:.60}]" for part in path)
