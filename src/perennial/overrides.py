"""Dotted overrides: `recipe.grpo.groups=8` changes one field deep inside a frozen configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, Literal, Union

from perennial import discovery
from perennial.errors import PerennialError, unknown

KINDS = {"recipe": "learning", "strategies": "strategies"}
"""Fields that hold a tuple of things chosen by name, and the room in which the names are found."""


def apply(config: Any, overrides: Mapping[str, str]) -> Any:
    """`config` with each dotted path set to the value that its text stands for.

    Choices by name come first, and settings of a part by its number after those by its name. A setting of something
    that `config` leaves out, such as an adapter, puts it in.

    Raises:
        PerennialError: an unknown key (nearest ones are listed), a text that does not fit the field's type, or a
            setting of what another override leaves out.
    """
    for path, text in overrides.items():
        inner = next((other for other in overrides if other.startswith(f"{path}.")), None)
        if text.lower() == "none" and inner is not None:
            raise PerennialError(f"--{path} is none, so --{inner} sets nothing; leave one of them out.")
    _require_full_names(config, overrides)
    for path, text in sorted(overrides.items(), key=lambda item: _precedence(item[0].split("."))):
        config = _set(config, path.replace("-", "_").split("."), text, path)
    return config


def _require_full_names(config: Any, overrides: Mapping[str, str]) -> None:
    """No setting inside a part is named as if it were one of the whole, as in --device for --policy.device."""
    known = {f.name for f in fields(config)}
    for path in overrides:
        name = path.replace("-", "_")
        inside = [f"--{key}" for key in keys(config) if key.endswith(f".{name}")]
        if name not in known and inside:
            raise PerennialError(f"There is no setting '--{path}'. Did you mean {' or '.join(inside)}?")


def _precedence(path: list[str]) -> tuple[bool, int]:
    return any(map(str.isdecimal, path)), len(path)


def from_json(kind: Any, value: Any, path: str = "config") -> Any:
    """The value of type `kind` that `config.to_json` wrote as `value`.

    Raises:
        PerennialError: a key is unknown or a value has the wrong type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return None if value is None else from_json(options[0], value, path)
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise PerennialError(f"{path} is {value!r}, but it must be an object.")
        own = dict(value)
        room = next((room for room, base in _kinds().items() if issubclass(kind, base)), None)
        if room is not None:
            kind = discovery.find(room, own.pop("name", ""), kind)
        hints = typing.get_type_hints(kind)
        for key in own:
            if key not in hints:
                raise unknown(f"setting in {path}", key, [f.name for f in fields(kind) if f.init])
        for f in fields(kind):
            if f.init and f.name not in own and f.default is MISSING and f.default_factory is MISSING:
                raise PerennialError(f"{path} has no {f.name!r}; add it.")
        return kind(**{key: from_json(hints[key], item, f"{path}.{key}") for key, item in own.items()})
    if origin is Mapping and isinstance(value, Mapping):
        return {key: from_json(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        inner = arguments[0]
        return tuple(from_json(inner, item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise unknown(f"choice for {path}", str(value), map(str, arguments))
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin in (tuple, Mapping) or (kind in (int, float, str, bool) and type(value) is not kind):
        raise PerennialError(f"{path} is {value!r}, but it must be {_article(origin or kind)}.")
    return value


def keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of `config` with its present value."""
    found: dict[str, Any] = {}
    for f in fields(config):
        if not f.init:
            continue
        child, path = getattr(config, f.name), f"{prefix}{f.name}"
        if is_dataclass(child):
            found |= keys(child, f"{path}.")
        elif f.name in KINDS:
            found[path] = ",".join(part.name for part in child)
            for part in child:
                found |= keys(part, f"{path}.{part.name}.")
        else:
            found[path] = child
    return found


def _kinds() -> dict[str, type]:
    from perennial.learning.base import Objective
    from perennial.strategies.base import Strategy

    return {"learning": Objective, "strategies": Strategy}


def _set(value: Any, path: list[str], text: str, whole: str) -> Any:
    """`value` with the field at `path` set."""
    head, *rest = path
    known = {f.name for f in fields(value) if f.init}
    if head not in known:
        before = "".join(f"{part}." for part in whole.split(".")[: -len(path)])
        raise unknown("setting", f"--{before}{head}", [f"--{before}{name}" for name in known])
    child = getattr(value, head)
    kind = typing.get_type_hints(type(value))[head]
    if head in KINDS:
        return replace(value, **{head: _set_kind(child, KINDS[head], rest, text, whole)})
    if rest:
        child = _default(kind) if child is None else child
        if not is_dataclass(child):
            raise PerennialError(f"--{whole} does not exist, because {head!r} is {child!r} and has no settings.")
        return replace(value, **{head: _set(child, rest, text, whole)})
    return replace(value, **{head: parse(kind, text, f"--{whole}")})


def _default(kind: Any) -> Any:
    """What an optional part is when it is put in; None for parts without settings."""
    parts = (option for option in typing.get_args(kind) if isinstance(option, type) and is_dataclass(option))
    return next((part() for part in parts), None)


def _set_kind(parts: tuple[Any, ...], room: str, rest: list[str], text: str, whole: str) -> tuple[Any, ...]:
    """Choose the parts by name, or change those chosen that have a name, or the one with a number, counted from 1."""
    base = _kinds()[room]
    if not rest:
        chosen = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
        return tuple(
            _nth(parts, name, chosen[:number].count(name)) or discovery.find(room, name, base)()  # type: ignore[misc]
            for number, name in enumerate(chosen)
        )
    name, *inner = rest
    meant = [number for number, part in enumerate(parts, start=1) if name in (part.name, str(number))]
    if not meant:
        option, names = whole.partition(".")[0], ",".join(part.name for part in parts) or "none"
        advice = f"count from 1 to {len(parts)} in" if name.isdecimal() else "add it to"
        raise PerennialError(
            f"--{whole} does not exist, because {name!r} is not chosen; {advice} --{option}, which is {names}."
        )
    if not inner:
        example = fields(parts[meant[0] - 1])[0].name
        raise PerennialError(f"--{whole} has settings of its own; set one, for example --{whole}.{example}.")
    return tuple(
        _set(part, inner, text, whole) if number in meant else part for number, part in enumerate(parts, start=1)
    )


def _nth(parts: tuple[Any, ...], name: str, number: int) -> Any:
    """The part of that name and number, counted from 0; the last one of the name if there are fewer, None if none."""
    named = [part for part in parts if part.name == name]
    return named[min(number, len(named) - 1)] if named else None


def parse(kind: Any, text: str, name: str) -> Any:
    """The value of type `kind` that `text` stands for; tuples are separated by commas.

    Raises:
        PerennialError: the text does not fit.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        inner = next(option for option in arguments if option is not type(None))
        return parse(inner, text, name)
    if origin is tuple:
        items = [item.strip() for item in text.split(",") if item.strip()]
        inner_kinds = [arguments[0]] * len(items) if len(arguments) == 2 and arguments[1] is ... else arguments
        if len(items) != len(inner_kinds):
            raise PerennialError(f"{name} is {text!r}, but it needs {len(inner_kinds)} values separated by commas.")
        return tuple(parse(inner, item, name) for inner, item in zip(inner_kinds, items, strict=True))
    if origin is Mapping:
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise PerennialError(f"{name} is {text!r}, but it should look like vision=4,language=8.")
        return {key.strip(): parse(arguments[1], value.strip(), name) for key, _, value in pairs}
    if origin is Literal:
        if text not in arguments:
            raise unknown(f"choice for {name}", text, map(str, arguments))
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            number = int(text) if kind is int else float(text)
            if math.isfinite(number):
                return number
    if kind is str:
        return text
    if dataclasses.is_dataclass(kind):
        raise PerennialError(f"{name} has settings of its own; set one, for example {name}.{fields(kind)[0].name}.")
    raise PerennialError(f"{name} is {json.dumps(text)}, but it must be {_article(kind)}.")


def fractions(text: str, name: str) -> tuple[float, ...]:
    """Numbers with commas between, as in "0,0.5,1".

    Raises:
        PerennialError: one is no number from 0 to 1.
    """
    with contextlib.suppress(ValueError):
        numbers = tuple(float(part) for part in text.split(","))
        if all(0 <= number <= 1 for number in numbers):
            return numbers
    raise PerennialError(f"{name} is {text!r}, but it must be numbers from 0 to 1 with commas between, as 0,0.5,1.")


def _article(kind: Any) -> str:
    texts = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}
    return texts.get(kind, "an object")
