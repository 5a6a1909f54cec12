"""The model behind the doors: a random Llama of 4 blocks, so small that a step takes less than a millisecond."""

from __future__ import annotations

from pathlib import Path

POSITIONS = 96
BLOCKS = 4
NAME = "tiny"


def save_tiny(folder: Path) -> None:
    """A checkpoint in Hugging Face format with a tokenizer of one token a byte and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=None,
        initializer_range=0.5,  # so that answers depend on what is asked
    )
    LlamaForCausalLM(config).save_pretrained(folder)
