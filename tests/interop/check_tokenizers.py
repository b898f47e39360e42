#!/usr/bin/env python3
"""Compares token ids of Arcus with those of other programs for the same tokenizer.

    check_tokenizers.py --write-texts texts                     # the stress texts, NUL after each
    arcus tokenize -z --tokenizer checkpoint:RUN < texts > ids  # what Arcus makes of them
    check_tokenizers.py --texts texts --ids ids PATH...

or in one go `check_tokenizers.py --arcus arcus --tokenizer SOURCE PATH...`. A PATH is a Hugging Face
directory (its tokenizer.json is read by the package `tokenizers`, its tokenizer.model by
`sentencepiece`) or a GGUF file (read by `llama_cpp`, where it is installed). Special tokens spelled
in a text are text for all of them. Prints a line for each and ends with 1 if any id differs.

U+2581 is left out of what SentencePiece-like files are asked: they spell a blank so and cannot tell
the two apart; Arcus's own SentencePiece vocabularies can.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys

CHOSEN = [
    " ", "  ", "   a  b   c ", "\n", "\r\n", "\n\n\n", "a\n\nb", "a \n b", "a\r\n\r\nb\r\n",
    "\t\t x \t\n", "don't I'LL we'Ve x'S '\u017f '\u017ft", "1234567890 12 3.14159",
    "\uff11\uff12\uff13 \u0663\u0664\u0665 \u2461\u216b\u00bd",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u6df7\u5408 English \u4e0e\u6578\u5b57123\u3002\n\u7b2c\u4e8c\u884c",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u043b\u043a\u0430 \u2014 \u044d\u0442\u043e 42.",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0661\u0662\u0663",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "a\u00a0b\u202fc\u3000d\u200be\ufefff\u180eg\u2028h\u2029i\u0085j",
    "e\u0301 \u00e9 o\u0323\u0302 \u01c6 \ufb01 \u212b \u1100\u1161\u11a8 \uac01 \u304b\u3099 \u304c",
    "\u2581 \u2581\u2581x\u2581y", "</s><unk><s><|endoftext|><0x41>[PAD256]", "x" * 3000,
    "ab" * 2000 + " " + " " * 500 + "z",
    "foo(bar[0])->baz(); /* c */ // d\n\tif (x != 0) {\n\t\treturn;\n\t}\n",
    "trailing blanks   \nnext   \n   ", "\x01\x7f\x1b[0m",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u092a\u093e\u0920",
    "\u0e44\u0e17\u0e22\u0e44\u0e21\u0e48\u0e21\u0e35\u0e0a\u0e48\u0e2d\u0e07\u0e27\u0e48\u0e32\u0e07",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u30ab\u30bf\u30ab\u30ca\u3002",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8\uc785\ub2c8\ub2e4.",
    "I'm 'sure' it's \"quoted\"\u2014\u2018curly\u2019 \u201cdouble\u201d\u2026",
    "$100 \u20ac50 %^&*()_+-=[]{}|;:,.<>/?~`", "camelCaseHTTPServer_snake_case", "\u0301leading mark",
]
PIECES = [
    " ", "  ", "\n", "\r\n", "\t", "the ", "The", " and", "ing", "'s", "'T", " 12", "345", "\u4e2d",
    "\u6587", " \u041f", "\u0440\u0438", "\u00e9", "e\u0301", "\u00a0", "\u3000", "\U0001f44d",
    "\U0001f3fd", "\u200d", "!", "...", "(", ")", "_", "-", "<", ">", "\u2581", "\u0301", "\u00df",
    "\u017f", "K", "\u0627", "\u0932", "\u093e", "\u4e00", "\u3093", "\x7f",
]


# Whether a character is a letter depends on the version of Unicode: PCRE2 10.42 has 14, others are
# younger. Draws keep to what all agree on.
SETTLED = [(0x1F300, 0x1F600), (0x20000, 0x2A6D7), (0x40000, 0x110000)]
YOUNG = {0x0897, 0x0CF3, 0x0CDC, 0x0C5C, 0x0ECE, 0x1C89, 0x1C8A, *range(0xA7CB, 0xA7D0), *range(0xA7DA, 0xA7DD),
         *range(0xA7F1, 0xA7F2), 0x088F, *range(0x1ACF, 0x1AEC)}


def random_texts(count):
    draw = random.Random(1)
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(draw.randrange(1, 60)):
            kind = draw.randrange(10)
            if kind < 7:
                text += draw.choice(PIECES)
            elif kind == 7:
                text += chr(draw.randrange(1, 0x250))
            elif kind == 8:
                text += chr(draw.choice([draw.randrange(0x250, 0xD800),
                                         draw.randrange(0xE000, 0x10000)]))
            else:
                text += chr(draw.randrange(*draw.choice(SETTLED)))
        texts.append("".join(c for c in text if ord(c) not in YOUNG))
    return texts


def every_code_point():
    """Each among letters, digits, blanks and punctuation, 512 in a text."""
    for begin in range(0, 0x110000, 512):
        text = ""
        for code in range(max(1, begin), begin + 512):
            if not 0xD800 <= code < 0xE000:
                c = chr(code)
                text += f"a{c}b 1{c}2 {c}{c} .{c}'{c}\n"
        if text:
            yield text


def stress_texts(thorough):
    texts = CHOSEN + random_texts(3000 if thorough else 500)
    return texts + (list(every_code_point()) if thorough else [])


class JsonEncoder:
    def __init__(self, path):
        import tokenizers

        self.name = f"tokenizers {tokenizers.__version__}"
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        layout = json.loads(path.read_text(encoding="utf-8"))
        self.blank_is_2581 = bool(layout["model"].get("byte_fallback"))

    def __call__(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids


class SentencePieceEncoder:
    blank_is_2581 = True

    def __init__(self, path):
        import sentencepiece

        self.name = f"sentencepiece {sentencepiece.__version__}"
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def __call__(self, text):
        return self.processor.encode(text)


class LlamaEncoder:
    def __init__(self, path):
        import llama_cpp

        self.name = f"llama_cpp {llama_cpp.__version__}"
        self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self.blank_is_2581 = "llama" == self.model.metadata.get("tokenizer.ggml.model")

    def __call__(self, text):
        return self.model.tokenize(text.encode(), add_bos=False, special=False)


def encoders_of(path):
    """(what, how to make it) for everything at `path` that some program here reads."""
    if path.is_file():
        return [("GGUF", lambda: LlamaEncoder(path))]
    found = []
    if (path / "tokenizer.json").exists():
        found.append(("tokenizer.json", lambda: JsonEncoder(path / "tokenizer.json")))
    if (path / "tokenizer.model").exists():
        found.append(("tokenizer.model", lambda: SentencePieceEncoder(path / "tokenizer.model")))
    return found


def compare(encoder, texts, ids):
    count = differing = 0
    first = None
    for text, expected in zip(texts, ids):
        if encoder.blank_is_2581 and "\u2581" in text:
            continue
        got = list(encoder(text))
        count += len(expected)
        if got != expected:
            differing += 1
            first = first or (text, expected, got)
    return count, differing, first


def read_ids(data):
    return [[int(word) for word in line.split()] for line in data.decode().split("\n")[:-1]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=pathlib.Path)
    parser.add_argument("--write-texts", type=pathlib.Path, help="write the stress texts and end")
    parser.add_argument("--texts", type=pathlib.Path, help="texts, a NUL after each")
    parser.add_argument("--ids", type=pathlib.Path, help="ids that Arcus made of them, by lines")
    parser.add_argument("--arcus", help="or the program to make them with")
    parser.add_argument("--tokenizer", help="and what it shall read: hf:DIR, checkpoint:PATH, ...")
    parser.add_argument("--thorough", action="store_true", help="every code point, more draws")
    options = parser.parse_args()

    if options.texts:
        texts = options.texts.read_bytes().decode().split("\0")[:-1]
    else:
        texts = stress_texts(options.thorough)
    packed = "".join(text + "\0" for text in texts).encode()
    if options.write_texts:
        options.write_texts.write_bytes(packed)
        return 0
    if options.ids:
        ids = read_ids(options.ids.read_bytes())
    else:
        command = [options.arcus, "tokenize", "-z", "--tokenizer", options.tokenizer]
        ids = read_ids(subprocess.run(command, input=packed, stdout=subprocess.PIPE, check=True).stdout)
    if len(ids) != len(texts):
        sys.exit(f"{len(texts)} texts, but {len(ids)} lines of ids")

    bad = compared = 0
    for path in options.paths:
        for what, make in encoders_of(path):
            try:
                encoder = make()
            except ImportError as missing:
                print(f"{path}: {what}: not compared, {missing}")
                continue
            count, differing, first = compare(encoder, texts, ids)
            compared += 1
            print(f"{path}: {what}: {encoder.name}: {count} ids, {differing} texts differ")
            if first:
                bad += 1
                print(f"  text {first[0][:200]!r}\n  Arcus {first[1][:40]}\n  other {first[2][:40]}")
    print(f"{compared} compared, {bad} with differences")
    return 1 if bad or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
