"""The documentation is true: commands exist, links lead somewhere, and blocks marked `test` run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:stagecraft|make) [^`]+)`")
SEPARATORS = {"|", "&&", ";", "&"}


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    is_run: bool
    text: str


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for language, words, text in FENCE.findall(page.read_text()):
            yield Block(page.name, language, "test" in words.split(), text)


def split_commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell text, one command for each side of a pipe."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in SEPARATORS:
                words.append(word)
                continue
            if words:
                yield words
            words = []


def documented(program: str) -> list[tuple[str, str]]:
    """(page, command line) of each use of the program in a shell block or in a line of text, each once."""
    texts = [(block.page, block.text) for block in blocks() if block.language == "sh"]
    texts += [(page.name, use) for page in PAGES for use in INLINE.findall(page.read_text()) if "COMMAND" not in use]
    found = {(page, shlex.join(words)) for page, text in texts for words in split_commands(text) if words[0] == program}
    return sorted(found)


def check_usage(words: list[str]) -> None:
    """Parses the words as `stagecraft` would, without running anything. Raises what the command line raises."""
    from orchestrator.cli import app

    group: Any = typer.main.get_command(app)
    if words[0].startswith("-"):
        names = {
            name for option in group.get_params(group.make_context("stagecraft", ["version"])) for name in option.opts
        }
        assert words[0] in names
        return
    # an inline mention such as `stagecraft plan` names a command without what it requires
    group.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=len(words) == 1)


@pytest.mark.parametrize(("page", "line"), documented("stagecraft"))
def test_documented_stagecraft_command_exists_with_its_options(page: str, line: str) -> None:
    check_usage(shlex.split(line)[1:])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("up demo --stagees 2", "stagees"), ("up demo --stages two", "integer"), ("serve demo", "serve")],
)
def test_a_command_that_does_not_exist_would_be_found(line: str, complaint: str) -> None:
    with pytest.raises(Exception, match=complaint):
        check_usage(shlex.split(line))


@pytest.mark.parametrize(("page", "line"), documented("make"))
def test_documented_make_target_exists_with_its_variables(page: str, line: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in shlex.split(line)[1:]:
        name, assigned, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} *\?=" if assigned else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), word


def test_the_pages_show_commands_at_all() -> None:
    assert len(documented("stagecraft")) > 5
    assert len(documented("make")) > 3


LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    if not link.startswith(("http://", "https://", "#"))
]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name}:{link}" for page, link in LINKS])
def test_link_leads_to_a_file(page: Path, link: str) -> None:
    file, _, anchor = link.partition("#")
    target = page.parent / file
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_documented_settings_exist() -> None:
    from functions.settings import StageSettings
    from orchestrator import settings

    known = {f"STAGE_{name.upper()}" for name in StageSettings.model_fields}
    known |= {f"ORCHESTRATOR_{name.upper()}" for name in settings.OrchestratorSettings.model_fields}
    named = set(re.findall(r"\b(?:STAGE|ORCHESTRATOR)_[A-Z_]+\b", "".join(page.read_text() for page in PAGES)))
    assert {name for name in named if not name.endswith("_")} <= known


RUNNABLE = [block for block in blocks() if block.is_run]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `stagecraft` that runs this very tree."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "stagecraft"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -P -m orchestrator.cli "$@"\n')
    script.chmod(0o755)
    return folder


@pytest.mark.parametrize("block", RUNNABLE, ids=[f"{b.page}-{b.language}-{i}" for i, b in enumerate(RUNNABLE)])
def test_block_marked_test_runs_against_the_demo(
    block: Block, demo_url: str, demo_runtime: str, programs: Path
) -> None:
    text = block.text.replace("http://127.0.0.1:8080", demo_url)
    bash = shutil.which("bash")
    assert bash is not None
    argv = {"sh": [bash, "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    env = {"PATH": f"{programs}:{Path(bash).parent}:/usr/bin:/bin", "COLUMNS": "100"}
    env |= {"STAGECRAFT_URL": demo_url, "STAGECRAFT_RUNTIME_DIR": demo_runtime}
    done = subprocess.run([*argv, text], capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
