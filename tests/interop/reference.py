#!/usr/bin/env python3
"""Logits of a language model by the formulas of its file format, in float64.

An independent reader and forward pass for directories of Hugging Face safetensors and for GGUF
files. It shares no code with Arcus: tensors come through the `safetensors` and `gguf` packages, the
arithmetic is numpy. It is strict, so that a file which an engine would silently misread is refused
here: every key of a configuration has to be one whose meaning is known, every tensor has to be used
once and have the expected shape, numbers have to have the type that engines insist on.

    reference.py MODEL --ids FILE [--logits OUT.h5] [--compare OTHER.h5]

FILE has one sequence a line, decimal ids; logits are [tokens, vocab], one sequence after the other.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys

import numpy as np


class Refused(Exception):
    """The file holds something that this reader does not know."""


def require(condition, message):
    if not condition:
        raise Refused(message)


# ---------------------------------------------------------------------------------------- a model


@dataclasses.dataclass
class Spec:
    """What the forward pass has to know besides the tensors. H hidden, d head_dim, E experts."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    inv_freq: np.ndarray | None = None  # [rotary_dim / 2]; None: learned positions
    interleaved: bool = False  # rotation of pairs (2i, 2i + 1) instead of (i, i + d/2)
    qk_norm: str = "none"  # none | head | full
    norm: str = "rms"  # rms | layer
    # Router; experts == 0: a dense model.
    experts: int = 0
    topk: int = 0
    first_dense: int = 0
    gating: str = "softmax"  # softmax | sigmoid
    renorm: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1


@dataclasses.dataclass
class Model:
    """A Spec and its tensors, float64, all matrices [out, in]. Names: embed [V,H], head [V,H],
    positions, final_norm; and per layer N: N.attn_norm, N.q, N.k, N.v, N.o, N.q_norm, N.k_norm,
    N.mlp_norm, N.router [E,H], N.correction [E], N.experts.{gate,up,down} [E,F,H] or [E,H,F],
    N.shared.{gate,up,down}, N.shared_gate [1,H], N.dense.{gate,up,down}; biases: the same name
    with `.bias`."""

    spec: Spec
    tensors: dict

    def get(self, name):
        return self.tensors.get(name)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu_tanh(x):
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def normalize(x, weight, bias, spec):
    if spec.norm == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + spec.eps) * weight
    return x if bias is None else x + bias


def linear(x, model, name):
    y = x @ model.tensors[name].T
    bias = model.get(name + ".bias")
    return y if bias is None else y + bias


