"""Writes tiny random models of every family that Arcus imports, without Arcus.

`hf_model` and `gguf_model` give a configuration and named tensors; `write_hf` and `write_gguf` put
them on disk. Weights are so large that every part of a model moves its logits. Sizes are multiples
of 32, so that GGUF's blocks fit.
"""

import json
import pathlib

import numpy as np

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 320, 64, 3, 4, 2, 16
EXPERTS, TOPK, FF, DENSE_FF, SHARED_FF, POSITIONS = 8, 3, 32, 96, 64, 128
THETA = 50000.0
ABSENT = object()  # for a key of a configuration that is to be left out


# --------------------------------------------------------------------------------------- tokenizer


def byte_alphabet():
    """The character that stands for each byte in vocabularies of byte-level BPE."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def vocabulary():
    """(tokens, merges, special): 256 bytes, then what merges make; ids follow the order."""
    alphabet = byte_alphabet()
    space = alphabet[ord(" ")]
    words = ["the", "line", "file", "in", "on", space + "the", space + "line", space + "of", "ing", "12"]
    tokens, merges = list(alphabet), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    return tokens, merges, "<|endoftext|>"


PRE_TOKENIZER = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # "qwen2" of GGUF


def tokenizer_json():
    tokens, merges, special = vocabulary()
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": len(tokens), "content": special, "single_word": False,
                          "lstrip": False, "rstrip": False, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PRE_TOKENIZER}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                    "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: id for id, token in enumerate(tokens)},
                  "merges": [list(pair) for pair in merges]},
    }


def write_hf_tokenizer(folder):
    special = vocabulary()[2]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(), ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "add_bos_token": False, "eos_token": special, "model_max_length": POSITIONS}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": special}))


def add_gguf_tokenizer(writer):
    tokens, merges, special = vocabulary()
    padding = VOCAB - len(tokens) - 1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, special, *(f"[PAD{len(tokens) + 1 + n}]" for n in range(padding))])
    writer.add_token_types([1] * len(tokens) + [3] + [5] * padding)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(len(tokens))
    writer.add_add_bos_token(False)


# --------------------------------------------------------------------------------- random tensors


class Filler:
    """Collects tensors by name and shape, with random numbers of a size that suits the name."""

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)
        self.tensors = {}

    def __call__(self, name, *shape):
        # A matrix maps numbers of size 1 to numbers of size 1; the rest is a shift or a factor.
        is_norm = "norm" in name or ".ln_" in name
        scale = 0.3 if len(shape) == 1 else 1.2 / np.sqrt(shape[-1])
        if "embd" in name or "embed" in name or "wte" in name or "wpe" in name:
            scale = 0.5
        start = 1.0 if is_norm and not name.endswith(".bias") else 0.0
        numbers = start + scale * self._rng.standard_normal(shape)
        if "rope_freqs" in name:
            numbers = 1.0 + 10.0 * np.abs(numbers)
        self.tensors[name] = numbers.astype(np.float32)


# ----------------------------------------------------------------------------- Hugging Face models

# What each family needs, as default values of the switches of hf_model.
GROUPED = dict(groups=4, groups_used=2, first_dense=1, scale=2.5, shared=1, renorm=True)
HF_FAMILIES = {
    "mixtral": dict(), "qwen3_moe": dict(renorm=True, qk_norm="head"),
    "qwen2_moe": dict(bias=True, shared=1), "olmoe": dict(qk_norm="full", kv_heads=HEADS),
    "glm4_moe": GROUPED | dict(qk_norm="head", rotary=1.0),
    "dots1": GROUPED | dict(qk_norm="head", kv_heads=HEADS),
    "bailing_moe_v2": GROUPED | dict(qk_norm="head", rotary=0.5),
    "llama": dict(), "mistral": dict(), "qwen2": dict(bias=True), "qwen3": dict(qk_norm="head"),
    "gpt2": dict(),
}
_CLASSES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "qwen2_moe": "Qwen2Moe", "olmoe": "Olmoe",
            "glm4_moe": "Glm4Moe", "dots1": "Dots1", "bailing_moe_v2": "BailingMoeV2",
            "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
            "gpt2": "GPT2LMHead"}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


def hf_config(kind, s):
    """s: the switches."""
    architecture = "GPT2LMHeadModel" if kind == "gpt2" else _CLASSES[kind] + "ForCausalLM"
    config = {"architectures": [architecture], "model_type": kind, "vocab_size": VOCAB,
              "bos_token_id": None, "eos_token_id": len(vocabulary()[0]), "pad_token_id": None,
              "initializer_range": 0.02, "use_cache": True, "torch_dtype": "float32"}
    if kind == "gpt2":
        return config | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": None,
                         "n_positions": POSITIONS, "activation_function": "gelu_new",
                         "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.1, "embd_pdrop": 0.1,
                         "resid_pdrop": 0.1, "scale_attn_weights": True, "n_ctx": POSITIONS,
                         "summary_activation": None, "summary_first_dropout": 0.1,
                         "summary_proj_to_labels": True, "summary_type": "cls_index",
                         "summary_use_proj": True,
                         "task_specific_params": {"text-generation": {"max_length": 50}}}
    config |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
               "num_key_value_heads": s["kv_heads"], "max_position_embeddings": POSITIONS,
               "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": s["tied"],
               "attention_dropout": 0.0, "rope_theta": THETA, "rope_scaling": s["rope_scaling"]}
    if kind not in ("qwen2_moe", "olmoe", "qwen2"):
        config["head_dim"] = s["head_dim"]
    if kind in ("mixtral", "mistral", "dots1"):
        config["sliding_window"] = None
    if kind not in DENSE:
        config |= {"num_experts_per_tok": TOPK}
    sparse = {"num_experts": EXPERTS, "moe_intermediate_size": FF, "intermediate_size": DENSE_FF,
              "norm_topk_prob": s["renorm"]}
    plain = {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
             "sliding_window": 4096, "max_window_layers": LAYERS}
    grouped = {"n_group": s["groups"], "topk_group": s["groups_used"],
               "first_k_dense_replace": s["first_dense"], "routed_scaling_factor": s["scale"]}
    own = {
        "mixtral": lambda: {"num_local_experts": EXPERTS, "intermediate_size": FF},
        "qwen3_moe": lambda: sparse | plain | {"attention_bias": False},
        "qwen2_moe": lambda: sparse | plain | {"shared_expert_intermediate_size": SHARED_FF}
        | ({} if s["bias"] else {"qkv_bias": False}),
        "olmoe": lambda: {"num_experts": EXPERTS, "intermediate_size": FF, "clip_qkv": None,
                          "norm_topk_prob": s["renorm"], "attention_bias": False},
        "glm4_moe": lambda: sparse | grouped | {
            "n_routed_experts": EXPERTS, "n_shared_experts": s["shared"],
            "use_qk_norm": s["qk_norm"] == "head", "attention_bias": s["bias"],
            "partial_rotary_factor": s["rotary"], "num_nextn_predict_layers": s["extra_layers"]},
        "dots1": lambda: sparse | grouped | {
            "n_routed_experts": EXPERTS, "n_shared_experts": s["shared"], "attention_bias": False},
        "bailing_moe_v2": lambda: sparse | grouped | {
            "num_shared_experts": s["shared"], "use_qk_norm": True, "use_qkv_bias": s["bias"],
            "use_bias": False, "score_function": "sigmoid", "partial_rotary_factor": s["rotary"],
            "moe_router_enable_expert_bias": True},
        "llama": lambda: {"intermediate_size": DENSE_FF, "attention_bias": False, "mlp_bias": False},
        "mistral": lambda: {"intermediate_size": DENSE_FF},
        "qwen2": lambda: {"intermediate_size": DENSE_FF, "use_sliding_window": False,
                          "sliding_window": 4096, "max_window_layers": LAYERS},
        "qwen3": lambda: {"intermediate_size": DENSE_FF, "attention_bias": False,
                          "use_sliding_window": False, "sliding_window": None},
    }[kind]()
    if kind in ("glm4_moe", "dots1"):
        del own["num_experts"]
    config = config | own | s["config"]
    return {key: value for key, value in config.items() if value is not ABSENT}


def hf_attention(fill, kind, s, at):
    q_rows, kv_rows = HEADS * s["head_dim"], s["kv_heads"] * s["head_dim"]
    if kind == "bailing_moe_v2":
        fill(at + "attention.query_key_value.weight", q_rows + 2 * kv_rows, HIDDEN)
        if s["bias"]:
            fill(at + "attention.query_key_value.bias", q_rows + 2 * kv_rows)
        fill(at + "attention.dense.weight", HIDDEN, q_rows)
        fill(at + "attention.query_layernorm.weight", s["head_dim"])
        fill(at + "attention.key_layernorm.weight", s["head_dim"])
        return
    for role, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        fill(f"{at}self_attn.{role}_proj.weight", rows, HIDDEN)
        if s["bias"]:
            fill(f"{at}self_attn.{role}_proj.bias", rows)
    fill(at + "self_attn.o_proj.weight", HIDDEN, q_rows)
    for role, rows in (("q", q_rows), ("k", kv_rows)):
        if s["qk_norm"] != "none":
            fill(f"{at}self_attn.{role}_norm.weight",
                 rows if s["qk_norm"] == "full" else s["head_dim"])


def hf_mlp(fill, at, ff, parts=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = parts
    fill(f"{at}{gate}.weight", ff, HIDDEN)
    fill(f"{at}{up}.weight", ff, HIDDEN)
    fill(f"{at}{down}.weight", HIDDEN, ff)


def hf_layer(fill, kind, s, n):
    at = f"model.layers.{n}."
    fill(at + "input_layernorm.weight", HIDDEN)
    fill(at + "post_attention_layernorm.weight", HIDDEN)
    hf_attention(fill, kind, s, at)
    if kind in DENSE or n < s["first_dense"]:
        return hf_mlp(fill, at + "mlp.", DENSE_FF)
    moe, parts = at + "mlp.", ("gate_proj", "up_proj", "down_proj")
    if kind == "mixtral" and not s["fused"]:
        moe, parts = at + "block_sparse_moe.", ("w1", "w3", "w2")
    fill(moe + "gate.weight", EXPERTS, HIDDEN)
    if kind in ("glm4_moe", "dots1"):
        fill(moe + "gate.e_score_correction_bias", EXPERTS)
    if kind == "bailing_moe_v2":
        fill(moe + "gate.expert_bias", EXPERTS)
    if s["fused"]:
        fill(moe + "experts.gate_up_proj", EXPERTS, 2 * FF, HIDDEN)
        fill(moe + "experts.down_proj", EXPERTS, HIDDEN, FF)
    else:
        for expert in range(EXPERTS):
            hf_mlp(fill, f"{moe}experts.{expert}.", FF, parts)
    if kind == "qwen2_moe":
        hf_mlp(fill, moe + "shared_expert.", SHARED_FF)
        fill(moe + "shared_expert_gate.weight", 1, HIDDEN)
    elif s["shared"]:
        hf_mlp(fill, moe + "shared_experts.", FF * s["shared"])


def hf_gpt2(fill, s):
    root = s["root"]
    fill(root + "wte.weight", VOCAB, HIDDEN)
    fill(root + "wpe.weight", POSITIONS, HIDDEN)
    for n in range(LAYERS):
        at = f"{root}h.{n}."
        for name, columns, rows in (("attn.c_attn", HIDDEN, 3 * HIDDEN), ("attn.c_proj", HIDDEN, HIDDEN),
                                    ("mlp.c_fc", HIDDEN, 4 * HIDDEN), ("mlp.c_proj", 4 * HIDDEN, HIDDEN)):
            fill(f"{at}{name}.weight", columns, rows)  # stored [in, out]
            fill(f"{at}{name}.bias", rows)
        for name in ("ln_1", "ln_2"):
            fill(f"{at}{name}.weight", HIDDEN)
            fill(f"{at}{name}.bias", HIDDEN)
        if s["buffers"]:
            mask = np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.float32))
            fill.tensors[at + "attn.bias"] = mask
            fill.tensors[at + "attn.masked_bias"] = np.full((1,), -1e4, np.float32)
    fill(root + "ln_f.weight", HIDDEN)
    fill(root + "ln_f.bias", HIDDEN)


def switches(family_defaults, given):
    s = dict(kv_heads=KV_HEADS, head_dim=HEAD_DIM, tied=False, bias=False, qk_norm="none",
             renorm=False, groups=1, groups_used=1, first_dense=0, scale=1.0, shared=0, rotary=1.0,
             rope_scaling=None, fused=False, extra_layers=0, rope_freqs=False, root="", buffers=False, gating=2,
             config={}, keys={})
    unknown = set(given) - set(s)
    assert not unknown, f"no such switches: {unknown}"
    return s | family_defaults | given


def hf_model(kind, seed=1, **given):
    """A configuration and tensors (fp32) of a model_type."""
    s = switches(HF_FAMILIES[kind], given)
    fill = Filler(seed)
    if kind == "gpt2":
        hf_gpt2(fill, s)
    else:
        word = "word_embeddings" if kind == "bailing_moe_v2" else "embed_tokens"
        fill(f"model.{word}.weight", VOCAB, HIDDEN)
        for n in range(LAYERS + s["extra_layers"]):
            hf_layer(fill, kind, s, n)
        fill("model.norm.weight", HIDDEN)
        if not s["tied"]:
            fill("lm_head.weight", VOCAB, HIDDEN)
    return hf_config(kind, s), fill.tensors


def bf16_bits(array):
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


_STORED = {"F32": ("float32", lambda a: a.astype("<f4")), "F16": ("float16", lambda a: a.astype("<f2")),
           "BF16": ("bfloat16", bf16_bits)}


def write_safetensors(path, tensors, dtype):
    """dtype F32 | F16 | BF16; correction biases stay F32. Gives the bytes of the tensors."""
    import safetensors

    described, alive = {}, []
    for name, array in tensors.items():
        kind = "F32" if "e_score_correction_bias" in name or "expert_bias" in name else dtype
        type_name, store = _STORED[kind]
        alive.append(np.ascontiguousarray(store(array)))
        described[name] = safetensors.TensorSpec(dtype=type_name, shape=list(array.shape),
                                                 data_ptr=alive[-1].ctypes.data,
                                                 data_len=alive[-1].nbytes)
    path.write_bytes(safetensors.serialize(described, metadata={"format": "pt"}))
    return sum(array.nbytes for array in alive)


def write_hf(folder, config, tensors, dtype="F32", shards=1, tokenizer=True):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    config = config | {"torch_dtype": _STORED[dtype][0]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer:
        write_hf_tokenizer(folder)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map, total = {}, 0
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        total += write_safetensors(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


# ------------------------------------------------------------------------------------ GGUF models

GGUF_ARCHS = {
    "llama": dict(), "qwen3moe": dict(qk_norm="head"), "olmoe": dict(qk_norm="full", kv_heads=HEADS),
    "qwen2moe": dict(bias=True, shared=1), "glm4moe": GROUPED | dict(qk_norm="head"),
    "dots1": GROUPED | dict(qk_norm="head", kv_heads=HEADS),
    "bailingmoe2": GROUPED | dict(qk_norm="head", rotary=0.5),
    "llama-dense": dict(), "qwen2": dict(bias=True), "qwen3": dict(qk_norm="head"), "gpt2": dict(),
}


def gguf_keys(name, s):
    """(method of gguf.GGUFWriter, value) pairs."""
    keys = [("context_length", POSITIONS), ("embedding_length", HIDDEN), ("block_count", LAYERS),
            ("head_count", HEADS), ("vocab_size", VOCAB)]
    if name == "gpt2":
        return keys + [("layer_norm_eps", 1e-5), ("feed_forward_length", 4 * HIDDEN)]
    keys += [("head_count_kv", s["kv_heads"]), ("layer_norm_rms_eps", 1e-5),
             ("key_length", s["head_dim"]), ("value_length", s["head_dim"]),
             ("rope_freq_base", THETA), ("rope_dimension_count", int(s["head_dim"] * s["rotary"]))]
    if name in ("llama-dense", "qwen2", "qwen3"):
        return keys + [("feed_forward_length", DENSE_FF)]
    keys += [("expert_count", EXPERTS), ("expert_used_count", TOPK)]
    if name in ("llama", "olmoe"):
        return keys + [("feed_forward_length", FF)]
    keys += [("feed_forward_length", DENSE_FF), ("expert_feed_forward_length", FF)]
    if name == "qwen2moe":
        keys += [("expert_shared_feed_forward_length", SHARED_FF)]
    if name in ("glm4moe", "dots1", "bailingmoe2"):
        keys += [("expert_shared_count", s["shared"]), ("leading_dense_block_count", s["first_dense"]),
                 ("expert_gating_func", s["gating"]), ("expert_weights_scale", s["scale"]),
                 ("expert_weights_norm", s["renorm"])]
        if s["groups"] > 1:
            keys += [("expert_group_count", s["groups"]), ("expert_group_used_count", s["groups_used"])]
    return keys


def gguf_layer(fill, name, s, n):
    at = f"blk.{n}."
    q_rows, kv_rows = HEADS * s["head_dim"], s["kv_heads"] * s["head_dim"]
    fill(at + "attn_norm.weight", HIDDEN)
    fill(at + ("post_attention_norm.weight" if name == "glm4moe" else "ffn_norm.weight"), HIDDEN)
    parts = [("qkv", q_rows + 2 * kv_rows)] if name == "bailingmoe2" or s["fused"] else \
        [("q", q_rows), ("k", kv_rows), ("v", kv_rows)]
    for role, rows in parts:
        fill(f"{at}attn_{role}.weight", rows, HIDDEN)
        if s["bias"]:
            fill(f"{at}attn_{role}.bias", rows)
    fill(at + "attn_output.weight", HIDDEN, q_rows)
    for role, rows in (("q", q_rows), ("k", kv_rows)):
        if s["qk_norm"] != "none":
            fill(f"{at}attn_{role}_norm.weight", rows if s["qk_norm"] == "full" else s["head_dim"])

    def mlp(suffix, ff, *stack):
        fill(f"{at}ffn_gate{suffix}.weight", *stack, ff, HIDDEN)
        fill(f"{at}ffn_up{suffix}.weight", *stack, ff, HIDDEN)
        fill(f"{at}ffn_down{suffix}.weight", *stack, HIDDEN, ff)

    if name in ("llama-dense", "qwen2", "qwen3") or n < s["first_dense"]:
        return mlp("", DENSE_FF)
    fill(at + "ffn_gate_inp.weight", EXPERTS, HIDDEN)
    if name in ("glm4moe", "dots1", "bailingmoe2"):
        fill(at + "exp_probs_b.bias", EXPERTS)
    mlp("_exps", FF, EXPERTS)
    if s["shared"]:
        mlp("_shexp", SHARED_FF if name == "qwen2moe" else FF * s["shared"])
    if name == "qwen2moe":
        fill(at + "ffn_gate_inp_shexp.weight", HIDDEN)


def gguf_gpt2_layer(fill, n):
    at = f"blk.{n}."
    for name, rows, columns in (("attn_qkv", 3 * HIDDEN, HIDDEN), ("attn_output", HIDDEN, HIDDEN),
                                ("ffn_up", 4 * HIDDEN, HIDDEN), ("ffn_down", HIDDEN, 4 * HIDDEN)):
        fill(f"{at}{name}.weight", rows, columns)
        fill(f"{at}{name}.bias", rows)
    for name in ("attn_norm", "ffn_norm"):
        fill(f"{at}{name}.weight", HIDDEN)
        fill(f"{at}{name}.bias", HIDDEN)


def gguf_model(name, seed=1, **given):
    """(architecture, keys, tensors in fp32); `llama-dense` is architecture llama without experts."""
    s = switches(GGUF_ARCHS[name], given)
    fill = Filler(seed)
    fill("token_embd.weight", VOCAB, HIDDEN)
    for n in range(LAYERS):
        gguf_gpt2_layer(fill, n) if name == "gpt2" else gguf_layer(fill, name, s, n)
    fill("output_norm.weight", HIDDEN)
    if s["rope_freqs"]:
        fill("rope_freqs.weight", s["head_dim"] // 2)
    if name == "gpt2":
        fill("output_norm.bias", HIDDEN)
        fill("position_embd.weight", POSITIONS, HIDDEN)
    elif not s["tied"]:
        fill("output.weight", VOCAB, HIDDEN)
    return name.removesuffix("-dense"), dict(gguf_keys(name, s)) | s["keys"], fill.tensors


def stays_f32(name, array):
    return array.ndim == 1 or "ffn_gate_inp" in name


def write_gguf(path, arch, keys, tensors, dtype="F32", tokenizer=True):
    """dtype: a name of gguf.GGMLQuantizationType."""
    import gguf
    import gguf.quants

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        enum = {"expert_gating_func": gguf.ExpertGatingFuncType,
                "rope_scaling_type": gguf.RopeScalingType}.get(key)
        value = value if enum is None else enum(value)
        getattr(writer, "add_" + key)(value)
    if tokenizer:
        add_gguf_tokenizer(writer)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType["F32" if stays_f32(name, array) else dtype]
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        elif kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
