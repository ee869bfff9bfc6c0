"""`diffusers-imagen cache-embeddings`: what is wrong is said in one line before any work is done."""

import json
import os

import pytest
import torch
from data_files import contents
from groups import run_command
from kills import EXIT
from tiny_t5 import save_text_parts

from diffusers_imagen.commands import main as cli
from diffusers_imagen.text import TextEncoder
from diffusers_imagen.text.cache import EmbeddingCache
from diffusers_imagen.text.cache_files import read_manifest
from diffusers_imagen.text.opening import open_text
from diffusers_imagen.training.data.data_config import DataConfig
from diffusers_imagen.training.data.sources import open_rows
from diffusers_imagen.utils.errors import describe
from diffusers_imagen.utils.files import FolderHold


CAPTIONS = ["a red apple", "blue", None, "a face of a tiger", "blue"]


@pytest.fixture
def data(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "data").mkdir()
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "data")


@pytest.fixture
def encoder(tokenizer, text_encoder, tmp_path) -> str:
    tokenizer.save_pretrained(tmp_path / "te" / "tokenizer")
    text_encoder.save_pretrained(tmp_path / "te" / "text_encoder")
    return str(tmp_path / "te")


def run(*arguments) -> int:
    return cli.main(["cache-embeddings", *map(str, arguments)])


def test_captions_that_are_missing_are_passed_over(data, encoder, tmp_path, capsys):
    arguments = [tmp_path / "c", "--text_encoder", encoder, "--train_data_dir", data, "--device", "cpu"]
    assert run(*arguments) == 0
    assert "3 captions" in capsys.readouterr().out
    cache = EmbeddingCache(tmp_path / "c")
    assert len(cache) == 3 and all(caption in cache for caption in CAPTIONS if caption is not None)
    with FolderHold(tmp_path / "c", "output_dir"):
        assert run(*arguments) == 2
        assert f"is '{tmp_path / 'c'}', which process {os.getpid()}" in capsys.readouterr().err
    assert run(*arguments) == 0 and "; 0 added" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["split", "part"])
