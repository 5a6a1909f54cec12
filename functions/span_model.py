"""The part of a Transformers model that one stage runs, cut out with no code per architecture.

The whole model is built on the meta device (no memory), its list of blocks is cut to the span, and modules that only
the first or the last stage needs are taken out elsewhere. Two hooks do the rest: one replaces what reaches the first
block by the hidden states that came in, one keeps what leaves the last block. Whatever a model does before its blocks
(scale embeddings, add learned positions) or after them is thereby skipped where it does not belong.

    first stage   input_ids -> [embedding ... blocks] -> hidden
    middle        hidden -> [blocks] -> hidden
    last stage    hidden -> [blocks, final norm, head] -> logits of the rows asked for
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from functions.contract.checkpoint import Checkpoint, CheckpointError
from functions.contract.spans import BlockSpan
from functions.weights import load_weights

# names of what comes before and after the blocks; anything else outside them is kept in every stage
_BEFORE = re.compile(r"embed|(^|[._])emb([._]|$)|wte|wpe|project_in", re.IGNORECASE)
_AFTER = re.compile(r"norm|ln_f|final|project_out|lm_head|embed_out|^head$|output", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Ends:
    """Which ends of the model a stage holds."""

    first: bool
    last: bool

    @property
    def whole(self) -> bool:
        return self.first and self.last

    def takes(self, name: str) -> bool:
        """Whether a module or tensor outside the blocks belongs here. An output embedding counts as after."""
        if "embed_out" in name or not _BEFORE.search(name):
            return self.last or not _AFTER.search(name)
        return self.first


@dataclass(frozen=True, slots=True)
class Cut:
    """A model cut to a span. `tied_head_name` is set where the head has to take the embedding's matrix."""

    model: Any
    blocks: nn.ModuleList
    span: BlockSpan
    ends: Ends
    embedding_name: str
    tied_head_name: str | None


class _Absent(nn.Module):
    """Stands where another stage's module was: adds nothing if it was an embedding, else passes its input on."""

    def __init__(self, was_embedding: bool) -> None:
        super().__init__()
        self._was_embedding = was_embedding

    def forward(self, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros((), device=value.device) if self._was_embedding else value


class SpanModel:
    """Runs one span. Not safe for two threads at once: the hooks hold the hidden states of the current pass."""

    def __init__(self, cut: Cut, device: torch.device, dtype: torch.dtype) -> None:
        self.span = cut.span
        self.ends = cut.ends
        self.device = device
        self.dtype = dtype
        self.config: PreTrainedConfig = cut.model.config.get_text_config()
        self._model = cut.model
        self._incoming: torch.Tensor | None = None
        self._outgoing: torch.Tensor | None = None
        if not cut.ends.first:
            cut.blocks[0].register_forward_pre_hook(self._put_in, with_kwargs=True)
        if not cut.ends.last:
            cut.blocks[-1].register_forward_hook(self._take_out)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int:
        """The most tokens of one sequence that the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 20)

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, hidden: torch.Tensor | None, positions: torch.Tensor, cache: Any, rows: torch.Tensor
    ) -> torch.Tensor:
        """tokens int64 [n], hidden [n, hidden size] unless first, positions int64 [n], rows int64 [m].

        Returns hidden states [n, hidden size], or at the last stage the logits [m, vocabulary] of `rows`.
        `cache` files keys and values (see functions.kv_cache)."""
        self._incoming = None if hidden is None else hidden[None]
        inputs = {"input_ids": tokens[None]} if hidden is None else {"inputs_embeds": hidden[None]}
        run = self._model if self.ends.last and rows.numel() else self._model.base_model
        extra = {"logits_to_keep": rows} if run is self._model else {}
        try:
            output = run(**inputs, **extra, position_ids=positions[None], past_key_values=cache, use_cache=True)
            if run is self._model:
                return cast(torch.Tensor, output.logits[0])
            if self.ends.last:
                return cast(torch.Tensor, output.last_hidden_state[0, :0])
            assert self._outgoing is not None  # our own hook has run
            return self._outgoing[0]
        finally:
            self._incoming = self._outgoing = None

    def _put_in(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._incoming, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._incoming}

    def _take_out(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._outgoing = output[0] if isinstance(output, tuple) else output


def load_span(
    checkpoint: Checkpoint, span: BlockSpan, dtype: torch.dtype, device: torch.device, attention: str | None = None
) -> SpanModel:
    """The span, ready to run. `attention` names a registered attention function, None is the model's own choice.

    Raises CheckpointError."""
    if span.end > checkpoint.block_count:
        raise CheckpointError(f"blocks {span} were asked for, the model has {checkpoint.block_count}")
    with _quiet():
        cut = _cut(_build(checkpoint, dtype, attention), checkpoint, span)
        load_weights(cut, checkpoint, dtype, device)
    cut.model.eval()
    return SpanModel(cut, device, dtype)


def _build(checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """The whole model on the meta device: shapes, no memory."""
    settings = dict(checkpoint.config)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (KeyError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.location}/config.json does not describe a decoder-only model that Transformers knows: {error}"
        ) from error


def _cut(model: Any, checkpoint: Checkpoint, span: BlockSpan) -> Cut:
    total = checkpoint.block_count
    ends = Ends(first=span.start == 0, last=span.end == total)
    owner, name, blocks = _find_blocks(model.base_model, total)
    kept = nn.ModuleList(list(blocks)[span.start : span.end])
    setattr(owner, name, kept)
    for index, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]  # a plain number, whatever torch's types say
    _cut_config(model.config.get_text_config(), span, total)
    embedding_name = _name_of(model, model.get_input_embeddings())
    head_name = _name_of(model, model.get_output_embeddings())
    tied = ends.last and not ends.first and _head_is_tied(model, checkpoint, head_name)
    for parent, child_name in list(_ends_of(model, kept)):
        child = getattr(parent, child_name)
        if not ends.takes(child_name):
            was_embedding = isinstance(child, nn.Embedding) or "embed" in type(child).__name__.lower()
            setattr(parent, child_name, _Absent(was_embedding))
    return Cut(model, kept, span, ends, f"{embedding_name}.weight", f"{head_name}.weight" if tied else None)


def _find_blocks(base: nn.Module, total: int) -> tuple[nn.Module, str, nn.ModuleList]:
    for module in base.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == total:
                return module, name, child
    raise CheckpointError(f"{type(base).__name__} has no list of {total} blocks that could be cut into stages")


def _cut_config(config: PreTrainedConfig, span: BlockSpan, total: int) -> None:
    """Settings given per block must be those of the span's blocks, counted from 0 like the blocks now are."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:
            object.__setattr__(config, key, value[span.start : span.end])
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if key in vars(config):
            object.__setattr__(config, key, len(span))


def _ends_of(model: nn.Module, blocks: nn.ModuleList) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of every module with weights that stands beside the blocks or above them."""
    above = [m for m in model.modules() if m is not blocks and any(sub is blocks for sub in m.modules())]
    for parent in above:
        for name, child in parent.named_children():
            if child is not blocks and child not in above and any(True for _ in child.parameters()):
                yield parent, name


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _head_is_tied(model: Any, checkpoint: Checkpoint, head_name: str) -> bool:
    return f"{head_name}.weight" in model.all_tied_weights_keys and f"{head_name}.weight" not in checkpoint.tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers warns about unused weights and draws bars; both are meant for whole models."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
