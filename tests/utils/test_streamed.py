"""Safetensors files written tensor by tensor, against the library's own reader."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_imagen.utils.streamed import read_kinds, read_tensors, write_tensors


TENSORS = {
    "a": torch.randn(3, 4),
    "b.half": torch.randn(5).half(),
    "c": torch.randn(2, 3, 1).bfloat16(),
    "d": torch.randn(2, 2, dtype=torch.float64),
    "e.empty": torch.zeros(0, 3),
    "f": torch.randn(4, 6).t(),
}
KINDS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_the_library_reads_what_is_written_in_any_order(tmp_path):
    path = tmp_path / "x.safetensors"
    size = write_tensors(path, KINDS, reversed(TENSORS.items()))
    assert path.stat().st_size == size
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert all(torch.equal(*pair) for pair in zip(read_tensors(path, read_kinds(path), TENSORS), TENSORS.values()))


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path)
    assert {name: kind for name, (kind, _) in read_kinds(path).items()} == KINDS
    assert all(
        torch.equal(*pair)
        for pair in zip(read_tensors(path, read_kinds(path), ["f", "a"]), (TENSORS["f"], TENSORS["a"]))
    )


def test_tensors_that_are_missing_or_of_another_kind(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="2 tensors are missing, such as e.empty"):
        write_tensors(path, KINDS, list(TENSORS.items())[:4])
    for other in (torch.zeros(4, 3), torch.zeros(3, 4).half()):
        with pytest.raises(ValueError, match="`a` is torch.*, but should be"):
            write_tensors(path, KINDS, [("a", other)])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "is not a safetensors file"),
        (b"[]", "is not a safetensors file"),
        (
            json.dumps({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode(),
            "not a safetensors file of fl",
        ),
        (json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode(), "is cut: 'a' is beyond"),
        (
            json.dumps({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}).encode(),
            "with an invalid shape",
        ),
    ],
)
def test_headers_that_are_none(header, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=message):
        read_kinds(path)
    path.write_bytes(bytes(4))
    with pytest.raises(ValueError, match="is not a safetensors file, or cut"):
        read_kinds(path)
