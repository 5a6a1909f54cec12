"""The program's commands. They import what they need when they run, so that help comes at once."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from orchestrator.cli.batch import app as batch
from orchestrator.cli.deploy import deploy, undeploy
from orchestrator.cli.generate import generate
from orchestrator.cli.local import app as local
from orchestrator.cli.plan import plan
from orchestrator.cli.profile import profile
from orchestrator.cli.render import render
from orchestrator.cli.score import score
from orchestrator.cli.status import status
from orchestrator.cli.top import top
from orchestrator.cli.up import up

app = typer.Typer(
    name="stagecraft",
    help="Serve large language models in stages: each stage is a service that holds some of the blocks.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(up)
app.command()(plan)
app.command()(profile)
app.command()(render)
app.command()(generate)
app.command()(score)
app.command()(deploy)
app.command()(undeploy)
app.command()(status)
app.command()(top)
app.add_typer(batch)
app.add_typer(local)


@app.command()
def version() -> None:
    """Print the version."""
    print(_version())


def _print_version(wanted: bool) -> None:
    if wanted:
        print(_version())
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Serve large language models in stages: each stage is a service that holds some of the blocks."""


def _version() -> str:
    try:
        return f"stagecraft {installed_version('stagecraft')}"
    except PackageNotFoundError:
        return "stagecraft (not installed)"
