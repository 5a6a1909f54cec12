"""What an image installs, out of pyproject.toml: `python tools/image_requirements.py IMAGE > requirements.txt`.

pyproject.toml names the packages of an image in [tool.stagecraft.images]; how each is required stands once, in the
project's own dependencies and extras. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


class UnknownPackage(Exception):
    """An image names a package that the project does not depend on, or there is no such image."""


def image_requirements(pyproject: Mapping[str, Any], image: str) -> list[str]:
    """The requirements of `image` in the order in which it names them. Raises UnknownPackage."""
    images = pyproject["tool"]["stagecraft"]["images"]
    if image not in images:
        raise UnknownPackage(f"there is no image {image}; [tool.stagecraft.images] has {', '.join(images)}")
    project = pyproject["project"]
    known = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    by_name = {_name(requirement): requirement for requirement in known}
    missing = [name for name in images[image] if _name(name) not in by_name]
    if missing:
        raise UnknownPackage(
            f"image {image} names {', '.join(missing)}, which [project] does not require; add it to dependencies"
        )
    return [by_name[_name(name)] for name in images[image]]


def _name(requirement: str) -> str:
    """A package's name as indexes compare it: lower-case, hyphens (the names specification of PyPA)."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python tools/image_requirements.py IMAGE", file=sys.stderr)
        return 2
    try:
        print("\n".join(image_requirements(tomllib.loads(PYPROJECT.read_text()), sys.argv[1])))
    except UnknownPackage as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
