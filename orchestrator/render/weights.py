"""Where pods read the model from: what a model's address becomes in a pod.

    demo                      the demonstration model, part of both images
    owner/name[@revision]     hf://..., each stage reads its own tensors by byte range
    s3:// gs:// hf:// http:// the same
    pvc://CLAIM[/PATH]        a volume, mounted read-only
    oci://IMAGE               an image that holds the checkpoint in /models (KServe's convention for modelcars)
    file:///PATH              a folder that is in the image already

Whatever the source, a stage reads only its own tensors; `storage_initializer` is the exception: KServe's own download
takes the whole checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knative.resources.names import is_dns_1123_subdomain
from orchestrator.render.deployment import Deployment, DeploymentError, Runtime, is_image

MOUNT = "/mnt/models"  # where KServe puts models; the same without KServe
VOLUME = "weights"
_STREAMED = ("s3", "gs", "gcs", "hf", "http", "https")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w][\w./-]*)?", re.ASCII)
_LOCATION = re.compile(r"[A-Za-z0-9]+://[^/\s]\S*")
_KSERVE_HUB_ID = re.compile(r"hf://[^/:]+/[^/:]+(:[^/]+)?")
_ALLOWED = "owner/name (a hub id), s3://, gs://, hf://, https://, pvc://CLAIM/PATH, oci://IMAGE, file:///PATH, or demo"


@dataclass(frozen=True, slots=True)
class Weights:
    """What a pod needs to read the model: `model` is for STAGE_MODEL and ORCHESTRATOR_MODEL, `why` for a comment.

    `settings` are keys of Knative's config-features that the volume needs. `storage_uri` is KServe's word for it."""

    model: str
    why: str
    volume: Mapping[str, Any] | None = None
    mount: Mapping[str, Any] | None = None
    init_container: Mapping[str, Any] | None = None
    storage_uri: str = ""
    features: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def weights(what: Deployment, runtime: Runtime) -> Weights:
    """For a pod that Knative, or KServe, starts. Raises DeploymentError for an address that no pod can read."""
    address = what.weights.uri or what.plan.model
    scheme, rest = _parted(address)
    if scheme in ("pvc", "oci"):
        return _mounted(what, runtime, scheme, rest)
    if what.weights.oci_as == "init-container":
        raise DeploymentError(f"--oci-as init-container copies a model image: it goes with oci://, not with {address}")
    location = _streamed(address, scheme)
    if what.weights.storage_initializer:
        return _downloaded(location, scheme, runtime)
    return Weights(location, "each stage reads its own tensors from here by byte range, nothing else")


def is_on_this_machine(address: str) -> bool:
    """Whether the model is a folder that only this machine sees."""
    return "://" not in address and (Path(address).is_absolute() or address.startswith(".") or Path(address).is_dir())


def _parted(address: str) -> tuple[str, str]:
    scheme, separator, rest = address.partition("://")
    return (scheme.lower(), rest) if separator else ("", address)


def _streamed(address: str, scheme: str) -> str:
    if scheme == "file":
        path = address[len("file://") :]
        if not path.startswith("/") or path == "/":
            raise DeploymentError(f"--weights {address}: file:// names a folder of the image, file:///models/mine")
        return path
    if scheme in _STREAMED:
        if not _LOCATION.fullmatch(address):
            raise DeploymentError(f"--weights {address}: {scheme}:// is followed by where the model is; see {_ALLOWED}")
        return address.rstrip("/")
    if scheme:
        raise DeploymentError(f"--weights {address}: a pod cannot read {scheme}://; it may be {_ALLOWED}")
    if address == "demo":
        return address
    if is_on_this_machine(address):
        raise DeploymentError(
            f"the model {address} is a folder of this machine, which no pod sees; say with --weights where the cluster "
            f"finds it: {_ALLOWED}"
        )
    if not _HUB_ID.fullmatch(address):
        raise DeploymentError(f"{address!r} names no model that a pod can read; it may be {_ALLOWED}")
    return f"hf://{address}"


def _downloaded(location: str, scheme: str, runtime: Runtime) -> Weights:
    """Through KServe's storage initializer: the whole checkpoint, into every pod, at every start."""
    if runtime != "kserve":
        raise DeploymentError("--storage-initializer is KServe's: it goes with --stages-as kserve only")
    if "://" not in location:
        raise DeploymentError(
            "--storage-initializer downloads s3://, gs://, hf:// or https://; this model is in a folder"
        )
    uri = location.replace("@", ":", 1) if scheme in ("", "hf") else location  # KServe writes hf://owner/name:revision
    if scheme == "gcs":
        raise DeploymentError(f"--storage-initializer: KServe knows gs://, not {location}")
    if uri.startswith("hf://") and not _KSERVE_HUB_ID.fullmatch(uri):
        raise DeploymentError(f"--storage-initializer: KServe takes hf://OWNER/NAME[:REVISION], not {uri}")
    why = (
        "KServe downloads the whole checkpoint into the pod first; without --storage-initializer a stage reads its part"
    )
    return Weights(MOUNT, why, storage_uri=uri)


