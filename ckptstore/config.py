"""The trainer's own YAML, read for where things are and how often it saves. Never written, never executed."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptstore.errors import NotFoundError, UsageError, from_os_error

if TYPE_CHECKING:
    import yaml

_REFERENCE = re.compile(r"\$\{([^${}]+)\}")
_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$")
_MAX_BYTES = 256 << 10  # of a file that people write by hand; the parser takes seconds for each megabyte
_MAX_CHARS = 1 << 16  #: of a value whose references are resolved: they may multiply it
_MAX_REFERENCES = 8  #: in one value
#: What PyYAML raises for values that look like numbers or dates and are none, beside its own errors.
_NOT_YAML = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A trainer's YAML with `key=value` overrides applied, as OmegaConf would; references `${a.b}` are resolved on reading."""

    path: str
    values: Mapping[str, Any]
    overrides: tuple[str, ...] = ()

    @property
    def unread(self) -> str:
        """The other files that Hydra composes it of (`defaults:`), which are not read: what it lacks may be there."""
        names = self.values.get("defaults")
        return ", ".join(str(name) for name in names if name != "_self_")[:200] if isinstance(names, list) else ""

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key; `default` where it is missing, null, or a reference that cannot be resolved."""
        value = self._resolve(_lookup(self.values, key), 0)
        return default if value is None else value

    def text(self, key: str) -> str:
        """The value at a dotted key as text; empty where it is missing."""
        value = self.get(key)
        return "" if value is None or isinstance(value, (dict, list)) else str(value)

    def _resolve(self, value: Any, depth: int) -> Any:
        if not isinstance(value, str) or "${" not in value:
            return value
        if depth > 5:
            return None
        whole = _REFERENCE.fullmatch(value.strip())
        if whole and ":" not in whole[1]:
            return self._resolve(_lookup(self.values, whole[1].strip()), depth + 1)  # of the type that it has there

        def replace(match: re.Match[str]) -> str:
            name = match[1].strip()
            if name.startswith(("oc.env:", "env:")):
                variable, _, fallback = name.split(":", 1)[1].partition(",")
                return os.environ.get(variable.strip(), fallback.strip())
            found = self._resolve(_lookup(self.values, name), depth + 1)
            return "${?}" if found is None or isinstance(found, (dict, list)) else str(found)

        if value.count("${") > _MAX_REFERENCES:
            return None
        resolved = _REFERENCE.sub(replace, value)
        return None if "${" in resolved or len(resolved) > _MAX_CHARS else resolved


def _lookup(values: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return None
        values = values[name]
    return values


@functools.cache
def _loader() -> type[yaml.SafeLoader]:
    """Scalars as OmegaConf, and so the trainer, types them: `1e-6` is a number, for YAML 1.1 it is text; a date is text."""
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's, but for these two."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return Loader


def _parsed(text: str | bytes) -> Any:
    loader = _loader()(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file. NotFoundError without one, UsageError for one that is not a mapping or an override without `=`."""
    import yaml  # 20 ms: only where a configuration is read

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe that nobody writes into would be waited for
            raise UsageError(f"--config {path} is no file", hint="Name the trainer's YAML.")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"--config {path}: there is no such file", hint=f"The current folder is {os.getcwd()}.") from error
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path) from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"--config {path}: {len(data):,} bytes and more is no training configuration")
    try:
        values = _parsed(data)
    except (yaml.YAMLError, *_NOT_YAML) as error:
        raise UsageError(f"--config {path} is not valid YAML: {_said(error)}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} does not hold a mapping, but a {type(values).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.lstrip("+")
        if not equals or not key:
            raise UsageError(f"{override!r} is not an override of the form key=value")
        try:
            value = _parsed(text)
        except (yaml.YAMLError, *_NOT_YAML) as error:
            raise UsageError(f"{override!r}: the value is not valid YAML: {_said(error)}") from error
        _store(values, key.split("."), value)
    return RunConfig(os.path.abspath(path), values, tuple(overrides))


def _said(error: Exception) -> str:
    """A parser's message in one line; it has no better name for bytes that it was given than `<byte string>`."""
    return " ".join(re.sub(r' in "<(byte|unicode) string>",', "", str(error)).split())


def _store(values: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        inner = values.get(name)
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[names[-1]] = value
