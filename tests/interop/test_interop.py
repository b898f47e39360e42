#!/usr/bin/env python3
"""Exports and imports of Arcus against reference.py and writers.py: see README.md.

    ARCUS=build/release/arcus test_interop.py [--full] [Export | Import | Refusals ...]
"""

import itertools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import unittest

import h5py
import numpy as np
import reference
import writers

ARCUS = os.environ.get("ARCUS", "build/release/arcus")
FAULTY_FILES = os.environ.get("ARCUS_FAULTY_FILES")
SOURCE = pathlib.Path(__file__).resolve().parents[2]
FULL = "--full" in sys.argv

# Largest difference of a logit between Arcus in fp32 and the reference in float64, in units of the
# logits' deviation. A logit is a sum of ~10^2 numbers behind ~10 such sums in a row, each rounded
# at 2^-24 = 6e-8: about 6e-8 sqrt(10^2 * 10) = 2e-6, and up to ten times that where attention
# scores are large, whose absolute error the softmax turns into a relative one. A tensor that is
# forgotten, swapped or permuted gives 4e-2 and more (check_every_role_matters holds it above
# FORGOTTEN). Random switches now and then give a model that fp32 cannot do better, attention scores
# near 100: there ten times the error of the reference itself in fp32 is allowed.
TOLERANCE = 5e-5
FORGOTTEN = 100 * TOLERANCE


# ------------------------------------------------------------------------------------ running Arcus


def run(*args, code=0, env=None, file_limit=None):
    """Arcus with these arguments; AssertionError with all it said where the exit code is another."""
    command = [ARCUS, *map(str, args)]

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
                          preexec_fn=None if file_limit is None else limit_files)
    if code is not None and done.returncode != code:
        raise AssertionError(f"{' '.join(command)}\ngave {done.returncode}, not {code}:\n"
                             f"{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done


def toml(settings):
    """--set arguments."""
    args = []
    for key, value in settings.items():
        text = json.dumps(value) if isinstance(value, (bool, str)) else repr(value)
        args += ["--set", f"{key}={text}"]
    return args


class InteropTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="arcus-interop-"))
        (cls.folder / "text").mkdir()
        numbers = random.Random(1)
        for file in range(30):
            lines = [f"file {file}, line {line}: {numbers.random()}" for line in range(20)]
            (cls.folder / "text" / f"{file}.txt").write_text("\n".join(lines))
        run("prepare", "--out", cls.folder / "data", "--tokenizer", "bytes", "--valid-fraction",
            0.1, "--domain", f"words={cls.folder / 'text'}")
        cls.trained = {}

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    def setUp(self):
        name = re.sub(r"\W", "_", self.id().split(".")[-1])
        self.here = self.folder / name
        self.here.mkdir()

    def train(self, settings, name="run"):
        """A few steps with so high a rate that every weight, bias and norm moves."""
        path = self.here / name
        run("train", SOURCE / "launch/configs/tiny.toml", *toml(
            {"run.dir": str(path), "run.data": str(self.folder / "data")} | TRAINING | settings))
        return path

    def ids(self, vocab, seed=5):
        rng = np.random.default_rng(seed)
        sequences = [rng.integers(0, vocab, length).tolist() for length in (1, 17, 40)]
        path = self.here / f"ids-{vocab}.txt"
        path.write_text("".join(" ".join(map(str, ids)) + "\n" for ids in sequences))
        return path, sequences

    def evaluate(self, path, vocab=256):
        """Logits of a checkpoint by Arcus, fp32 [tokens, vocab]."""
        ids, sequences = self.ids(vocab)
        out = self.here / "logits.h5"
        run("eval", path, "--ids", ids, "--logits", out)
        with h5py.File(out, "r") as file:
            logits = file["logits"][...]
        out.unlink()
        self.assertEqual(logits.dtype, np.float32)
        self.assertEqual(logits.shape, (sum(map(len, sequences)), vocab))
        return logits

    def assert_close(self, ours, model, vocab=256):
        """ours: logits by Arcus; model: a reference.Model."""
        theirs = reference.logits(model, self.ids(vocab)[1])
        error = np.abs(ours - theirs).max() / theirs.std()
        FIGURES.append((self.id().split(".")[-1], error))
        if error >= TOLERANCE:  # is the model so badly conditioned, or Arcus wrong?
            single = reference.Model(model.spec, {name: tensor.astype(np.float32)
                                                  for name, tensor in model.tensors.items()})
            plain = reference.logits(single, self.ids(vocab)[1])
            self.assertLess(error, 10 * np.abs(plain - theirs).max() / theirs.std())

    def assert_same_weights(self, run_dir, other, shifted=False):
        """Every weight of two runs' last checkpoints is bit-equal; shifted: correction biases may
        differ by a constant, which changes no choice."""
        ours, theirs = weights(run_dir), weights(other)
        self.assertEqual(sorted(ours), sorted(theirs))
        for name in ours:
            if shifted and name.endswith("e_score_correction_bias"):
                np.testing.assert_allclose(ours[name] - ours[name].min(),
                                           theirs[name] - theirs[name].min(), atol=1e-6)
                continue
            self.assertTrue(np.array_equal(ours[name].view(np.uint8), theirs[name].view(np.uint8)),
                            name)

    def assert_refused(self, pattern, *args, **how):
        """One line that says what the pattern looks for, and no file or folder more than before."""
        before = tree(self.here)
        done = run(*args, code=None, **how)
        self.assertIn(done.returncode, (64, 65, 66), done.stdout + done.stderr)
        lines = [line for line in done.stderr.splitlines()
                 if not line.startswith(("note: ", "warning: ", "arcus: warning: "))]
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertRegex(lines[0], r"^arcus: error: ")
        self.assertRegex(lines[0], re.compile(pattern, re.I))
        self.assertEqual(tree(self.here), before)


