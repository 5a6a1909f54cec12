"""From container image to local command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.errors import KnativeError, ValidationError
from knative.images import BUILTIN, Command, Images, expand, expand_env, read_images, repository
from knative.resources.objects import Container

STAGE = BUILTIN["stagecraft/stage"]


@pytest.mark.parametrize(
    "image",
    [
        "stagecraft/stage",
        "stagecraft/stage:1.2",
        "ghcr.io/x/stagecraft/stage:1.2@sha256:0123",
        "localhost:5000/stagecraft/stage",
        "localhost:5000/stagecraft/stage:latest",
        "stagecraft/stage@sha256:0123",
    ],
)
def test_registry_tag_and_digest_do_not_matter(image: str) -> None:
    assert Images().resolve(Container(image)) == STAGE


@pytest.mark.parametrize(
    "image", ["stage", "mystagecraft/stage", "stagecraft/stage-gpu", "stagecraft/stage/x", "", "nginx"]
)
def test_a_match_ends_at_the_boundaries_of_the_path(image: str) -> None:
    with pytest.raises(KnativeError, match="no command on this machine") as caught:
        Images().resolve(Container(image))
    assert "stagecraft/orchestrator, stagecraft/process, stagecraft/results, stagecraft/stage" in str(caught.value)
    assert "stagecraft local start --images FILE" in str(caught.value)


def test_the_longest_match_wins() -> None:
    images = Images({"b/c": Command(argv=("short",)), "a/b/c": Command(argv=("long",))})
    assert images.resolve(Container("r.io/a/b/c:1")).argv == ("long",)
    assert images.resolve(Container("r.io/x/b/c:1")).argv == ("short",)


def test_a_row_of_the_user_goes_before_a_built_in_one() -> None:
    images = Images({"stagecraft/stage:2": Command(argv=("mine",))})
    assert images.resolve(Container("stagecraft/stage")).argv == ("mine",)


TABLE = {
    "acme/web": Command(argv=("/bin/web", "serve"), args=("--port", "$(PORT)"), env={"A": "1"}),
    "acme/model": Command(module="acme.model", args=("--port", "$(PORT)"), preload=("acme",), env={"A": "1"}),
}


@pytest.mark.parametrize(
    ("image", "command", "args", "expected"),
    [
        ("acme/web", (), (), Command(argv=("/bin/web", "serve", "--port", "$(PORT)"), env={"A": "1"})),
        ("acme/web", (), ("-v",), Command(argv=("/bin/web", "serve", "-v"), env={"A": "1"})),
        ("acme/web", ("sh",), ("-c", "x"), Command(argv=("sh", "-c", "x"), env={"A": "1"})),
        ("acme/web", ("sh",), (), Command(argv=("sh",), env={"A": "1"})),
        ("acme/model", (), (), TABLE["acme/model"]),
        (
            "acme/model",
            (),
            ("-v",),
            Command(module="acme.model", args=("--port", "$(PORT)", "-v"), preload=("acme",), env={"A": "1"}),
        ),
        ("acme/model", ("sh",), ("-c",), Command(argv=("sh", "-c"), env={"A": "1"})),
        ("stagecraft/process", ("sleep", "1"), (), Command(argv=("sleep", "1"))),
    ],
)
def test_command_and_args_mean_what_they_mean_in_kubernetes(
    image: str, command: tuple[str, ...], args: tuple[str, ...], expected: Command
) -> None:
    assert Images(TABLE).resolve(Container(image, command=command, args=args)) == expected


def test_the_image_without_a_command_of_its_own_asks_for_one() -> None:
    with pytest.raises(KnativeError, match="give the container a `command`"):
        Images().resolve(Container("stagecraft/process", args=("x",)))


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)", "1"),
        ("x$(A)y$(B)z", "x1y$(A)z"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$$$$(A)", "$$(A)"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$(A", "$(A"),
        ("$", "$"),
        ("$A ${A}", "$A ${A}"),
        ("$()", "$()"),
        ("$(A)$(A)", "11"),
        ("$$", "$"),
        ("$($(A))", "$($(A))"),
        ("", ""),
    ],
)
def test_expand_as_kubernetes_does(text: str, expanded: str) -> None:
    assert expand(text, {"A": "1", "B": "$(A)"}) == expanded


@given(st.text(st.sampled_from("$()AB x"), max_size=12))
def test_expanding_with_nothing_known_only_halves_dollars(text: str) -> None:
    assert expand(text, {}).replace("$", "") == text.replace("$", "")
    assert expand(text.replace("$", "$$"), {"A": "1"}) == text


def test_variables_refer_to_those_before_them() -> None:
    pairs = (("A", "$(PORT)"), ("B", "$(A)/$(C)"), ("C", "3"))
    assert expand_env(pairs, {"PORT": "80"}) == {"PORT": "80", "A": "80", "B": "80/$(C)", "C": "3"}


@given(st.text(max_size=30))
def test_a_repository_has_neither_tag_nor_digest(image: str) -> None:
    assert "@" not in repository(image)
    assert ":" not in repository(image).rpartition("/")[2]


def test_a_file_of_images(tmp_path: Path) -> None:
    file = tmp_path / "images.yaml"
    file.write_text(
        "ghcr.io/acme/web:\n  command: [/bin/web]\n  args: [--port, $(PORT)]\n  env: {A: b}\n"
        "acme/model:\n  module: acme.model\n  preload: [acme]\n"
    )
    assert read_images(file) == {
        "ghcr.io/acme/web": Command(argv=("/bin/web",), args=("--port", "$(PORT)"), env={"A": "b"}),
        "acme/model": Command(module="acme.model", preload=("acme",)),
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a/b: 5", ":1: a/b: expected a mapping of command, args, preload, module, env"),
        ("a/b:\n  comand: [x]\n  module: m", ':2: a/b: unknown field "comand"; known are command, args, preload, '
         "module, env"),
        ("a/b:\n  command: x", ":2: a/b: command is a list of texts, such as [a, b]"),
        ("a/b:\n  command: [5]", ":2: a/b: command is a list of texts, such as [a, b]"),
        ("a/b:\n  command: [x]\n  env: {A: 5}", ":3: a/b: env maps names to texts; quote numbers"),
        ("a/b:\n  module: [m]", ":2: a/b: module is the name of a Python module"),
        ("a/b:\n  args: [x]", ":1: a/b: give either `command` or `module`"),
        ("a/b:\n  command: [x]\n  module: m", ":1: a/b: give either `command` or `module`"),
        ("a/b:\n  command: [x]\n  preload: [m]", ":1: a/b: `preload` goes with `module`"),
        ("a/b: {command: [x]}\na/b: {command: [y]}", ':2: key "a/b" already set in map'),
        ("[", ":1: not YAML: "),
        (":tag: {command: [x]}", ":1: an image has a name"),
    ],
)  # fmt: skip
def test_a_bad_file_of_images_says_where_and_what(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "images.yaml"
    file.write_text(text)
    with pytest.raises(ValidationError) as caught:
        read_images(file)
    assert caught.value.problems[0].startswith(f"{file}{problem}")


def test_a_missing_file_of_images(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no such file"):
        read_images(tmp_path / "none.yaml")


def test_reading_manifests_loads_no_model_library(root: Path) -> None:
    code = "import knative.images, sys; print(*{'torch', 'transformers', 'functions', 'orchestrator'} & {*sys.modules})"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
