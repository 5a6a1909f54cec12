"""The container images, where no container engine runs: their files as text, their steps in plain environments.

`Image` reads a Dockerfile; `served` builds what an image contains out of links to installed packages and runs its
ENTRYPOINT; the test marked slow runs the very install steps in a fresh environment.
"""

from __future__ import annotations

import ast
import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ORCHESTRATOR = ROOT / "orchestrator" / "Dockerfile"
# the last build stage of a Dockerfile is what it builds by itself; the others are named by --target
DOCKERFILES = {"stage": ROOT / "functions" / "Dockerfile", "orchestrator": ORCHESTRATOR, "results": ORCHESTRATOR}
ENTRY_POINTS = {
    "stage": ("functions.__main__", "functions.main"),
    "orchestrator": ("orchestrator.server",),
    "results": ("orchestrator.batches.server",),
}
REQUIREMENTS = {"results": "orchestrator"}  # the same environment
FOREIGN = {
    "stage": {"kserve", "fastapi", "pandas", "kubernetes", "pytest", "mypy"},
    "orchestrator": {"torch", "transformers", "accelerate", "functions-framework", "pytest", "mypy"},
    "results": {"torch", "transformers", "accelerate", "functions-framework", "pytest", "mypy"},
}
VENV = "/opt/venv"


# --- reading


@dataclass(frozen=True)
class Instruction:
    """One instruction; `stage` counts the FROMs before it, from 0, and is -1 before the first."""

    keyword: str
    rest: str
    stage: int


def read_dockerfile(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found, stage = [], -1
    for line in filter(str.strip, whole.splitlines()):
        keyword, _, rest = line.partition(" ")
        stage += keyword == "FROM"
        found.append(Instruction(keyword, rest.strip(), stage))
    return found


class Image:
    def __init__(self, name: str) -> None:
        self.name = name
        self.instructions = read_dockerfile(DOCKERFILES[name])
        froms = [rest.split(" AS ") for rest in self.all("FROM")]
        self.names = names = {alias[0]: stage for stage, (_, *alias) in enumerate(froms) if alias}
        stage = names["results"] if name == "results" else len(froms) - 1
        self.final = [stage]  # the stage that is built, and those that it starts from
        while froms[stage][0] in names:
            stage = names[froms[stage][0]]
            self.final.append(stage)

    def at_the_end(self, keyword: str) -> list[str]:
        """What follows `keyword` in the stages that make up the image."""
        return [rest for stage in reversed(self.final) for rest in self.all(keyword, stage=stage)]

    def all(self, keyword: str, *, stage: int | None = None) -> list[str]:
        """What follows `keyword`, in order, in all stages or in one."""
        return [i.rest for i in self.instructions if i.keyword == keyword and stage in (None, i.stage)]

    def copies(self, *, stage: int | None = None) -> list[tuple[str, str]]:
        """(source, target) of every COPY out of the build context."""
        found = []
        for rest in self.all("COPY", stage=stage):
            if not rest.startswith("--from="):
                *sources, target = shlex.split(rest)
                found += [(source, target) for source in sources]
        return found

    @property
    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for rest in self.at_the_end("ENV") for pair in shlex.split(rest))

    @property
    def entrypoint(self) -> list[str]:
        return [str(word) for word in ast.literal_eval(self.at_the_end("ENTRYPOINT")[-1])]


@pytest.fixture(params=list(DOCKERFILES))
def image(request: pytest.FixtureRequest) -> Image:
    return Image(request.param)


# --- the text of the Dockerfiles


