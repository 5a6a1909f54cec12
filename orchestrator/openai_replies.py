"""Answers of the OpenAI endpoints, built from the `openai` package's own types. Pure.

Members are set one by one and the unset ones left out, so that required nulls (finish_reason, logprobs) stay.

Building and writing such an object takes longer than everything else that a streamed token needs. A chunk that brings
nothing but text differs from the one before only there, so it is written once for each choice, and texts are put in.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from orchestrator.choices import Answer, Piece
from orchestrator.generation import GenerationError, Token
from orchestrator.openai_requests import ChatRequest, CompletionRequest, Prompt, Work
from orchestrator.tokenizer import Tokenizer

_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error", 500: "server_error", 502: "server_error"}
DONE = b"data: [DONE]\n\n"

_as_json = json.JSONEncoder(ensure_ascii=False).encode


def error_body(error: GenerationError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def model_card(name: str, created_s: int) -> Model:
    return Model(id=name, created=created_s, object="model", owned_by="stagecraft")


def to_json(reply: BaseModel) -> bytes:
    return reply.model_dump_json(exclude_unset=True, warnings=False).encode()


def event(reply: BaseModel) -> bytes:
    return b"data: " + to_json(reply) + b"\n\n"


def error_event(error: GenerationError) -> bytes:
    return b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"


@dataclass(frozen=True, slots=True)
class TextFrame:
    """The event of a chunk that brings nothing but text: the bytes before the text, and those after it."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, chunk: BaseModel, member: str) -> TextFrame:
        """From a chunk whose `member`, the one for the text, is empty."""
        # quotes within texts are escaped, so this is found nowhere else
        before, found, after = event(chunk).partition(f'"{member}":""'.encode())
        return cls(before + found.removesuffix(b'""'), after)

    def event(self, text: str) -> bytes:
        return self.before + _as_json(text).encode() + self.after


class _Streamed(ABC):
    """What pieces become in a stream."""

    _frames: dict[int, TextFrame]  # by choice, as soon as text alone is all that is left to say

    def events(self, piece: Piece) -> bytes:
        """Those of one piece, often one; none where text is held back (half a character, half a stop text)."""
        frame = self._frames.get(piece.index)
        if frame is not None and piece.finish is None:
            return frame.event(piece.text) if piece.text else b""
        return b"".join(map(event, self.chunks(piece)))

    @abstractmethod
    def chunks(self, piece: Piece) -> list[BaseModel]:
        """The same as objects of the SDK."""


