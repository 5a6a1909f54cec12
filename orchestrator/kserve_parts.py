"""What KServe's server says and allows where its own answer would be wrong for a chain of stages.

KServe 0.21: readiness of the server is always true and a request in wrong form often an internal error
(protocol/dataplane.py), and any client may unload the model, which then is gone for everybody
(protocol/model_repository_extension.py).
"""

from __future__ import annotations

from typing import Any

from kserve.errors import InvalidInput, ModelNotFound
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension

from orchestrator.choices import Service

_REASON_CHARACTERS_MAX = 200


class StagedDataPlane(DataPlane):  # type: ignore[misc]  # kserve has no types
    """Ready when the stages are, for /v2/health/ready and gRPC ServerReady; and what KServe's lacks of the protocol."""

    def __init__(self, registry: ModelRepository, service: Service) -> None:
        super().__init__(model_registry=registry)
        self._service = service

    async def ready(self) -> bool:
        return self._service.generator.ready

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        """KServe's, which says nothing of versions and so shows them as null, where the protocol has a list."""
        return {**await super().model_metadata(model_name), "versions": []}

    def decode(self, *arguments: Any, **named: Any) -> Any:
        """KServe's parsers trust that members are there, of their types, and that binary data are as long as they say.
        Raises InvalidInput."""
        try:
            return super().decode(*arguments, **named)
        except InvalidInput:
            raise
        except Exception as error:  # KeyError, struct.error, ...: nothing of ours is at work here
            reason = f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS_MAX]
            raise InvalidInput(
                f"the request cannot be read ({reason}); compare it with the Open Inference Protocol"
            ) from None


class FixedModels(ModelRepositoryExtension):  # type: ignore[misc]  # kserve has no types
    """The one model stays: loading it is nothing to do, unloading is refused."""

    async def load(self, model_name: str) -> dict[str, Any]:
        """What KServe's gRPC side answers with; its REST side makes the same by itself."""
        self._check(model_name)
        return {"name": model_name, "load": True}

    async def unload(self, model_name: str) -> None:
        self._check(model_name)
        # KServe's REST side answers this exception with 501
        raise NotImplementedError("the model cannot be unloaded by clients; stop the server instead")

    def _check(self, model_name: str) -> None:
        if self._model_registry.get_model(model_name) is None:
            raise ModelNotFound(model_name)
