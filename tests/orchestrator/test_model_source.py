"""Where models come from, the hub included: a real HTTP server speaks its endpoints, real huggingface_hub asks it.

huggingface_hub reads its environment once, at import, so each case runs in an interpreter of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from functions.contract.checkpoint import CheckpointError, open_checkpoint
from orchestrator.model_source import (
    DEMO_FOLDER,
    ModelSourceError,
    check_index,
    open_model,
    resolve_model,
)

ROOT = Path(__file__).resolve().parents[2]
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
TOKEN = "hf_test"

RESOLVE = """
import sys
from orchestrator.model_source import ModelSourceError, resolve_model
try:
    print(resolve_model(sys.argv[1]).location)
except ModelSourceError as error:
    sys.exit(f"refused: {error}")
"""
OPEN = """
import sys
from functions.contract.checkpoint import CheckpointError
from orchestrator.model_source import ModelSourceError, open_model
try:
    found, checkpoint = open_model(sys.argv[1])
    print(found.location, found.name, len(checkpoint.tensors))
except (CheckpointError, ModelSourceError) as error:
    sys.exit(f"refused: {error}")
"""


@dataclass
class Hub:
    """A hub of one repository, tests/tiny, and a gated one, tests/gated, with the same files."""

    folder: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)
    sent_bytes: dict[str, int] = field(default_factory=dict)
    broken: bool = False

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """The endpoints of https://huggingface.co/docs/hub/api that downloads use."""

        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self._serve()

        def _serve(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append(f"{self.command} {path}")
            if hub.broken:
                return self._answer(502, b"bad gateway")
            api = re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree|paths-info)/([^/]+))?(/.*)?", path)
            file = re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.+)", path)
            match = api or file
            if match is None or match[1] not in ("tests/tiny", "tests/gated", "tests/private"):
                return self._refuse(404 if self.headers.get("authorization") else 401, "RepoNotFound")
            if match[1] == "tests/private" and self.headers.get("authorization") != f"Bearer {TOKEN}":
                return self._refuse(401, "RepoNotFound")
            if (api[3] if api else file[2]) not in (None, "main", COMMIT):  # type: ignore[index]
                return self._refuse(404, "RevisionNotFound")
            if api:
                return self._facts(api)
            if match[1] == "tests/gated":
                return self._refuse(403, "GatedRepo")
            return self._file(hub.folder / match[3])

        def _facts(self, api: re.Match[str]) -> None:
            entries = [
                {
                    "type": "file",
                    "path": str(path.relative_to(hub.folder)),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in hub.files()
            ]
            if api[2] in ("tree", "paths-info"):
                return self._answer(200, json.dumps(entries).encode())
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            return self._answer(200, json.dumps({"id": api[1], "sha": COMMIT, "siblings": siblings}).encode())

        def _file(self, path: Path) -> None:
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            status, total = 200, len(data)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            if wanted:
                start, end = int(wanted[1]), int(wanted[2] or total - 1)
                status, data = 206, data[start : end + 1]
                headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{total}"
            if self.command == "GET":
                hub.sent_bytes[path.name] = hub.sent_bytes.get(path.name, 0) + len(data)
            return self._answer(status, data, headers)

        def _refuse(self, status: int, code: str) -> None:
            self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    return Handler


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks in several files, wide enough that its weights outweigh all headers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="600KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"not for us")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"not for us either")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    hub = Hub(published)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Of a person whose hub is ours and whose cache is empty."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **own, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}


def ask(code: str, model: str, environment: dict[str, str]) -> str:
    """What the code prints about the model, or, from `refused:` on, why it did not."""
    done = subprocess.run([sys.executable, "-c", code, model], env=environment, capture_output=True, text=True)
    if done.returncode:
        text = done.stderr.strip()
        assert "Traceback" not in text, text
        return text[text.index("refused:") :]
    return done.stdout.strip()


def weights_bytes(sent: dict[str, int]) -> int:
    return sum(size for name, size in sent.items() if name.endswith(".safetensors"))


def test_a_download_brings_what_serving_needs_and_nothing_else(hub: Hub, environment: dict[str, str]) -> None:
    folder = Path(ask(RESOLVE, "tests/tiny", environment))
    wanted = {p.name for p in hub.folder.iterdir() if p.is_file()} - {"pytorch_model.bin"}
    assert {p.name for p in folder.rglob("*")} == wanted
    assert folder.is_relative_to(environment["HF_HOME"])
    assert open_checkpoint(str(folder)).tensors.keys() == open_checkpoint(str(hub.folder)).tensors.keys()


def test_a_second_download_sends_no_file_again(hub: Hub, environment: dict[str, str]) -> None:
    first = ask(RESOLVE, "tests/tiny@main", environment)
    hub.sent_bytes.clear()
    assert ask(RESOLVE, f"tests/tiny@{COMMIT}", environment) == first
    assert hub.sent_bytes == {}