TRAINING = {"train.steps": 3, "train.warmup_steps": 0, "train.lr": 0.1, "train.weight_decay": 0.0,
            "train.schedule": "constant", "eval.batches": 1, "model.hidden_size": 64,
            "model.num_layers": 3, "model.head_dim": 16, "model.num_experts": 8, "model.topk": 3,
            "model.expert_ff_size": 32, "model.dense_ff_size": 96, "model.norm_eps": 1e-5,
            "model.rope_theta": 50000.0, "routing.capacity_factor": 0.0}
FIGURES = []  # (test, largest difference in deviations)


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def weights(run_dir):
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints/latest").read_text().strip()
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and not name.startswith(("optimizer/", "counters/",
                                                                   "balance/")):
            found[name] = np.ascontiguousarray(item[...])

    with h5py.File(folder / "index.h5", "r") as file:
        file["tensors"].visititems(visit)
    return found


# ------------------------------------------------------------------------------------------ exports

SIGMOID = {"routing.score": "sigmoid", "routing.expert_bias_rate": 0.3, "routing.aux_loss": 0.0}
GROUPS = SIGMOID | {"routing.n_group": 4, "routing.topk_group": 2, "model.num_shared_experts": 1,
                    "model.first_k_dense": 1, "routing.routed_scaling_factor": 2.5,
                    "routing.renormalize": True, "model.qk_norm": "head"}
PLAIN = {"routing.renormalize": False, "model.qk_norm": "none"}
OLMOE = {"routing.renormalize": False, "model.qk_norm": "full", "model.num_kv_heads": 4}
GATED = PLAIN | {"model.num_shared_experts": 1, "model.shared_expert_gate": True,
                 "model.qkv_bias": True}

# name -> (settings, model_type or None where no family represents it, GGUF architecture)
EXPORTS = {
    "mixtral": (PLAIN | {"routing.renormalize": True}, "mixtral", "llama"),
    "mixtral_wide_heads": (PLAIN | {"routing.renormalize": True, "model.head_dim": 32}, "mixtral",
                           "llama"),
    "mixtral_mha_tied": (PLAIN | {"routing.renormalize": True, "model.num_kv_heads": 4,
                                  "model.tie_embeddings": True}, "mixtral", "llama"),
    "qwen3_moe": ({"routing.renormalize": True, "model.qk_norm": "head"}, "qwen3_moe", "qwen3moe"),
    "qwen3_moe_mqa_tied": ({"routing.renormalize": True, "model.qk_norm": "head",
                            "model.num_kv_heads": 1, "model.head_dim": 32,
                            "model.tie_embeddings": True}, "qwen3_moe", "qwen3moe"),
    "qwen3_moe_no_renorm": ({"routing.renormalize": False, "model.qk_norm": "head"}, "qwen3_moe",
                            "glm4moe"),
    "olmoe": (OLMOE, "olmoe", "olmoe"),
    "qwen2_moe": (GATED, "qwen2_moe", "qwen2moe"),
    "qwen2_moe_two_shared_no_bias": (GATED | {"model.qkv_bias": False,
                                              "model.num_shared_experts": 2},
                                     "qwen2_moe", "qwen2moe"),
    "glm4_moe_groups": (GROUPS, "glm4_moe", "glm4moe"),
    "glm4_moe_half_rotary": (SIGMOID | {"routing.renormalize": False, "model.qk_norm": "none",
                                        "model.qkv_bias": True, "model.num_shared_experts": 2,
                                        "model.partial_rotary_factor": 0.5}, "glm4_moe", "glm4moe"),
    "glm4_moe_tied_two_dense": (GROUPS | {"model.tie_embeddings": True, "model.first_k_dense": 2,
                                          "model.num_kv_heads": 4, "model.head_dim": 32},
                                "glm4_moe", "glm4moe"),
    "glm4_moe_no_shared": (SIGMOID | {"routing.renormalize": True, "model.qk_norm": "head"},
                           "glm4_moe", "glm4moe"),
    "glm4_moe_no_bias": ({"routing.score": "sigmoid", "routing.renormalize": True,
                          "model.num_shared_experts": 1, "model.qk_norm": "head"},
                         "glm4_moe", "glm4moe"),
    "container": (PLAIN | {"model.tie_embeddings": True}, None, "glm4moe"),
    "container_bias": (PLAIN | {"routing.renormalize": True, "model.qkv_bias": True}, None,
                       "glm4moe"),
    "container_scale_rotary": (PLAIN | {"routing.routed_scaling_factor": 4.0,
                                        "model.partial_rotary_factor": 0.5}, None, "glm4moe"),
    "container_groups": (PLAIN | {"routing.n_group": 4, "routing.topk_group": 2}, None, "glm4moe"),
    "container_dense_layer": (PLAIN | {"routing.renormalize": True, "model.first_k_dense": 1,
                                       "model.num_shared_experts": 1}, None, "glm4moe"),
}


