"""NeMo's pickled text embeddings, and pickles that hold more than these."""

import collections
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from diffusers_imagen.commands import main as cli
from diffusers_imagen.conversion.nemo_embeddings import read_tar, unpickle_embeddings
from diffusers_imagen.text.cache import EmbeddingCache


EMBEDS = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float16)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_and_tensors_of_every_protocol(protocol, kind):
    value = EMBEDS if kind == "numpy" else torch.from_numpy(EMBEDS)
    data = pickle.dumps({"t5_text": {"encodings": value, "tokens": 5}}, protocol=protocol)
    assert torch.equal(unpickle_embeddings(data)["t5_text"], torch.from_numpy(EMBEDS))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_layout(dtype, protocol):
    array = EMBEDS.astype(dtype)
    for value in (array, np.asfortranarray(array), array[::2, 1:], array[:0], array.T):
        data = pickle.dumps({"t5_text": {"encodings": value, "mask": np.ones(3, bool), "n": np.int64(3)}}, protocol)
        expected = torch.from_numpy(np.ascontiguousarray(value).astype(dtype[1:]))
        for version in (data, data.replace(b"numpy._core.", b"numpy.core.") if protocol < 4 else data):
            found = unpickle_embeddings(version)["t5_text"]
            assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_tensors_of_every_layout_and_format(dtype):
    tensor = torch.from_numpy(EMBEDS).to(dtype)
    for value in (tensor, tensor.T, tensor[1:3], tensor[:, 1:3], tensor[:0], torch.nn.Parameter(tensor[::2])):
        files = [pickle.dumps({"t5_text": {"encodings": value}}, protocol) for protocol in (0, 2, 5)]
        for options in ({}, {"pickle_protocol": 4}):
            for new in (True, False):
                files.append(
                    torch_bytes({"t5_text": value, "b": tensor}, _use_new_zipfile_serialization=new, **options)
                )
        for data in files:
            found = unpickle_embeddings(data)["t5_text"]
            assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, value)


def test_the_larger_part_of_a_file_is_refused_by_its_size(monkeypatch):
    monkeypatch.setattr("diffusers_imagen.conversion.nemo_embeddings.PICKLE_BYTES", 100)
    with pytest.raises(ValueError, match="a.pickle cannot be read safely: it has 2.. bytes, more than 100"):
        unpickle_embeddings(pickle.dumps({"t5_text": EMBEDS}), "a.pickle")


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "system": lambda path: Malicious(os.system, f"touch {path}"),
    "mkdir": lambda path: Malicious(os.mkdir, str(path)),
    "eval": lambda path: Malicious(eval, f"open({str(path)!r}, 'w')"),
    "exec": lambda path: Malicious(exec, f"open({str(path)!r}, 'w')"),
    "getattr": lambda path: Malicious(getattr, "a", "format"),
    "numpy": lambda path: Malicious(np.save, str(path) + ".npy", EMBEDS),
    "nested": lambda path: Malicious(torch.storage._load_from_bytes, torch_bytes(Malicious(os.mkdir, str(path)))),
    "partial": lambda path: collections.OrderedDict(a=Malicious(os.mkdir, str(path))),
}


def torch_bytes(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("pack", [pickle.dumps, torch_bytes], ids=["pickle", "torch"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, attack, pack):
    data = pack({"t5_text": {"encodings": EMBEDS, "extra": attack(tmp_path / "hacked")}})
    with pytest.raises(ValueError, match="00000.pickle cannot be read safely"):
        unpickle_embeddings(data, "00000.pickle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, message",
    [
        ([EMBEDS], "holds list, but should hold a dictionary"),
        ({"t5_text": {"encodings": [1, 2]}}, "no embeddings .* at 't5_text'"),
        ({"t5_text": EMBEDS[0]}, "no embeddings .* at 't5_text'"),
        ({"t5_text": EMBEDS.astype(int)}, "has int64 at 't5_text'"),
    ],
)
def test_what_holds_no_embeddings_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        unpickle_embeddings(pickle.dumps(content), "a.pickle")
    with pytest.raises(ValueError, match="a.pickle cannot be read safely"):
        unpickle_embeddings(pickle.dumps({"t5_text": EMBEDS})[:-20], "a.pickle")


def write_tar(path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def test_tar_shards_become_a_cache(tmp_path, capsys):
    members = {}
    for i in range(4):
        embeds = {"t5_text": {"encodings": EMBEDS + i}}
        members |= {f"{i}.jpg": b"", f"{i}.pickle": pickle.dumps(embeds), f"{i}.txt": f"caption {i % 3}".encode()}
    tar = write_tar(tmp_path / "0.tar", members)
    command = ["cache-embeddings", str(tmp_path / "c"), "--nemo_tars", tar, "--dtype", "float16"]
    assert cli.main(command) == 2 and "`tokenizer-max-length` is not given" in capsys.readouterr().err
    assert cli.main([*command, "--tokenizer_max_length", "3"]) == 0
    assert "3 captions, 3.0 tokens" in capsys.readouterr().out
    cache = EmbeddingCache(tmp_path / "c")
    for i in range(3):
        assert torch.equal(cache.unpadded(f"caption {i}"), torch.from_numpy(EMBEDS + i)[:3])
    cache.check_encoder({"max_length": 3, "width": 4, "class": "T5EncoderModel"})
    with pytest.raises(ValueError, match=r"has embeddings of \['t5_text'\], but not of 'ul2'"):
        list(read_tar(tar, "ul2"))
    alone = write_tar(tmp_path / "1.tar", {"a.pickle": pickle.dumps({"t5_text": EMBEDS})})
    with pytest.raises(ValueError, match="1 pickles have no caption .* such as 'a'"):
        list(read_tar(alone, "t5_text"))


def test_a_tar_whose_members_do_not_fit_together_is_refused(tmp_path):
    embeds = pickle.dumps({"t5_text": EMBEDS})
    two = write_tar(tmp_path / "0.tar", {"a.pickle": embeds, "a.pkl": embeds, "a.txt": b"a"})
    with pytest.raises(ValueError, match="0.tar: 'a' has two members with the suffix pickle"):
        list(read_tar(two, "t5_text"))
    latin = write_tar(tmp_path / "1.tar", {"a.pickle": embeds, "a.txt": "ü".encode("latin-1")})
    with pytest.raises(ValueError, match="1.tar:a has a caption that is not UTF-8"):
        list(read_tar(latin, "t5_text"))
    hostile = write_tar(tmp_path / "2.tar", {"a.pickle": pickle.dumps(Malicious(os.mkdir, "x")), "a.txt": b"a"})
    with pytest.raises(ValueError, match="2.tar:a cannot be read safely: it asks for 'posix.mkdir'"):
        list(read_tar(hostile, "t5_text"))
