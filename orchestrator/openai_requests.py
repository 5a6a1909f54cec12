"""Bodies of OpenAI requests, checked and turned into choices. Pure: no HTTP, no generation.

Parameters follow https://platform.openai.com/docs/api-reference; top_k, min_p, repetition_penalty, ignore_eos and
return_token_ids are additions that vLLM's server knows under the same names.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from functions.contract.sampling import MAX_TOP_LOGPROBS, SEED_BOUND, SamplingParams
from orchestrator.chat import ChatTemplateError
from orchestrator.choices import Choice, Service
from orchestrator.generation import GenerationError, GenerationRequest, Priority, choice_seed
from orchestrator.request_terms import NO_TERMS, Terms
from orchestrator.tokenizer import TokenizerError

N_MAX = 16
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 1024
# OpenAI's default is the whole context, which would reserve KV memory for it
CHAT_TOKENS_DEFAULT = 2048
COMPLETION_TOKENS_DEFAULT = 16

# known to OpenAI's clients, and left out here on purpose
NOT_SUPPORTED = {
    "suffix": "text is only continued, never filled in",
    "tools": "tools are not supported",
    "tool_choice": "tools are not supported",
    "parallel_tool_calls": "tools are not supported",
    "functions": "functions are not supported",
    "function_call": "functions are not supported",
    "audio": "only text is generated",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "web search is not supported",
    "reasoning_effort": "reasoning effort cannot be chosen",
}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> GenerationError:
    return GenerationError(message, status=400, code=code, param=param)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _stop_list(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a text or a list of texts, none of them empty")
    if len(stops) > STOPS_MAX or any(len(stop) > STOP_CHARACTERS_MAX for stop in stops):
        raise ValueError(f"may hold at most {STOPS_MAX} texts of at most {STOP_CHARACTERS_MAX} characters")
    return tuple(stops)


def _prompt_list(value: Any) -> Any:
    """One prompt (text or ids) becomes a list of one."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, list) and all(type(i) is int for i in item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists; not empty")