def neutral(name, tensor):
    """A tensor as it would be had it been forgotten, permuted or left as initialised."""
    role = name.split(".", 1)[-1]
    if role.endswith(".bias") or role == "correction":
        return np.zeros_like(tensor)
    if "norm" in role:
        return np.ones_like(tensor)
    return np.flip(tensor, axis=-1)


class Export(InteropTest):
    """Trained for a few steps, written, read by the reference, imported again."""

    def check_target(self, run_dir, logits, to, expected):
        out = self.here / ("export.gguf" if to == "gguf" else "export")
        run("export", "--checkpoint", run_dir, "--to", to, "--out", out, "--dtype", "f32")
        (check_gguf if to == "gguf" else check_directory)(self, out, expected, "F32")
        model = reference.read_model(out)
        self.assert_close(logits, model)
        back = self.here / f"back-{to}"
        run("import", "--from", out, "--out", back)
        self.assertTrue(np.array_equal(self.evaluate(back), logits), f"logits after import of {to}")
        return model, back

    def check_case(self, settings, model_type, arch):
        run_dir = self.train(settings)
        logits = self.evaluate(run_dir)
        self.assertGreater(logits.std(), 0.01)
        if model_type is None:
            self.assert_refused("", "export", "--checkpoint", run_dir, "--to", "hf", "--out",
                                self.here / "export")
        else:
            model, back = self.check_target(run_dir, logits, "hf", model_type)
            self.check_every_role_matters(model)
            if not has_additions(settings):
                self.assert_same_weights(run_dir, back, settings.get("routing.n_group", 1) > 1)
        self.check_target(run_dir, logits, "gguf", arch)

    def check_every_role_matters(self, model):
        """The comparison is worth something: it sees every kind of tensor that the model has."""
        sequences = self.ids(256)[1]
        right = reference.logits(model, sequences)
        matters = {}
        for name, tensor in model.tensors.items():
            if not tensor.any() or name == "embed" and tensor is model.tensors["head"]:
                continue  # a part that the model does not have, written as zeros
            changed = reference.Model(model.spec, model.tensors | {name: neutral(name, tensor)})
            error = np.abs(reference.logits(changed, sequences) - right).max() / right.std()
            role = re.sub(r"^\d+\.", "", name)
            matters[role] = max(error, matters.get(role, 0.0))
        if model.spec.layers - model.spec.first_dense == 1:
            matters.pop("correction", None)  # one layer's may happen to change no choice
        for role, error in matters.items():
            self.assertGreater(error, FORGOTTEN, role)

    def check_sixteen_bits(self, settings, dtype):
        """The reference reads the rounded weights, and so does Arcus when they are imported."""
        run_dir = self.train(settings)
        for to, out in (("hf", self.here / "export"), ("gguf", self.here / "export.gguf")):
            run("export", "--checkpoint", run_dir, "--to", to, "--out", out, "--dtype", dtype)
            back = self.here / f"back-{to}"
            run("import", "--from", out, "--out", back)
            self.assert_close(self.evaluate(back), reference.read_model(out))
        check_directory(self, self.here / "export", None, dtype.upper())
        check_gguf(self, self.here / "export.gguf", None, dtype.upper())
        self.assert_same_weights(self.here / "back-hf", self.here / "back-gguf")

    def test_bf16_glm4_moe(self):
        self.check_sixteen_bits(GROUPS, "bf16")

    def test_f16_mixtral(self):
        self.check_sixteen_bits(EXPORTS["mixtral"][0], "f16")

    def test_bf16_qwen2_moe(self):
        self.check_sixteen_bits(GATED, "bf16")

    def test_check_answers_like_export(self):
        """Random switches: --check says what export does, and what is exported is right."""
        choices = {"routing.renormalize": [True, False], "model.qk_norm": ["none", "head", "full"],
                   "model.qkv_bias": [False, True], "model.tie_embeddings": [False, True],
                   "routing.score": ["softmax", "sigmoid"], "model.num_shared_experts": [0, 1],
                   "model.shared_expert_gate": [False, True], "model.num_kv_heads": [1, 2, 4],
                   "model.head_dim": [16, 32], "model.partial_rotary_factor": [1.0, 0.5],
                   "model.first_k_dense": [0, 1], "routing.n_group": [1, 4],
                   "routing.routed_scaling_factor": [1.0, 2.5]}
        every = list(itertools.product(*choices.values()))
        exported = 0
        for number, values in enumerate(random.Random(3).sample(every, 400 if FULL else 12)):
            settings = dict(zip(choices, values))
            settings["routing.topk_group"] = 2 if settings["routing.n_group"] == 4 else 1
            if settings["model.num_shared_experts"] == 0:
                settings["model.shared_expert_gate"] = False
            with self.subTest(**settings):
                exported += self.check_switches(settings, f"run-{number}")
        self.assertGreater(exported, 0)

    def check_switches(self, settings, name):
        run_dir = self.train(settings, name)
        config = self.here / f"{name}.toml"
        shutil.copy(run_dir / "config.toml", config)
        answer = run("export", "--check", config, code=None)
        out = {to: self.here / f"{name}-{to}{'.gguf' * (to == 'gguf')}" for to in ("hf", "gguf")}
        done = {to: run("export", "--checkpoint", run_dir, "--to", to, "--out", out[to], "--dtype",
                        "f32", code=None) for to in out}
        exported = [to for to in out if done[to].returncode == 0]
        self.assertEqual(answer.returncode == 0, bool(exported), answer.stdout + answer.stderr)
        for to in exported:
            self.assert_close(self.evaluate(run_dir), reference.read_model(out[to]))
        for to in set(out) - set(exported):
            self.assertFalse(out[to].exists())
        return len(exported)


