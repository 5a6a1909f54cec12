"""What --scoring writes: stages that a broker alone chains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from functions.contract.scoring import RESULT, SCORE
from orchestrator.render.check import check
from orchestrator.render.deployment import Batch, Deployment, DeploymentError, Scoring, Surroundings

Make = Callable[..., Deployment]
Trees = Callable[[Deployment], list[dict[str, Any]]]
FORMS = ("triggers", "sequence")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("claims", ["", "s3://bucket/claims", "file:///scratch/claims"])
def test_clusters_take_it_with_everything_else(deployment: Make, complaints: Any, form: Any, claims: str) -> None:
    for stages_as, dead in product(("knative", "kserve"), ("", "https://example.org/dead")):
        scoring = Scoring(form, claims=claims, dead_letters=dead)
        what = deployment(5, stages_as=stages_as, orchestrator_as=stages_as, scoring=scoring)
        assert complaints(what) == []
        check(what)


@pytest.mark.parametrize("stages_as", ["knative", "kserve"])
def test_each_stage_gets_the_answer_of_the_one_before(deployment: Make, trees: Trees, stages_as: str) -> None:
    what = deployment(5, stages_as=stages_as, scoring=Scoring(broker="main", claims="gs://b/c"))
    found = {one["metadata"]["name"]: one["spec"] for one in trees(what) if one["kind"] == "Trigger"}
    name = what.service_name
    assert set(found) == {f"{name}-score-{stage}" for stage in (*range(5), "spent")}
    for stage in range(5):
        spec = found[f"{name}-score-{stage}"]
        model = {"model": what.plan.name}
        assert (spec["broker"], spec["filter"]["attributes"]) == ("main", {"type": SCORE, "stage": str(stage)} | model)
        assert spec["subscriber"]["ref"]["name"] == what.knative_name(stage)
        assert "deadLetterSink" not in spec["delivery"]
    spent = found[f"{name}-score-spent"]
    assert spent["filter"]["attributes"] == {"type": RESULT, "model": what.plan.name, "usedref": ""}
    assert spent["subscriber"]["uri"] == "/spent"


def test_a_sequence_has_the_stages_as_steps_and_gives_the_result_to_the_broker(deployment: Make, trees: Trees) -> None:
    what = deployment(5, scoring=Scoring("sequence"), batch=Batch())
    (sequence,) = [one for one in trees(what) if one["kind"] == "Sequence"]
    feeds = [one["spec"] for one in trees(what) if one["metadata"]["name"] == f"{what.service_name}-score"]
    feed = next(spec for spec in feeds if "subscriber" in spec)
    assert feed["subscriber"]["ref"]["name"] == sequence["metadata"]["name"]
    assert feed["filter"]["attributes"]["stage"] == "0"
    steps = sequence["spec"]["steps"]
    assert [step["ref"]["name"] for step in steps] == what.stage_names
    assert {step["delivery"]["deadLetterSink"]["ref"]["name"] for step in steps} == {f"{what.service_name}-results"}
    assert sequence["spec"]["reply"]["ref"]["name"] == "default"


def test_every_stage_is_told_where_claims_are(deployment: Make, trees: Trees) -> None:
    for scoring, expected in ((None, 0), (Scoring(), 0), (Scoring(claims="s3://b/c"), 5)):
        text = str(trees(deployment(5, scoring=scoring)))
        assert text.count("{'name': 'STAGE_CLAIMS', 'value': 's3://b/c'}") == expected


def test_the_deployer_may_deploy_it(deployment: Make, trees: Trees) -> None:
    what = deployment(2, scoring=Scoring("sequence"), around=Surroundings(deployer="jo"))
    (role,) = [one for one in trees(what) if one["kind"] == "Role"]
    granted = {(group, name) for rule in role["rules"] for group in rule["apiGroups"] for name in rule["resources"]}
    assert {("eventing.knative.dev", "triggers"), ("flows.knative.dev", "sequences")} <= granted


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("Trigger", "spec", "subscriber", "ref", "name"), "nobody", "no Sequence 'nobody'"),
        (("Trigger", "spec", "subscriber", "uri"), "http://x/", "beside a ref"),
        (("Trigger", "spec", "filter", "attributes"), {"ce-type": "x"}, "no attribute"),
        (("Trigger", "spec", "filter", "attributes"), {"stage": 0}, "is no string"),
        (("Trigger", "spec", "delivery", "backoffDelay"), "1s", "no ISO 8601 duration"),
        (("Trigger", "spec", "delivery", "retries"), 1, "unknown field"),
        (("Sequence", "spec", "steps"), [], "without steps"),
        (("Sequence", "spec", "replies"), {}, "unknown field"),
    ],
)
def test_the_rules_see_what_is_wrong(
    deployment: Make, trees: Trees, complaints: Any, path: tuple[str, ...], value: Any, complaint: str
) -> None:
    what = deployment(2, scoring=Scoring("sequence"))
    objects = copy.deepcopy(trees(what))
    tree: Any = next(one for one in objects if one["kind"] == path[0])
    for key in path[1:-1]:
        tree = tree[key]
    tree[path[-1]] = value
    assert complaint in " ".join(complaints(what, objects))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"broker": "Not A Name"}, "--broker"),
        ({"claims": "/tmp/claims"}, "--claims"),
        ({"claims": "s3://"}, "--claims"),
        ({"claims": "http://example.org/claims"}, "--claims"),
        ({"dead_letters": "results"}, "--dead-letters"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, str], option: str) -> None:
    with pytest.raises(DeploymentError, match=option):
        Scoring(**changes)  # type: ignore[arg-type]  # the values are texts


def test_options_of_scoring_need_it(tmp_path: Path) -> None:
    from orchestrator.cli import app

    for option in ("--claims", "--dead-letters"):
        done = CliRunner().invoke(app, ["render", str(tmp_path / "plan.yaml"), "-o", "x", option, "s3://b/c"])
        assert done.exit_code == 2, done.stderr
