"""The models behind the doors: random ones of 4 blocks, so small that a step takes less than a millisecond."""

from __future__ import annotations

from pathlib import Path

POSITIONS = 96
BLOCKS = 4
NAME = "tiny"

_COMMON = {
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.5,  # so that answers depend on what is asked
}
_USUAL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
# different in what their configurations can say: windows, experts, latent attention, positions that are learned, a
# recurrent state
ARCHITECTURES = {
    "llama": _USUAL,
    "gpt2": {"n_embd": 16, "n_layer": BLOCKS, "n_head": 4, "n_positions": POSITIONS},
    "gemma3_text": {**_USUAL, "head_dim": 4, "sliding_window": 8, "query_pre_attn_scalar": 4},
    "mixtral": {**_USUAL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_USUAL, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 8,
    },
    "falcon_h1": {
        **_USUAL, "head_dim": 4, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4
    },
}  # fmt: skip


def save_tiny(folder: Path, architecture: str = "llama") -> None:
    """A checkpoint in Hugging Face format with a tokenizer of one token a byte and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    settings = {"vocab_size": len(fast), "eos_token_id": fast.eos_token_id, **_COMMON, **ARCHITECTURES[architecture]}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).save_pretrained(folder)