def has_additions(settings):
    """Exports of such models hold parts that the model has not."""
    return settings.get("model.num_shared_experts", 0) == 0 and "routing.score" in settings or \
        settings.get("model.shared_expert_gate") and not settings["model.qkv_bias"] or \
        settings.get("routing.score") == "sigmoid" and "routing.expert_bias_rate" not in settings


for _name, _case in EXPORTS.items():
    setattr(Export, f"test_{_name}", lambda self, case=_case: self.check_case(*case))


def check_directory(test, folder, model_type, dtype):
    """What engines expect of a directory beside names and numbers."""
    config = json.loads((folder / "config.json").read_text())
    if model_type is not None:
        test.assertEqual(config["model_type"], model_type)
    spelled = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    test.assertEqual([config["torch_dtype"], config["dtype"]], [spelled] * 2)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "architectures",
                "max_position_embeddings", "rope_theta", "rope_scaling"):
        test.assertIn(key, config)
    test.assertEqual(config["rope_parameters"]["rope_theta"], config["rope_theta"])
    test.assertEqual(config["rope_parameters"]["rope_type"], "default")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        test.assertTrue((folder / name).exists(), name)
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        test.assertEqual(length % 8, 0)
        test.assertEqual(header.pop("__metadata__")["format"], "pt")
        for name, tensor in header.items():
            router = re.search(r"mlp\.gate\.|block_sparse_moe\.gate|shared_expert_gate", name)
            plain = router or len(tensor["shape"]) == 1
            test.assertEqual(tensor["dtype"], "F32" if plain else dtype, name)


def check_gguf(test, path, arch, dtype):
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    if arch is not None:
        test.assertEqual(keys["general.architecture"], arch)
    tokens = keys["tokenizer.ggml.tokens"]
    embed = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    test.assertEqual(len(tokens), int(embed.shape[1]))
    test.assertEqual(len(set(tokens)), len(tokens))
    test.assertEqual(len(keys["tokenizer.ggml.token_type"]), len(tokens))
    for tensor in reader.tensors:
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name:
            test.assertEqual(tensor.tensor_type.name, dtype, tensor.name)
        test.assertLess(len(tensor.name), 64)


# ------------------------------------------------------------------------------------------ imports

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}

