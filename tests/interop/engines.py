#!/usr/bin/env python3
"""Runs models in transformers and in llama.cpp: see with_engines.sh.

    engines.py reference   reference.py against transformers: models that transformers wrote
    engines.py writers     reference.py against both: models of writers.py
    engines.py exports     exports of Arcus in both: logits, perplexity, greedy text; ARCUS is its path
    engines.py tokenizers  ids of a stress text: Arcus, tokenizers, SentencePiece, llama.cpp

An engine that is not installed is left out.
"""

import importlib.util
import math
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import reference
import writers

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None

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


def difference(logits, right):
    return np.abs(logits - right).max() / right.std()


# ----------------------------------------------------------------------------------- the two engines


class Transformers:
    def __init__(self, folder, dtype="float32"):
        import torch

        transformers = quiet()
        # The plain loops: the fused ones do not do float64.
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager",
            experts_implementation="eager", output_loading_info=True)
        self.complaints = [f"{kind} {sorted(report[kind])[:4]}" for kind in
                           ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]]
        self.model, self._folder = model.eval(), folder

    def logits(self, sequences):
        import torch

        with torch.no_grad():
            return np.concatenate([self.model(torch.tensor([ids])).logits[0].double().numpy()
                                   for ids in sequences])

    def greedy(self, prompt, count):
        """The text after the prompt, which begins a document: Arcus puts the end of one before it."""
        import torch

        tokenizer = quiet().AutoTokenizer.from_pretrained(self._folder)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        ids = torch.tensor([[self.model.config.eos_token_id, *ids]])
        with torch.no_grad():
            out = self.model.generate(ids, do_sample=False, min_new_tokens=count,
                                      max_new_tokens=count)
        return tokenizer.decode(out[0, ids.shape[1]:])


class LlamaCpp:
    """fp32 for keys and values, no flash attention: what comes nearest to exact."""

    def __init__(self, path, context=256):
        import llama_cpp

        self.complaints = []  # it loads nothing that it would complain of
        self.model = llama_cpp.Llama(str(path), n_ctx=context, n_batch=context, n_ubatch=context,
                                     logits_all=True, type_k=0, type_v=0, flash_attn=False,
                                     n_threads=1, n_threads_batch=1, verbose=False)

    def logits(self, sequences):
        out = []
        for ids in sequences:
            self.model.reset()
            self.model.eval(ids)
            out.append(np.array(self.model.scores[: len(ids)], np.float64))
        return np.concatenate(out)

    def greedy(self, prompt, count):
        ids = [self.model.token_eos(), *self.model.tokenize(prompt.encode(), add_bos=False)]
        start = len(ids)
        for _ in range(count):
            ids = ids + [int(self.logits([ids])[-1].argmax())]
        text = self.model.detokenize(ids, prev_tokens=None).decode(errors="replace")
        return text[len(self.model.detokenize(ids[:start]).decode(errors="replace")):]


# ----------------------------------------------------------------------- the reference is what it says


def check_reference():
    transformers = quiet()
    import torch

    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 160, length).tolist() for length in (1, 17, 64)]
    worst = 0.0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float64")
    for name, (kind, keys) in TINY.items():
        common = {} if kind == "GPT2Config" else rope() | COMMON
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**(common | keys)))
        randomize(model, rng)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            ours = reference.logits(reference.read_model(folder), sequences)
            theirs = Transformers(folder, "float64").logits(sequences)
        error = difference(ours, theirs)
        worst = max(worst, error)
        print(f"{name:36} logits' deviation {theirs.std():7.3f}, max |d| / deviation {error:.1e}")
    return worst < 1e-4  # transformers normalises and routes in fp32 even then


