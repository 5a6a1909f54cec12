"""A manifest that every test may bend."""

from __future__ import annotations

from typing import Any

import pytest

Manifest = dict[str, Any]


@pytest.fixture
def manifest() -> Manifest:
    """A Service that Knative takes, with a little of everything."""
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "stage-0", "labels": {"app": "demo"}},
        "spec": {
            "template": {
                "metadata": {
                    "name": "stage-0-first",
                    "annotations": {"autoscaling.knative.dev/target": "2", "autoscaling.knative.dev/maxScale": "4"},
                },
                "spec": {
                    "containerConcurrency": 4,
                    "timeoutSeconds": 400,
                    "containers": [
                        {
                            "image": "registry.example/stagecraft/stage:1.2",
                            "args": ["--fast"],
                            "ports": [{"containerPort": 9000, "name": "h2c"}],
                            "env": [{"name": "MODEL", "value": "demo"}, {"name": "EMPTY"}],
                            "resources": {
                                "requests": {"cpu": "250m", "memory": "1Gi"},
                                "limits": {"cpu": 2, "nvidia.com/gpu": 1},
                            },
                            "readinessProbe": {"httpGet": {"path": "/readyz", "port": 9000}},
                            "livenessProbe": {"tcpSocket": {}},
                            "startupProbe": {"exec": {"command": ["true"]}, "failureThreshold": 30},
                            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
                        }
                    ],
                    "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}],
                },
            },
            "traffic": [
                {"latestRevision": True, "percent": 90},
                {"revisionName": "stage-0-old", "percent": 10, "tag": "old"},
            ],
        },
    }
