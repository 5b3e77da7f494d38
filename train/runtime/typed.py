"""Values as YAML or the command line gives them -> frozen dataclasses, checked on the way."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from train.runtime.yaml_files import parse_yaml

Location = Annotated[str, "a path, whose ~ is expanded, a URL or a name"]


class CommandLineText(str):
    """The text that was given for a key on the command line; how it is read depends on the key's type."""


def documented(default: Any, text: str) -> Any:
    """A dataclass field with its default, and one line about it with its unit."""
    return dataclasses.field(default=default, metadata={"text": text})


def options(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Key, default and documentation of each field of a dataclass, of those within it as section.key."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from options(field.default_factory, f"{prefix}{field.name}.")  # pyright: ignore[reportArgumentType]
        else:
            yield prefix + field.name, field.default, field.metadata.get("text", "")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"width": 518}} -> {"data.width": 518}; what has other keys than names is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_section = isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value)
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat


def build(cls: type, values: dict[str, Any], prefix: str = "", root: type | None = None) -> Any:
    """An instance of a dataclass. root: the outermost one, which is searched for the place of a misplaced key.

    Raises ValueError naming the key, what was expected and what was found.
    """
    root, types_of = root or cls, get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)
    for key in values:
        if key not in types_of:
            raise ValueError(f"{prefix}{key}: no such key{_meant(root, cls, prefix, key, values[key])}")
    for field in fields:
        if field.default is field.default_factory and field.name not in values:  # neither: both are MISSING
            raise ValueError(f"{prefix}{field.name}: not given")
    arguments = {key: _convert(types_of[key], value, f"{prefix}{key}", root) for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def closest(word: str, known: list[str], prefix: str = "") -> str:
    """A hint at the one of the known words that was probably meant; empty if none is like it."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _meant(root: type, cls: type, prefix: str, key: str, value: Any) -> str:
    """A hint at the intended key: one of the same name in another section, else a similar one in this section."""
    wanted = {name.rpartition(".")[2] for name in flatten({key: value})}
    elsewhere = [name for name, _, _ in options(root) if name.rpartition(".")[2] in wanted]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return closest(str(key), [field.name for field in dataclasses.fields(cls)], prefix)


def _convert(kind: Any, value: Any, name: str, root: type) -> Any:
    """`value` as the type `kind`. Raises ValueError naming the key."""
    if isinstance(value, CommandLineText):
        value = _read_text(kind, value, name)
    if get_origin(kind) is Annotated:  # Location
        return os.path.expanduser(_convert(get_args(kind)[0], value, name, root))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected a section of keys, found {value!r}")
        return build(kind, value, f"{name}.", root)  # pyright: ignore[reportArgumentType]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(_fitting(arguments, value), value, name, root)
    if origin is Literal:
        if isinstance(value, bool) and ("on" if value else "off") in arguments:  # YAML 1.1 reads these words as such
            return "on" if value else "off"
        if value not in arguments:
            choices = [str(argument) for argument in arguments]
            hint = closest(str(value), choices)
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            length = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
            raise ValueError(f"{name}: expected a list{length} such as [{arguments[0].__name__}, ...], found {value!r}")
        return tuple(_convert(arguments[0], item, f"{name}[{i}]", root) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected {{{arguments[0].__name__}: {arguments[1].__name__}}}, found {value!r}")
        return {
            _convert(arguments[0], k, name, root): _convert(arguments[1], v, f"{name}[{k}]", root)
            for k, v in value.items()
        }
    if kind is float:
        return _number(value, name)
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, found {value!r} ({type(value).__name__})")
    return value


def _kinds(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _read_text(kind: Any, text: str, name: str) -> Any:
    """Text stays as it is where text is expected; anything else is read as YAML."""
    kinds = _kinds(kind)
    if text in ("", "null") and types.NoneType in kinds:
        return None
    takes_text = any(kind is str or get_origin(kind) is Annotated for kind in kinds)
    takes_list = any(get_origin(kind) is tuple for kind in kinds)
    if takes_text and not (takes_list and text.startswith("[")):
        return str(text)
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {text!r} is not readable as a YAML value") from error


def _fitting(kinds: tuple[Any, ...], value: Any) -> Any:
    """The type that fits: the tuple for a list, else another."""
    known = [kind for kind in kinds if kind is not types.NoneType]
    fitting = [kind for kind in known if (get_origin(kind) is tuple) == isinstance(value, list)]
    return (fitting or known)[0]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name}: expected float, found {value!r} ({type(value).__name__})")
    try:
        number = float(value)  # also of text, such as nan
    except OverflowError:
        number = math.inf
    except ValueError as error:
        raise ValueError(f"{name}: expected float, found {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, found {value!r}")
    return number
