"""The tool that compiles what is in C, on a project with a function of one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import build_kernels

PYPROJECT = """
[[tool.setuptools.ext-modules]]
name = "functions._answer"
sources = ["functions/answer.c"]
depends = ["functions/answer.h"]
extra-compile-args = ["-DMORE=1"]
optional = true
"""

needs_compiler = pytest.mark.skipif(not shutil.which("gcc"), reason="there is no C compiler")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in ("tools", "functions"):
        (tmp_path / folder).mkdir()
    shutil.copy(build_kernels.__file__, tmp_path / "tools")
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "functions" / "answer.c").write_text(
        '#include "answer.h"\nint answer(void) { return ANSWER + MORE; }\n'
    )
    (tmp_path / "functions" / "answer.h").write_text("#define ANSWER 41\n")
    return tmp_path


def build(project: Path, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(project / "tools" / "build_kernels.py"), *options]
    env = None if path is None else {"PATH": path}
    return subprocess.run(argv, cwd="/", env=env, capture_output=True, text=True, check=False)


def built(project: Path) -> list[Path]:
    return list((project / "functions").glob("_answer*.so"))


def answer_of(library: Path) -> int:
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"  # not here: what is loaded stays loaded
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@needs_compiler
def test_it_is_compiled_in_place_as_pyproject_says_and_again_when_a_header_changes(project: Path) -> None:
    assert build(project, "--required").returncode == 0
    (library,) = built(project)
    assert answer_of(library) == 42
    made_ns = library.stat().st_mtime_ns
    assert build(project).returncode == 0
    assert library.stat().st_mtime_ns == made_ns, "nothing had changed"
    (project / "functions" / "answer.h").write_text("#define ANSWER 1\n")
    assert build(project).returncode == 0
    assert answer_of(library) == 2


@needs_compiler
@pytest.mark.parametrize(("options", "code"), [([], 0), (["--required"], 1)])
def test_a_failure_is_told_and_leaves_nothing_of_older_sources(project: Path, options: list[str], code: int) -> None:
    assert build(project).returncode == 0
    (project / "functions" / "answer.c").write_text("this is not C\n")
    done = build(project, *options)
    assert done.returncode == code
    assert "the kernels in C were not built" in done.stderr
    assert built(project) == []


def test_without_a_compiler_it_says_what_to_do(project: Path, tmp_path: Path) -> None:
    done = build(project, path=str(tmp_path))
    assert done.returncode == 0
    assert "With a C compiler (gcc) this builds them: python tools/build_kernels.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_project_itself_names_sources_that_are_there() -> None:
    root = Path(build_kernels.__file__).parents[1]
    for extension in build_kernels.extensions():
        for path in (*extension.sources, *extension.depends):
            assert (root / path).is_file(), path
        assert "-ffast-math" not in extension.extra_link_args, "linked with it, it changes the arithmetic of torch too"
