"""Scoring without an orchestrator: who delivers each stage's answer to the next stage.

    triggers    Broker ──stage 0──► stage 0 ──reply──► Broker ──stage 1──► stage 1 ──reply──► Broker (the result)
    sequence    Broker ──stage 0──► Sequence: stage 0 ──► stage 1 ──reply──► Broker (the result)

A Trigger keeps all events in one broker, with what that says of durability and dead letters; a Sequence has a channel
for each step and shows the chain as one object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from functions.contract.scoring import RESULT, SCORE, SPENT_PATH
from orchestrator.render.batch import DEAD_LETTERS, results_name
from orchestrator.render.deployment import Deployment, Scoring
from orchestrator.render.knative_services import PART_OF
from orchestrator.render.noted import Noted, Tree

_RETRIES = 12  # 1 s, 2 s, 4 s, ... over an hour in all
_RETRIES_OF_SPENT = 3  # what is not let go now goes by age


def score_objects(what: Deployment, scoring: Scoring) -> dict[str, Tree]:
    """By the name of their file."""
    found = _triggers(what, scoring) if scoring.form == "triggers" else _sequence(what, scoring)
    if scoring.claims:
        found["trigger-score-spent"] = _spent(what, scoring)
    return {f"{name}.yaml": tree for name, tree in found.items()}


def _triggers(what: Deployment, scoring: Scoring) -> dict[str, Tree]:
    return {
        f"trigger-score-{index}": _trigger(
            what, scoring, f"score-{index}", _score_filter(what, index), _stage(what, index), _delivery(what, scoring)
        )
        for index in range(len(what.plan.stages))
    }


def _sequence(what: Deployment, scoring: Scoring) -> dict[str, Tree]:
    name = f"{what.service_name}-score"
    delivery = _delivery(what, scoring)
    steps = [{**_stage(what, index), "delivery": delivery} for index in range(len(what.plan.stages))]
    sequence: Tree = {
        "apiVersion": "flows.knative.dev/v1",
        "kind": "Sequence",
        "metadata": _metadata(what, name),
        "spec": {
            "steps": Noted(
                steps,
                "each step has a channel of the namespace's default kind; Knative's in-memory one loses what it holds "
                "when it ends: name another one in ConfigMap default-ch-webhook",
            ),
            "reply": {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": scoring.broker}},
        },
    }
    subscriber = {"ref": {"apiVersion": "flows.knative.dev/v1", "kind": "Sequence", "name": name}}
    feed = _trigger(what, scoring, "score", _score_filter(what, 0), subscriber, delivery)
    return {"sequence-score": sequence, "trigger-score": feed}


def _spent(what: Deployment, scoring: Scoring) -> Tree:
    """An empty value in a filter stands for any that is not empty."""
    last = len(what.plan.stages) - 1
    attributes = {
        "type": RESULT,
        "model": what.plan.name,
        "usedref": Noted("", "a result that was made from a claim: as it is in the broker, the claim can go"),
    }
    subscriber = {**_stage(what, last), "uri": SPENT_PATH}
    return _trigger(what, scoring, "score-spent", attributes, subscriber, _backoff(_RETRIES_OF_SPENT))


def _score_filter(what: Deployment, index: int) -> Tree:
    return {"type": SCORE, "model": what.plan.name, "stage": str(index)}


def _stage(what: Deployment, index: int) -> dict[str, Any]:
    """Its Knative Service, also for an InferenceService: not every cluster lets Eventing ask those for an address."""
    return {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": what.knative_name(index)}}


def _delivery(what: Deployment, scoring: Scoring) -> Tree:
    found = {
        **_backoff(_RETRIES),
        "timeout": Noted(f"PT{what.timeout_s}S", "of one attempt; a stage may have to start first"),
    }
    if scoring.dead_letters:
        found["deadLetterSink"] = {"uri": scoring.dead_letters}
    elif what.batch is not None:
        service = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": results_name(what)}
        found["deadLetterSink"] = {"ref": service, "uri": DEAD_LETTERS}
    return found


def _backoff(retries: int) -> Tree:
    return {"retry": retries, "backoffPolicy": "exponential", "backoffDelay": "PT1S"}


def _trigger(
    what: Deployment,
    scoring: Scoring,
    name: str,
    attributes: Mapping[str, Any],
    subscriber: Mapping[str, Any],
    delivery: Tree,
) -> Tree:
    return {
        "apiVersion": "eventing.knative.dev/v1",
        "kind": "Trigger",
        "metadata": _metadata(what, f"{what.service_name}-{name}"),
        "spec": {
            "broker": scoring.broker,
            "filter": {"attributes": attributes},
            "subscriber": subscriber,
            "delivery": delivery,
        },
    }


def _metadata(what: Deployment, name: str) -> Tree:
    labels = {**PART_OF, "stagecraft.dev/model": what.service_name}
    return {"name": name, "namespace": what.namespace, "labels": labels}
