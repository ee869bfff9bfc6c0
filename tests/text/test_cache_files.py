"""Damage to a cache is noticed wherever it is, and a build that is killed goes on as if it had not been."""

import errno
import json
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from diffusers_imagen.text.cache import EmbeddingCache
from diffusers_imagen.text.cache_files import find_problems, read_manifest, render_manifest
from diffusers_imagen.text.cache_writer import CacheWriter, write_cache


CAPTIONS = [f"{'a' * (1 + i % 5)} {i}" for i in range(12)]
WIDTH, MAX_LENGTH = 3, 8


class Encoder:
    """Embeddings that depend on what else is in the batch, as an encoder's last bits do."""

    def identity(self) -> dict:
        return {"class": "Speller", "width": WIDTH, "max_length": MAX_LENGTH, "weights": [0.5, -0.25]}

    def count_tokens(self, captions: list[str]) -> list[int]:
        return [len(caption) for caption in captions]

    def unpadded(self, captions: list[str]) -> list[torch.Tensor]:
        longest = max(map(len, captions))
        return [torch.full((len(c), WIDTH), 1 + len(captions) / 8 + longest / 16) + len(c) for c in captions]


def build(folder, captions=CAPTIONS) -> int:
    with CacheWriter(folder, Encoder().identity(), "bfloat16", shard_bytes=50) as writer:
        return write_cache(writer, captions, Encoder(), batch_size=3)


def read(folder) -> torch.Tensor:
    return EmbeddingCache(folder).encode(CAPTIONS)[0]


def contents(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder)) if name != ".lock"}


@pytest.fixture
def cache(tmp_path) -> Path:
    assert build(tmp_path / "cache") == len(CAPTIONS)
    assert len(read_manifest(tmp_path / "cache")["shards"]) == 4
    return tmp_path / "cache"


