"""One Knative Service: its revisions, and which of them gets traffic.

A changed template makes a new revision; the old one keeps the traffic until the new one is ready, then loses its route,
becomes unreachable and goes to zero. After pkg/reconciler/{configuration,route,revision}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from knative.autoscaler.config import AutoscalerConfig
from knative.errors import ValidationError
from knative.node import Node, RevisionName
from knative.resources.objects import Service, TrafficTarget
from knative.resources.service import check_update
from knative.revision import Revision

_OLD_REVISIONS_MAX = 20  # config-gc min-non-active-revisions


class ServiceController:
    """Owns the revisions of one Service."""

    def __init__(
        self,
        service: Service,
        node: Node,
        config: AutoscalerConfig,
        *,
        changed: Callable[[], None],
        wakes: Wakes,
        refuses: Refuses,
    ) -> None:
        self.service = service
        self.generation = 0
        self.revisions: list[Revision] = []  # oldest first
        self.created = datetime.now(UTC)
        self._node = node
        self._config = config
        self._changed = changed
        self._wakes = wakes
        self._refuses = refuses
        self._latest_ready: Revision | None = None
        self._add_revision()

    @property
    def key(self) -> tuple[str, str]:
        return self.service.namespace, self.service.name

    @property
    def latest(self) -> Revision:
        return self.revisions[-1]

    def update(self, service: Service) -> bool:
        """Takes over a new version of the Service; True when that made a new revision."""
        before, self.service = self.service, service
        if service.template != before.template:
            self._add_revision()
            return True
        self.settle()
        return False

    def check(self, service: Service) -> None:
        """Raises ValidationError for a template that cannot become a revision beside those there are."""
        check_update(self.service, service)
        name = service.template.name
        other = next((revision for revision in self.revisions if name and revision.id.name == name), None)
        if other is not None and other.template != service.template:
            raise ValidationError([f'revision "{name}" exists with another template: spec.template.metadata.name'])

    def configure(self, config: AutoscalerConfig) -> None:
        self._config = config
        self.settle()

    def targets(self) -> list[tuple[TrafficTarget, Revision]]:
        """Where requests go, with percent and tag. A revision that was named and does not exist gets none."""
        named = {revision.id.name: revision for revision in self.revisions}
        latest = self._latest_ready or self.latest
        pairs = ((target, named.get(target.revision) if target.revision else latest) for target in self.service.traffic)
        return [(target, revision) for target, revision in pairs if revision is not None]

    def settle(self) -> None:
        """After any change: who is the latest ready one, who is reachable, what can be forgotten."""
        self._latest_ready = self._newest_usable() or self._latest_ready
        routed = {id(revision) for _, revision in self.targets()}
        for revision in list(self.revisions):
            # a new revision has to start before it may get traffic
            fresh = revision is self.latest and not revision.usable
            revision.configure(self._config, reachable=fresh or id(revision) in routed)
        self._forget_old(routed)
        self._changed()

    async def close(self, *, gently: bool = False) -> None:
        """Ends all replicas: now, or once running requests have been answered."""
        for revision in self.revisions:  # before a service of the same name may count anew
            self._node.metrics.forget(revision.id)
        await asyncio.gather(*(revision.close(gently=gently) for revision in self.revisions))

    def _add_revision(self) -> None:
        self.generation += 1
        template = self.service.template
        again = next((one for one in self.revisions if template.name and one.id.name == template.name), None)
        if again is not None:  # back to one that exists: it is the latest once more
            self.revisions.remove(again)
            self.revisions.append(again)
            self.settle()
            return
        name = template.name or f"{self.service.name}-{self.generation:05d}"
        identity = RevisionName(self.service.namespace, self.service.name, name, self.generation)
        revision = Revision(
            identity,
            template,
            self._node,
            self._config,
            changed=self._revision_changed,
            wakes=self._wake_others,
            refused=self._refuse_others,
        )
        self.revisions.append(revision)
        revision.open()
        self.settle()

    def _revision_changed(self, revision: Revision) -> None:
        if revision in self.revisions and self._newest_usable() is not self._latest_ready:
            self.settle()

    def _newest_usable(self) -> Revision | None:
        return next((revision for revision in reversed(self.revisions) if revision.usable), None)

    def _wake_others(self) -> None:
        self._wakes(self)

    def _refuse_others(self, reason: str) -> None:
        self._refuses(self, reason)

    def _forget_old(self, routed: set[int]) -> None:
        old = [one for one in self.revisions[:-1] if id(one) not in routed and one.idle]
        for revision in old[: max(0, len(old) - _OLD_REVISIONS_MAX)]:
            self.revisions.remove(revision)
            self._node.metrics.forget(revision.id)

    # -- what is shown

    @property
    def ready(self) -> bool:
        return self._latest_ready is self.latest and not self.latest.failing and not self._missing

    @property
    def _missing(self) -> list[str]:
        """Revisions that get traffic and do not exist."""
        names = {revision.id.name for revision in self.revisions}
        return [target.revision for target in self.service.traffic if target.revision and target.revision not in names]

    def status(self, url: str) -> dict[str, Any]:
        """The `status` block of `kubectl get ksvc -o yaml`."""
        latest = self.latest
        return {
            "url": url,
            "observedGeneration": self.generation,
            "latestCreatedRevisionName": latest.id.name,
            "latestReadyRevisionName": self._latest_ready.id.name if self._latest_ready else "",
            "conditions": [self._condition()],
            "traffic": [
                {
                    "revisionName": revision.id.name,
                    "percent": target.percent,
                    "latestRevision": not target.revision,
                    **({"tag": target.tag} if target.tag else {}),
                }
                for target, revision in self.targets()
            ],
        }

    def _condition(self) -> dict[str, str]:
        """Ready, with Knative's reasons (pkg/apis/serving/v1/{configuration,route}_lifecycle.go)."""
        latest = self.latest
        if self.ready:
            return {"type": "Ready", "status": "True"}
        if latest.failing:
            return {"type": "Ready", "status": "False", "reason": "RevisionFailed", "message": latest.failure}
        if self._missing:
            text = f'Revision "{self._missing[0]}" referenced in traffic not found.'
            return {"type": "Ready", "status": "False", "reason": "RevisionMissing", "message": text}
        text = f"Revision {latest.id.name} is not ready yet" + (f": {latest.waits_for}" if latest.waits_for else "")
        return {"type": "Ready", "status": "Unknown", "reason": "Deploying", "message": text}


Wakes = Callable[[ServiceController], None]
Refuses = Callable[[ServiceController, str], None]
