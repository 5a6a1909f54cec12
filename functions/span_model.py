"""The part of a Transformers model that one stage runs, cut out with no code per architecture.

The whole model is built on the meta device (no memory), its list of blocks is cut to the span, and the embeddings and
the head are taken out where they do not belong. Two hooks do the rest: one replaces what reaches the first block by the
hidden states that came in, one keeps what leaves the last block. Whatever a model does before its blocks (scale
embeddings, add learned positions) or after them thereby has no effect in the other stages.

    first stage   input_ids -> [embedding ... blocks] -> hidden
    middle        hidden -> [blocks] -> hidden
    last stage    hidden -> [blocks, final norm, head] -> logits of the rows asked for
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging as transformers_logging

from functions import linears
from functions.attention import Unpackable
from functions.contract.checkpoint import Checkpoint, CheckpointError
from functions.contract.spans import BlockSpan
from functions.norms import replace_norms
from functions.quantize import Quantization, quantise
from functions.weights import load_weights

# settings of architectures whose later blocks need more than the hidden states of the one before
_ENTANGLED = {
    "hidden_size_per_layer_input": "feeds token embeddings into every block",
    "num_kv_shared_layers": "shares keys and values between blocks",
}


@dataclass(frozen=True, slots=True)
class Ends:
    """Which ends of the model a stage holds."""

    first: bool
    last: bool

    @property
    def whole(self) -> bool:
        return self.first and self.last


@dataclass(frozen=True, slots=True)
class Cut:
    """A model cut to a span. `base` is the module that owns the blocks.

    `elsewhere` are the weights that this stage leaves to others; `tied_head` is (name in the checkpoint, name here)
    where the head has to take the matrix of an embedding that is elsewhere."""

    model: Any
    base: nn.Module
    blocks: nn.ModuleList
    embedding_size: int
    span: BlockSpan
    ends: Ends
    elsewhere: frozenset[str]
    tied_head: tuple[str, str] | None


class _Absent(nn.Module):
    """Stands where an embedding or the head of another stage was: what it would add or compute is never used."""

    def forward(self, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros((), device=value.device)


class _States(BaseModelOutputWithPast):  # type: ignore[misc]  # Transformers has no types
    """What the base of a model gives to its head. Architectures ask for members of their own, which have no value."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class SpanModel:
    """Runs one span. Not safe for two threads at once: the hooks hold the hidden states of the current pass."""

    def __init__(self, cut: Cut, device: torch.device, dtype: torch.dtype) -> None:
        self.span = cut.span
        self.ends = cut.ends
        self.device = device
        self.dtype = dtype
        self.config: PreTrainedConfig = cut.model.config.get_text_config()
        self._model = cut.model
        self._base = cut.base
        self.blocks = cut.blocks
        self._embedding_size = cut.embedding_size
        self._incoming: torch.Tensor | None = None
        self._outgoing: torch.Tensor | None = None
        self._hooks: list[RemovableHandle] = []
        self._hook(cut.blocks)

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

    def watched_linears(self) -> AbstractContextManager[list[list[str]]]:
        """See `linears.watched_inputs`."""
        return linears.watched_inputs(self._model)

    def linear_paths(self) -> list[str]:
        """Paths of the linear layers."""
        return [path for path, module in self._model.named_modules() if linears.is_linear(module)]

    def pack_linears(self, groups: list[list[str]]) -> bool:
        """Packs the linear layers and replaces the norms; whether there are kernels for this model."""
        if not linears.can_be_packed(self._model):
            return False
        with torch.inference_mode():
            linears.pack(self._model, groups)
            if self.dtype == torch.float32:  # the kernel reads floats, whatever a norm is given
                replace_norms(self._model)
        return True

    def set_blocks(self, blocks: nn.ModuleList) -> None:
        """Puts others in the place of the blocks."""
        name = next(name for name, child in self._base.named_children() if child is self.blocks)
        self.blocks = blocks
        setattr(self._base, name, blocks)
        self._hook(blocks)

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
        run = self._model if self.ends.last and rows.numel() else self._base
        extra = {"logits_to_keep": rows} if run is self._model else {}
        output, outgoing = self._pass(run, tokens, hidden, positions, cache, **extra)
        if run is self._model:
            return cast(torch.Tensor, output.logits[0])
        return cast(torch.Tensor, output.last_hidden_state[0, :0]) if outgoing is None else outgoing

    @torch.inference_mode()
    def states(
        self, tokens: torch.Tensor, hidden: torch.Tensor | None, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """As `forward`, but at the last stage the hidden states [n, hidden size] after the final norm."""
        output, outgoing = self._pass(self._base, tokens, hidden, positions, cache)
        return cast(torch.Tensor, output.last_hidden_state[0]) if outgoing is None else outgoing

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What the head makes of rows of `states` [m, hidden size]: logits [m, vocabulary]. For the last stage."""
        output = _States(last_hidden_state=states[None])
        # the model's own code scales and caps logits; only what it has computed before the head is given to it
        self._base.forward = lambda *_, **__: output
        try:
            if self.ends.first:
                inputs = {"input_ids": torch.zeros((1, len(states)), dtype=torch.long, device=states.device)}
            else:
                inputs = {"inputs_embeds": states.new_zeros(()).expand(1, len(states), self._embedding_size)}
            return cast(torch.Tensor, self._model(**inputs, use_cache=False).logits[0])
        finally:
            del self._base.forward

    def _pass(
        self, run: Any, tokens: torch.Tensor, hidden: torch.Tensor | None, positions: torch.Tensor, cache: Any,
        **extra: torch.Tensor,
    ) -> tuple[Any, torch.Tensor | None]:  # fmt: skip
        """The output of `run`, and what left the last block, [n, hidden size], unless this is the last stage."""
        self._incoming = None if hidden is None else hidden[None]
        if hidden is None:
            inputs = {"input_ids": tokens[None]}
        else:  # only its shape counts: the hook replaces what becomes of it
            inputs = {"inputs_embeds": hidden.new_zeros(()).expand(1, len(tokens), self._embedding_size)}
        try:
            output = run(**inputs, **extra, position_ids=positions[None], past_key_values=cache, use_cache=True)
            if self.ends.last:
                return output, None
            assert self._outgoing is not None  # our own hook has run
            return output, self._outgoing[0]
        finally:
            self._incoming = self._outgoing = None

    def _hook(self, blocks: nn.ModuleList) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if not self.ends.first:
            self._hooks.append(blocks[0].register_forward_pre_hook(self._put_in, with_kwargs=True))
        if not self.ends.last:
            self._hooks.append(blocks[-1].register_forward_hook(self._take_out))

    def _put_in(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._incoming, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._incoming}

    def _take_out(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._outgoing = output[0] if isinstance(output, tuple) else output


def load_span(
    checkpoint: Checkpoint,
    span: BlockSpan,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    quantization: Quantization = "none",
) -> SpanModel:
    """The span, ready to run. `attention` names a registered attention function, None is the model's own choice.

    Raises CheckpointError."""
    if span.end > checkpoint.block_count:
        raise CheckpointError(f"blocks {span} were asked for, the model has {checkpoint.block_count}")
    if checkpoint.block_count > len(checkpoint.tensors):  # all are built before one looks for their weights
        raise CheckpointError(
            f"{checkpoint.location}/config.json speaks of {checkpoint.block_count} blocks, and the weights are "
            f"{len(checkpoint.tensors)} tensors; the checkpoint is incomplete, copy or download it again"
        )
    with _quiet():
        cut = _cut(_build(checkpoint, dtype, attention), checkpoint, span)
        quantise(cut, quantization, checkpoint.location)
        load_weights(cut, checkpoint, dtype, device, one_by_one=quantization != "none")
    cut.model.eval()
    return SpanModel(cut, device, dtype)


def _build(checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """The whole model on the meta device: shapes, no memory. Raises CheckpointError, or Unpackable if it may be only
    the attention function that the model does not take."""
    settings = dict(checkpoint.config)
    try:
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(PreTrainedConfig._decode_special_floats(settings))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # whatever a strange configuration makes the architecture's code do
        if attention is not None:
            raise Unpackable(f"{type(error).__name__}: {error}") from error
        raise CheckpointError(
            f"{checkpoint.location}/config.json does not describe a decoder-only model that Transformers can build "
            f"({type(error).__name__}: {error})"
        ) from error


def _cut(model: Any, checkpoint: Checkpoint, span: BlockSpan) -> Cut:
    total = checkpoint.block_count
    ends = Ends(first=span.start == 0, last=span.end == total)
    base, name, blocks = _find_blocks(model, total)
    kept = nn.ModuleList(list(blocks)[span.start : span.end])
    setattr(base, name, kept)
    for index, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]  # a plain number, whatever torch's types say
    _check_separable(model.config.get_text_config(), ends, checkpoint)
    _cut_config(model.config.get_text_config(), span, total)
    embedding_size = model.get_input_embeddings().embedding_dim
    head, embedding = _name_of(model, model.get_output_embeddings()), _name_of(model, model.get_input_embeddings())
    tied = ends.last and not ends.first and _head_is_tied(model, checkpoint, head)
    elsewhere = {} if ends.first else _embeddings(model, kept)
    if not ends.last:
        elsewhere[head] = model.get_output_embeddings()
    for path in elsewhere:
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, _Absent())
    return Cut(
        model, base, kept, embedding_size, span, ends,
        elsewhere=frozenset(f"{path}.{weight}" for path, m in elsewhere.items() for weight, _ in m.named_parameters()),
        tied_head=(f"{embedding}.weight", f"{head}.weight") if tied else None,
    )  # fmt: skip


def _check_separable(config: PreTrainedConfig, ends: Ends, checkpoint: Checkpoint) -> None:
    for key, what in _ENTANGLED.items():
        if getattr(config, key, None) and not ends.whole:
            raise CheckpointError(
                f"{checkpoint.location}: this architecture {what} ({key} in config.json), so its blocks cannot be "
                "served in separate stages; use 1 stage"
            )


def _embeddings(model: nn.Module, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """Every embedding outside the blocks (of tokens, of positions) by its path."""
    inside = {id(module) for module in blocks.modules()}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module) not in inside
    }


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
