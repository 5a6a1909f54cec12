"""Volumes of a revision: checked as Knative's webhook does, so that a manifest that passes here passes there.

After pkg/apis/serving/k8s_validation.go (ValidateVolumes, validateVolumeMounts). A process of one machine sees the
machine's own files: no volume has an effect.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from knative.resources.config_maps import FeaturesConfig
from knative.resources.field_errors import Problems
from knative.resources.names import is_dns_1123_label
from knative.resources.quantities import parse_quantity
from knative.resources.trees import Tree, child, children, text

_RESERVED_PATHS = frozenset({"/", "/dev", "/dev/log"})
_ALWAYS = ("secret", "configMap", "projected")
_WRITABLE = ("emptyDir", "persistentVolumeClaim", "ephemeral")
# source -> flag of config-features, and how the complaint begins
_FLAGGED = {
    "emptyDir": ("kubernetes.podspec-volumes-emptydir", "EmptyDir volume support is disabled, but found EmptyDir"),
    "hostPath": ("kubernetes.podspec-volumes-hostpath", "HostPath volume support is disabled, but found HostPath"),
    "csi": ("kubernetes.podspec-volumes-csi", "CSI volume support is disabled, but found CSI"),
    "ephemeral": (
        "kubernetes.podspec-volumes-ephemeral", "Ephemeral volume support is disabled, but found ephemeral",
    ),
    "image": ("kubernetes.podspec-volumes-image", "Image volume support is disabled, but found image"),
}  # fmt: skip


def default_mounts(pod: Tree, container: Tree) -> None:
    """Mounts of volumes that cannot be written are read-only; changes `container`."""
    volumes = children(pod, "volumes")
    writable = {text(volume, "name") for volume in volumes if any(source in volume for source in _WRITABLE)}
    mounts = [dict(mount) for mount in children(container, "volumeMounts")]
    for mount in mounts:
        if text(mount, "name") not in writable:
            mount["readOnly"] = True
    if mounts:
        container["volumeMounts"] = mounts


def check_volumes(pod: Tree, path: str, features: FeaturesConfig, problems: Problems) -> dict[str, Tree]:
    """The volumes of the pod spec at `path`, by name."""
    mounted = {text(m, "name") for c in children(pod, "containers") for m in children(c, "volumeMounts")}
    volumes: dict[str, Tree] = {}
    for i, volume in enumerate(children(pod, "volumes")):
        here, name = f"{path}.volumes[{i}]", text(volume, "name")
        if name in volumes:
            problems.add(f'duplicate volume name "{name}"', f"{here}.name")
        if name and name not in mounted:
            problems.add(f'volume with name "{name}" not mounted', f"{here}.name")
        _check_volume(volume, here, features, problems)
        volumes[name] = volume
    if volumes:
        problems.warn("volumes have no effect: a process sees the files of this machine", f"{path}.volumes")
    return volumes


def _check_volume(volume: Tree, path: str, features: FeaturesConfig, problems: Problems) -> None:
    name = text(volume, "name")
    if not name:
        problems.missing(f"{path}.name")
    elif not is_dns_1123_label(name):
        problems.invalid(name, f"{path}.name")
    _check_flags(volume, path, features, problems)
    _check_sources(volume, path, features, problems)
    _check_empty_dir(child(volume, "emptyDir"), f"{path}.emptyDir", problems)
    for source in ("secret", "configMap"):
        _check_items(child(volume, source), f"{path}.{source}", problems)


def _check_flags(volume: Tree, path: str, features: FeaturesConfig, problems: Problems) -> None:
    for source, (flag, complaint) in _FLAGGED.items():
        if source in volume and not features.enabled(flag):
            problems.add(f"{complaint} volume {text(volume, 'name')}", f"{path}.{source}")
    if "persistentVolumeClaim" not in volume:
        return
    claim, here = child(volume, "persistentVolumeClaim"), f"{path}.persistentVolumeClaim"
    found = f"but found persistent volume claim {claim.get('claimName', '')}"
    if not features.enabled("kubernetes.podspec-persistent-volume-claim"):
        problems.add(f"Persistent volume claim support is disabled, {found}", here)
    if claim.get("readOnly") is not True and not features.enabled("kubernetes.podspec-persistent-volume-write"):
        problems.add(f"Persistent volume write support is disabled, {found} that is not read-only", here)


def _check_sources(volume: Tree, path: str, features: FeaturesConfig, problems: Problems) -> None:
    every = (*_ALWAYS, *_FLAGGED, "persistentVolumeClaim")
    given = [name for name in every if name in volume]
    if len(given) > 1:
        problems.add("expected exactly one, got both", *(f"{path}.{name}" for name in given))
    elif not given:
        allowed = [*_ALWAYS, *(name for name, (flag, _) in _FLAGGED.items() if features.enabled(flag))]
        problems.add("expected exactly one, got neither", *(f"{path}.{name}" for name in allowed))


def _check_empty_dir(source: Tree, path: str, problems: Problems) -> None:
    if source.get("medium", "") not in ("", "Memory"):
        problems.invalid(source["medium"], f"{path}.medium")
    if "sizeLimit" in source:
        problems.parsed(parse_quantity, source["sizeLimit"], f"{path}.sizeLimit")


def _check_items(source: Tree, path: str, problems: Problems) -> None:
    for i, item in enumerate(children(source, "items")):
        for name in ("key", "path"):
            if not text(item, name):
                problems.missing(f"{path}.items[{i}].{name}")


def check_mounts(
    container: Tree, path: str, volumes: Mapping[str, Tree], features: FeaturesConfig, problems: Problems
) -> None:
    """volumeMounts of the container at `path`."""
    seen: set[str] = set()
    for i, mount in enumerate(children(container, "volumeMounts")):
        here, name = f"{path}.volumeMounts[{i}]", text(mount, "name")
        if name not in volumes:
            problems.add("volumeMount has no matching volume", f"{here}.name")
        _check_mount_path(text(mount, "mountPath"), f"{here}.mountPath", seen, problems)
        flag = "kubernetes.podspec-volumes-mount-propagation"
        if "mountPropagation" in mount and not features.lets_pass(flag):
            problems.disallowed(f"{here}.mountPropagation")
        volume = volumes.get(name, {})
        if child(volume, "persistentVolumeClaim").get("readOnly") is True and mount.get("readOnly") is not True:
            problems.add("volume is readOnly but volume mount is not", f"{here}.readOnly")


def _check_mount_path(mount_path: str, path: str, seen: set[str], problems: Problems) -> None:
    clean = posixpath.normpath(mount_path)
    if not mount_path:
        problems.missing(path)
    elif clean in _RESERVED_PATHS:
        problems.add(f'mountPath "{clean}" is a reserved path', path)
    elif not posixpath.isabs(mount_path):
        problems.invalid(mount_path, path)
    elif clean in seen:
        problems.invalid(f'"{mount_path}" must be unique', path)
    seen.add(clean)
