"""The model as KServe sees it: V1 :predict, V2 infer over REST and gRPC, metadata, readiness.

Importing this module imports kserve, which parses sys.argv while it is imported: see `server.bare_argv`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import kserve
import numpy as np
from kserve.protocol.infer_type import to_http_parameters

from orchestrator.choices import Answer, Service, as_generation_error, collect
from orchestrator.openai_api import REPEATED_HEADER
from orchestrator.openai_requests import CompletionRequest, Work, completion_work, invalid, parse_json, parse_request
from orchestrator.request_terms import Terms, current_terms, seeded
from orchestrator.tokenizer import half_character

# parameters of /openai/v1/completions that make no sense for one text in, one text out
_NOT_HERE = frozenset({"model", "n", "best_of", "stream", "stream_options", "echo", "return_token_ids"})
_INPUTS = ("text_input", "input_ids")
_OUTPUTS = ("text_output", "output_ids", "finish_reason")
_FRACTIONS = frozenset(name for name, info in CompletionRequest.model_fields.items() if info.annotation is float)


class StagedModel(kserve.Model):  # type: ignore[misc]  # kserve has no types
    """Registered before it is ready; `healthy` follows the generator, so probes get 503 until all stages are up."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.name, return_response_headers=True)
        self._service = service

    async def healthy(self) -> bool:
        return self._service.generator.ready

    def load(self) -> bool:
        """KServe calls this for a request (gRPC) while the model is not healthy: waiting is the client's business."""
        self._service.check_ready()
        return True  # it has become ready in this moment

    async def get_input_types(self) -> list[dict[str, Any]]:
        return [
            {"name": "text_input", "datatype": "BYTES", "shape": [-1]},
            {"name": "input_ids", "datatype": "INT64", "shape": [1, -1]},
        ]

    async def get_output_types(self) -> list[dict[str, Any]]:
        return [
            {"name": "text_output", "datatype": "BYTES", "shape": [-1]},
            {"name": "output_ids", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "finish_reason", "datatype": "BYTES", "shape": [-1]},
        ]

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> Any:
        """Raises GenerationError, which the servers of both protocols answer with a status of theirs."""
        try:
            terms = current_terms()
            tag = uuid.uuid4().hex if terms.key is None else terms.key.tag
            request_id = (headers or {}).get("x-request-id") or f"infer-{tag}"
            if self._service.begun_s(terms) is not None and response_headers is not None:
                response_headers[REPEATED_HEADER] = "true"
            if isinstance(payload, kserve.InferRequest):
                return await self._infer(payload, request_id, terms)
            return await self._predict_v1(payload, request_id, (headers or {}).get("content-type", ""), terms)
        except Exception as error:
            raise as_generation_error(error) from None

    async def _predict_v1(self, payload: Any, request_id: str, content_type: str, terms: Terms) -> dict[str, Any]:
        if isinstance(payload, bytes) and content_type.lower().startswith("application/json"):
            payload = parse_json(payload)  # KServe decodes only where no charset is named
        bodies = [seeded(body, terms, i) for i, body in enumerate(_v1_bodies(payload, self.name))]
        requests = [parse_request(CompletionRequest, body) for body in bodies]
        work = _joined([completion_work(self._service, request, terms=terms) for request in requests])
        answers = await self._answers(work, "v1", request_id, terms)
        return {"predictions": [_prediction(work, i, answer) for i, answer in enumerate(answers)]}

    async def _infer(self, request: kserve.InferRequest, request_id: str, terms: Terms) -> kserve.InferResponse:
        wanted = _wanted_outputs(request)
        if isinstance(request.id, str) and (at := half_character(request.id)) is not None:
            raise invalid(f"the id is not valid Unicode at character {at}", "id")  # no answer could repeat it
        parameters = _checked_parameters(_v2_parameters(request))
        if "prompt" in parameters:
            raise invalid("the prompt of a V2 request is its input text_input or input_ids", "prompt")
        body = {**parameters, "model": self.name, "prompt": _v2_prompt(request)}
        work = completion_work(self._service, parse_request(CompletionRequest, seeded(body, terms)), terms=terms)
        answers = await self._answers(work, "v2", request_id, terms)
        outputs = [_output(name, answers) for name in wanted]
        return kserve.InferResponse(request.id or request_id, self.name, outputs, from_grpc=request.from_grpc)

    async def _answers(self, work: Work, endpoint: str, request_id: str, terms: Terms) -> list[Answer]:
        if len(work.choices) > self._service.choices_max:
            raise invalid(f"{len(work.choices)} instances are over the limit of {self._service.choices_max}")
        pieces = self._service.generate(
            work.choices, endpoint=endpoint, request_id=request_id, prompt_tokens=work.prompt_tokens, terms=terms
        )
        return await collect(pieces, len(work.choices))


def _v1_bodies(payload: Any, model: str) -> list[dict[str, Any]]:
    """{"instances": [text or {"prompt": ..., ...}], "parameters": {...}} as bodies of completion requests."""
    if not isinstance(payload, dict):
        raise invalid("the body must be a JSON object, with content type application/json")
    unknown = sorted(set(payload) - {"instances", "parameters"})
    if unknown:
        raise invalid(f"unknown members {unknown}; known are instances and parameters")
    instances = payload.get("instances")
    if not isinstance(instances, list) or not instances:
        raise invalid("instances must be a list with at least one entry")
    shared = _checked_parameters(payload.get("parameters"))
    bodies = []
    for instance in instances:
        own = {"prompt": instance} if isinstance(instance, str) else instance
        if not isinstance(own, dict):
            raise invalid('an instance is a text or an object such as {"prompt": "...", "max_tokens": 16}')
        own = _checked_parameters(own)
        prompt = own.get("prompt")
        if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
            raise invalid("the prompt of an instance is one text or one list of token ids", "prompt")
        bodies.append({**shared, **own, "model": model})
    return bodies