def rotate(x, spec):
    """x: [T, heads, d]; the first rotary_dim numbers of each head, the others stay."""
    half = len(spec.inv_freq)
    angle = np.arange(len(x))[:, None] * spec.inv_freq  # [T, half]
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = np.arange(half), half + np.arange(half)
    if spec.interleaved:
        first, second = 2 * np.arange(half), 2 * np.arange(half) + 1
    y = x.copy()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def attention(x, model, n):
    """Causal, within one sequence. x: [T, H]."""
    spec, rows = model.spec, len(x)
    q, k, v = (linear(x, model, f"{n}.{role}") for role in "qkv")
    norms = [model.get(f"{n}.q_norm"), model.get(f"{n}.k_norm")]
    if spec.qk_norm == "full":
        q, k = (normalize(a, w, None, spec) for a, w in zip((q, k), norms))
    q = q.reshape(rows, spec.heads, spec.head_dim)
    k, v = (a.reshape(rows, spec.kv_heads, spec.head_dim) for a in (k, v))
    if spec.qk_norm == "head":
        q, k = (normalize(a, w, None, spec) for a, w in zip((q, k), norms))
    if spec.inv_freq is not None:
        q, k = rotate(q, spec), rotate(k, spec)
    k, v = (np.repeat(a, spec.heads // spec.kv_heads, axis=1) for a in (k, v))
    score = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(spec.head_dim)
    score[:, np.triu(np.ones((rows, rows), bool), 1)] = -np.inf
    mixed = np.einsum("hqk,khd->qhd", softmax(score), v)
    return linear(mixed.reshape(rows, -1), model, f"{n}.o")


def gated_mlp(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def route(x, model, n):
    """x: [T, H] -> experts [T, K] and their weights [T, K]."""
    spec = model.spec
    logits = x @ model.tensors[f"{n}.router"].T
    score = softmax(logits) if spec.gating == "softmax" else sigmoid(logits)
    correction = model.get(f"{n}.correction")
    choice = score if correction is None else score + correction
    if spec.groups > 1:
        by_group = np.sort(choice.reshape(len(x), spec.groups, -1), axis=-1)
        worth = by_group[..., -2:].sum(axis=-1)  # its two best experts
        kept = np.argsort(-worth, axis=-1, kind="stable")[:, : spec.groups_used]
        mask = np.full_like(worth, -np.inf)
        np.put_along_axis(mask, kept, 0.0, axis=-1)
        choice = choice + np.repeat(mask, spec.experts // spec.groups, axis=-1)
    chosen = np.argsort(-choice, axis=-1, kind="stable")[:, : spec.topk]
    weight = np.take_along_axis(score, chosen, axis=-1)
    if spec.renorm:
        weight = weight / weight.sum(axis=-1, keepdims=True)
    return chosen, weight * spec.scale


def feed_forward(x, model, n):
    spec, t = model.spec, model.tensors
    if spec.norm == "layer":  # GPT-2
        return linear(gelu_tanh(linear(x, model, f"{n}.dense.up")), model, f"{n}.dense.down")
    if n < spec.first_dense or not spec.experts:
        return gated_mlp(x, *(t[f"{n}.dense.{part}"] for part in ("gate", "up", "down")))
    gate, up, down = (t[f"{n}.experts.{part}"] for part in ("gate", "up", "down"))
    chosen, weight = route(x, model, n)
    y = np.zeros_like(x)
    for expert in range(spec.experts):
        rows, slots = np.nonzero(chosen == expert)
        y[rows] += weight[rows, slots, None] * gated_mlp(x[rows], gate[expert], up[expert],
                                                          down[expert])
    if f"{n}.shared.gate" in t:
        shared = gated_mlp(x, *(t[f"{n}.shared.{part}"] for part in ("gate", "up", "down")))
        if f"{n}.shared_gate" in t:
            shared = shared * sigmoid(x @ t[f"{n}.shared_gate"].T)
        y = y + shared
    return y


def sequence_logits(model, ids):
    """ids: T numbers, one sequence -> [T, V]."""
    spec, t = model.spec, model.tensors
    ids = np.asarray(ids)
    require(ids.size and ids.min() >= 0 and ids.max() < spec.vocab, "an id is outside the vocabulary")
    x = t["embed"][ids]
    if "positions" in t:
        x = x + t["positions"][: len(ids)]
    for n in range(spec.layers):
        x = x + attention(normalize(x, t[f"{n}.attn_norm"], model.get(f"{n}.attn_norm.bias"), spec),
                          model, n)
        x = x + feed_forward(normalize(x, t[f"{n}.mlp_norm"], model.get(f"{n}.mlp_norm.bias"), spec),
                             model, n)
    return normalize(x, t["final_norm"], model.get("final_norm.bias"), spec) @ t["head"].T


def logits(model, sequences):
    """Lists of ids -> [tokens, V], one sequence after the other."""
    return np.concatenate([sequence_logits(model, ids) for ids in sequences])


# ------------------------------------------------------------------------------- keys and tensors

_NO_DEFAULT = object()


class Keys:
    """Keys of a configuration; each has to be asked for, or to be known to change nothing."""

    def __init__(self, values, where):
        self._left = dict(values)
        self._where = where

    def take(self, key, kind, default=_NO_DEFAULT):
        """A value of exactly this type; null counts as absent."""
        value = self._left.pop(key, None)
        if value is None:
            require(default is not _NO_DEFAULT, f"{self._where}: key {key} is missing")
            return default
        require(type(value) is kind, f"{self._where}: {key} = {value!r} is no {kind.__name__}")
        return value

    def expect(self, key, *allowed):
        """Absent (or null), or one of these values."""
        value = self._left.pop(key, None)
        require(value is None or any(value == a and type(value) is type(a) for a in allowed),
                f"{self._where}: {key} = {value!r} is not among what this reader does: {allowed}")

    def finish(self, harmless):
        left = [key for key in self._left if key not in harmless]
        require(not left, f"{self._where}: unknown keys {', '.join(sorted(left))}")


class Tensors:
    """Tensors of a file by name; each has to be used once, with the shape that its place gives."""

    def __init__(self, loaders, where):
        self._left = dict(loaders)  # name -> (shape, function that gives the numbers)
        self._where = where

    def has(self, name):
        return name in self._left

    def take(self, name, *shape):
        require(name in self._left, f"{self._where}: tensor {name} is missing (or used twice)")
        stored, load = self._left.pop(name)
        require(tuple(stored) == shape, f"{self._where}: {name} is {list(stored)}, not {list(shape)}")
        return np.asarray(load(), np.float64).reshape(shape)

    def shape(self, name):
        require(name in self._left, f"{self._where}: tensor {name} is missing")
        return list(self._left[name][0])

    def drop(self, condition):
        self._left = {name: value for name, value in self._left.items() if not condition(name)}

    def finish(self):
        require(not self._left, f"{self._where}: unused tensors {', '.join(sorted(self._left))}")


def inverse_frequencies(rotary_dim, theta, scaling, where):
    """scaling: the rope dictionary; types that change anything else than frequencies are refused."""
    inv = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    scaling = Keys(scaling, where)
    kind = scaling.take("rope_type", str, None) or scaling.take("type", str, "default")
    scaling.expect("type", kind)
    if kind == "linear":
        inv = inv / scaling.take("factor", float)
    elif kind == "llama3":
        factor, low, high = (scaling.take(key, float)
                             for key in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = scaling.take("original_max_position_embeddings", int) * inv / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        inv = inv * (share + (1 - share) / factor)
    else:
        require(kind == "default", f"{where}: rope type {kind}")
    scaling.finish({"rope_theta", "partial_rotary_factor"})
    return inv


# ------------------------------------------------------------------------- Hugging Face directories


@dataclasses.dataclass
class Family:
    """How a model_type spells what it is. A text is the name of the key that says it."""

    experts: str | None = None
    ff: str = "moe_intermediate_size"  # width of an expert
    gating: str = "softmax"
    renorm: bool | str = "norm_topk_prob"
    grouped: bool = False  # groups, correction bias, scale and leading dense layers
    groups_given: bool = False  # else 1 where the configuration says nothing
    shared: str | None = None  # key of the number of shared experts, or of their width
    shared_gate: bool = False
    qk_norm: str = "none"
    qk_norm_key: str | None = None  # absent: always as qk_norm says
    qkv_bias: bool | str = False
    o_bias: bool = False  # a bias on o_proj wherever q, k and v have one
    partial_rotary: float | None = 1.0  # where the configuration says nothing; None: it has to
    window_switch: bool = False  # use_sliding_window decides, and is off where it is absent
    moe: str = "mlp"
    parts: tuple = ("gate_proj", "up_proj", "down_proj")
    expect: dict = dataclasses.field(default_factory=dict)


_ALL_SPARSE = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}

FAMILIES = {
    "mixtral": Family("num_local_experts", "intermediate_size", renorm=True,
                      moe="block_sparse_moe", parts=("w1", "w3", "w2")),
    "qwen3_moe": Family("num_experts", qk_norm="head", qkv_bias="attention_bias",
                        o_bias=True, window_switch=True, expect=_ALL_SPARSE),
    "qwen2_moe": Family("num_experts", shared="shared_expert_intermediate_size", shared_gate=True,
                        qkv_bias="qkv_bias", window_switch=True, expect=_ALL_SPARSE),
    "olmoe": Family("num_experts", "intermediate_size", qk_norm="full", qkv_bias="attention_bias",
                    o_bias=True, expect={"clip_qkv": ()}),
    "glm4_moe": Family("n_routed_experts", gating="sigmoid", grouped=True,
                       shared="n_shared_experts", qk_norm="head", qk_norm_key="use_qk_norm",
                       qkv_bias="attention_bias", partial_rotary=0.5,
                       expect={"num_nextn_predict_layers": (0, 1)}),
    "dots1": Family("n_routed_experts", gating="sigmoid", grouped=True, shared="n_shared_experts",
                    qk_norm="head", qkv_bias="attention_bias", o_bias=True,
                    expect={"scoring_func": ("sigmoid", "noaux_tc")}),
    "bailing_moe_v2": Family("num_experts", gating="sigmoid", grouped=True, groups_given=True,
                             shared="num_shared_experts", qk_norm="head",
                             qk_norm_key="use_qk_norm", qkv_bias="use_qkv_bias",
                             renorm=True, partial_rotary=None,
                             expect={"use_bias": (False,), "score_function": ("sigmoid",),
                                     "norm_topk_prob": (True,),
                                     "moe_router_enable_expert_bias": (True,)}),
    "llama": Family(qkv_bias="attention_bias", o_bias=True,
                    expect={"mlp_bias": (False,), "pretraining_tp": (1,)}),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True, window_switch=True),
    "qwen3": Family(qk_norm="head", qkv_bias="attention_bias", o_bias=True, window_switch=True),
    "gpt2": Family(),
}

# Keys of configurations that change no logit of evaluation.
HARMLESS = {
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype",
    "embd_pdrop", "embedding_dropout", "eos_token_id", "initializer_range", "max_position_embeddings",
    "max_window_layers", "model_type", "mtp_loss_scaling_factor", "n_ctx", "n_positions",
    "output_dropout", "output_router_logits", "pad_token_id", "resid_pdrop", "rotary_dim",
    "router_aux_loss_coef", "router_dtype", "router_jitter_noise", "seq_aux", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    # Written by transformers for every model.
    "_attn_implementation_autoset", "chunk_size_feed_forward", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
}

_FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}


def decode(dtype, data):
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    require(dtype in _FLOATS, f"tensor type {dtype}")
    return np.frombuffer(data, _FLOATS[dtype])


def hf_tensors(folder):
    """Every tensor of a directory, checked against its index where there is one."""
    import safetensors

    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        index = json.loads(index.read_text())
        files = sorted(set(index["weight_map"].values()))
    loaders, homes, total = {}, {}, 0
    for file in files:
        for name, tensor in safetensors.deserialize((folder / file).read_bytes()):
            require(name not in loaders, f"{folder}: tensor {name} stands in two files")
            homes[name], total = file, total + len(tensor["data"])
            loaders[name] = (tensor["shape"],
                             lambda t=tensor: decode(t["dtype"], bytes(t["data"])))
    if isinstance(index, dict):
        require(homes == index["weight_map"], f"{folder}: the index does not match the files")
        require(total == index["metadata"]["total_size"], f"{folder}: total_size is not {total}")
    return Tensors(loaders, folder)


def hf_attention(spec, has, take, prefix):
    """Attention of a layer under names of the Llama kind. has: which biases there are."""
    q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    out = {}
    for role, rows, columns in (("q", q_rows, spec.hidden), ("k", kv_rows, spec.hidden),
                                ("v", kv_rows, spec.hidden), ("o", spec.hidden, q_rows)):
        out[role] = take(f"{prefix}{role}_proj.weight", rows, columns)
        if has["o" if role == "o" else "qkv"]:
            out[f"{role}.bias"] = take(f"{prefix}{role}_proj.bias", rows)
    for role, rows in (("q", q_rows), ("k", kv_rows)):
        if spec.qk_norm != "none":
            out[f"{role}_norm"] = take(f"{prefix}{role}_norm.weight",
                                       rows if spec.qk_norm == "full" else spec.head_dim)
    return out


def bailing_attention(spec, has, take, prefix):
    """One matrix of rows q, k, v."""
    sizes = [spec.heads * spec.head_dim] + [spec.kv_heads * spec.head_dim] * 2
    fused = take(f"{prefix}query_key_value.weight", sum(sizes), spec.hidden)
    out = dict(zip("qkv", np.split(fused, np.cumsum(sizes)[:2])))
    if has["qkv"]:
        bias = take(f"{prefix}query_key_value.bias", sum(sizes))
        out |= dict(zip(("q.bias", "k.bias", "v.bias"), np.split(bias, np.cumsum(sizes)[:2])))
    out["o"] = take(f"{prefix}dense.weight", spec.hidden, sizes[0])
    if spec.qk_norm != "none":
        out["q_norm"] = take(f"{prefix}query_layernorm.weight", spec.head_dim)
        out["k_norm"] = take(f"{prefix}key_layernorm.weight", spec.head_dim)
    return out


def gated_parts(take, prefix, parts, ff, hidden):
    shapes = ((ff, hidden), (ff, hidden), (hidden, ff))
    return {role: take(f"{prefix}{part}.weight", *shape)
            for role, part, shape in zip(("gate", "up", "down"), parts, shapes)}


def hf_experts(spec, family, tensors, prefix, ff):
    """Per expert, or fused: gate rows, then up rows."""
    for fused in (f"{prefix}{family.moe}.experts.", f"{prefix}mlp.experts."):
        if tensors.has(fused + "gate_up_proj"):
            both = tensors.take(fused + "gate_up_proj", spec.experts, 2 * ff, spec.hidden)
            return {"gate": both[:, :ff], "up": both[:, ff:],
                    "down": tensors.take(fused + "down_proj", spec.experts, spec.hidden, ff)}
    each = [gated_parts(tensors.take, f"{prefix}{family.moe}.experts.{e}.", family.parts, ff,
                        spec.hidden) for e in range(spec.experts)]
    return {role: np.stack([expert[role] for expert in each]) for role in ("gate", "up", "down")}


def switch(keys, value, default=False):
    return keys.take(value, bool, default) if isinstance(value, str) else value


def read_hf_spec(keys, family, where):
    hidden, heads = keys.take("hidden_size", int), keys.take("num_attention_heads", int)
    spec = Spec(vocab=keys.take("vocab_size", int), hidden=hidden,
                layers=keys.take("num_hidden_layers", int), heads=heads,
                kv_heads=keys.take("num_key_value_heads", int, heads),
                head_dim=keys.take("head_dim", int, hidden // heads),
                eps=keys.take("rms_norm_eps", float))
    keys.expect("hidden_act", "silu")
    theta = keys.take("rope_theta", float, 10000.0)
    partial = keys.take("partial_rotary_factor", float, 0.0) or family.partial_rotary
    scaling = keys.take("rope_scaling", dict, {})
    scaling = keys.take("rope_parameters", dict, scaling)
    theta, partial = scaling.get("rope_theta", theta), scaling.get("partial_rotary_factor", partial)
    require(partial, f"{where}: partial_rotary_factor is missing")
    spec.inv_freq = inverse_frequencies(int(spec.head_dim * partial), theta, scaling, where)
    spec.qk_norm = family.qk_norm
    if family.qk_norm_key and not keys.take(family.qk_norm_key, bool, False):
        spec.qk_norm = "none"
    if family.experts:
        spec.experts = keys.take(family.experts, int, 0) or keys.take("num_local_experts", int)
        keys.expect("num_local_experts", spec.experts)
        spec.topk = keys.take("num_experts_per_tok", int)
        spec.gating, spec.renorm = family.gating, switch(keys, family.renorm)
    if family.grouped:
        spec.scale = keys.take("routed_scaling_factor", float)
        one = {} if family.groups_given else {"default": 1}
        spec.groups, spec.groups_used = (keys.take(key, int, **one)
                                         for key in ("n_group", "topk_group"))
        spec.first_dense = keys.take("first_k_dense_replace", int)
    return spec


def refuse_windows(keys, family, where):
    """Attention over a window of tokens; layer_types, where given, says which layers have one."""
    layer_types = keys.take("layer_types", list, [])
    require(set(layer_types) <= {"full_attention"}, f"{where}: layer_types {set(layer_types)}")
    if family.window_switch:
        keys.expect("use_sliding_window", False)
    if layer_types or family.window_switch:
        keys.take("sliding_window", int, 0)
    else:
        keys.expect("sliding_window")


def read_hf_layer(spec, family, widths, has, tensors, n):
    bailing = has["bailing"]
    prefix = f"model.layers.{n}."
    take = tensors.take
    out = {"attn_norm": take(prefix + "input_layernorm.weight", spec.hidden),
           "mlp_norm": take(prefix + "post_attention_layernorm.weight", spec.hidden)}
    out |= (bailing_attention(spec, has, take, prefix + "attention.") if bailing
            else hf_attention(spec, has, take, prefix + "self_attn."))
    if n < spec.first_dense or not spec.experts:
        parts = gated_parts(take, prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"),
                            widths["dense"], spec.hidden)
        return out | {f"dense.{role}": value for role, value in parts.items()}
    gate = next((g for g in (f"{prefix}{family.moe}.gate.", f"{prefix}mlp.gate.")
                 if tensors.has(g + "weight")), f"{prefix}{family.moe}.gate.")
    out["router"] = take(gate + "weight", spec.experts, spec.hidden)
    if family.grouped:
        name = "expert_bias" if bailing else "e_score_correction_bias"
        out["correction"] = take(gate + name, spec.experts)
    experts = hf_experts(spec, family, tensors, prefix, widths["expert"])
    out |= {f"experts.{role}": value for role, value in experts.items()}
    if widths["shared"]:
        name = "mlp.shared_expert." if family.shared_gate else "mlp.shared_experts."
        parts = gated_parts(take, prefix + name, family.parts, widths["shared"], spec.hidden)
        out |= {f"shared.{role}": value for role, value in parts.items()}
    if family.shared_gate:
        out["shared_gate"] = take(prefix + "mlp.shared_expert_gate.weight", 1, spec.hidden)
    return out


def read_hf(folder):
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type")
    require(kind in FAMILIES, f"{folder}: unknown model_type {kind!r}")
    family, where = FAMILIES[kind], f"{folder}/config.json"
    keys, tensors = Keys(config, where), hf_tensors(folder)
    if kind == "gpt2":
        return read_hf_gpt2(keys, tensors)
    for key, allowed in family.expect.items():
        keys.expect(key, *allowed)
    spec = read_hf_spec(keys, family, where)
    refuse_windows(keys, family, where)
    has = {"bailing": kind == "bailing_moe_v2",
           "qkv": switch(keys, family.qkv_bias, kind == "qwen2_moe")}
    has["o"] = family.o_bias and has["qkv"]
    widths = {"dense": 0, "expert": 0, "shared": 0}
    if family.experts:
        widths["expert"] = keys.take(family.ff, int)
    if family.ff != "intermediate_size" or not family.experts:
        widths["dense"] = keys.take("intermediate_size", int, 0)
    if family.shared:
        widths["shared"] = keys.take(family.shared, int)
        if not family.shared_gate:
            widths["shared"] *= widths["expert"]
    keys.expect("moe_shared_expert_intermediate_size", widths["shared"])
    tied = keys.take("tie_word_embeddings", bool, False)
    keys.finish(HARMLESS)

    # Layers beyond the last are for predicting several tokens at once.
    extra = tuple(f"model.layers.{spec.layers + n}." for n in range(2))
    tensors.drop(lambda name: name.startswith(extra) or name.endswith("rotary_emb.inv_freq"))
    embed = "model.word_embeddings.weight" if has["bailing"] else "model.embed_tokens.weight"
    out = {"embed": tensors.take(embed, spec.vocab, spec.hidden),
           "final_norm": tensors.take("model.norm.weight", spec.hidden)}
    out["head"] = out["embed"] if tied else tensors.take("lm_head.weight", spec.vocab, spec.hidden)
    for n in range(spec.layers):
        layer = read_hf_layer(spec, family, widths, has, tensors, n)
        out |= {f"{n}.{role}": value for role, value in layer.items()}
    tensors.finish()
    return Model(spec, out)


def read_hf_gpt2(keys, tensors):
    hidden, heads = keys.take("n_embd", int), keys.take("n_head", int)
    spec = Spec(vocab=keys.take("vocab_size", int), hidden=hidden, layers=keys.take("n_layer", int),
                heads=heads, kv_heads=heads, head_dim=hidden // heads, norm="layer",
                eps=keys.take("layer_norm_epsilon", float))
    inner = keys.take("n_inner", int, 4 * hidden)
    keys.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    keys.expect("scale_attn_weights", True)
    keys.expect("tie_word_embeddings", True)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        keys.expect(key, False)
    keys.finish(HARMLESS | {"attn_pdrop"})
    root = "transformer." if tensors.has("transformer.wte.weight") else ""
    tensors.drop(lambda name: name.endswith((".attn.bias", ".attn.masked_bias")))
    if tensors.has("lm_head.weight"):  # a copy of the embedding
        copy = tensors.take("lm_head.weight", spec.vocab, hidden)
    else:
        copy = None
    positions = tensors.shape(root + "wpe.weight")[0]
    out = {"embed": tensors.take(root + "wte.weight", spec.vocab, hidden),
           "positions": tensors.take(root + "wpe.weight", positions, hidden)}
    out["head"] = out["embed"]
    require(copy is None or np.array_equal(copy, out["embed"]), "lm_head is no copy of wte")

    def norm(role, name):
        out[role] = tensors.take(f"{name}.weight", hidden)
        out[role + ".bias"] = tensors.take(f"{name}.bias", hidden)

    def conv1d(name, columns, rows):  # stored [in, out]
        return tensors.take(f"{name}.weight", columns, rows).T, tensors.take(f"{name}.bias", rows)

    norm("final_norm", root + "ln_f")
    for n in range(spec.layers):
        at = f"{root}h.{n}."
        norm(f"{n}.attn_norm", at + "ln_1")
        norm(f"{n}.mlp_norm", at + "ln_2")
        weight, bias = conv1d(at + "attn.c_attn", hidden, 3 * hidden)
        for role, w, b in zip("qkv", np.split(weight, 3), np.split(bias, 3)):
            out[f"{n}.{role}"], out[f"{n}.{role}.bias"] = w, b
        for role, name, columns, rows in (("o", "attn.c_proj", hidden, hidden),
                                          ("dense.up", "mlp.c_fc", hidden, inner),
                                          ("dense.down", "mlp.c_proj", inner, hidden)):
            out[f"{n}.{role}"], out[f"{n}.{role}.bias"] = conv1d(at + name, columns, rows)
    tensors.finish()
    return Model(spec, out)


# --------------------------------------------------------------------------------------- GGUF files


@dataclasses.dataclass
class Arch:
    """What a GGUF architecture fixes; None: a key says it."""

    gating: str | None = None
    renorm: bool | None = None
    interleaved: bool = False
    qk_norm: str = "none"
    qk_norm_optional: bool = False
    shared: bool = False
    shared_gate: bool = False
    grouped: bool = False
    ffn_norm: str = "ffn_norm"
    may_tie: bool = False
    experts: bool = True


ARCHS = {
    "llama": Arch("softmax", True, interleaved=True, may_tie=True),
    "qwen3moe": Arch("softmax", True, qk_norm="head", may_tie=True),
    "olmoe": Arch("softmax", False, qk_norm="full"),
    "qwen2moe": Arch("softmax", False, shared=True, shared_gate=True),
    "glm4moe": Arch(qk_norm="head", qk_norm_optional=True, shared=True, grouped=True,
                    ffn_norm="post_attention_norm", may_tie=True),
    "dots1": Arch(qk_norm="head", shared=True, grouped=True),
    "bailingmoe2": Arch(qk_norm="head", shared=True, grouped=True),
    "qwen2": Arch(experts=False, may_tie=True),
    "qwen3": Arch(experts=False, qk_norm="head", may_tie=True),
    "gpt2": Arch(experts=False, may_tie=True),
}


def gguf_contents(path):
    """Keys as python values of the types that readers insist on, and tensors."""
    import gguf
    import gguf.quants

    reader = gguf.GGUFReader(path)
    of_type = {gguf.GGUFValueType.UINT32: int, gguf.GGUFValueType.FLOAT32: float,
               gguf.GGUFValueType.BOOL: bool, gguf.GGUFValueType.STRING: str,
               gguf.GGUFValueType.ARRAY: list}
    keys = {}
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.", "tokenizer.")) and name != "general.architecture":
            continue
        kind = of_type.get(field.types[0])
        require(kind is not None, f"{path}: {name} has type {field.types[0].name}")
        keys[name] = kind(field.contents())
    loaders = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        name, plain = tensor.name, tensor.tensor_type == gguf.GGMLQuantizationType.F32
        always_plain = len(shape) == 1 or "ffn_gate_inp" in name or "exp_probs_b" in name
        require(plain or not always_plain, f"{path}: {name} has to be F32")
        loaders[name] = (shape, lambda t=tensor: gguf.quants.dequantize(t.data, t.tensor_type))
    return keys, loaders


def read_gguf_spec(keys, arch, prefix, vocab, frequency_factors, where):
    def key(name, kind, default=_NO_DEFAULT):
        return keys.take(f"{prefix}.{name}", kind, default)

    heads, hidden = key("attention.head_count", int), key("embedding_length", int)
    spec = Spec(vocab=vocab, hidden=hidden, layers=key("block_count", int), heads=heads,
                kv_heads=key("attention.head_count_kv", int, heads),
                head_dim=key("attention.key_length", int, hidden // heads),
                eps=key("attention.layer_norm_epsilon" if prefix == "gpt2"
                        else "attention.layer_norm_rms_epsilon", float))
    keys.expect(f"{prefix}.attention.value_length", spec.head_dim)
    require(key("vocab_size", int, vocab) == vocab, f"{where}: vocab_size is not {vocab}")
    key("context_length", int)
    if prefix == "gpt2":
        spec.norm = "layer"
        return spec
    rotary = key("rope.dimension_count", int, spec.head_dim)
    scaling = {"rope_type": key("rope.scaling.type", str, "none").replace("none", "default")}
    if scaling["rope_type"] == "linear":
        scaling["factor"] = key("rope.scaling.factor", float)
    spec.inv_freq = inverse_frequencies(rotary, key("rope.freq_base", float, 10000.0), scaling, where)
    if frequency_factors is not None:
        spec.inv_freq = spec.inv_freq / frequency_factors(len(spec.inv_freq))
    spec.interleaved, spec.qk_norm = arch.interleaved, arch.qk_norm
    may_be_dense = prefix == "llama" or not arch.experts
    spec.experts = key("expert_count", int, *([0] if may_be_dense else []))
    if not spec.experts:
        return spec
    spec.topk = key("expert_used_count", int)
    spec.gating, spec.renorm = arch.gating, arch.renorm
    if arch.grouped:
        default = {"default": 2} if prefix == "glm4moe" else {}
        func = key("expert_gating_func", int, **default)
        require(func in (1, 2), f"{where}: expert_gating_func {func}")
        spec.gating = {1: "softmax", 2: "sigmoid"}[func]
        spec.renorm = key("expert_weights_norm", bool, False)
        spec.scale = key("expert_weights_scale", float, 0.0) or 1.0
        spec.groups = key("expert_group_count", int, 1)
        spec.groups_used = key("expert_group_used_count", int, 1)
        spec.first_dense = key("leading_dense_block_count", int, 0)
    return spec


def gguf_attention(spec, arch, tensors, at):
    q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    out = {}
    if tensors.has(at + "attn_qkv.weight"):
        sizes = np.cumsum([q_rows, kv_rows])
        fused = tensors.take(at + "attn_qkv.weight", q_rows + 2 * kv_rows, spec.hidden)
        out |= dict(zip("qkv", np.split(fused, sizes)))
        if tensors.has(at + "attn_qkv.bias"):
            bias = tensors.take(at + "attn_qkv.bias", q_rows + 2 * kv_rows)
            out |= dict(zip(("q.bias", "k.bias", "v.bias"), np.split(bias, sizes)))
    for role, name, rows, columns in (("q", "attn_q", q_rows, spec.hidden),
                                      ("k", "attn_k", kv_rows, spec.hidden),
                                      ("v", "attn_v", kv_rows, spec.hidden),
                                      ("o", "attn_output", spec.hidden, q_rows)):
        if role not in out:
            out[role] = tensors.take(f"{at}{name}.weight", rows, columns)
            if tensors.has(f"{at}{name}.bias"):
                out[f"{role}.bias"] = tensors.take(f"{at}{name}.bias", rows)
    if spec.qk_norm != "none":
        for role, rows in (("q", q_rows), ("k", kv_rows)):
            out[f"{role}_norm"] = tensors.take(f"{at}attn_{role}_norm.weight",
                                               rows if spec.qk_norm == "full" else spec.head_dim)
    return out


def read_gguf_layer(spec, arch, widths, tensors, n):
    at, take = f"blk.{n}.", tensors.take
    parts = ("gate", "up", "down")
    out = {"attn_norm": take(at + "attn_norm.weight", spec.hidden),
           "mlp_norm": take(at + arch.ffn_norm + ".weight", spec.hidden)}
    out |= gguf_attention(spec, arch, tensors, at)
    if n < spec.first_dense or not spec.experts:
        dense = gated_parts(take, at, [f"ffn_{part}" for part in parts], widths["dense"], spec.hidden)
        return out | {f"dense.{role}": value for role, value in dense.items()}
    out["router"] = take(at + "ffn_gate_inp.weight", spec.experts, spec.hidden)
    if arch.grouped:
        out["correction"] = take(at + "exp_probs_b.bias", spec.experts)
    ff = widths["expert"]
    for part in parts:
        shape = (spec.hidden, ff) if part == "down" else (ff, spec.hidden)
        out[f"experts.{part}"] = take(f"{at}ffn_{part}_exps.weight", spec.experts, *shape)
    if arch.shared and widths["shared"]:
        shared = gated_parts(take, at, [f"ffn_{part}_shexp" for part in parts], widths["shared"],
                             spec.hidden)
        out |= {f"shared.{role}": value for role, value in shared.items()}
    if arch.shared_gate:
        out["shared_gate"] = take(at + "ffn_gate_inp_shexp.weight", spec.hidden)[None, :]
    return out


def read_gguf(path):
    values, loaders = gguf_contents(path)
    where, tensors = str(path), Tensors(loaders, path)
    prefix = values.pop("general.architecture", None)
    require(prefix in ARCHS, f"{path}: unknown architecture {prefix!r}")
    arch, keys = ARCHS[prefix], Keys(values, where)
    vocab = loaders["token_embd.weight"][0][0]
    factors = None
    if tensors.has("rope_freqs.weight"):
        def factors(half):
            return tensors.take("rope_freqs.weight", half)

    spec = read_gguf_spec(keys, arch, prefix, vocab, factors, where)

    def key(name, default=_NO_DEFAULT):
        return keys.take(f"{prefix}.{name}", int, default)

    widths = {"dense": key("feed_forward_length", 0), "expert": 0, "shared": 0}
    if spec.experts:
        widths["expert"] = widths["dense"] if prefix in ("llama", "olmoe") else \
            key("expert_feed_forward_length")
        key("expert_feed_forward_length", 0)
    if arch.shared_gate:
        widths["shared"] = key("expert_shared_feed_forward_length")
    elif arch.shared:
        count = key("expert_shared_count", 0)
        require(count or prefix != "glm4moe", f"{path}: glm4moe without shared expert is misread")
        widths["shared"] = key("expert_shared_feed_forward_length", widths["expert"]) * count
    if arch.qk_norm_optional and not tensors.has(f"blk.{spec.layers - 1}.attn_q_norm.weight"):
        spec.qk_norm = "none"
    keys.expect(f"{prefix}.nextn_predict_layers", 0)
    keys.finish(set())

    out = {"embed": tensors.take("token_embd.weight", vocab, spec.hidden),
           "final_norm": tensors.take("output_norm.weight", spec.hidden)}
    tied = arch.may_tie and not tensors.has("output.weight")
    out["head"] = out["embed"] if tied else tensors.take("output.weight", vocab, spec.hidden)
    for n in range(spec.layers):
        layer = (read_gguf_gpt2_layer(spec, widths, tensors, n) if prefix == "gpt2"
                 else read_gguf_layer(spec, arch, widths, tensors, n))
        out |= {f"{n}.{role}": value for role, value in layer.items()}
    if prefix == "gpt2":
        out["final_norm.bias"] = tensors.take("output_norm.bias", spec.hidden)
        out["positions"] = tensors.take("position_embd.weight", *loaders["position_embd.weight"][0])
    tensors.finish()
    return Model(spec, out)


def read_gguf_gpt2_layer(spec, widths, tensors, n):
    at, hidden = f"blk.{n}.", spec.hidden
    out = gguf_attention(spec, ARCHS["gpt2"], tensors, at)
    for role, name in (("attn_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
        out[role] = tensors.take(f"{at}{name}.weight", hidden)
        out[role + ".bias"] = tensors.take(f"{at}{name}.bias", hidden)
    for part, rows, columns in (("up", widths["dense"], hidden), ("down", hidden, widths["dense"])):
        out[f"dense.{part}"] = tensors.take(f"{at}ffn_{part}.weight", rows, columns)
        out[f"dense.{part}.bias"] = tensors.take(f"{at}ffn_{part}.bias", rows)
    return out


# ------------------------------------------------------------------------------------- command line


def read_model(path):
    path = pathlib.Path(path)
    return read_hf(path) if path.is_dir() else read_gguf(path)


def read_ids(path):
    return [[int(word) for word in line.split()]
            for line in pathlib.Path(path).read_text().splitlines() if line.strip()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a directory, or a .gguf file")
    parser.add_argument("--ids", required=True)
    parser.add_argument("--logits", help="write them here, as `arcus eval --logits` does")
    parser.add_argument("--compare", help="logits to compare with")
    args = parser.parse_args()
    result = logits(read_model(args.model), read_ids(args.ids))
    print(f"{result.shape[0]} tokens, logits {result.mean():.6g} +- {result.std():.6g}")
    import h5py

    if args.logits:
        with h5py.File(args.logits, "w") as file:
            file["logits"] = result.astype(np.float32)
    if args.compare:
        with h5py.File(args.compare, "r") as file:
            other = file["logits"][...].astype(np.float64)
        require(other.shape == result.shape, f"{args.compare} has shape {other.shape}")
        worst = np.abs(other - result).max()
        print(f"largest difference {worst:.3g} = {worst / result.std():.3g} of their deviation")


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        sys.exit(f"reference.py: {error}")