# name -> (model_type, switches of writers.hf_model, arguments of writers.write_hf)
HF_IMPORTS = {
    **{kind: (kind, {}, {}) for kind in writers.HF_FAMILIES},
    "mixtral_fused_bf16": ("mixtral", dict(fused=True, head_dim=32), dict(dtype="BF16")),
    "qwen3_moe_no_renorm": ("qwen3_moe", dict(renorm=False, tied=True), dict(shards=3)),
    "qwen3_moe_fused_f16": ("qwen3_moe", dict(fused=True), dict(dtype="F16")),
    "qwen3_moe_of_transformers_5": ("qwen3_moe", dict(config={
        "num_experts": writers.ABSENT, "num_local_experts": writers.EXPERTS,
        "rope_theta": writers.ABSENT, "rope_scaling": writers.ABSENT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}), {}),
    "qwen2_moe_fused": ("qwen2_moe", dict(fused=True), dict(shards=2)),
    "olmoe_bf16": ("olmoe", dict(fused=True), dict(dtype="BF16", shards=2)),
    "glm4_moe_half_rotary": ("glm4_moe", dict(groups=1, groups_used=1, rotary=0.5, bias=True,
                                              qk_norm="none", shared=2, renorm=False), {}),
    "glm4_moe_with_mtp": ("glm4_moe", dict(extra_layers=1, tied=True, head_dim=32),
                          dict(dtype="BF16", shards=4)),
    "glm4_moe_fused": ("glm4_moe", dict(fused=True, first_dense=0), {}),
    "dots1_bf16": ("dots1", dict(groups=1, groups_used=1), dict(dtype="BF16", shards=2)),
    "dots1_as_published": ("dots1", dict(groups=1, groups_used=1, config={
        "n_group": None, "topk_group": writers.ABSENT, "head_dim": writers.ABSENT,
        "scoring_func": "noaux_tc"}), {}),
    "bailing_fused_bias": ("bailing_moe_v2", dict(fused=True, bias=True), dict(dtype="F16")),
    "llama_tied": ("llama", dict(tied=True), dict(dtype="BF16")),
    "llama_llama3_rope": ("llama", dict(rope_scaling=LLAMA3, head_dim=32), {}),
    "qwen3_moe_linear_rope": ("qwen3_moe", dict(rope_scaling={"type": "linear", "factor": 4.0}), {}),
    "gpt2_prefixed": ("gpt2", dict(root="transformer.", buffers=True), dict(shards=2)),
}
# name -> (architecture, switches of writers.gguf_model, type)
GGUF_IMPORTS = {
    **{f"gguf_{name.replace('-', '_')}": (name, {}, "F32") for name in writers.GGUF_ARCHS},
    **{f"gguf_{arch}_{dtype.lower()}": (arch, {}, dtype)
       for arch, dtype in (("llama", "Q8_0"), ("glm4moe", "Q4_0"), ("qwen3moe", "Q4_1"),
                           ("olmoe", "F16"), ("qwen2moe", "BF16"), ("qwen3", "Q4_0"))},
    "gguf_container": ("glm4moe", dict(gating=1, renorm=False, qk_norm="none", groups=1, scale=4.0,
                                       tied=True, rotary=0.5, bias=True, first_dense=0), "F32"),
    "gguf_llama_linear_rope": ("llama", dict(keys={"rope_scaling_type": "linear",
                                                   "rope_scaling_factor": 4.0}), "F32"),
    "gguf_qwen3moe_tied": ("qwen3moe", dict(tied=True, head_dim=32), "F32"),
}
if FULL:
    for _kind, _dtype, _fused in itertools.product(writers.HF_FAMILIES, ("F32", "F16", "BF16"),
                                                   (False, True)):
        HF_IMPORTS[f"full_{_kind}_{_dtype}_{_fused}"] = (
            _kind, dict(fused=_fused and _kind not in writers.DENSE, seed=2),
            dict(dtype=_dtype, shards=1 + 2 * _fused))
    for _arch, _dtype in itertools.product(writers.GGUF_ARCHS, (
            "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")):
        GGUF_IMPORTS[f"full_{_arch}_{_dtype}"] = (_arch, dict(seed=2), _dtype)


class Import(InteropTest):
    """Written by writers.py, imported, evaluated, compared with the reference's reading."""

    def check(self, path):
        out = self.here / "run"
        run("import", "--from", path, "--out", out)
        logits = self.evaluate(out, writers.VOCAB)
        self.assert_close(logits, reference.read_model(path), writers.VOCAB)
        return out

    def check_hf(self, kind, switches, how):
        model = writers.hf_model(kind, **switches)
        path = writers.write_hf(self.here / "model", *model, **how)
        out = self.check(path)
        if kind not in writers.DENSE:
            self.check_passed_on(path, out)

    def check_passed_on(self, path, run_dir):
        """What was imported can be exported, in fp32 with the same logits, its tokenizer verbatim."""
        out = self.here / "again"
        done = run("export", "--checkpoint", run_dir, "--to", "hf", "--out", out, "--dtype", "f32",
                   code=None)
        if done.returncode:  # what no family can hold: said, not made up
            self.assertRegex(done.stderr, "arcus: error: ")
            return
        self.assert_close(self.evaluate(run_dir, writers.VOCAB), reference.read_model(out),
                          writers.VOCAB)
        self.assertEqual((out / "tokenizer.json").read_bytes(),
                         (path / "tokenizer.json").read_bytes())

    def check_gguf(self, arch, switches, dtype):
        model = writers.gguf_model(arch, **switches)
        self.check(writers.write_gguf(self.here / "model.gguf", *model, dtype=dtype))

    def test_hf_and_gguf_give_the_same_run(self):
        """The same qwen3_moe as a directory and as GGUF: the same weights, bit by bit."""
        config, tensors = writers.hf_model("qwen3_moe", tied=True)
        writers.write_hf(self.here / "model", config, tensors)
        run("import", "--from", self.here / "model", "--out", self.here / "run")
        run("export", "--checkpoint", self.here / "run", "--to", "gguf", "--out",
            self.here / "model.gguf", "--dtype", "f32")
        run("import", "--from", self.here / "model.gguf", "--out", self.here / "run-gguf")
        self.assert_same_weights(self.here / "run", self.here / "run-gguf")


