"""The model that faults are injected into: random, small, and with texts that differ from token to token."""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path

BLOCKS = 4
CONTEXT = 512
VOCABULARY = 256  # one token a byte; the end of a text is one more


def write_checkpoint(folder: Path) -> None:
    """A Llama of four blocks and width 32, with a tokenizer of one token a byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # as in the tests of exactness: else every text is alike
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model.save_pretrained(folder)


def spans(stages: int, blocks: int = BLOCKS) -> list[str]:
    """Blocks of each stage, as even as can be."""
    cuts = [blocks * stage // stages for stage in range(stages + 1)]
    return [f"{start}:{end}" for start, end in itertools.pairwise(cuts)]
