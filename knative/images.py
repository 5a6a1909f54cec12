"""The one table from container image to local command.

A container of a cluster has its program in its image; on one machine the image's name stands for a command here.
`stagecraft local start --images FILE` adds rows:

    ghcr.io/acme/greeter:
      command: [/opt/greeter/bin/greeter]
      args: [--port, $(PORT)]
      env: {GREETING: hello}
    acme/model:
      module: acme.server
      preload: [acme.server, torch]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from knative.errors import KnativeError, ValidationError
from knative.resources.documents import Document, parse_documents, read_text
from knative.resources.objects import Container


@dataclass(frozen=True, slots=True)
class Command:
    """What runs for an image: `argv` by exec, or else `module` as __main__ in a fork of an interpreter.

    In the table, `args` are the image's own arguments (its CMD); in what `Images.resolve` gives, those of a module:
    `argv` holds its own. `preload` are modules that the interpreter imports before it forks. `$(VAR)` everywhere is
    for `expand`."""

    argv: tuple[str, ...] = ()
    module: str = ""
    args: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


BUILTIN: Mapping[str, Command] = {
    "stagecraft/stage": Command(
        module="functions",
        preload=("functions.preload",),
        env={"HOST": "127.0.0.1", "STAGE_REPLICA": "$(POD_ADDRESS)"},
    ),
    "stagecraft/orchestrator": Command(
        module="orchestrator.server",
        args=("--host", "127.0.0.1", "--http-port", "$(PORT)", "--grpc-port", "$(GRPC_PORT)"),
        preload=("orchestrator.serving_imports",),
    ),
    "stagecraft/results": Command(
        module="orchestrator.batches.server",
        preload=("orchestrator.batches.results_api", "uvicorn"),
        env={"HOST": "127.0.0.1"},
    ),
    "stagecraft/process": Command(),  # the manifest's own command
}


class ImageError(KnativeError):
    """An image without a command on this machine."""

    status = 400


class Images:
    """`table` maps repository paths to commands; its rows go before the built-in ones."""

    def __init__(self, table: Mapping[str, Command] | None = None) -> None:
        rows = {**BUILTIN, **(table or {})}
        self._rows = {tuple(repository(image).split("/")): command for image, command in rows.items()}

    def resolve(self, container: Container) -> Command:
        """What to run for `container`: its `command` replaces the image's program, its `args` the image's arguments,
        as in Kubernetes; a module has its own arguments always, and those of the manifest follow.

        Raises ImageError, which says which images there are and how to add one."""
        row = self._row(container.image)
        if container.command:
            return Command(argv=(*container.command, *container.args), env=row.env)
        if row.module:
            return replace(row, args=(*row.args, *container.args))
        if not row.argv:
            raise ImageError(f"image {container.image} runs the manifest's own command; give the container a `command`")
        return Command(argv=(*row.argv, *(container.args or row.args)), env=row.env)

    def _row(self, image: str) -> Command:
        path = repository(image).split("/")
        for start in range(len(path)):  # longest match first
            if (command := self._rows.get(tuple(path[start:]))) is not None:
                return command
        known = ", ".join(sorted("/".join(row) for row in self._rows))
        raise ImageError(
            f"no command on this machine for image {image}; there is one for {known}. Add a row to a file of images "
            "and give it to `stagecraft local start --images FILE`, or use stagecraft/process with a `command`"
        )


def repository(image: str) -> str:
    """An image reference without tag and digest: "ghcr.io/x/stage:1.2@sha256:..." is "ghcr.io/x/stage"."""
    name = image.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return head + slash + last.partition(":")[0]


def expand(text: str, env: Mapping[str, str]) -> str:
    """`text` with $(VAR) replaced by values of `env`; unknown ones stay, $$ stands for one $, values are not expanded
    again. After third_party/forked/golang/expansion of Kubernetes."""
    parts: list[str] = []
    at = 0
    while (dollar := text.find("$", at)) >= 0:
        parts.append(text[at:dollar])
        follows = text[dollar + 1 : dollar + 2]
        close = text.find(")", dollar) if follows == "(" else -1
        if close >= 0:
            name = text[dollar + 2 : close]
            parts.append(env.get(name, f"$({name})"))
            at = close + 1
        elif follows == "$":
            parts.append("$")
            at = dollar + 2
        else:
            parts.append("$" + follows)
            at = dollar + 1 + len(follows)
    return "".join(parts) + text[at:]


def expand_env(pairs: Iterable[tuple[str, str]], env: Mapping[str, str]) -> dict[str, str]:
    """`env` and the variables of a container; each value may refer to those before it, as in Kubernetes."""
    values = dict(env)
    for name, text in pairs:
        values[name] = expand(text, values)
    return values


def read_images(path: Path) -> dict[str, Command]:
    """The rows of a YAML file of images. Raises ValidationError with file, line and what is allowed."""
    documents = parse_documents(read_text(path), str(path))
    rows: dict[str, Command] = {}
    problems: list[str] = []
    for document in documents:
        for image, row in document.value.items():
            command = _command(image, row, document, problems)
            if not repository(image):
                problems.append(f"{document.place(image)}: an image has a name")
            rows[image] = command
    if problems:
        raise ValidationError(problems)
    return rows


_LISTS = ("command", "args", "preload")
_FIELDS = (*_LISTS, "module", "env")


def _command(image: str, row: object, document: Document, problems: list[str]) -> Command:
    where = document.place(image)
    if not isinstance(row, dict):
        problems.append(f"{where}: {image}: expected a mapping of {', '.join(_FIELDS)}")
        return Command()
    before = len(problems)
    problems.extend(
        f'{document.place(f"{image}.{name}")}: {image}: unknown field "{name}"; known are {", ".join(_FIELDS)}'
        for name in row
        if name not in _FIELDS
    )
    problems.extend(
        f"{document.place(f'{image}.{name}')}: {image}: {name} is a list of texts, such as [a, b]"
        for name in _LISTS
        if not _is_texts(row.get(name, []))
    )
    module, env = row.get("module", ""), row.get("env", {})
    if not isinstance(module, str):
        problems.append(f"{document.place(f'{image}.module')}: {image}: module is the name of a Python module")
    if not isinstance(env, dict) or not _is_texts(list(env.values())):
        problems.append(f"{document.place(f'{image}.env')}: {image}: env maps names to texts; quote numbers")
    if bool(row.get("command")) == bool(module):
        problems.append(f"{where}: {image}: give either `command` or `module`")
    if row.get("preload") and not module:
        problems.append(f"{where}: {image}: `preload` goes with `module`")
    return _built(row) if len(problems) == before else Command()


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and "\0" not in item for item in value)


def _built(row: Mapping[str, object]) -> Command:
    command, args, preload = (tuple(cast(list[str], row.get(name, []))) for name in _LISTS)
    env = cast(dict[str, str], row.get("env", {}))
    return Command(argv=command, module=cast(str, row.get("module", "")), args=args, preload=preload, env=dict(env))