def _biases(value: Any) -> Any:
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() for key in value):
        raise ValueError("must map token ids (written as texts) to numbers")
    return {int(key): bias for key, bias in value.items()}


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(_Strict):
    model: str
    n: int = Field(1, ge=1, le=N_MAX)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_list)] = ()
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = Field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    # taken and without effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Common):
    prompt: Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompt_list)]
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def logprobs_count(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


def _text_format(value: Any) -> Any:
    if value != {"type": "text"}:
        raise ValueError('only {"type": "text"} is supported')
    return value


class ChatRequest(_Common):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: Annotated[dict[str, str] | None, BeforeValidator(_text_format)] = None
    modalities: list[Literal["text"]] | None = None

    @property
    def logprobs_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the client wrote (for echo), None where it sent token ids."""

    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A checked request: prompts, and n choices for each of them, in order."""

    prompts: tuple[Prompt, ...]
    choices: tuple[Choice, ...]
    seed: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    def prompt_of(self, choice: int) -> Prompt:
        return self.prompts[choice * len(self.prompts) // len(self.choices)]


R = TypeVar("R", bound=_Common)


def parse_json(body: bytes) -> dict[str, Any]:
    """Raises GenerationError (400) for anything but a JSON object."""
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise invalid("the body nests too deeply", code="invalid_json") from None
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    return data


def parse_request(kind: type[R], data: Mapping[str, Any]) -> R:
    """Raises GenerationError (400) that names the parameter. null stands for "not given", as in OpenAI's clients."""
    data = {name: _without_nulls(value) for name, value in data.items() if value is not None}
    known = set(kind.model_fields)
    for name in data:
        if name in NOT_SUPPORTED and name not in known:
            raise invalid(f"{name}: {NOT_SUPPORTED[name]}", name, "unsupported_parameter")
        if name not in known:
            raise invalid(f"unknown parameter {name!r}; known are {sorted(known)}", name, "unknown_parameter")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        _raise_first(error)


def completion_work(
    service: Service, request: CompletionRequest, priority: Priority = "interactive", terms: Terms = NO_TERMS
) -> Work:
    """Raises GenerationError (400, and what `Service.check_open` does)."""
    service.check_open(priority, terms)
    if request.best_of is not None and request.best_of != request.n:
        raise invalid("best_of is only supported where it equals n", "best_of", "unsupported_parameter")
    if request.echo and request.logprobs is not None:
        raise invalid("echo cannot go with logprobs: prompts get no log-probabilities", "echo", "unsupported_parameter")
    prompts = tuple(_prompt(service, prompt) for prompt in request.prompt)
    default = COMPLETION_TOKENS_DEFAULT
    return _work(service, request, prompts, request.max_tokens, default, priority, continues=True)


def chat_work(
    service: Service, request: ChatRequest, priority: Priority = "interactive", terms: Terms = NO_TERMS
) -> Work:
    """As `completion_work`."""
    service.check_open(priority, terms)
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise invalid("give max_completion_tokens or max_tokens, not both", "max_tokens")
    if service.chat_template is None:
        raise invalid(service.chat_problem, "messages", "no_chat_template")
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    try:
        text = service.chat_template.render(messages)
    except ChatTemplateError as error:
        raise invalid(str(error), "messages") from None
    # the template writes the special tokens itself
    ids = _encode(service, text, "messages", add_special_tokens=False)
    limit, default = request.max_completion_tokens or request.max_tokens, CHAT_TOKENS_DEFAULT
    return _work(service, request, (Prompt(ids),), limit, default, priority, continues=False, param="messages")


def _work(
    service: Service,
    request: CompletionRequest | ChatRequest,
    prompts: tuple[Prompt, ...],
    limit: int | None,
    default: int,
    priority: Priority,
    *,
    continues: bool,
    param: str = "prompt",
) -> Work:
    if len(prompts) * request.n > service.choices_max:
        raise invalid(
            f"{len(prompts)} prompts x n = {request.n} are over the limit of {service.choices_max} choices", param
        )
    # any whole number is a seed: those outside the range are folded into it
    seed = secrets.randbelow(SEED_BOUND) if request.seed is None else request.seed % SEED_BOUND
    choices: list[Choice] = []
    for prompt in prompts:
        most = _tokens_left(service, prompt, limit, default, param)
        for _ in range(request.n):
            generation = GenerationRequest(
                prompt.ids,
                most,
                _params(service, request, choice_seed(seed, len(choices))),
                frozenset() if request.ignore_eos else service.tokenizer.eos_ids,
                priority,
            )
            choices.append(Choice(generation, request.stop, continues))
    return Work(prompts, tuple(choices), seed)


def _params(service: Service, request: CompletionRequest | ChatRequest, seed: int) -> SamplingParams:
    for token in request.logit_bias:
        if token >= service.generator.vocab_size:
            raise invalid(f"logit_bias: token {token} is not in 0..{service.generator.vocab_size - 1}", "logit_bias")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    values = {name: getattr(request, name) for name in names}
    try:
        return SamplingParams(**values, logit_bias=request.logit_bias, seed=seed, logprobs=request.logprobs_count)
    except ValueError as error:
        raise invalid(str(error), str(error).split(maxsplit=1)[0]) from None


def _tokens_left(service: Service, prompt: Prompt, limit: int | None, default: int, param: str) -> int:
    context, length = service.generator.context_length, len(prompt.ids)
    if length == 0:
        raise invalid("the prompt is empty; it must hold at least one token", param, "empty_prompt")
    if length >= context:
        raise invalid(
            f"the prompt has {length} tokens; the model's context is {context} tokens for prompt and answer together",
            param,
            "context_length_exceeded",
        )
    if limit is None:
        return min(default, context - length)
    if length + limit > context:
        raise invalid(
            f"the model's context is {context} tokens; the prompt has {length} and max_tokens asks for {limit} more",
            "max_tokens",
            "context_length_exceeded",
        )
    return limit


def _prompt(service: Service, prompt: str | tuple[int, ...]) -> Prompt:
    if isinstance(prompt, str):
        if not prompt:
            raise invalid("the prompt is empty", "prompt", "empty_prompt")
        return Prompt(_encode(service, prompt, "prompt"), prompt)
    for token in prompt:
        if not 0 <= token < service.generator.vocab_size:
            raise invalid(f"token id {token} is not in 0..{service.generator.vocab_size - 1}", "prompt")
    return Prompt(prompt)


def _encode(service: Service, text: str, param: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    try:
        return tuple(service.tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except TokenizerError as error:
        raise invalid(str(error), param) from None


def _without_nulls(value: Any) -> Any:
    """Clients send a received message back with all its empty members."""
    if isinstance(value, list):
        return [_without_nulls(item) if isinstance(item, dict) else item for item in value]
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if item is not None}
    return value


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _raise_first(error: ValidationError) -> NoReturn:
    """The first complaint, in words that name the parameter; of a union's several, the one that got deepest."""
    complaints = error.errors(include_url=False)
    about_first = [entry for entry in complaints if entry["loc"][0] == complaints[0]["loc"][0]]
    first = max(about_first, key=lambda entry: len(entry["loc"]))
    # the last part of a location inside a union is the branch's type, which says nothing to a client
    where = [part for part in first["loc"] if part != "str" and not str(part).startswith("list[")]
    name = str(where[0])
    path = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where[1:])
    if first["type"] == "missing":
        raise invalid(f"{path} is required", name, "missing_parameter") from None
    if first["type"] == "extra_forbidden":
        raise invalid(f"{path} is unknown or not supported", name, "unknown_parameter") from None
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = repr(first["input"])
    raise invalid(f"{path}: {message}, got {given[:80]}{'...' if len(given) > 80 else ''}", name) from None
