"""Compares the tensors that h5py sees in a checkpoint's index with files of raw bytes."""

import json
import sys

import h5py

NUMPY_TYPES = {"f32": "<f4", "f64": "<f8", "bf16": "<u2", "i64": "<i8", "u8": "|u1"}


def main(index_path, expected_path):
    with open(expected_path) as file:
        expected = json.load(file)
    with h5py.File(index_path, "r") as index:
        assert index.attrs["format"] == "arcus-checkpoint"
        assert index.attrs["step"] == 6 and "seed = 7" in index.attrs["config"]
        table = json.loads(index["tensor_table"][()].tobytes())
        assert [row["name"] for row in table] == [tensor["name"] for tensor in expected]
        assert bytes(index["extra/tokenizer"][()]) == b"\0binary\xff\n"
        for tensor in expected:
            dataset = index["tensors/" + tensor["name"]]
            assert list(dataset.shape) == tensor["shape"], (dataset, tensor)
            assert dataset.dtype.str == NUMPY_TYPES[tensor["dtype"]], (dataset, tensor)
            assert (dataset.attrs.get("dtype") == b"bf16") == (tensor["dtype"] == "bf16")
            with open(tensor["file"], "rb") as file:
                assert dataset[()].tobytes() == file.read(), tensor["name"]


if __name__ == "__main__":
    main(*sys.argv[1:])
