"""What a fork server does once, so that every stage forked from it need not: imports, and a rehearsal of loading.

Besides the imports, the first model that Transformers loads in a process costs 0.1 s and more: modules that it imports
late, and hundreds of patterns that it compiles. A tiny Llama is loaded for that, from a checkpoint made for it. Nothing
here starts a thread or touches a GPU, so that a process may fork afterwards.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path

# the usual check would initialise CUDA, which a forked process could not use any more
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from safetensors.torch import save_file

import functions.handler
import functions.server
from functions.contract.checkpoint import open_checkpoint
from functions.contract.spans import BlockSpan
from functions.runner import load_runner

PRELOADED = (functions.handler, functions.server)  # in memory for whoever forks this process

# architectures whose code is in memory beforehand, some 20 ms each; all others are imported when they are loaded
_COMMON = ("gemma3", "gpt2", "gpt_oss", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")
_WIDTH, _INNER, _VOCABULARY = 8, 16, 16


def rehearse() -> None:
    """Loads a model of one block from the disk, as a stage does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="stagecraft-rehearsal-") as folder:
            _write_checkpoint(Path(folder))
            load_runner(open_checkpoint(folder), BlockSpan(0, 1), torch.float32, torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


def _write_checkpoint(folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    square, wide = (_WIDTH, _WIDTH), (_INNER, _WIDTH)
    shapes = {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        **{"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]},
        **{"input_layernorm": (_WIDTH,), "post_attention_layernorm": (_WIDTH,)},
    }
    tensors = {f"model.layers.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    outer = {"model.embed_tokens": (_VOCABULARY, _WIDTH), "lm_head": (_VOCABULARY, _WIDTH), "model.norm": (_WIDTH,)}
    tensors |= {f"{name}.weight": torch.zeros(shape) for name, shape in outer.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _import_common() -> None:
    for name in _COMMON:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")


rehearse()
_import_common()
