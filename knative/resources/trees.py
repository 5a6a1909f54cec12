"""Typed access to the members of a sifted manifest (schema.sifted has checked their types)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

Tree = dict[str, object]


def child(tree: Mapping[str, object], name: str) -> Tree:
    """The mapping under `name`; empty when absent."""
    return cast(Tree, tree.get(name) or {})


def children(tree: Mapping[str, object], name: str) -> list[Tree]:
    return cast(list[Tree], tree.get(name) or [])


def text(tree: Mapping[str, object], name: str) -> str:
    return cast(str, tree.get(name, ""))


def texts(tree: Mapping[str, object], name: str) -> tuple[str, ...]:
    return tuple(cast(list[str], tree.get(name) or []))


def text_map(tree: Mapping[str, object], name: str) -> dict[str, str]:
    return cast(dict[str, str], tree.get(name) or {})


def whole(tree: Mapping[str, object], name: str, default: int = 0) -> int:
    return cast(int, tree.get(name, default))
