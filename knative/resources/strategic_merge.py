"""Kubernetes' strategic merge: a patch over a pod or container, lists of named things merged by their names.

After k8s.io/apimachinery pkg/util/strategicpatch, for the patches that KServe makes (no directives).
"""

from __future__ import annotations

from collections.abc import Mapping

from knative.resources.trees import Tree, children

# list -> the field that tells its members apart; all other lists are replaced whole (patchMergeKey of core/v1)
MERGE_KEYS: Mapping[str, str] = {
    "env": "name",
    "imagePullSecrets": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumes": "name",
}


def strategic_merge(base: Mapping[str, object], patch: Mapping[str, object]) -> Tree:
    """`base` with what `patch` says; an empty text or list of it says nothing, as in Go's JSON."""
    merged = dict(base)
    for name, value in patch.items():
        before = base.get(name)
        if value in ("", []):
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            merged[name] = strategic_merge(before, value)
        elif name in MERGE_KEYS and before:
            merged[name] = _by_key(children(base, name), children(patch, name), MERGE_KEYS[name])
        else:
            merged[name] = value
    return merged


def _by_key(base: list[Tree], patch: list[Tree], key: str) -> list[Tree]:
    """Members of both are merged in the place of the first; new ones come last."""
    merged = [dict(member) for member in base]
    for member in patch:
        at = index_of(merged, key, member.get(key))
        if at is None:
            merged.append(dict(member))
        else:
            merged[at] = strategic_merge(merged[at], member)
    return merged


def index_of(members: list[Tree], key: str, value: object) -> int | None:
    return next((i for i, member in enumerate(members) if member.get(key) == value), None)