@dataclass(frozen=True)
class CompletionReplies(_Streamed):
    """Replies to one completion request; one object a request, as it knows what was said already."""

    request: CompletionRequest
    work: Work
    tokenizer: Tokenizer
    id: str
    created_s: int
    _begun: set[int] = field(default_factory=set)
    _frames: dict[int, TextFrame] = field(default_factory=dict)

    def whole(self, answers: Sequence[Answer]) -> Completion:
        choices = [self._choice(i, a.text, a.tokens, a.offsets, a.finish, first=True) for i, a in enumerate(answers)]
        count = sum(len(a.tokens) for a in answers)
        return self._reply(choices, usage=_usage(self.work, count))

    def chunks(self, piece: Piece) -> list[BaseModel]:
        """None or one."""
        first = piece.index not in self._begun
        detailed = self.request.logprobs is not None or self.request.return_token_ids
        if not (piece.text or piece.finish or detailed or (first and self.request.echo)):
            return []
        self._begun.add(piece.index)
        if not detailed:
            self._frames[piece.index] = TextFrame.of(self._chunk(Piece(piece.index, piece.token, "", 0)), "text")
        return [self._chunk(piece, first=first)]

    def usage(self, completion_tokens: int) -> BaseModel:
        return self._reply([], usage=_usage(self.work, completion_tokens))

    def _chunk(self, piece: Piece, *, first: bool = False) -> Completion:
        choice = self._choice(piece.index, piece.text, [piece.token], [piece.offset], piece.finish, first=first)
        return self._reply([choice], **_no_usage(self.request))

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], offsets: Sequence[int], finish: str | None, *, first: bool
    ) -> CompletionChoice:
        prompt = self.work.prompt_of(index)
        if first and self.request.echo:
            text = _prompt_text(prompt, self.tokenizer) + text
        logprobs = None if self.request.logprobs is None else _legacy_logprobs(tokens, offsets, self.tokenizer)
        extra: dict[str, Any] = {}
        if self.request.return_token_ids:
            extra["token_ids"] = [token.id for token in tokens]
            if first:
                extra["prompt_token_ids"] = list(prompt.ids)
        return CompletionChoice.model_construct(
            index=index, text=text, logprobs=logprobs, finish_reason=finish, **extra
        )

    def _reply(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        return Completion.model_construct(
            id=self.id,
            object="text_completion",
            created=self.created_s,
            model=self.request.model,
            choices=choices,
            **more,
        )


@dataclass(frozen=True)
class ChatReplies(_Streamed):
    """Replies to one chat request; one object a request, as it knows what was said already."""

    request: ChatRequest
    work: Work
    tokenizer: Tokenizer
    id: str
    created_s: int
    _begun: set[int] = field(default_factory=set)
    _frames: dict[int, TextFrame] = field(default_factory=dict)

    def whole(self, answers: Sequence[Answer]) -> ChatCompletion:
        choices = [
            chat_completion.Choice.model_construct(
                index=i,
                message=ChatCompletionMessage(role="assistant", content=a.text, refusal=None),
                logprobs=self._logprobs(a.tokens, chat_completion.ChoiceLogprobs),
                finish_reason=a.finish,
                **self._ids(a.tokens),
            )
            for i, a in enumerate(answers)
        ]
        extra: dict[str, Any] = {}
        if self.request.return_token_ids:
            extra["prompt_token_ids"] = list(self.work.prompts[0].ids)
        return ChatCompletion.model_construct(
            id=self.id,
            object="chat.completion",
            created=self.created_s,
            model=self.request.model,
            choices=choices,
            usage=_usage(self.work, sum(len(a.tokens) for a in answers)),
            **extra,
        )

    def chunks(self, piece: Piece) -> list[BaseModel]:
        """The role before the first text, the finish reason after the last."""
        made: list[BaseModel] = []
        detailed = self.request.logprobs or self.request.return_token_ids
        if piece.index not in self._begun:
            first = not self._begun
            self._begun.add(piece.index)
            made.append(self._chunk(piece.index, {"role": "assistant", "content": ""}, first=first))
            if not detailed:
                self._frames[piece.index] = TextFrame.of(self._chunk(piece.index, {"content": ""}), "content")
        if piece.text or detailed:
            made.append(self._chunk(piece.index, {"content": piece.text}, tokens=[piece.token]))
        if piece.finish:
            made.append(self._chunk(piece.index, {}, finish=piece.finish))
        return made

    def usage(self, completion_tokens: int) -> BaseModel:
        return self._reply([], usage=_usage(self.work, completion_tokens))

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        tokens: Sequence[Token] = (),
        finish: str | None = None,
        first: bool = False,
    ) -> BaseModel:
        choice = chat_completion_chunk.Choice.model_construct(
            index=index,
            delta=chat_completion_chunk.ChoiceDelta.model_construct(**delta),
            logprobs=self._logprobs(tokens, chat_completion_chunk.ChoiceLogprobs) if tokens else None,
            finish_reason=finish,
            **(self._ids(tokens) if tokens else {}),
        )
        more = _no_usage(self.request)
        if first and self.request.return_token_ids:
            more["prompt_token_ids"] = list(self.work.prompts[0].ids)
        return self._reply([choice], **more)

    def _reply(self, choices: list[chat_completion_chunk.Choice], **more: Any) -> BaseModel:
        return ChatCompletionChunk.model_construct(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created_s,
            model=self.request.model,
            choices=choices,
            **more,
        )

    def _logprobs(self, tokens: Sequence[Token], kind: type[BaseModel]) -> Any:
        if not self.request.logprobs:
            return None
        return kind.model_construct(content=[_chat_logprob(token, self.tokenizer) for token in tokens], refusal=None)

    def _ids(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"token_ids": [token.id for token in tokens]} if self.request.return_token_ids else {}


def _usage(work: Work, completion_tokens: int) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=work.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=work.prompt_tokens + completion_tokens,
    )


def _no_usage(request: CompletionRequest | ChatRequest) -> dict[str, Any]:
    """With include_usage every chunk but the last says null."""
    return {"usage": None} if request.include_usage else {}


def _prompt_text(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return prompt.text if prompt.text is not None else tokenizer.decode(prompt.ids)


def _legacy_logprobs(tokens: Sequence[Token], offsets: Sequence[int], tokenizer: Tokenizer) -> Logprobs:
    return Logprobs(
        tokens=[tokenizer.token_text(token.id) for token in tokens],
        token_logprobs=[_finite(token.logprob) for token in tokens],
        # two tokens may read the same: the likelier one keeps the name
        # and the chosen one is always there
        top_logprobs=[
            {tokenizer.token_text(other): _finite(value) for other, value in (*reversed(token.top), chosen)}
            for token in tokens
            for chosen in [(token.id, token.logprob)]
        ],
        text_offset=list(offsets),
    )


def _chat_logprob(token: Token, tokenizer: Tokenizer) -> ChatCompletionTokenLogprob:
    return ChatCompletionTokenLogprob(
        token=tokenizer.token_text(token.id),
        bytes=_byte_list(token.id, tokenizer),
        logprob=_finite(token.logprob),
        top_logprobs=[
            TopLogprob(token=tokenizer.token_text(other), bytes=_byte_list(other, tokenizer), logprob=_finite(logprob))
            for other, logprob in token.top
        ],
    )


def _byte_list(token: int, tokenizer: Tokenizer) -> list[int] | None:
    spelled = tokenizer.token_bytes(token)
    return None if spelled is None else list(spelled)


def _finite(logprob: float | None) -> float:
    """JSON has no -inf; OpenAI writes -9999 for "very unlikely"."""
    return -9999.0 if logprob is None or logprob < -9999.0 else logprob