def check_writers():
    """gpt2 is apart: llama.cpp looks GELU up in a table of 16-bit numbers."""
    import test_interop

    rng = np.random.default_rng(2)
    sequences = [rng.integers(0, writers.VOCAB, length).tolist() for length in (1, 17, 64)]
    fine = True

    def report(name, path, engine, limit):
        nonlocal fine
        error = difference(engine(path).logits(sequences),
                           reference.logits(reference.read_model(path), sequences))
        fine = fine and error < limit
        print(f"{name:36} {engine.__name__:12} max |d| / deviation {error:.1e}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, switches, how) in test_interop.HF_IMPORTS.items():
            if HAS_TRANSFORMERS and kind != "bailing_moe_v2":  # which needs code of its own
                config, tensors = writers.hf_model(kind, **switches)
                path = writers.write_hf(pathlib.Path(folder) / name, config, tensors, **how)
                report(name, path, Transformers, 1e-4)
        for name, (arch, switches, dtype) in test_interop.GGUF_IMPORTS.items():
            if HAS_LLAMA and dtype == "F32":
                path = writers.write_gguf(pathlib.Path(folder) / f"{name}.gguf",
                                          *writers.gguf_model(arch, **switches))
                report(name, path, LlamaCpp, 1e-2 if arch == "gpt2" else 1e-4)
    return fine


# ------------------------------------------------------------------------------- exports of Arcus

PROMPT, NEW_TOKENS = "A run gives ", 60


def perplexity(logits, sequences):
    """Of every token but the first of a sequence."""
    losses, start = [], 0
    for ids in sequences:
        rows = logits[start : start + len(ids) - 1]
        top = rows.max(axis=-1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(rows - top).sum(axis=-1))
        losses.append(log_sum - rows[np.arange(len(rows)), ids[1:]])
        start += len(ids)
    return math.exp(np.concatenate(losses).mean())


class Exports:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        text = self.folder / "text"
        text.mkdir()
        source = pathlib.Path(__file__).resolve().parents[2]
        held_out = source / "CONTRIBUTING.md"
        files = sorted(path for path in source.glob("**/*.md") if "build" not in path.parts)
        for number, path in enumerate(path for path in files if path != held_out):
            (text / f"{number}.txt").write_bytes(path.read_bytes())
        self.held_out = held_out.read_text(encoding="utf-8")[:800]
        self.source = source

    def prepare(self, tokenizer):
        import test_interop

        data = self.folder / f"data-{tokenizer.replace(':', '-')}"
        if not data.exists():
            test_interop.run("prepare", "--out", data, "--tokenizer", tokenizer, "--domain",
                             f"text={self.folder / 'text'}")
        return data

    def check(self, name, tokenizer, settings, targets, steps=400):
        import h5py
        import test_interop

        run_dir = self.folder / name
        test_interop.run("train", self.source / "launch/configs/tiny.toml", *test_interop.toml(
            {"run.dir": str(run_dir), "run.data": str(self.prepare(tokenizer))}
            | test_interop.TRAINING | {"train.lr": 3e-3, "train.steps": steps, "train.seq_len": 128}
            | settings))
        engines = {}
        for to, kind in targets.items():
            out = self.folder / f"{name}-{to}{'.gguf' * (to == 'gguf')}"
            test_interop.run("export", "--checkpoint", run_dir, "--to", to, "--out", out, "--dtype",
                             "f32")
            engines[kind.__name__] = kind(out)
        ids = self.ids(tokenizer, self.folder / f"{name}-hf")
        path = self.folder / "ids.txt"
        path.write_text("".join(" ".join(map(str, line)) + "\n" for line in ids))
        logits_path = self.folder / f"{name}.h5"
        test_interop.run("eval", run_dir, "--ids", path, "--logits", logits_path)
        with h5py.File(logits_path, "r") as file:
            ours = file["logits"][...].astype(np.float64)
        said = test_interop.run("generate", run_dir, "--prompt", PROMPT, "--temperature", 0,
                                "--max-tokens", NEW_TOKENS, "--ignore-eos").stdout
        said = said.removesuffix("\n").removeprefix(PROMPT)
        line = f"{name:30} {ours.std():6.2f} {perplexity(ours, ids):12.6f}"
        fine = True
        for engine in engines.values():
            theirs = engine.logits(ids)
            error, text = difference(theirs, ours), engine.greedy(PROMPT, NEW_TOKENS)
            same = text.strip() == said.strip()
            fine = fine and error < 1e-3 and same and not engine.complaints
            for complaint in engine.complaints:
                print(f"  {type(engine).__name__} on loading: {complaint}")
            line += (f"  {type(engine).__name__}: {error:.1e} {perplexity(theirs, ids):12.6f} "
                     f"{'same text' if same else 'OTHER TEXT ' + repr(text)}")
        print(line, flush=True)
        if not fine:
            print(f"  Arcus says {said!r}")
        return fine

    def ids(self, tokenizer, folder):
        if tokenizer == "bytes":
            ids = list(self.held_out.encode())
        else:
            ids = quiet().AutoTokenizer.from_pretrained(folder).encode(self.held_out)
        return [ids[at : at + 128] for at in range(0, min(len(ids), 512), 128)]


def check_exports():
    import test_interop

    fine = True
    print("model, deviation and perplexity of Arcus' logits; of each engine: max |d| / deviation, "
          "perplexity, greedy text")
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(folder)
        cases = [(name, "bytes", *case) for name, case in test_interop.EXPORTS.items()]
        cases.append(("glm4_moe_spm", "spm:512", test_interop.GROUPS, "glm4_moe", "glm4moe"))
        for name, tokenizer, settings, model_type, _ in cases:
            targets = {}
            if HAS_TRANSFORMERS and model_type:
                targets["hf"] = Transformers
            if HAS_LLAMA:
                targets["gguf"] = LlamaCpp
            if targets:
                fine = exports.check(name, tokenizer, settings, targets) and fine
    return fine


def check_tokenizers():
    """Of bytes and SentencePiece vocabularies that Arcus made, and of an imported one."""
    import test_interop

    run, fine = test_interop.run, True
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(folder)
        model = writers.write_hf(exports.folder / "model", *writers.hf_model("qwen3_moe"))
        run("import", "--from", model, "--out", exports.folder / "imported")
        for name in ("bytes", "spm:512", "imported"):
            run_dir = exports.folder / name
            if name != "imported":
                run("train", exports.source / "launch/configs/tiny.toml", *test_interop.toml(
                    {"run.dir": str(run_dir), "run.data": str(exports.prepare(name))}))
            files = [exports.folder / f"{name}-hf", exports.folder / f"{name}.gguf"]
            for to, out in zip(("hf", "gguf"), files):
                run("export", "--checkpoint", run_dir, "--to", to, "--out", out)
            program = pathlib.Path(__file__).with_name("check_tokenizers.py")
            done = subprocess.run([sys.executable, program, "--arcus", test_interop.ARCUS,
                                   "--tokenizer", f"checkpoint:{run_dir}", *files],
                                  capture_output=True, text=True)
            print(f"== {name}\n{done.stdout}{done.stderr if done.returncode else ''}", end="")
            fine = fine and done.returncode == 0
    return fine


if __name__ == "__main__":
    checks = {"reference": check_reference, "writers": check_writers, "exports": check_exports,
              "tokenizers": check_tokenizers}
    if len(sys.argv) != 2 or sys.argv[1] not in checks:
        sys.exit(__doc__)
    sys.exit(0 if checks[sys.argv[1]]() else 1)
