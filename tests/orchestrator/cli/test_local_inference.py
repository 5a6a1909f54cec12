"""`stagecraft local` with KServe's kinds: a folder as a cluster gets it, listed and removed as kubectl does it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("platform")

SERVER = "import http.server, os; http.server.test(port=int(os.environ['PORT']), bind='127.0.0.1')"
FOLDER = {
    "10-runtime.yaml": f"""\
apiVersion: serving.kserve.io/v1alpha1
kind: ServingRuntime
metadata: {{name: plain}}
spec:
  supportedModelFormats: [{{name: huggingface}}]
  containers:
  - name: kserve-container
    image: stagecraft/process
    command: ["{sys.executable}", -S, -c, "{SERVER}"]
""",
    "20-bard.yaml": """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: bard}
spec:
  predictor:
    model: {modelFormat: {name: huggingface}, runtime: plain}
""",
    "30-account.yaml": "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: reader}\n",
    "kustomization.yaml": "resources: [10-runtime.yaml, 20-bard.yaml]\n",
}


def test_a_folder_with_an_inference_service(stagecraft: Callable[..., Any], tmp_path: Path) -> None:
    for name, text in FOLDER.items():
        (tmp_path / name).write_text(text)
    done = stagecraft("local", "apply", "-f", tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "servingruntime.serving.kserve.io/plain created",
        "inferenceservice.serving.kserve.io/bard created",
    ]
    assert "skipped serviceaccount/reader" in done.err
    assert "skipped kustomization/" in done.err
    assert re.search(r"inferenceservice bard is ready at http://\S+/default/bard\n", done.err)

    head, row = stagecraft("local", "get", "isvc").out.splitlines()
    assert head.split() == ["NAME", "URL", "READY", "LATEST", "LATESTREADYREVISION", "AGE"]
    assert re.fullmatch(r"bard +http://\S+/default/bard +True +100 +bard-predictor-00001 +\d+s", row)
    assert stagecraft("local", "get", "ksvc").out.splitlines()[1].split()[0] == "bard-predictor"
    runtimes = stagecraft("local", "get", "servingruntimes").out.splitlines()
    assert [line.split()[:3] for line in runtimes] == [
        ["NAME", "DISABLED", "MODELTYPE"], ["plain", "huggingface", "kserve-container"],
    ]  # fmt: skip

    gone = stagecraft("local", "delete", "-f", tmp_path)
    assert gone.code == 0, gone.err
    assert gone.out.splitlines() == [
        'inferenceservice.serving.kserve.io "bard" deleted',
        'servingruntime.serving.kserve.io "plain" deleted',
    ]
    assert stagecraft("local", "get", "ksvc").out == ""