def _mounted(what: Deployment, runtime: Runtime, scheme: str, rest: str) -> Weights:
    if what.weights.storage_initializer:
        raise DeploymentError(f"--storage-initializer has no use for {scheme}://: that is mounted, not downloaded")
    if scheme == "pvc":
        return _claim(runtime, rest)
    if not is_image(rest):
        raise DeploymentError(
            f"--weights oci://{rest}: oci:// is followed by an image, such as oci://ghcr.io/acme/llama:1"
        )
    if runtime == "kserve":
        # the modelcar shows its files a little after our container starts
        return Weights(
            MOUNT,
            "KServe runs the model image beside the stage; the node keeps it, so a wake downloads nothing",
            storage_uri=f"oci://{rest}",
            variables={"MODEL_INIT_MODE": "async"},
        )
    return _image_volume(rest) if what.weights.oci_as == "image-volume" else _init_container(rest)


def _claim(runtime: Runtime, rest: str) -> Weights:
    claim, _, path = rest.partition("/")
    path = path.strip("/")
    if not is_dns_1123_subdomain(claim) or ".." in path.split("/"):
        raise DeploymentError(
            f"--weights pvc://{rest}: expected pvc://CLAIM or pvc://CLAIM/PATH, CLAIM a volume claim's name"
        )
    why = f"a stage reads its own tensors from volume claim {claim}"
    if runtime == "kserve":
        return Weights(MOUNT, why, storage_uri=f"pvc://{claim}/{path}" if path else f"pvc://{claim}/")
    return Weights(
        MOUNT,
        why,
        volume={"name": VOLUME, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}},
        mount={"name": VOLUME, "mountPath": MOUNT, "readOnly": True, **({"subPath": path} if path else {})},
        features=("kubernetes.podspec-persistent-volume-claim",),
    )


def _image_volume(image: str) -> Weights:
    return Weights(
        f"{MOUNT}/models",
        "the model image is mounted as it is (Kubernetes with the feature gate ImageVolume); the node's cache keeps it",
        volume={"name": VOLUME, "image": {"reference": image, "pullPolicy": "IfNotPresent"}},
        mount={"name": VOLUME, "mountPath": MOUNT, "readOnly": True},
        features=("kubernetes.podspec-volumes-image",),
    )


def _init_container(image: str) -> Weights:
    mount = {"name": VOLUME, "mountPath": MOUNT}
    return Weights(
        MOUNT,
        "an init container copies the model out of its image: the whole of it, at every start of a pod",
        volume={"name": VOLUME, "emptyDir": {}},
        mount=mount,
        init_container={
            "name": "fetch-weights",
            "image": image,
            "command": ["cp", "-r", "/models/.", MOUNT],
            "volumeMounts": [mount],
        },
        features=("kubernetes.podspec-init-containers",),
    )