for _name, _case in HF_IMPORTS.items():
    setattr(Import, f"test_{_name}", lambda self, case=_case: self.check_hf(*case))
for _name, _case in GGUF_IMPORTS.items():
    setattr(Import, f"test_{_name}", lambda self, case=_case: self.check_gguf(*case))


class Upcycle(InteropTest):
    """A dense model with every expert a copy of its feed-forward computes what it did."""

    def check(self, kind, *args, **switches):
        path = writers.write_hf(self.here / "model", *writers.hf_model(kind, **switches))
        run("import", "--from", path, "--out", self.here / "dense")
        run("upcycle", "--from", self.here / "dense", "--experts", 4, "--topk", 2, *args, "--out",
            self.here / "run")
        ours = self.evaluate(self.here / "run", writers.VOCAB)
        self.assert_close(ours, reference.read_model(path), writers.VOCAB)
        if kind != "gpt2":
            # No directory holds biases beside a softmax gate that renormalises.
            for to, out in [("gguf", "again.gguf")] + [("hf", "again")] * (kind != "qwen2"):
                run("export", "--checkpoint", self.here / "run", "--to", to, "--out",
                    self.here / out)
                again = reference.read_model(self.here / out)
                self.assertEqual((again.spec.experts, again.spec.topk), (4, 2))
                self.assert_close(ours, again, writers.VOCAB)
        else:
            self.assert_refused("gpt2|layer|bias|position", "export", "--checkpoint",
                                self.here / "run", "--to", "hf", "--out", self.here / "again")

    def test_llama(self):
        self.check("llama")

    def test_llama3_rope(self):
        self.check("llama", rope_scaling=LLAMA3 | {"original_max_position_embeddings": 8192},
                   head_dim=32)

    def test_granular(self):
        self.check("llama", "--granularity", 2)

    def test_mistral(self):
        self.check("mistral")

    def test_qwen2(self):
        self.check("qwen2")

    def test_qwen3(self):
        self.check("qwen3")

    def test_gpt2(self):
        self.check("gpt2")


# ------------------------------------------------------------------------------------------ refusals


def changed(**keys):
    """A change of config.json."""
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return apply


def without(key):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    return apply


def truncated(name, share=0.6):
    def apply(folder):
        path = folder / name if folder.is_dir() else folder
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
    return apply


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def removed(name):
    return lambda folder: (folder / name).unlink()


# name -> (model_type, arguments of write_hf, change of the directory, what the message has to name)
HF_REFUSALS = {
    "unknown_model_type": ("llama", {}, changed(model_type="frobnicator"), "frobnicator"),
    "mla": ("llama", {}, changed(model_type="deepseek_v3", kv_lora_rank=512),
            "deepseek_v3|kv_lora_rank"),
    "sinks": ("qwen3_moe", {}, changed(model_type="gpt_oss"), "gpt_oss"),
    "quantized": ("llama", {}, changed(quantization_config={"quant_method": "gptq", "bits": 4}),
                  "quantization_config"),
    "sliding_window": ("mistral", {}, changed(sliding_window=32), "sliding_window"),
    "mixtral_sliding_window": ("mixtral", {}, changed(sliding_window=32), "sliding_window"),
    "use_sliding_window": ("qwen2", {}, changed(use_sliding_window=True, sliding_window=32,
                                                max_window_layers=1), "sliding_window"),
    "rope_dynamic": ("llama", {}, changed(rope_scaling={"type": "dynamic", "factor": 2.0}),
                     "dynamic"),
    "rope_longrope": ("llama", {}, changed(rope_scaling={"rope_type": "longrope"}), "longrope"),
    "rope_parameters_unknown": ("qwen3", {}, changed(rope_parameters={
        "rope_type": "proportional", "rope_theta": 1e4}), "proportional"),
    "mlp_only_layers": ("qwen3_moe", {}, changed(mlp_only_layers=[0]), "mlp_only_layers"),
    "decoder_sparse_step": ("qwen2_moe", {}, changed(decoder_sparse_step=2), "decoder_sparse_step"),
    "clip_qkv": ("olmoe", {}, changed(clip_qkv=8.0), "clip_qkv"),
    "activation": ("llama", {}, changed(hidden_act="gelu"), "hidden_act|gelu"),
    "mlp_bias": ("llama", {}, changed(mlp_bias=True), "mlp_bias"),
    "bias_without_tensors": ("llama", {}, changed(attention_bias=True), "bias"),
    "gpt2_scaled_by_layer": ("gpt2", {}, changed(scale_attn_by_inverse_layer_idx=True),
                             "scale_attn_by_inverse_layer_idx"),
    "more_layers_than_tensors": ("llama", {}, changed(num_hidden_layers=4), "layers\\.3"),
    "fewer_layers_than_tensors": ("llama", {}, changed(num_hidden_layers=2), "layers\\.2"),
    "other_width": ("llama", {}, changed(intermediate_size=64), "intermediate_size|mlp|shape"),
    "missing_key": ("qwen3_moe", {}, without("num_experts_per_tok"), "num_experts_per_tok"),
    "no_config": ("llama", {}, removed("config.json"), "config.json"),
    "config_is_no_json": ("llama", {}, text("config.json", '{"model_type": "llama",'), "config.json"),
    "half_a_download_shard": ("qwen3", dict(shards=3), removed("model-00002-of-00003.safetensors"),
                              "model-00002-of-00003"),
    "half_a_download_file": ("qwen3", {}, truncated("model.safetensors"), "model.safetensors"),
    "half_a_download_header": ("qwen3", {}, truncated("model.safetensors", 0.001),
                               "model.safetensors"),
    "no_tensors_at_all": ("qwen3", {}, removed("model.safetensors"), "safetensors"),
    "index_names_unknown_tensor": ("qwen3", dict(shards=2), lambda folder: (
        folder / "model.safetensors.index.json").write_text(json.dumps({
            "metadata": {}, "weight_map": {"model.ghost.weight": "model-00001-of-00002.safetensors"}})),
        "ghost|index"),
    "vocabulary_too_large": ("llama", {}, lambda folder: add_tokens(folder, 100), "vocab|token"),
}