def test_planning_reads_headers_and_no_weights(hub: Hub, environment: dict[str, str]) -> None:
    location, name, tensors = ask(OPEN, "tests/tiny", environment).split()
    assert (location, name) == (f"hf://tests/tiny@{COMMIT}", "tiny")
    checkpoint = open_checkpoint(str(hub.folder))
    assert int(tensors) == len(checkpoint.tensors)
    headers = sum(min(t.start for t in checkpoint.tensors.values() if t.file == file) for file in files_of(hub.folder))
    assert weights_bytes(hub.sent_bytes) == headers
    assert headers * 10 < sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def files_of(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.safetensors")]


def test_the_command_line_plans_from_the_hub(hub: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys, typer; from orchestrator.cli.plan import plan; app = typer.Typer(); app.command()(plan); "
        "app([sys.argv[1], '--stages', '2', '--json'])"
    )
    facts = json.loads(ask(code, "tests/tiny@main", environment))
    assert facts["model"] == "tests/tiny@main"
    assert facts["name"] == "tiny"
    assert [stage["blocks"] for stage in facts["stages"]] == ["0:1", "1:2"]
    assert weights_bytes(hub.sent_bytes) < 10_000


def test_offline_works_from_the_cache(hub: Hub, environment: dict[str, str]) -> None:
    folder = ask(RESOLVE, "tests/tiny", environment)
    hub.requests.clear()
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert ask(RESOLVE, "tests/tiny", offline) == folder
    assert ask(OPEN, "tests/tiny", offline).split()[0] == folder
    assert hub.requests == []


@pytest.mark.parametrize("code", [RESOLVE, OPEN], ids=["resolve", "open"])
def test_the_cache_serves_when_the_hub_is_down(code: str, hub: Hub, environment: dict[str, str]) -> None:
    folder = ask(RESOLVE, "tests/tiny", environment)
    unreachable = {**environment, "HF_ENDPOINT": "http://127.0.0.1:1"}
    assert ask(code, "tests/tiny", unreachable).split()[0] == folder
    hub.broken = True
    assert ask(code, "tests/tiny", environment).split()[0] == folder


@pytest.mark.parametrize("code", [RESOLVE, OPEN], ids=["resolve", "open"])
@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("tests/absent", {}, r"neither a folder tests/absent nor a model .* check the spelling, .* HF_TOKEN"),
        ("tests/private", {}, r"neither a folder tests/private nor a model .* HF_TOKEN"),
        ("tests/gated", {}, r"tests/gated is gated: .* Accept them at http://[\d.:]+/tests/gated and set HF_TOKEN"),
        ("tests/tiny@v9", {}, r"tests/tiny has no revision v9 .* branch, tag or commit"),
        (f"tests/tiny@{OTHER_COMMIT}", {}, rf"tests/tiny has no revision {OTHER_COMMIT}"),
        ("tests/tiny", {"HF_HUB_OFFLINE": "1"}, r"not \(completely\) in the cache .* HF_HUB_OFFLINE forbids"),
        ("tests/tiny", {"HF_ENDPOINT": "http://127.0.0.1:1"}, r"http://127.0.0.1:1 cannot be reached .* HF_ENDPOINT"),
    ],
    ids=["absent", "private", "gated", "no-branch", "no-commit", "offline", "network-down"],
)
def test_what_the_hub_refuses_is_explained(
    code: str, model: str, more: dict[str, str], said: str, environment: dict[str, str]
) -> None:
    text = ask(code, model, {**environment, **more})
    assert re.match(f"refused: .*{said}", text), text
    assert "\n" not in text


def test_a_token_opens_a_private_model(environment: dict[str, str]) -> None:
    assert COMMIT in ask(RESOLVE, "tests/private", {**environment, "HF_TOKEN": TOKEN})


def test_a_full_disk_is_explained(environment: dict[str, str]) -> None:
    """The limit on the size of files stands for the disk: both end a write with an OSError."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + RESOLVE
    assert re.match(r"refused: there is no room for tests/tiny in .* HF_HOME", ask(limited, "tests/tiny", environment))


def test_a_folder_is_itself_and_absolute(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(published.parent)
    found = resolve_model(published.name)
    assert (found.location, found.name, found.revision) == (str(published), published.name, None)


def test_a_url_is_itself() -> None:
    assert resolve_model("s3://bucket/llama/").location == "s3://bucket/llama"
    assert resolve_model("hf://owner/llama@main").name == "llama"


def test_a_checkpoint_is_opened_by_url(published: Path) -> None:
    found, checkpoint = open_model(f"file://{published}")
    assert found.name == published.name
    assert checkpoint.block_count == 2


def test_an_unknown_kind_of_url_is_explained() -> None:
    with pytest.raises((ModelSourceError, CheckpointError), match="nowhere"):
        open_model("nowhere://x/y")


def test_demo_is_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("demo").location == str(DEMO_FOLDER)
    (tmp_path / "demo").mkdir()
    assert resolve_model("demo").location == str(tmp_path / "demo"), "a folder of that name comes first"


@pytest.mark.parametrize(
    "model", ["", " ", "no-such-folder", "./x/y", "/no/such", "a/b/c", "owner/name@", "a\nb/c", "~"]
)
def test_what_is_no_model_is_refused_with_what_is_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    with pytest.raises(ModelSourceError, match=r"MODEL is a folder .* hub id owner/name"):
        resolve_model(model)


def test_a_file_is_refused_in_favour_of_its_folder(published: Path) -> None:
    with pytest.raises(ModelSourceError, match="name the folder"):
        resolve_model(str(published / "config.json"))


def test_tensors_that_only_the_index_knows_are_named(published: Path, tmp_path: Path) -> None:
    for path in published.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.layers.1.extra.weight"] = files_of(tmp_path)[0]
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"lacks tensors .* model\.layers\.1\.extra\.weight; .* incomplete"):
        check_index(open_checkpoint(str(tmp_path)))
