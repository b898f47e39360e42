#!/usr/bin/env python3
"""Runs models in transformers and in llama.cpp: see with_engines.sh.

    engines.py reference       reference.py against transformers, tiny random models of each family
"""

import contextlib
import json
import pathlib
import sys
import tempfile

import numpy as np
import reference

COMMON = dict(vocab_size=160, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=128,
              bos_token_id=None, eos_token_id=None, pad_token_id=None)
GROUPED = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
               intermediate_size=80, n_shared_experts=2, first_k_dense_replace=1, n_group=4,
               topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True)
SPARSE = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, intermediate_size=80)


def rope(theta=5e4, **more):
    return {"rope_parameters": dict(rope_type="default", rope_theta=theta) | more}


# name -> configuration class of transformers, and what is said to it besides COMMON.
TINY = {
    "mixtral": ("MixtralConfig", dict(num_local_experts=8, num_experts_per_tok=3,
                                      intermediate_size=32, head_dim=16, sliding_window=None)),
    "qwen3_moe": ("Qwen3MoeConfig", SPARSE | dict(head_dim=16, norm_topk_prob=True)),
    "qwen3_moe, no renorm, tied": ("Qwen3MoeConfig", SPARSE | dict(
        head_dim=8, norm_topk_prob=False, tie_word_embeddings=True)),
    "qwen3_moe, bias": ("Qwen3MoeConfig", SPARSE | dict(head_dim=16, norm_topk_prob=True,
                                                        attention_bias=True)),
    "qwen2_moe": ("Qwen2MoeConfig", SPARSE | dict(shared_expert_intermediate_size=40,
                                                  norm_topk_prob=False)),
    "qwen2_moe, renorm, no bias, tied": ("Qwen2MoeConfig", SPARSE | dict(
        shared_expert_intermediate_size=40, norm_topk_prob=True, qkv_bias=False,
        tie_word_embeddings=True)),
    "olmoe": ("OlmoeConfig", dict(num_experts=8, num_experts_per_tok=3, intermediate_size=32,
                                  norm_topk_prob=False)),
    "olmoe, MHA, renorm, bias": ("OlmoeConfig", dict(
        num_experts=8, num_experts_per_tok=3, intermediate_size=32, norm_topk_prob=True,
        num_key_value_heads=4, attention_bias=True)),
    "glm4_moe, groups": ("Glm4MoeConfig", GROUPED | dict(
        head_dim=16, use_qk_norm=True, **rope(partial_rotary_factor=1.0))),
    "glm4_moe, half rotary, bias": ("Glm4MoeConfig", GROUPED | dict(
        head_dim=16, n_group=1, topk_group=1, attention_bias=True, norm_topk_prob=False,
        n_shared_experts=1, first_k_dense_replace=0, **rope(partial_rotary_factor=0.5))),
    "glm4_moe, tied, default rotary": ("Glm4MoeConfig", GROUPED | dict(
        head_dim=16, tie_word_embeddings=True)),
    "dots1": ("Dots1Config", GROUPED | dict(head_dim=12, sliding_window=None)),
    "dots1, bias": ("Dots1Config", GROUPED | dict(head_dim=12, attention_bias=True, n_group=1,
                                                  topk_group=1)),
    "llama": ("LlamaConfig", dict(intermediate_size=80)),
    "llama, llama3 rope": ("LlamaConfig", dict(intermediate_size=80, attention_bias=True, **rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64))),
    "llama, linear rope": ("LlamaConfig", dict(intermediate_size=80, tie_word_embeddings=True,
                                               **rope(rope_type="linear", factor=4.0))),
    "mistral": ("MistralConfig", dict(intermediate_size=80, head_dim=16, sliding_window=None)),
    "qwen2": ("Qwen2Config", dict(intermediate_size=80)),
    "qwen3": ("Qwen3Config", dict(intermediate_size=80, head_dim=16)),
    "gpt2": ("GPT2Config", dict(vocab_size=160, n_embd=48, n_layer=3, n_head=4, n_positions=96,
                                bos_token_id=None, eos_token_id=None)),
}


def randomize(model, rng):
    """Weights so large that every part of the model moves the logits."""
    import torch

    with torch.no_grad():
        for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
            if "inv_freq" in name:
                continue
            scale = 0.2 if tensor.dim() > 1 else 0.3
            start = 1.0 if "norm" in name and "bias" not in name or "ln_" in name else 0.0
            tensor.copy_(torch.from_numpy(start + scale * rng.standard_normal(tensor.shape)))


def quiet():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def transformers_logits(model, sequences):
    import torch

    with torch.no_grad():
        return np.concatenate([model(torch.tensor([ids])).logits[0].double().numpy()
                               for ids in sequences])


def check_reference():
    transformers = quiet()
    import torch

    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 160, length).tolist() for length in (1, 17, 64)]
    worst = 0.0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float64")
    for name, (kind, keys) in TINY.items():
        common = {} if kind == "GPT2Config" else rope() | COMMON
        config = getattr(transformers, kind)(**(common | keys))
        config._attn_implementation = config._experts_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
        randomize(model, rng)
        with tempfile.TemporaryDirectory() as folder:
            model.float().save_pretrained(folder)
            path = pathlib.Path(folder) / "config.json"
            saved = json.loads(path.read_text())
            ours = reference.logits(reference.read_model(folder), sequences)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64, attn_implementation="eager",
                experts_implementation="eager").eval()
        theirs = transformers_logits(model, sequences)
        difference = np.abs(ours - theirs).max() / theirs.std()
        worst = max(worst, difference)
        print(f"{name:36} logits' deviation {theirs.std():7.3f}, max |d| / deviation {difference:.1e}")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["reference"]:
        sys.exit(0 if check_reference() < 1e-4 else 1)
    sys.exit(__doc__)
