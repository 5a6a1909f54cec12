"""`make run` as people type it, with the tests' own interpreter in place of the environment that make sets up."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


@pytest.fixture
def bin_folder(tmp_path: Path, root: Path) -> Path:
    """A folder with a program `stagecraft`, which an environment without the package lacks."""
    program = tmp_path / "stagecraft"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(root))} exec {sys.executable} -m orchestrator.cli "$@"\n'
    )
    program.chmod(0o755)
    return tmp_path


def make(root: Path, bin_folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` with our programs; -o keeps it from installing anything."""
    stamp = str(bin_folder / "stagecraft")
    argv = ["make", *arguments, f"BIN={bin_folder}", f"STAMP={stamp}", "-o", stamp]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env["STAGECRAFT_RUNTIME_DIR"] = str(bin_folder)
    return subprocess.run(argv, capture_output=True, text=True, cwd=root, env=env, check=False)


def test_run_once_serves_answers_and_ends(root: Path, bin_folder: Path) -> None:
    prompt = 'What\'s "in" a $name?'
    done = make(root, bin_folder, "run", "ONCE=1", "PORT=0", "GRPC_PORT=0", f"PROMPT={prompt.replace('$', '$$')}")
    assert done.returncode == 0, done.stderr
    text = done.stdout.strip()
    assert text.startswith(prompt)
    assert len(text) > len(prompt) + 20
    assert "stage 1 (blocks" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changed", "install", "build"),
    [
        (None, False, False),
        ("functions/paged_attention.c", False, True),
        ("functions/paged_attention_row.h", False, True),
        ("tools/build_kernels.py", False, True),
        ("pyproject.toml", True, True),
        ("constraints.txt", True, True),
    ],
)
def test_what_a_change_makes_anew(root: Path, tmp_path: Path, changed: str | None, install: bool, build: bool) -> None:
    """Sources in C are compiled without installing everything again."""
    for name in (".packages", ".installed"):
        (tmp_path / name).touch()
    argv = ["make", "-n", "lint", f"VENV={tmp_path}", *(["-W", changed] if changed else [])]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=root, env=env, check=True)
    assert ("pip install" in done.stdout) == install
    assert ("tools/build_kernels.py" in done.stdout) == build


@pytest.mark.parametrize(
    ("variable", "option"),
    [
        ("MODEL=./mine", "up ./mine "),
        ("STAGES=3", "--stages 3"),
        ("PORT=9000", "--port 9000"),
        ("GRPC_PORT=9001", "--grpc-port 9001"),
        ("ONCE=1", "--exit"),
    ],
)
def test_variables_of_run_become_options(root: Path, bin_folder: Path, variable: str, option: str) -> None:
    plain, changed = (make(root, bin_folder, "-n", "run", *more) for more in ([], [variable]))
    assert (plain.returncode, changed.returncode) == (0, 0), changed.stderr
    assert option in changed.stdout
    assert option not in plain.stdout


def test_a_failure_of_the_system_is_one_of_make(root: Path, bin_folder: Path) -> None:
    done = make(root, bin_folder, "run", "ONCE=1", "PORT=0", "GRPC_PORT=0", "MODEL=./no/such/folder")
    assert done.returncode == 2
    assert "no/such/folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_command(root: Path, bin_folder: Path) -> None:
    done = make(root, bin_folder)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    assert {"run", "test", "test-slow", "lint", "format", "images", "clean"} <= listed


def engine(folder: Path, name: str = "docker", info: str = "exit 0") -> Path:
    """A container engine that writes down how it is called."""
    program = folder / name
    program.write_text(f'#!/bin/sh\n[ "$1" = info ] && {info}\necho "{name} $@" >> {folder}/calls\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("variables", "stage", "orchestrator"),
    [
        ([], "stagecraft/stage:{version}", "stagecraft/orchestrator:{version}"),
        (["TAG=1.0"], "stagecraft/stage:1.0", "stagecraft/orchestrator:1.0"),
        (["TAG=1.0", "VARIANT=cuda"], "stagecraft/stage:1.0-cuda", "stagecraft/orchestrator:1.0"),
        (
            ["TAG=1.0", "REGISTRY=registry.example.com/team/"],
            "registry.example.com/team/stagecraft/stage:1.0",
            "registry.example.com/team/stagecraft/orchestrator:1.0",
        ),
    ],
)
def test_images_are_built_and_named(
    root: Path, tmp_path: Path, bin_folder: Path, variables: list[str], stage: str, orchestrator: str
) -> None:
    done = make(root, bin_folder, "images", f"ENGINE={engine(tmp_path)}", *variables)
    assert done.returncode == 0, done.stderr
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    variant = "cuda" if "VARIANT=cuda" in variables else "cpu"
    results = orchestrator.replace("orchestrator", "results").format(version=version)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"docker build -f functions/Dockerfile --build-arg VARIANT={variant} -t {stage.format(version=version)} .",
        f"docker build -f orchestrator/Dockerfile --target results -t {results} .",
        f"docker build -f orchestrator/Dockerfile -t {orchestrator.format(version=version)} .",
    ]


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("ENGINE=no-such-engine", "docker or podman, and there is no 'no-such-engine' here"),
        ("VARIANT=gpu", "VARIANT must be cpu or cuda, got 'gpu'"),
    ],
)
def test_images_that_cannot_be_built_say_why(root: Path, bin_folder: Path, variable: str, reason: str) -> None:
    done = make(root, bin_folder, "images", variable)
    assert done.returncode == 2
    assert reason in done.stderr


def test_an_engine_that_does_not_answer_is_named(root: Path, tmp_path: Path, bin_folder: Path) -> None:
    program = engine(tmp_path, info="exit 1")
    done = make(root, bin_folder, "images", f"ENGINE={program}")
    assert done.returncode == 2
    assert f"'{program} info' fails: is its daemon running" in done.stderr
    assert not (tmp_path / "calls").exists()
