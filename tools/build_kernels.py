"""Compiles what is written in C, in place: `python tools/build_kernels.py [--required]`.

What is compiled, and how, stands in pyproject.toml ([[tool.setuptools.ext-modules]]), where `pip install` reads it too.
Only what has changed is compiled anew. Without a compiler a stage computes the same with torch, slower; so a failure is
told but no error, unless it is --required. Needs setuptools, and nothing of the project.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parents[1]


def extensions() -> list[Extension]:
    """Their paths count from the root."""
    pyproject: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tables = pyproject["tool"]["setuptools"]["ext-modules"]
    made = [Extension(**{name.replace("-", "_"): value for name, value in table.items()}) for table in tables]
    for extension in made:
        extension.optional = False  # else a failure would only be written to the log
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/build_kernels.py", description=__doc__)
    parser.add_argument("--required", action="store_true", help="a failure is an error")
    required = parser.parse_args().required
    os.chdir(ROOT)  # where pyproject.toml counts its paths from
    command = Distribution({"name": "stagecraft", "ext_modules": extensions()}).get_command_obj("build_ext")
    command.inplace = True
    command.ensure_finalized()
    outputs = [Path(command.get_ext_fullpath(extension.name)) for extension in command.extensions]
    try:
        command.run()
    except (BaseError, CCompilerError) as error:
        for output in outputs:  # what is there may be of other sources
            output.unlink(missing_ok=True)
        print(
            f"the kernels in C were not built: {error}. Stages compute the same with torch, slower. With a C compiler "
            "(gcc) this builds them: python tools/build_kernels.py",
            file=sys.stderr,
        )
        return 1 if required else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
