"""The rules that keep the parts apart, as ARCHITECTURE.md states them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("functions", "orchestrator", "knative")
FREE_OF_TORCH = [
    "functions.contract.events",
    "functions.contract.messages",
    "functions.contract.checkpoint",
    "orchestrator.chain",
    "orchestrator.cli",
    "orchestrator.render.files",
    "knative.platform",
    "knative.control",
    "orchestrator.planner",
    "orchestrator.server",
]
UNPICKLERS = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
FREE_OF_KSERVE = [
    "functions.contract.events",
    "orchestrator.chain",
    "orchestrator.cli",
    "orchestrator.render.files",
    "knative.platform",
]


def modules(*folders: str) -> list[Path]:
    """Our Python files, without caches and tests of other projects."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def loaded_after_importing(module: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter, started in the repository root, after the import."""
    code = f"import sys; import {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def test_the_kserve_package_is_not_hidden_by_our_folder() -> None:
    code = "import kserve; print(kserve.__file__); print(kserve.ModelServer)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.splitlines()[0]).is_relative_to(ROOT / "kserve")


def test_no_package_marker_in_kserve_or_tests() -> None:
    assert [path for folder in ("kserve", "tests") for path in (ROOT / folder).rglob("__init__.py")] == []


@pytest.mark.parametrize("module", FREE_OF_TORCH)
def test_module_does_without_torch(module: str) -> None:
    assert not {"torch", "transformers"} & loaded_after_importing(module)


@pytest.mark.parametrize("module", FREE_OF_KSERVE)
def test_module_does_without_kserve(module: str) -> None:
    """Importing kserve takes a second and reads sys.argv of whatever program runs."""
    assert "kserve" not in loaded_after_importing(module)


def test_orchestrator_imports_only_the_contract_from_functions() -> None:
    found = {(path.name, name) for path in modules("orchestrator") for name in imports(path)}
    of_functions = {(path, name) for path, name in found if name.split(".")[0] == "functions"}
    assert of_functions, "the orchestrator speaks the contract, so the scan must find it"
    assert {(path, name) for path, name in of_functions if not name.startswith("functions.contract")} == set()


def test_functions_import_nothing_of_the_orchestrator() -> None:
    assert [name for path in modules("functions") for name in imports(path) if name.startswith("orchestrator")] == []


def test_knative_imports_neither_of_the_others() -> None:
    tops = {name.split(".")[0] for path in modules("knative") for name in imports(path)}
    assert tops.isdisjoint({"functions", "orchestrator"})


def unsafe_loading(source: str) -> list[str]:
    """What in a module could run code that lies in a checkpoint or in a message."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in UNPICKLERS]
            found += [name for name in names if getattr(node, "module", "") == "torch" and name == "load"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(node.func.id)
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is False else [node.arg]
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(node.value)
    return found


@pytest.mark.parametrize("path", modules("functions", "orchestrator"), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_was_loaded_is_run_as_code(path: Path) -> None:
    """Weights are safetensors and models those of Transformers: a checkpoint is data, whoever made it."""
    assert unsafe_loading(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as quick",
        "from joblib.numpy_pickle import load",
        "import torch\ntorch.load(path)",
        "import torch\nread = torch.load",
        "from torch import load",
        "build(path, trust_remote_code=True)",
        "build(path, trust_remote_code=trusted)",
        "build(path, **{'trust_remote_code': True})",
        "eval(text)",
    ],
)
def test_the_scan_sees_what_could_run_code(source: str) -> None:
    assert unsafe_loading(source)


def test_the_scan_lets_harmless_code_pass() -> None:
    assert unsafe_loading("import json\njson.load(f)\nmodel.eval()\nbuild(path, trust_remote_code=False)") == []


def test_every_module_has_a_docstring() -> None:
    paths = modules(*PACKAGES, "tests", "tools", "benchmarks")
    assert [str(path.relative_to(ROOT)) for path in paths if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_version_is_the_newest_of_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headings = re.findall(r"^## \[?v?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:1] == [project["version"]]


def test_the_scan_sees_relative_and_nested_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pack" / "part.py"
    file.parent.mkdir()
    file.write_text("from . import a\nfrom ..pack.b import c\ndef f():\n    import d.e\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert list(imports(file)) == ["pack.a", "pack.b.c", "d.e"]
