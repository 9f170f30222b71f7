"""Plain trees of keys and values: from YAML text, merged, and with one dotted key set."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Hashable, Mapping
from typing import Any

import yaml
from msgspec import Struct

from tunix_mlflow.config.schema import Config


def read_yaml(text: str) -> Any:
    """Return what YAML text contains.

    Raises:
        yaml.YAMLError: if it is no YAML, or a key is given twice.
    """
    return yaml.load(text, _UniqueKeys)


def merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `top` added or replaced, section by section."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key.

    Args:
        tree: is changed; sections that do not exist are made.
        key: of the configuration.
        value: text is read as YAML, except for a key that holds text; other values are taken as
            they are. A mapping for a section is merged into it.
    """
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        inner = node.get(part)
        node[part] = inner = dict(inner) if isinstance(inner, dict) else {}
        node = inner
    kinds = _types_of(key)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        value = _parse(value, is_text=str in kinds)
        if bool in kinds:
            value = yaml.SafeLoader.bool_values.get(str(value).lower(), value)
    is_section = any(isinstance(kind, type) and issubclass(kind, Struct) for kind in kinds)
    if is_section and isinstance(value, dict) and isinstance(node.get(last), dict):
        value = merge(node[last], value)
    node[last] = value


def _parse(text: str, *, is_text: bool) -> Any:
    """Return the value of an override; of a key that holds text only quotes and null are read."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if is_text and not quoted:
        return None if text == "null" else text
    try:
        value = yaml.load(text, _TextScalars) if text.strip() else text
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    return value if isinstance(value, str) or not is_text else text


def _types_of(key: str) -> set[Any]:
    """Return the types that the value of a dotted key may have; empty for an unknown key."""
    kinds: set[Any] = {Config}
    for part in key.split("."):
        hints: dict[str, Any] = {}
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Struct):
                hints |= typing.get_type_hints(kind)
        kinds = members(hints[part]) if part in hints else set()
    return kinds


def choices(key: str) -> list[Any]:
    """Return the values that a dotted key chooses from; none for other keys."""
    kind: Any = Config
    for part in key.split("."):
        fields = typing.get_type_hints(kind) if isinstance(kind, type) else {}
        kind = fields.get(part)
    return list(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else []


def members(annotation: Any) -> set[Any]:
    """Return the types that an annotation allows: those of a union, and of literals."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {m for inner in typing.get_args(annotation) for m in members(inner)}
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return {annotation}


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset, without keys that are given twice."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    met: set[Any] = set()
    for named, _ in node.value:
        key = loader.construct_object(named, deep=True)
        if not isinstance(key, Hashable):
            continue  # construct_mapping says so
        if key in met:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", node.start_mark
            )
        met.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class _TextScalars(yaml.SafeLoader):
    """YAML's safe subset, whose scalars stay text, except null: the schema tells their types."""


def _scalar(loader: _TextScalars, node: yaml.ScalarNode) -> str | None:
    return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)


_TextScalars.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _tag in ("null", "bool", "int", "float", "timestamp", "str", "merge", "value", "binary"):
    _TextScalars.add_constructor(f"tag:yaml.org,2002:{_tag}", _scalar)