def add_tokens(folder, count):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = vocab | {f"extra{n}": writers.VOCAB + n for n in range(count)}
    path.write_text(json.dumps(content))


# name -> (architecture, switches, type, change of the file, what the message has to name)
GGUF_REFUSALS = {
    "gguf_truncated": ("llama", {}, "F32", truncated(""), "gguf"),
    "gguf_truncated_header": ("llama", {}, "F32", truncated("", 0.001), "gguf"),
    "gguf_wrong_magic": ("llama", {}, "F32", lambda path: path.write_bytes(
        b"GGML" + path.read_bytes()[4:]), "magic|GGUF"),
    "gguf_five_bits": ("qwen3", {}, "Q5_0", lambda path: None, "Q5_0|type"),
    "gguf_yarn": ("qwen3", dict(keys={"rope_scaling_type": "yarn"}), "F32", lambda path: None,
                  "yarn|rope"),
    # Factors that no rule gives; those of llama3's rule come and go in Upcycle.
    "gguf_rope_factors": ("llama-dense", dict(rope_freqs=True), "F32", lambda path: None,
                          "rope_freqs"),
    "gguf_fused_qkv": ("qwen3moe", dict(fused=True), "F32", lambda path: None, "attn_qkv"),
}


class Refusals(InteropTest):
    def check_hf(self, kind, how, change, pattern):
        folder = writers.write_hf(self.here / "model", *writers.hf_model(kind), **how)
        change(folder)
        self.assert_refused(pattern, "import", "--from", folder, "--out", self.here / "run")

    def check_gguf(self, arch, switches, dtype, change, pattern):
        path = writers.write_gguf(self.here / "model.gguf", *writers.gguf_model(arch, **switches),
                                  dtype=dtype)
        change(path)
        self.assert_refused(pattern, "import", "--from", path, "--out", self.here / "run")

    def check_tensors(self, change, pattern):
        config, tensors = writers.hf_model("qwen3_moe")
        change(tensors)
        folder = writers.write_hf(self.here / "model", config, tensors)
        self.assert_refused(pattern, "import", "--from", folder, "--out", self.here / "run")

    def test_extra_tensor(self):
        self.check_tensors(lambda t: t.update({"model.layers.1.mlp.ghost.weight": np.ones((4, 4))}),
                           "ghost")

    def test_missing_expert(self):
        self.check_tensors(lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"),
                           r"layers\.1\.mlp\.experts")

    def test_fused_and_single_experts(self):
        self.check_tensors(lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": np.ones(
            (writers.EXPERTS, 2 * writers.FF, writers.HIDDEN), np.float32)}),
            r"layers\.1\.mlp\.experts")

    def test_transposed_tensor(self):
        def change(tensors):
            name = "model.layers.0.mlp.experts.0.down_proj.weight"
            tensors[name] = np.ascontiguousarray(tensors[name].T)

        self.check_tensors(change, r"layers\.0\.mlp\.experts")

    def test_no_such_source(self):
        self.assert_refused("nowhere", "import", "--from", self.here / "nowhere", "--out",
                            self.here / "run")

    def test_existing_run(self):
        folder = writers.write_hf(self.here / "model", *writers.hf_model("qwen3_moe"))
        run("import", "--from", folder, "--out", self.here / "run")
        self.assert_refused("exist|already", "import", "--from", folder, "--out", self.here / "run")

    def export(self, run_dir, *more):
        return ["export", "--checkpoint", run_dir, "--to", "hf", "--out", self.here / "export", *more]

    def test_wrong_family(self):
        run_dir = self.train(GROUPS)
        for family, pattern in (("mixtral", "score|sigmoid"), ("olmoe", "score|sigmoid|qk_norm"),
                                ("frobnicator", "frobnicator")):
            self.assert_refused(pattern, *self.export(run_dir, "--family", family))

    def test_no_family(self):
        for name, settings, pattern in (
                ("full", OLMOE | {"model.num_kv_heads": 2}, "num_kv_heads|qk_norm"),
                ("stream", {"routing.stream": "threshold"}, "stream"),
                ("hash", {"routing.select": "hash", "routing.aux_loss": 0.0}, "select|hash"),
                ("gate_bias", {"routing.gate_bias": True}, "gate_bias")):
            with self.subTest(name):
                run_dir = self.train(settings, name)
                self.assert_refused(pattern, *self.export(run_dir))
                done = run("export", "--check", run_dir / "config.toml", code=None)
                self.assertNotEqual(done.returncode, 0)

    def test_no_overwriting(self):
        run_dir = self.train(EXPORTS["mixtral"][0])
        run(*self.export(run_dir))
        self.assert_refused("--force", *self.export(run_dir))
        other = self.train(EXPORTS["qwen3_moe"][0], "other")
        run(*self.export(other, "--force"))
        self.assertEqual(reference.read_model(self.here / "export").spec.qk_norm, "head")
        stray = [path.name for path in self.here.iterdir()]
        self.assertEqual(sorted(stray), ["export", "export.report.json", "other", "run"])

    def test_checkpoint_under_way(self):
        run_dir = self.train(EXPORTS["mixtral"][0])
        step = next((run_dir / "checkpoints").glob("step-*"))
        under_way = step.with_name(step.name + ".tmp")
        step.rename(under_way)
        (under_way / "CHECKSUMS").unlink()  # which is written last
        self.assert_refused("checkpoint", *self.export(run_dir))
        self.assert_refused("checkpoint", *self.export(under_way))

    def test_checkpoint_with_missing_shard(self):
        run_dir = self.train(EXPORTS["mixtral"][0])
        next((run_dir / "checkpoints").glob("step-*/rank-00000.h5")).unlink()
        self.assert_refused("rank-00000", *self.export(run_dir))

    def test_files_that_cannot_grow(self):
        run_dir = self.train(EXPORTS["mixtral"][0])
        for to in ("hf", "gguf"):
            for limit in (0, 100, 10_000, 500_000):
                self.assert_refused("File too large", "export", "--checkpoint", run_dir, "--to", to,
                                    "--out", self.here / "export", file_limit=limit)

    def test_full_disk(self):
        disk = self.here / "disk"
        disk.mkdir()
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk],
                               capture_output=True)
        if mount.returncode:
            self.skipTest("this user may not mount a small disk")
        try:
            run_dir = self.train(EXPORTS["mixtral"][0])
            for to in ("hf", "gguf"):
                self.assert_refused("No space left", "export", "--checkpoint", run_dir, "--to", to,
                                    "--out", disk / "export")
            folder = writers.write_hf(self.here / "model", *writers.hf_model("qwen3_moe"))
            self.assert_refused("No space left", "import", "--from", folder, "--out", disk / "run")
        finally:
            subprocess.run(["umount", disk], check=True)

    @unittest.skipUnless(FAULTY_FILES, "ARCUS_FAULTY_FILES is not set")
    def test_killed_export_is_absent_or_whole(self):
        run_dir = self.train(EXPORTS["mixtral"][0])
        for call in (1, 3, 6, 10, 15):
            env = {"LD_PRELOAD": FAULTY_FILES, "ARCUS_FAULT_PATH": "export",
                   "ARCUS_FAULT_CALL": str(call)}
            done = run(*self.export(run_dir), code=None, env=env)
            if done.returncode == 0:
                break
            self.assertEqual(done.returncode, -9)
            if (self.here / "export").exists():
                reference.read_model(self.here / "export")
        run(*self.export(run_dir, "--force"))
        reference.read_model(self.here / "export")


for _name, _case in HF_REFUSALS.items():
    setattr(Refusals, f"test_{_name}", lambda self, case=_case: self.check_hf(*case))
for _name, _case in GGUF_REFUSALS.items():
    setattr(Refusals, f"test_{_name}", lambda self, case=_case: self.check_gguf(*case))


if __name__ == "__main__":
    program = unittest.main(argv=[arg for arg in sys.argv if arg != "--full"], exit=False)
    if FIGURES:
        name, error = max(FIGURES, key=lambda figure: figure[1])
        print(f"{len(FIGURES)} comparisons, largest difference {error:.1e} of the deviation ({name}); "
              f"median {np.median([e for _, e in FIGURES]):.1e}, tolerance {TOLERANCE:.0e}")
    sys.exit(not program.result.wasSuccessful())
