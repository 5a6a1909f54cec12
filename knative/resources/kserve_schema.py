"""The fields of KServe's InferenceService and ServingRuntime that end up in a Knative Service.

After the definitions of serving.kserve.io (config/crd/full of kserve/kserve). What Knative's masks leave out of a pod
is known as `refused`, as in schema.py; parts that one machine does not run are open, since it says so of the whole.
"""

from __future__ import annotations

from knative.resources.schema import (
    BOOLEAN,
    CONTAINER,
    INTEGER,
    METADATA,
    OPEN,
    OPEN_ARRAY,
    OPEN_OBJECT,
    POD_SPEC,
    STRING,
    Shape,
    array,
    mapping,
    record,
)

# predictors named after a framework, which KServe rewrites as `model`
FRAMEWORKS = (
    "huggingface", "lightgbm", "onnx", "paddle", "pmml", "pytorch", "sklearn", "tensorflow", "triton", "xgboost",
)  # fmt: skip

# set on a Knative revision by fields of KServe's own (`timeout`), or not at all
_NOT_IN_POD = frozenset({"containerConcurrency", "timeoutSeconds", "responseStartTimeoutSeconds", "idleTimeoutSeconds"})
POD_FIELDS = {name: shape for name, shape in POD_SPEC.fields.items() if name not in _NOT_IN_POD}

_REFUSED_IN_POD = " ".join(sorted(POD_SPEC.refused - {"ephemeralContainers"}))  # which KServe does not know
_REFUSED_IN_CONTAINER = " ".join(sorted(CONTAINER.refused))

_MODEL = record(
    {
        **CONTAINER.fields,
        "confidential": OPEN_OBJECT,
        "modelFormat": record({"name": STRING, "version": STRING}),
        "protocolVersion": STRING,
        "runtime": STRING,
        "runtimeVersion": STRING,
        "storage": record({"key": STRING, "parameters": mapping(STRING), "path": STRING, "schemaPath": STRING}),
        "storageUri": STRING,
    },
    refused=_REFUSED_IN_CONTAINER,
)
_PREDICTOR = record(
    {
        **POD_FIELDS,
        **dict.fromkeys(FRAMEWORKS, OPEN_OBJECT),
        "annotations": mapping(STRING),
        "autoScaling": OPEN_OBJECT,
        "batcher": OPEN_OBJECT,
        "canaryTrafficPercent": INTEGER,
        "containerConcurrency": INTEGER,
        "deploymentStrategy": OPEN_OBJECT,
        "labels": mapping(STRING),
        "logger": OPEN_OBJECT,
        "maxReplicas": INTEGER,
        "minReplicas": INTEGER,
        "model": _MODEL,
        "name": STRING,
        "scaleMetric": STRING,
        "scaleMetricType": STRING,
        "scaleTarget": INTEGER,
        "storageContainerName": STRING,
        "storageUris": array(record({"mountPath": STRING, "uri": STRING})),
        "timeout": INTEGER,
        "workerSpec": OPEN_OBJECT,
    },
    refused=_REFUSED_IN_POD,
)
INFERENCE_SERVICE: Shape = record(
    {
        "apiVersion": STRING,
        "kind": STRING,
        "metadata": METADATA,
        "spec": record(
            {"canary": OPEN_OBJECT, "explainer": OPEN_OBJECT, "predictor": _PREDICTOR, "transformer": OPEN_OBJECT}
        ),
        "status": OPEN,  # what `get -o yaml` of a cluster prints; nothing of it is used
    }
)

# of a ServingRuntime, what is merged into the pod of a predictor (pkg/controller/v1beta1/inferenceservice/utils)
MERGED_POD_FIELDS = (
    "affinity", "imagePullSecrets", "nodeSelector", "resourceClaims", "schedulerName", "tolerations", "volumes",
)  # fmt: skip

SERVING_RUNTIME: Shape = record(
    {
        "apiVersion": STRING,
        "kind": STRING,
        "metadata": METADATA,
        "spec": record(
            {
                **{name: POD_FIELDS.get(name, OPEN_ARRAY) for name in MERGED_POD_FIELDS},
                "annotations": mapping(STRING),
                "builtInAdapter": OPEN_OBJECT,
                "containers": array(CONTAINER),
                "disabled": BOOLEAN,
                "grpcDataEndpoint": STRING,
                "grpcEndpoint": STRING,
                "hostIPC": BOOLEAN,
                "httpDataEndpoint": STRING,
                "labels": mapping(STRING),
                "multiModel": BOOLEAN,
                "protocolVersions": array(STRING),
                "replicas": INTEGER,
                "storageHelper": OPEN_OBJECT,
                "supportedModelFormats": array(
                    record({"autoSelect": BOOLEAN, "name": STRING, "priority": INTEGER, "version": STRING})
                ),
                "workerSpec": OPEN_OBJECT,
            }
        ),
        "status": OPEN,
    }
)