def _checked_parameters(parameters: Any) -> dict[str, Any]:
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise invalid("parameters must be an object")
    for name in parameters:
        if name in _NOT_HERE:
            raise invalid(f"parameter {name!r} cannot be given here; /openai/v1/completions takes it", name)
    return dict(parameters)


def _joined(works: Sequence[Work]) -> Work:
    """Works of one choice each, as one."""
    return Work(
        tuple(prompt for work in works for prompt in work.prompts),
        tuple(choice for work in works for choice in work.choices),
        works[0].seed,
    )


def _prediction(work: Work, index: int, answer: Answer) -> dict[str, Any]:
    prediction: dict[str, Any] = {
        "text": answer.text,
        "tokens": [token.id for token in answer.tokens],
        "finish_reason": answer.finish,
        "prompt_tokens": len(work.prompts[index].ids),
    }
    if work.choices[index].request.params.logprobs is not None:
        prediction["logprobs"] = [token.logprob for token in answer.tokens]
    return prediction


def _v2_parameters(request: kserve.InferRequest) -> dict[str, Any]:
    """KServe's gRPC parameters know no fractions: there `temperature` is a text such as "0.7"."""
    parameters: dict[str, Any] = to_http_parameters(request.parameters or {})
    if not request.from_grpc:
        return parameters
    return {name: _number(value) if name in _FRACTIONS else value for name, value in parameters.items()}


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _v2_prompt(request: kserve.InferRequest) -> Any:
    inputs = {tensor.name: tensor for tensor in request.inputs}
    if len(request.inputs) != 1 or not set(inputs) <= set(_INPUTS):
        raise invalid(f"give exactly one input, one of {list(_INPUTS)}; got {sorted(inputs)}", "inputs")
    (tensor,) = request.inputs
    shape, values = list(tensor.shape), _values(tensor)
    if len(values) != int(np.prod(shape)) or any(size < 0 for size in shape):
        raise invalid(f"{tensor.name}: shape {shape} does not fit {len(values)} values", tensor.name)
    return _texts(tensor, values) if tensor.name == "text_input" else _ids(tensor, values)


def _texts(tensor: Any, values: list[Any]) -> list[str]:
    if tensor.datatype != "BYTES":
        raise invalid(f"text_input must be BYTES, got {tensor.datatype}", "text_input")
    try:
        texts = [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError:
        raise invalid("text_input must be UTF-8", "text_input") from None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise invalid("text_input must hold at least one text", "text_input")
    return texts


def _ids(tensor: Any, values: list[Any]) -> list[int]:
    if tensor.datatype not in ("INT64", "INT32"):
        raise invalid(f"input_ids must be INT64 or INT32, got {tensor.datatype}", "input_ids")
    shape = list(tensor.shape)
    if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):
        raise invalid(f"input_ids must have the shape [1, n], got {shape}", "input_ids")
    if not all(type(value) is int for value in values):
        raise invalid("input_ids must be whole numbers", "input_ids")
    return values


def _values(tensor: Any) -> list[Any]:
    """The tensor's values in a flat list, from JSON data (nested or flat) or raw bytes."""
    if tensor._raw_data is not None:
        try:
            return list(tensor.as_numpy().ravel().tolist())
        except Exception:  # whatever numpy or struct say of too few or too many bytes
            raise invalid(f"{tensor.name}: the raw data does not fit {tensor.datatype} {tensor.shape}") from None
    values, rest = [], [tensor.data]
    while rest:
        item = rest.pop()
        if isinstance(item, list):
            rest.extend(reversed(item))
        else:
            values.append(item)
    return values


def _wanted_outputs(request: kserve.InferRequest) -> Sequence[str]:
    wanted = [output.name for output in request.request_outputs or ()]
    unknown = sorted(set(wanted) - set(_OUTPUTS))
    if unknown:
        raise invalid(f"unknown outputs {unknown}; known are {list(_OUTPUTS)}", "outputs")
    return wanted or _OUTPUTS


def _output(name: str, answers: Sequence[Answer]) -> kserve.InferOutput:
    if name == "output_ids":
        return _ids_output(answers)
    texts = [answer.text if name == "text_output" else answer.finish for answer in answers]
    output = kserve.InferOutput(name, [len(texts)], "BYTES")
    output.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_), binary_data=False)
    return output


def _ids_output(answers: Sequence[Answer]) -> kserve.InferOutput:
    """[answers, longest]; shorter rows end in -1, which is no token."""
    longest = max(len(answer.tokens) for answer in answers)
    ids = np.full((len(answers), longest), -1, dtype=np.int64)
    for row, answer in zip(ids, answers, strict=True):
        row[: len(answer.tokens)] = [token.id for token in answer.tokens]
    output = kserve.InferOutput("output_ids", list(ids.shape), "INT64")
    output.set_data_from_numpy(ids, binary_data=False)
    return output