def make_older(folder) -> None:
    """As earlier versions wrote it: without checksums of the manifest and of indices."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for shard in manifest["shards"]:
        del shard["index_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors", "shard-00003.safetensors"])
def test_no_flipped_byte_of_any_part_is_used_unnoticed(cache, name, older):
    if older:
        make_older(cache)
    if older and name == "manifest.json":
        return  # which has no checksum: only what it says of the shards is checked
    path = cache / name
    whole, expected = path.read_bytes(), read(cache)
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"(?s)`embedding_cache`.*{name}.*cache-embeddings again") as caught:
            read(cache)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert torch.equal(read(cache), expected)


def test_a_shard_is_checked_once_by_each_process_when_it_is_first_read(cache, monkeypatch):
    checked = []
    original = EmbeddingCache._check
    monkeypatch.setattr(EmbeddingCache, "_check", lambda self, i: (checked.append(i), original(self, i))[1])
    opened = EmbeddingCache(cache)
    assert checked == []
    opened.encode(CAPTIONS)
    opened.encode(CAPTIONS)
    assert sorted(checked) == [0, 1, 2, 3]
    pickle.loads(pickle.dumps(opened)).encode(CAPTIONS)  # as in a worker that was spawned
    assert len(checked) == 8


def test_a_cache_of_an_earlier_version_opens_and_is_brought_up_to_date_by_the_next_build(cache):
    expected, files = read(cache), contents(cache)
    make_older(cache)
    assert torch.equal(read(cache), expected)
    assert build(cache) == 0
    assert contents(cache) == files


@pytest.mark.parametrize("damaged", [["0"], ["1"], ["3"], ["0", "2"], ["0", "1", "2", "3"]])
def test_the_captions_of_damaged_shards_are_encoded_again(cache, damaged, caplog):
    files = contents(cache)
    for number in damaged:
        path = cache / f"shard-0000{number}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    problems = find_problems(cache, read_manifest(cache))
    assert problems == [
        f"shard-0000{number}.safetensors has a different checksum than in manifest.json" for number in damaged
    ]
    assert build(cache) == 3 * len(damaged)
    assert contents(cache) == files


def run_killed(folder, number: int) -> bool:
    """Builds in another process, killed just before its change to the file system of that number; False if it ends."""
    child = os.fork()
    if child == 0:
        left = number

        def hook(event: str, arguments: tuple) -> None:
            nonlocal left
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and str(folder) in str(
                arguments[0]
            ):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.stderr = open(os.devnull, "w")
            sys.addaudithook(hook)
            build(folder)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_build_that_is_killed_at_any_change_to_the_file_system_goes_on_to_the_same_files(tmp_path):
    build(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    kills = 0
    while run_killed(tmp_path / f"c{kills}" / "cache", kills):
        folder = tmp_path / f"c{kills}" / "cache"
        assert not run_killed(folder, 10**6)
        assert contents(folder) == expected
        kills += 1
    assert kills >= 20


def test_a_build_that_is_killed_again_and_again_ends_in_the_same_files(tmp_path):
    build(tmp_path / "whole")
    folder, runs = tmp_path / "cache", 0
    while run_killed(folder, 5 + runs % 11):
        runs += 1
        assert runs < 50
    assert contents(folder) == contents(tmp_path / "whole") and runs > 2


def test_a_full_disk_leaves_what_is_whole(tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "shard-00002" in path.name:
            write(path, data[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", full)
        build(tmp_path / "cache")
    assert len(EmbeddingCache(tmp_path / "cache")) == 6
    assert find_problems(tmp_path / "cache", read_manifest(tmp_path / "cache")) == []
    assert not list((tmp_path / "cache").glob(".*.partial"))
    assert build(tmp_path / "cache") == 6
    build(tmp_path / "whole")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_one_build_at_a_time_and_readers_beside_it(tmp_path):
    folder = tmp_path / "cache"
    with CacheWriter(folder, Encoder().identity()) as writer:
        assert len(EmbeddingCache(folder)) == 0
        with pytest.raises(
            ValueError, match=rf"`output_dir` is '{folder}', which process {os.getpid()} on .* is using"
        ):
            build(folder)
        writer.add(["a"], [torch.ones(1, WIDTH)])
        writer.flush()
        reader = EmbeddingCache(folder)
        writer.add(["b"], [torch.ones(1, WIDTH)])
        writer.flush()
        assert "a" in reader and "b" not in reader and "b" in EmbeddingCache(folder)
    assert build(folder) == len(CAPTIONS)
    assert torch.equal(reader.unpadded("a"), torch.ones(1, WIDTH).bfloat16())


def shard(**fields) -> dict:
    return {"shards": [fields]}


FIRST = {"file": "shard-00000.safetensors", "captions": 3, "tokens": 3, "bytes": 10, "sha256": "0" * 64}
MANIFESTS = {
    "a list": ([], "holds a JSON list"),
    "another format": ({"format": 2}, "has format '2', but should have 1"),
    "a format that is true": ({"format": "1"}, "has format '1', but"),
    "an encoder that is text": ({"encoder": "T5"}, "has 'encoder': \"T5\""),
    "weights that are text": ({"encoder": {"weights": "a"}}, "has 'encoder'"),
    "weights of text": ({"encoder": {"weights": ["a"]}}, "has 'encoder'"),
    "a width of text": ({"width": "4"}, "has 'width': \"4\""),
    "no width": ({"width": 0}, "has 'width': 0"),
    "a width that is true": ({"width": True}, "has 'width': true"),
    "a broken width": ({"width": 4.5}, "has 'width': 4.5"),
    "a huge width": ({"width": 10**9}, "which is too large"),
    "a negative length": ({"max_length": -1}, "has 'max_length': -1"),
    "an endless length": ({"max_length": 10**30}, "has 'max_length': 1000"),
    "another dtype": ({"dtype": "int8"}, "has 'dtype': \"int8\""),
    "a dtype of a list": ({"dtype": ["bfloat16"]}, "has 'dtype'"),
    "shards that are an object": ({"shards": {}}, "has 'shards': {}"),
    "a shard that is text": ({"shards": ["a"]}, "is str, not an object in shard 0"),
    "a shard of nothing": (shard(), "lacks 'file' in shard 0"),
    "a file that leads up": (shard(**FIRST | {"file": "../shard-00000.safetensors"}), "has 'file'"),
    "a file elsewhere": (shard(**FIRST | {"file": "/etc/passwd"}), "has 'file': \"/etc/passwd\""),
    "a file with a line": (shard(**FIRST | {"file": "shard-00000.safetensors\n"}), "has 'file'"),
    "a file that is a number": (shard(**FIRST | {"file": 5}), "has 'file': 5"),
    "negative bytes": (shard(**FIRST | {"bytes": -1}), "has 'bytes': -1"),
    "negative tokens": (shard(**FIRST | {"tokens": -1}), "has 'tokens': -1"),
    "captions of text": (shard(**FIRST | {"captions": "3"}), "has 'captions'"),
    "a short checksum": (shard(**FIRST | {"sha256": "0"}), "has 'sha256'"),
    "a shard twice": ({"shards": [FIRST, FIRST]}, "names a shard twice"),
    "more than there is": ({"extra": 1}, "has 'extra', which is unknown"),
}


@pytest.mark.parametrize("change, message", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none_is_refused_by_name_and_no_other_file_is_opened(cache, change, message, monkeypatch):
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest = manifest | change if isinstance(change, dict) else change
    # of an attacker, who knows how the checksum is made
    text = render_manifest(manifest) if isinstance(manifest, dict) else json.dumps(manifest)
    (cache / "manifest.json").write_text(text)
    monkeypatch.setattr("diffusers_imagen.text.cache_files.safe_open", None)
    for use, argument in ((EmbeddingCache, "embedding_cache"), (build, "output_dir")):
        with pytest.raises(ValueError, match=rf"`{argument}` is .*manifest.json.* {re.escape(message)}") as caught:
            use(cache)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "field, value, message",
    [("captions", 4, "different tensors"), ("tokens", 1, "different tensors"), ("bytes", 1, "bytes, not 1")],
)
def test_a_manifest_that_does_not_fit_its_shards_is_refused(cache, field, value, message):
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][1][field] = value
    (cache / "manifest.json").write_text(render_manifest(manifest))
    with pytest.raises(ValueError, match=rf"`embedding_cache` '.*': shard-00001.safetensors has .*{message}"):
        EmbeddingCache(cache)


def test_every_problem_is_found(cache):
    (cache / "shard-00000.safetensors").unlink()
    (cache / "shard-00001.safetensors").write_bytes(b"short")
    os.replace(cache / "shard-00003.safetensors", cache / "shard-00002.safetensors")
    os.mkdir(cache / "shard-00003.safetensors")
    problems = find_problems(cache, read_manifest(cache))
    assert [problem.split()[0] for problem in problems] == [f"shard-0000{i}.safetensors" for i in range(4)]


def test_what_a_killed_build_left_is_tolerated_and_goes(cache):
    files = contents(cache)
    (cache / "manifest.json").unlink()
    for name in (".manifest.json.17.partial", "shard-00007.safetensors.partial", "..lock-owner.json.3.partial"):
        (cache / name).write_bytes(b"half")
    os.replace(cache / "shard-00001.safetensors", cache / "shard-00009.safetensors")
    assert build(cache) == len(CAPTIONS)
    assert contents(cache) == files


@pytest.mark.parametrize("name", ["thesis.tex", "shard-00000.safetensors", ".hidden", "manifest.json.bak", "shard-1"])
def test_a_folder_with_files_of_others_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("all my work")
    with pytest.raises(ValueError, match=rf"neither an empty folder nor a cache: it has '{re.escape(name)}'"):
        build(tmp_path)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "all my work"


def test_a_file_or_a_dead_link_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("all my work")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match="neither an empty folder nor a cache"):
            build(tmp_path / name)
