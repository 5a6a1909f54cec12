"""`stagecraft score` from text to result: rendered stages on one machine that a broker chains, and no orchestrator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [
    {"text": "To be, or not to be, that is the question.", "custom_id": "short \u00e9"},
    {"text": "O Romeo, Romeo! wherefore art thou Romeo? " * 8, "custom_id": "long"},
    {"tokens": [1, 2, 3]},
    {"tokens": [1] * 3000, "custom_id": "too long"},
]
LINES = "".join(f"{json.dumps(line)}\n" for line in TEXTS)
FORMS = ["triggers", "sequence"]


@pytest.fixture(scope="module")
def platform(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Forks replicas, so that stages are up in tenths of a second once torch is imported."""
    folder = tmp_path_factory.mktemp("platform")
    argv = [sys.executable, "-P", "-m", "orchestrator.cli", "local", "start", "--name", "scoring", "--json"]
    argv += ["--port", "0", "--drain-quiet", "0s", "--log-dir", str(folder), "--data-dir", str(folder / "data")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "STAGECRAFT_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(folder)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as run:
        assert run.stdout is not None
        try:
            assert run.stdout.readline()
            yield "scoring"
        finally:
            run.send_signal(signal.SIGINT)


@pytest.fixture(scope="module", params=FORMS)
def claims(request: pytest.FixtureRequest, platform: str, runtime: Path, tmp_path_factory: Any) -> Iterator[Path]:
    """The folder of claims of a chain of two stages that a broker holds together."""
    from typer.testing import CliRunner

    from orchestrator.cli import app

    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGECRAFT_RUNTIME_DIR", str(runtime))

        def run(*arguments: object) -> None:
            done = CliRunner().invoke(app, [str(argument) for argument in arguments])
            assert done.exit_code == 0, done.stderr

        run("plan", "demo", "--stages", 2, "-o", folder / "plan.yaml")
        run(
            "render", folder / "plan.yaml", "-o", folder / "all", "--orchestrator-as", "knative", "--cpu", "1",
            "--image-registry", "registry.example/acme", "--kv-memory", "64MiB", "--batch",
            "--scoring", request.param, "--claims", f"file://{folder}/claims",
        )  # fmt: skip
        wanted = ("stage-", "results", "broker", "trigger-score", "sequence", "trigger-batch-results")
        paths = [path for path in sorted((folder / "all").iterdir()) if path.name.startswith(wanted)]
        files = [word for path in paths for word in ("-f", path)]
        run("local", "apply", *files, "--platform", platform)
        yield folder / "claims"
        run("local", "delete", *files, "--platform", platform)


@pytest.fixture
def score(claims: Path, platform: str, stagecraft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """score("-o", ...) -> the outcome of the command for LINES."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "texts.jsonl").write_text(LINES)
    return lambda *options: stagecraft(
        "score", tmp_path / "texts.jsonl", "--tokenizer", "demo", "--platform", platform, *options
    )


@pytest.fixture(scope="module")
def whole_model() -> Callable[[dict[str, Any]], Any]:
    """A line -> (logprobs of its tokens but the first, hidden states after the norm), by the whole model."""
    import torch
    from transformers import AutoModelForCausalLM

    from functions.contract.location import DEMO_FOLDER
    from orchestrator.tokenizer import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    encode = load_tokenizer(str(DEMO_FOLDER)).encode

    @torch.inference_mode()
    def forward(line: dict[str, Any]) -> Any:
        ids = torch.tensor([line.get("tokens") or encode(line["text"])])
        table = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        return table.gather(1, ids[0, 1:, None])[:, 0], model.model(ids).last_hidden_state[0]

    return forward


def results_of(text: str) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    found = {line["custom_id"]: line["response"] for line in lines}
    assert len(found) == len(lines)
    return found


def test_scores_equal_those_of_the_whole_model_and_no_orchestrator_runs(
    score: Any, claims: Path, whole_model: Any, stagecraft: Any, platform: str, tmp_path: Path
) -> None:
    done = score("-o", tmp_path / "scores.jsonl")
    assert done.code == 0, done.err
    found = results_of((tmp_path / "scores.jsonl").read_text())
    assert set(found) == {"short \u00e9", "long", "line-000003", "too long"}
    assert found["too long"]["status_code"] == 422
    assert found["too long"]["body"]["error"]["code"] == "prompt_too_long"
    for line in TEXTS[:3]:
        (answer,) = found[str(line.get("custom_id", "line-000003"))]["body"]["data"]
        logprobs, _ = whole_model(line)
        assert answer["logprobs"][1:] == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert answer["sum"] == pytest.approx(float(logprobs.sum()), abs=1e-3)
    pods = stagecraft("local", "get", "pods", "-o", "name", "--platform", platform).out.splitlines()
    assert {name.rpartition("/")[2].rsplit("-0000", 1)[0] for name in pods} <= {
        "demo-stage-0", "demo-stage-1", "demo-results",
    }  # fmt: skip
    assert any(claims.iterdir())  # the long text went by a claim
    assert not (tmp_path / "scores.jsonl.score").exists()


def test_embeddings_go_to_standard_output(score: Any, whole_model: Any) -> None:
    done = score("--embeddings", "--pooling", "last")
    assert done.code == 0, done.err
    (answer,) = results_of(done.out)["long"]["body"]["data"]
    _, states = whole_model(TEXTS[1])
    assert answer["embedding"] == pytest.approx(states[-1].tolist(), abs=1e-4)


def test_what_was_sent_without_waiting_is_collected_by_the_same_command(score: Any, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    sent = score("-o", output, "--no-wait")
    assert (sent.code, sent.out.startswith("score-")) == (0, True), sent.err
    other = score("-o", output, "--embeddings")
    assert (other.code, "belongs to score-" in other.err) == (2, True)
    done = score("-o", output)
    assert (done.code, "going on with" in done.err) == (0, True), done.err
    assert len(results_of(output.read_text())) == len(TEXTS)
    again = score("-o", output)
    assert (again.code, "exists already" in again.err) == (2, True)


def test_bad_lines_are_told_and_do_not_stop_the_rest(score: Any, tmp_path: Path) -> None:
    bad = ["{", "[1]", '{"text": 5}', '{"text": "a", "tokens": [1]}', "{}", '{"tokens": []}', '{"tokens": [-1]}']
    bad += ['{"tokens": [1], "custom_id": ""}', '{"tokens": [1], "custom_id": "a\\n"}', "\udcff"]
    good = ['{"tokens": [1], "custom_id": "a"}', "", '{"tokens": [2], "custom_id": "a"}']
    text = "\n".join([*bad, *good])
    (tmp_path / "texts.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    done = score("-o", tmp_path / "scores.jsonl")
    assert done.code == 1
    assert "11 lines were left out" in done.err
    errors = [json.loads(line) for line in (tmp_path / "scores.jsonl.score.errors.jsonl").read_text().splitlines()]
    assert [one["error"]["line"] for one in errors] == [*range(1, 11), 13]
    assert "line 1: not valid JSON: Expecting property name" in errors[0]["error"]["message"]
    assert errors[0]["error"]["message"].endswith(" at character 2")
    assert list(results_of((tmp_path / "scores.jsonl").read_text())) == ["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokenizer", "/nowhere"), "--tokenizer"),
        (("--broker", "http://127.0.0.1:1/a/b", "--results", "http://127.0.0.1:1/"), "--model"),
        (("-o", "/nowhere/out.jsonl"), "no folder"),
        (("--broker", "nonsense"), "--broker"),
    ],
)
def test_wrong_arguments_are_named(
    stagecraft: Any, tmp_path: Path, options: tuple[str, ...], message: str, runtime: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text(LINES)
    done = stagecraft("score", tmp_path / "texts.jsonl", *options)
    assert (done.code, message in done.err) == (2, True), done.err