def test_splits_are_those_of_training(encoder, tmp_path, capsys, monkeypatch, column):
    """Also if they are the values of a column."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "data").mkdir()
    rows = [("a red apple", "train"), ("blue", "test"), ("a face", "dev"), ("a face of a tiger", "test")]
    lines = [
        json.dumps({"file_name": f"{i}.png", "text": text, column: split}) for i, (text, split) in enumerate(rows)
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    arguments = ["--text_encoder", encoder, "--train_data_dir", tmp_path / "data", "--device", "cpu"]
    arguments += [] if column == "split" else ["--split_column", column]
    config = DataConfig(train_data_dir=str(tmp_path / "data"), split_column=column)
    for chosen in (["test"], ["train", "dev"], []):
        folder = tmp_path / "-".join(["cache", *chosen])
        assert run(folder, *arguments, *(["--splits", *chosen] if chosen else [])) == 0
        expected = {
            text for name in chosen or ["train", "test", "dev"] for text in open_rows(config, name).data["text"]
        }
        cache = EmbeddingCache(folder)
        assert {text for text, _ in rows if text in cache} == expected and len(cache) == len(expected)
    assert run(tmp_path / "x", *arguments, "--splits", "test", "tset") == 2
    message = f"`splits` has ['tset'], but the column '{column}' has ['dev', 'test', 'train']."
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert run(tmp_path / "x", *arguments, "--splits", "test", "--streaming") == 2
    assert f"`splits` is given, but the splits are the values of the column '{column}'" in capsys.readouterr().err


def test_several_processes_write_what_one_writes(encoder, tmp_path, capsys):
    """Also if one of them is killed, and the build is continued by another number of processes."""
    (tmp_path / "data").mkdir()
    words = ["a", "red", "blue", "apple", "face", "of", "tiger"]
    rows = [{"file_name": "a.png", "text": f"{words[i % 7]} {words[i // 7]} " * (1 + i % 4)} for i in range(49)]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--text_encoder", encoder, "--train_data_dir", tmp_path / "data", "--device", "cpu"]
    arguments += ["--batch_size", 4, "--shard_size_mb", 5e-4]
    assert run(tmp_path / "one", *arguments) == 0
    one = contents(tmp_path / "one")
    assert sum(name.startswith("shard-") for name in one) > 6

    killed = (str(tmp_path / "some"), 5)  # in its second shard
    codes, printed = run_command(tmp_path, 2, "cache-embeddings", tmp_path / "some", *arguments, killed=killed)
    assert codes[1] == EXIT and codes[0] not in (0, None) and " added" not in printed[0]
    listed = len(read_manifest(tmp_path / "some")["shards"])
    assert 1 <= listed < len(one) - 4
    codes, printed = run_command(tmp_path, 3, "cache-embeddings", tmp_path / "some", *arguments)
    assert codes == [0, 0, 0] and contents(tmp_path / "some") == one
    assert "49 captions" in printed[0] and not any("captions" in text for text in printed[1:])


def test_verify_names_every_problem(data, encoder, tmp_path, capsys):
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a " * i + "red"}) + "\n" for i in range(3)]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(rows))
    source = ["--text_encoder", encoder, "--train_data_dir", data, "--device", "cpu"]
    assert run(tmp_path / "c", *source, "--batch_size", "1", "--shard_size_mb", "1e-6") == 0
    assert run(tmp_path / "c", "--verify") == 0 and "verified" in capsys.readouterr().out
    (tmp_path / "c" / "shard-00000.safetensors").unlink()
    path = tmp_path / "c" / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    assert run(tmp_path / "c", "--verify") == 2
    error = capsys.readouterr().err
    assert "shard-00000.safetensors is missing; shard-00001.safetensors has a different checksum than" in error
    assert "run cache-embeddings again to repair it" in error
    assert run(tmp_path / "c", *source) == 0 and "; 2 added" in capsys.readouterr().out
    assert run(tmp_path / "c", "--verify") == 0


WRONG = {
    "no number": (["--shard_size_mb", "nan"], "`shard-size-mb` is nan"),
    "an endless shard": (["--shard_size_mb", "inf"], "`shard-size-mb` is inf"),
    "a shard of nothing": (["--shard_size_mb", "0"], "`shard-size-mb` is 0"),
    "a negative shard": (["--shard_size_mb", "-1"], "`shard-size-mb` is -1"),
    "a negative batch": (["--batch_size", "-1"], "`batch-size` is -1"),
    "a huge batch": (["--batch_size", "100000000"], "`batch-size` is 100000000"),
    "no tokens": (["--tokenizer_max_length", "0"], "`tokenizer-max-length` is 0"),
    "negative tokens": (["--tokenizer_max_length", "-5"], "`tokenizer-max-length` is -5"),
    "a device of nobody": (["--device", "toaster"], "`device` is 'toaster', which cannot be used"),
    "a device far away": (["--device", "cuda:99"], "`device` is 'cuda:99', which cannot be used"),
    "a device without numbers": (["--device", "meta"], "`device` is 'meta', which cannot be used"),
    "two data sets": (["--dataset_name", "a/b"], "Exactly one of `train-data-dir` and `dataset-name`"),
    "tar files and data": (["--nemo_tars", "a.tar"], "`nemo-tars` and `train-data-dir` are both given"),
}


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_before_anything_is_read(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("diffusers_imagen.training.data.sources.load_splits", None)
    monkeypatch.setattr("diffusers_imagen.text.encoder.load_tokenizer", None)
    assert run(tmp_path / "c", "--text_encoder", "a/b", "--train_data_dir", tmp_path / "data", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_is_none_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers_imagen.training.data.sources.load_splits", None)
    (tmp_path / "file").write_text("all my work")
    (tmp_path / "data").mkdir()
    for output, message in (
        ("file", "neither an empty folder nor a cache"),
        ("file/c", f"needs the folder '{tmp_path / 'file'}', which is a file"),
        ("a" * 300, "which cannot be written: File name too long"),
        ("data/c", "where its files would be read as data"),
    ):
        assert run(tmp_path / output, "--text_encoder", "a/b", "--train_data_dir", tmp_path / "data") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["data", "file"] and (tmp_path / "file").read_text() == "all my work"


def test_nemo_files_that_are_none_are_refused(tmp_path, capsys):
    assert run(tmp_path / "c", "--nemo_tars", tmp_path, "--tokenizer_max_length", "4") == 2
    assert f"`nemo-tars` has '{tmp_path}', which is not a file" in capsys.readouterr().err
    (tmp_path / "a.tar").write_bytes(b"all my work")
    assert run(tmp_path / "c", "--nemo_tars", tmp_path / "a.tar", "--tokenizer_max_length", "4") == 2
    assert "a.tar' cannot be read as a tar file" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_an_error_of_a_worker_is_one_line_without_its_traceback():
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "  File \"a.py\", line 1, in f\nValueError: `embedding_cache` 'c': shard-00000.safetensors has: that.\n"
    )
    assert describe(ValueError(text)) == "`embedding_cache` 'c': shard-00000.safetensors has: that."


def test_a_cache_for_deepfloyd_if(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusers_imagen.text.cleanup.is_bs4_available", lambda: False)
    folder = save_text_parts(tmp_path / "if", max_length=512)
    arguments = [tmp_path / "c", "--text_encoder", folder, "--train_data_dir", data, "--device", "cpu"]
    arguments += ["--tokenizer_max_length", 77, "--keep_padding", "--clean_captions", "--dtype", "float16"]
    assert run(*arguments) == 0 and "4 captions" in capsys.readouterr().out  # the empty one among them
    cache = open_text(folder, str(tmp_path / "c"), 77, keeps_padding=True, cleans_captions=True).for_captions(["blue"])
    encoder = TextEncoder.from_pretrained(folder, 77, keeps_padding=True)
    torch.testing.assert_close(cache.encode(["blue"]), encoder.encode(["blue"]), atol=2e-3, rtol=2e-3)
    assert run(tmp_path / "c", "--verify") == 0
    assert run(*arguments[:-3]) == 2 and "(cleans_captions True, not False)" in capsys.readouterr().err
    tars = [tmp_path / "d", "--nemo_tars", tmp_path / "a.tar", "--tokenizer_max_length", 77]
    assert run(*tars, "--keep_padding") == 2
    assert "`nemo-tars` and `keep-padding` are both given" in capsys.readouterr().err