def test_the_base_is_pinned_and_every_stage_starts_from_it(image: Image) -> None:
    base = next(rest for rest in image.all("ARG", stage=-1) if rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.11[\w.-]*", base)
    assert {rest.split(" AS ")[0] for rest in image.all("FROM")} - {"runtime"} == {"${BASE}"}
    assert "latest" not in DOCKERFILES[image.name].read_text()


def test_the_user_is_a_number_and_not_root(image: Image) -> None:
    (user,) = image.at_the_end("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_nothing_is_installed_or_downloaded_in_the_final_stage(image: Image) -> None:
    assert image.at_the_end("RUN") == []
    assert image.all("ADD") == []
    assert not re.search(r"\bcurl\b|\bwget\b", DOCKERFILES[image.name].read_text())
    # a compiler is in a stage by itself, from which nothing is taken but what was compiled
    assert {i.stage for i in image.instructions if re.search(r"apt-get|\bgcc\b", i.rest)} <= {image.names.get("kernel")}
    taken = [rest for rest in image.all("COPY") if rest.startswith("--from=kernel ")]
    assert all(re.fullmatch(r"--from=kernel \S+\.so \S+", rest) for rest in taken)


def test_it_can_run_with_a_root_file_system_that_is_read_only(image: Image) -> None:
    assert image.environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert image.environment["HOME"] == "/tmp"
    assert image.environment["HF_HOME"].startswith("/tmp/")
    assert any("compileall" in run for run in image.all("RUN"))


def test_no_setting_is_baked_in(image: Image) -> None:
    assert [name for name in image.environment if name.startswith(("STAGE_", "ORCHESTRATOR_", "PORT"))] == []


def test_versions_come_from_constraints(image: Image) -> None:
    installs = [part for run in image.all("RUN") for part in run.split(";") if "pip install" in part]
    assert installs
    assert all("-c constraints.txt" in part for part in installs)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"VARIANT": "cpu"}, "--index-url https://download.pytorch.org/whl/cpu"),
        ({"VARIANT": "cuda"}, ""),
        ({"VARIANT": "cuda", "TORCH_INDEX": "https://example.com/cu"}, "--index-url https://example.com/cu"),
        ({"VARIANT": "cpu", "TORCH_INDEX": "https://example.com/cpu"}, "--index-url https://example.com/cpu"),
        ({"VARIANT": "gpu"}, None),
    ],
)
def test_the_variant_decides_where_torch_comes_from(
    tmp_path: Path, arguments: dict[str, str], expected: str | None
) -> None:
    (run,) = [run for run in Image("stage").all("RUN") if "VARIANT" in run]
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text('#!/bin/sh\necho "$@"\n')
    pip.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", run.replace(VENV, str(tmp_path))], capture_output=True, text=True, env=arguments, check=False
    )
    if expected is None:
        assert done.returncode == 1
        assert "VARIANT must be cpu or cuda, got gpu" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert bool(done.stdout) == bool(expected)


# --- what is sent to the builder


def dockerignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a file out: the last pattern that fits it, or a folder above it, decides.

    https://docs.docker.com/build/concepts/context/#dockerignore-files"""
    parts = path.split("/")
    ignored = False
    for pattern in patterns:
        wanted = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(wanted, "/".join(parts[:count])) for count in range(1, len(parts) + 1)):
            ignored = not pattern.startswith("!")
    return ignored


