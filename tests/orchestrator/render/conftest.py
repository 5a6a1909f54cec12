"""What the tests of rendering share: two readers of other people's rules, and deployments to hold against them.

The readers (schemas.py, rules.py, kn_flags.py) are loaded by path: tests import nothing from each other.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from functions.contract.spans import BlockSpan
from orchestrator.cost import Cost
from orchestrator.plan import Plan, StageSpec
from orchestrator.render.deployment import Deployment, Gpu, Images, Resources, Scaling, Surroundings, WeightSource
from orchestrator.render.files import objects
from orchestrator.render.noted import plain
from orchestrator.render.settings import needed_settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SHARED = ROOT.parent / "shared"

Tree = dict[str, Any]


def _load(name: str) -> ModuleType:
    """The module beside this file, under a name of its own."""
    known = f"stagecraft_tests_render_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def _facts(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"NOT CHECKED AGAINST THE FACTS: {path} is not there")
    return path


@pytest.fixture(scope="session")
def rules() -> ModuleType:
    return _load("rules")


@pytest.fixture(scope="session")
def kn_flags() -> ModuleType:
    return _load("kn_flags")


@pytest.fixture(scope="session")
def schemas() -> Any:
    """A reader of the CRDs; 0.7 s, once for each test process."""
    return _load("schemas").Schemas(_facts("crds"))


@pytest.fixture(scope="session")
def open_places() -> Callable[[Any], list[str]]:
    found: Callable[[Any], list[str]] = _load("schemas").open_places
    return found


@pytest.fixture(scope="session")
def cluster(rules: ModuleType) -> Any:
    """A cluster with Knative's defaults."""
    return rules.Cluster(_facts("knative-config.yaml"))


@pytest.fixture(scope="session")
def plans() -> Mapping[int, Plan]:
    """A model of 0.8 billion parameters in so many stages; 40 blocks, float16."""
    return {count: _plan(count) for count in (2, 5)}


def _plan(count: int) -> Plan:
    size = 40 // count
    cost = Cost(size * 20_000_000, size * 40_000_000, size * 4096, size * 40_000_000)
    stages = tuple(StageSpec(BlockSpan(size * index, size * (index + 1)), cost) for index in range(count))
    return Plan("acme/small-1b", "small-1b", stages, "float16", 40, "0123456789abcdef")


@pytest.fixture(scope="session")
def deployment(plans: Mapping[int, Plan]) -> Callable[..., Deployment]:
    """deployment(stages=5, weights="s3://...", ...): what `stagecraft render` makes of its defaults, and changes."""

    def make(stages: int = 2, weights: str | WeightSource = "", gpu: Gpu | None = None, **changes: Any) -> Deployment:
        source = weights if isinstance(weights, WeightSource) else WeightSource(weights)
        usual = Deployment(
            plans[stages],
            orchestrator_as="kserve",
            images=Images("ghcr.io/acme", "0.3.0"),
            scaling=Scaling(max_scale=4, scale_down_delay_s=15),
            stage=Resources("2", ""),
            orchestrator=Resources("1", "1Gi"),
            gpu=gpu,
            device="cpu" if gpu is None else "cuda",
            threads_per_stage=2,
            weights=source,
            around=Surroundings(),
            lane_width=64,
        )
        return replace(usual, **changes)

    return make


@pytest.fixture(scope="session")
def trees() -> Callable[[Deployment], list[Tree]]:
    """The objects of a deployment as a cluster sees them."""
    return lambda what: [plain(one.tree) for one in objects(what)]


@pytest.fixture(scope="session")
def complaints(
    schemas: Any, rules: ModuleType, cluster: Any, trees: Callable[[Deployment], list[Tree]]
) -> Callable[..., list[str]]:
    """complaints(what, objects=...): what schemas and rules have against a deployment, its own objects or others."""

    def check(what: Deployment, objects: Sequence[Tree] | None = None) -> list[str]:
        found = trees(what) if objects is None else objects
        settings = [(one.config_map, one.key, one.value) for one in needed_settings(what)]
        by_schema = [text for one in found for text in schemas.complaints(one)]
        # objects of a wrong shape would only confuse the rules
        return by_schema or rules.violations(found, cluster.with_settings(settings))

    return check