def ignore_patterns() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def context(folder: Path) -> set[str]:
    """The files of the build context, by their paths from `folder`."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in found if not dockerignored(path, ignore_patterns())}


KEPT = ["constraints.txt", "pyproject.toml", "tools/image_requirements.py", "functions/contract/events.py",
        "orchestrator/cli/up.py", "models/demo/config.json", "tools/build_kernels.py", "functions/kernel.c",
        "functions/kernel.h"]  # fmt: skip
LEFT_OUT = [".env", ".git/config", "id_rsa", "tests/test_images.py", "benchmarks/bench.py", "models/mine/a.safetensors",
            "functions/__pycache__/main.cpython-311.pyc", "orchestrator/Dockerfile", ".venv/bin/python",
            "functions/kernel.cpython-311-x86_64-linux-gnu.so",
            "tools/train_demo.py", "plan.yaml", "orchestrator/cli/__pycache__/up.pyc", "docs/cli.md"]  # fmt: skip


def test_only_what_the_images_take_is_sent_to_the_builder(tmp_path: Path) -> None:
    for name in [*KEPT, *LEFT_OUT]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert context(tmp_path) == set(KEPT)


def test_everything_that_is_copied_is_sent_to_the_builder(image: Image) -> None:
    for source, _ in image.copies():
        path = ROOT / source
        files = [path] if path.is_file() else [file for file in path.rglob("*.*") if file.is_file()]
        kept = [file for file in files if not dockerignored(file.relative_to(ROOT).as_posix(), ignore_patterns())]
        assert kept, f"COPY {source}: no such file in the build context"


# --- what is installed


def requirements(name: str) -> list[str]:
    """As the first stage of the Dockerfile computes them, by the same program."""
    argv = [sys.executable, str(ROOT / "tools" / "image_requirements.py"), REQUIREMENTS.get(name, name)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def closure(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """Every distribution that these requirements bring, by name, out of what is installed here."""
    found: dict[str, metadata.Distribution] = {}
    extras: dict[str, set[str]] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found and wanted.extras <= extras[name]:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            pytest.fail(f"{name} is not installed here: make the environment anew (rm -r .venv; make test)")
        extras[name] = extras.get(name, set()) | wanted.extras
        for text in found[name].requires or []:
            needed = Requirement(text)
            asked = extras[name] or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in asked):
                waiting.append(needed)
    return found


def test_an_image_brings_nothing_of_the_other(image: Image) -> None:
    names = set(closure(requirements(image.name)))
    assert len(names) > 20
    assert names & FOREIGN[image.name] == set()


def test_every_package_of_an_image_is_pinned(image: Image) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    assert set(closure(requirements(image.name))) - set(pins) == set()


def test_an_image_names_nothing_that_the_project_does_not_require(tmp_path: Path) -> None:
    tool = tmp_path / "tools" / "image_requirements.py"
    tool.parent.mkdir()
    shutil.copy(ROOT / "tools" / "image_requirements.py", tool)
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"structlog>=', '"structlock>='))
    for name, reason in (("stage", "image stage names structlog, which"), ("none", "there is no image none")):
        done = subprocess.run([sys.executable, str(tool), name], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported(name: str) -> Iterator[str]:
    """What a module of ours imports, now or later in a function."""
    file = module_file(name)
    for node in ast.walk(ast.parse(file.read_text())) if file else ():
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_all_that_an_entry_point_may_import_is_in_the_image(image: Image) -> None:
    ours, others, waiting = set(), set(), list(ENTRY_POINTS[image.name])
    while waiting:
        name = waiting.pop()
        if name not in ours and module_file(name):
            ours.add(name)
            waiting += imported(name)
            waiting += [name.rpartition(".")[0]] if "." in name else []
        elif not module_file(name):
            others.add(name.partition(".")[0])
    copied = [Path(source) for source, _ in image.copies()]
    files = [file.relative_to(ROOT) for file in map(module_file, ours) if file]
    assert [str(file) for file in files if not any(file.is_relative_to(source) for source in copied)] == []
    others -= set(sys.stdlib_module_names) | {"functions", "orchestrator", "knative"}
    providers = metadata.packages_distributions()
    installed = set(closure(requirements(image.name)))
    assert {top for top in others if not {canonicalize_name(one) for one in providers[top]} & installed} == set()


def test_the_project_lists_what_each_image_installs_once_and_in_order() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    images = project["tool"]["stagecraft"]["images"]
    assert set(images) == set(DOCKERFILES) - set(REQUIREMENTS)
    assert all(names == sorted(set(names)) for names in images.values())


# --- running what an image contains


def place(image: Image, where: Path) -> None:
    """The COPY instructions out of the context, below `where`; relative targets are below WORKDIR /build."""
    for source, target in image.copies():
        goal = where / (target.lstrip("/") if target.startswith("/") else f"build/{target}")
        origin = ROOT / source
        if origin.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(origin, goal, ignore=ignored, dirs_exist_ok=True)
        else:
            goal = goal / origin.name if target.endswith("/") else goal
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, goal)


def link_packages(names: dict[str, metadata.Distribution], environment: Path) -> None:
    """An environment that has these distributions and no other, by links to where they are installed."""
    venv.create(environment, symlinks=True, with_pip=False)
    packages = environment / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for distribution in names.values():
        for unit in {_unit(distribution, file.parts) for file in distribution.files or () if file.parts[0] != ".."}:
            link = packages / unit
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(unit))))


def _unit(distribution: metadata.Distribution, parts: tuple[str, ...]) -> str:
    """What can be linked as a whole: a package, or a file; folders such as google/ belong to several distributions."""
    for count in range(1, len(parts)):
        folder = "/".join(parts[:count])
        if folder.endswith(".dist-info") or Path(str(distribution.locate_file(f"{folder}/__init__.py"))).exists():
            return folder
    return "/".join(parts)


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def get(self, path: str) -> int:
        """The status code, once something listens."""
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return httpx.get(self.url + path).status_code
            except httpx.TransportError:
                time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def serve(name: str, folder: Path, **settings: str) -> Served:
    """The ENTRYPOINT of an image in an environment of just its packages, with its variables and no others."""
    image = Image(name)
    place(image, folder)
    link_packages(closure(requirements(name)), folder / VENV.lstrip("/"))
    # what is absolute in the image lies below `folder` here; ${PATH} is the base image's
    moved = {k: re.sub(r"(?<![\w])/(opt|app|tmp)\b", rf"{folder}/\1", v) for k, v in image.environment.items()}
    moved["PATH"] = moved["PATH"].replace("${PATH}", "/usr/bin:/bin")
    (folder / "tmp").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    command = [str(folder / VENV.lstrip("/") / "bin" / image.entrypoint[0]), *image.entrypoint[1:]]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=folder / "app", env={**moved, **settings, "PORT": str(port)}, stderr=stderr, stdout=stderr
        )
    return Served(process, f"http://127.0.0.1:{port}", log)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no C compiler")
def test_the_image_of_a_stage_brings_the_kernel(tmp_path: Path) -> None:
    image = Image("stage")
    place(image, tmp_path)
    (step,) = [run for run in image.all("RUN") if "build_kernels" in run]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", step], cwd=tmp_path / "build", env=env, check=True)
    (taken,) = [rest for rest in image.all("COPY") if rest.startswith("--from=kernel ")]
    source, target = taken.split()[1:]
    (built,) = tmp_path.glob(source.lstrip("/"))
    assert target == "/app/functions/"
    assert ctypes.CDLL(str(built)).paged_attention


def test_the_images_serve_the_demonstration_from_nothing_but_what_they_contain(tmp_path: Path) -> None:
    common = {"STAGE_MODEL": "demo", "STAGE_PLAN": "p", "STAGE_THREADS": "1"}
    stage = serve("stage", tmp_path / "stage", HOST="127.0.0.1", STAGE_BLOCKS="0:8", **common)
    try:
        orchestrator = serve(
            "orchestrator", tmp_path / "orchestrator", ORCHESTRATOR_HOST="127.0.0.1", ORCHESTRATOR_GRPC_PORT="0",
            ORCHESTRATOR_MODEL="demo", ORCHESTRATOR_MODEL_NAME="demo", ORCHESTRATOR_PLAN="p",
            ORCHESTRATOR_STAGE_URLS=stage.url,
        )  # fmt: skip
        try:
            assert orchestrator.get("/v2/health/live") == 200
            while orchestrator.get("/v2/health/ready") != 200:
                assert stage.process.poll() is None, stage.log.read_text()
                time.sleep(0.1)
            body = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 8}
            answer = httpx.post(f"{orchestrator.url}/openai/v1/completions", json=body, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 8
        finally:
            assert orchestrator.stop() == 0
    finally:
        assert stage.stop() == 0
    for log in (stage.log.read_text(), orchestrator.log.read_text()):
        assert "Traceback" not in log
    # read-only later: neither wrote beside its code
    assert list(tmp_path.glob("*/app/**/__pycache__")) == []


@pytest.mark.install
def test_the_install_steps_work_in_a_fresh_environment(image: Image, tmp_path: Path) -> None:
    """Every RUN of the Dockerfile, in order, with its folders below a temporary one."""
    place(image, tmp_path)
    # cuda: torch from the package index that this machine uses; PyTorch's own may be out of reach
    env = {**os.environ, "VARIANT": os.environ.get("VARIANT", "cuda")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    for run in image.all("RUN"):
        if run.startswith("apt-get"):  # the compiler is this machine's own
            continue
        step = re.sub(r"(?<![\w])/(opt|app)\b", rf"{tmp_path}/\1", run)
        done = subprocess.run(
            ["sh", "-c", step], cwd=tmp_path / "build", env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{run}\n{done.stdout}{done.stderr}"
    python = tmp_path / VENV.lstrip("/") / "bin" / "python"
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    names = {canonicalize_name(line.partition("==")[0]) for line in listed.stdout.splitlines()}
    assert names & FOREIGN[image.name] == set()
    subprocess.run([python, "-m", "pip", "check"], check=True)
    modules = {"stage": "functions.handler", "orchestrator": "orchestrator.serving_imports"}
    module = modules.get(image.name, "orchestrator.batches.server")
    code = f"import {module}, s3fs, gcsfs"
    subprocess.run([python, "-c", code], cwd=tmp_path / "app", env={"PATH": "/usr/bin:/bin"}, check=True)


def test_the_entrypoint_is_a_module_of_ours(image: Image) -> None:
    python, flag, module = image.entrypoint
    assert (python, flag) == ("python", "-m")
    assert import_module(module.partition(".")[0])
    assert module_file(module) or module_file(f"{module}.__main__")
