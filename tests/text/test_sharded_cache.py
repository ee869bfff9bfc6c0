"""A cache with a part for each shard of the data: what a stream reads from it is what it reads from one cache."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_files import contents, picture, tar, write
from groups import run_command

from diffusers_imagen.commands import main as cli
from diffusers_imagen.text.cache import EmbeddingCache, caption_key
from diffusers_imagen.text.cache_writer import CacheWriter
from diffusers_imagen.text.encoder import TextEncoder
from diffusers_imagen.text.opening import open_text
from diffusers_imagen.text.sharded_cache import MOST_OPEN, ShardedCache, encode_window
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import make_train_batches


SHARDS, PER_SHARD = 4, 6
WORDS = ("a", "red", "blue", "circle", "triangle", "orange", "on", "the", "left")


def caption(i: int) -> str:
    """Of one to nine words; two rows of every shard have the same one."""
    i -= i % PER_SHARD == 3
    return " ".join(WORDS[: 1 + i * 5 % 9]) + f" {i}"


@pytest.fixture
def data(tmp_path) -> str:
    shards = {}
    for shard in range(SHARDS):
        files = {}
        for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            files |= {f"{i:04d}.png": picture(i), f"{i:04d}.txt": caption(i).encode()}
        shards[f"{shard}.tar"] = tar(files)
    return write(tmp_path / "data", shards)


@pytest.fixture
def arguments(folder, data) -> list[str]:
    """Of cache-embeddings, but for `--streaming` and the folder of the cache."""
    arguments = ["--text-encoder", folder, "--device", "cpu", "--train-data-dir", data, "--caption-column", "txt"]
    return [*arguments, "--dtype", "float16", "--batch-size", "2"]


@pytest.fixture
def make(arguments, tmp_path):
    def make(*options: str) -> Path:
        assert cli.main(["cache-embeddings", str(tmp_path / "cache"), "--streaming", *arguments, *options]) == 0
        return tmp_path / "cache"

    return make


def config_of(data: str, **kwargs) -> TrainingConfig:
    settings = {"resolution": 8, "train_batch_size": 4, "streaming": True, "shuffle_buffer_size": 4}
    return TrainingConfig(preset="emoji_base_64", train_data_dir=data, caption_column=["txt"], **(settings | kwargs))


def joined(cache: ShardedCache, folder: Path) -> EmbeddingCache:
    """The same embeddings in one cache."""
    with CacheWriter(folder, cache.identity(), cache.dtype) as writer:
        for shard in range(SHARDS):
            part = cache.at("train", shard, SHARDS)
            for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                if caption(i) not in writer:
                    states, tokens = part.read(caption(i))
                    lengths = [tokens] if cache.keeps_padding else None
                    writer.add([caption(i)], [states], lengths)
        if cache.keeps_padding:
            states, tokens = part.read("")
            writer.add([""], [states], [tokens])
        writer.flush()
    return EmbeddingCache(folder)


@pytest.mark.parametrize("workers, processes, options", [(2, 1, ()), (0, 2, ()), (0, 1, ("--keep-padding",))])
def test_a_stream_reads_what_it_reads_from_one_cache(make, data, folder, tmp_path, workers, processes, options):
    cache = ShardedCache(make(*options))
    whole = joined(cache, tmp_path / "whole")
    config = config_of(data, dataloader_num_workers=workers)
    for process in range(processes):
        stream, other = (make_train_batches(config, text, process, processes) for text in (cache, whole))
        for _ in range(8):
            for given, expected in zip(next(stream), next(other)):
                assert (given is None and expected is None) or torch.equal(given, expected)
    encoder = TextEncoder.from_pretrained(folder, keeps_padding=bool(options))
    batch, expected = (next(make_train_batches(config, text)) for text in (cache, encoder))
    torch.testing.assert_close(batch.text, expected.text, atol=2e-3, rtol=2e-3)


def test_several_processes_write_the_parts_that_one_writes(make, arguments, tmp_path):
    """Also if one of them is killed, and the others continue."""
    one = contents(make())
    command = ["cache-embeddings", tmp_path / "some", "--streaming", *arguments]
    codes, _ = run_command(tmp_path, 2, *command, killed=(str(tmp_path / "some"), 4))
    assert codes[1] not in (0, None) and len(contents(tmp_path / "some")) < len(one)
    codes, printed = run_command(tmp_path, 3, *command)
    assert codes == [0, 0, 0] and contents(tmp_path / "some") == one
    assert "20 captions" in printed[0] and not any("captions" in text for text in printed[1:])


def test_a_folder_has_one_kind_of_cache(make, arguments, tmp_path, capsys):
    before = contents(make())
    assert cli.main(["cache-embeddings", *arguments, str(tmp_path / "cache")]) == 2
    assert "`output_dir` is" in capsys.readouterr().err and contents(tmp_path / "cache") == before
    assert cli.main(["cache-embeddings", *arguments, str(tmp_path / "ordinary")]) == 0
    before = contents(tmp_path / "ordinary")
    assert cli.main(["cache-embeddings", *arguments, "--streaming", str(tmp_path / "ordinary")]) == 2
    assert "`output_dir` is" in capsys.readouterr().err and contents(tmp_path / "ordinary") == before


def test_a_stream_is_resumed_exactly(make, data):
    config = config_of(data)
    cache = open_text(None, str(make()), None)
    stream = make_train_batches(config, cache)
    for _ in range(3):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make_train_batches(config, ShardedCache(cache.folder))
    resumed.load_state_dict(state)
    for _ in range(5):
        assert torch.equal(next(resumed).text, next(stream).text)


def test_captions_are_in_the_order_of_their_rows_and_few_parts_are_open(make, data):
    cache = ShardedCache(make())
    for shard in range(SHARDS):
        part = cache.at("train", shard, SHARDS)
        rows = dict.fromkeys(caption(i) for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD))
        found = {tuple(key): tuple(place) for key, place in zip(part.keys.tolist(), part.places.tolist())}
        places = [found[caption_key(text)] for text in rows]
        assert len(found) == len(rows) == PER_SHARD - 1 and places == sorted(places)
        assert cache.at("train", shard, SHARDS) is part and len(cache._open) <= MOST_OPEN
    assert caption(20) in cache and "no caption" not in cache and len(cache) == SHARDS * (PER_SHARD - 1)
    text = cache.encode([caption(20), caption(1)])
    assert torch.equal(text.embeds[1], cache.at("train", 0, SHARDS).encode([caption(1)]).embeds[0])


def test_captions_of_a_window_are_encoded_by_length():
    class Encoder:
        keeps_padding = False

        def unpadded(self, texts: list[str]) -> list[str]:
            batches.append(texts)
            return [text.upper() for text in texts]

    batches: list[list[str]] = []
    (embeds,) = encode_window(["ccc", "a", "dddd", "bb", "e"], Encoder(), 2)
    assert embeds == ["CCC", "A", "DDDD", "BB", "E"] and batches == [["a", "e"], ["bb", "ccc"], ["dddd"]]


def parquet(path: Path, captions: list[str | None]) -> bytes:
    """A file of images with captions."""
    rows = {
        "image": [{"bytes": picture(1), "path": None}] * len(captions),
        "text": pyarrow.array(captions, pyarrow.string()),
    }
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path.read_bytes()


def test_shards_that_are_damaged_or_have_no_captions(folder, tmp_path, capsys, caplog):
    """A shard without captions has an empty part; one that cannot be read is named, and the build goes on after it."""
    content = parquet(tmp_path / "data" / "a.parquet", ["red", "blue"])
    parquet(tmp_path / "data" / "b.parquet", [None, None])
    source = ["--text-encoder", folder, "--device", "cpu", "--train-data-dir", str(tmp_path / "data")]
    command = ["cache-embeddings", str(tmp_path / "cache"), "--streaming", *source]
    (tmp_path / "data" / "c.parquet").write_bytes(content[:4] + b"x" * 40 + content[44:])
    assert cli.main(command) == 2
    assert "Shard 2 of split 'train' cannot be read: " in capsys.readouterr().err
    parquet(tmp_path / "data" / "c.parquet", ["red", "a triangle"])
    assert cli.main(command) == 0
    assert "4 captions" in capsys.readouterr().out and "Shard 1 of split 'train': None of the 2" in caplog.text
    cache = ShardedCache(tmp_path / "cache")
    assert [len(cache.at("train", shard, 3)) for shard in range(3)] == [2, 0, 2] and cache.verify() == []

    parquet(tmp_path / "data" / "d.parquet", [])
    for option in ([], ["--streaming"]):
        assert cli.main(["cache-embeddings", str(tmp_path / "other"), *source, *option]) == 2
        assert "d.parquet' has no rows: remove it" in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_a_build_goes_on_where_it_was(make, capsys, tmp_path):
    folder = make()
    assert "20 captions" in capsys.readouterr().out
    shutil.rmtree(folder / "part-000002")
    with pytest.raises(ValueError, match="lacks 1 of 4 parts, such as part-000002: run cache-embeddings again"):
        ShardedCache(folder)
    before = (folder / "part-000001" / "manifest.json").stat().st_mtime_ns
    make()
    assert "20 captions" in (out := capsys.readouterr().out) and "5 added" in out
    assert (folder / "part-000001" / "manifest.json").stat().st_mtime_ns == before
    assert cli.main(["cache-embeddings", str(folder), "--verify"]) == 0
    assert cli.main(["doctor", str(folder)]) == 0
    capsys.readouterr()
    file = folder / "part-000003" / "shard-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.main(["cache-embeddings", str(folder), "--verify"]) == 2
    assert "part-000003: shard-00000.safetensors has a different checksum" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(make, data, folder, tmp_path, capsys):
    cache = ShardedCache(make())
    with pytest.raises(ValueError, match="wrote with --streaming: set `streaming`"):
        make_train_batches(config_of(data, streaming=False), cache)
    shutil.copy(f"{data}/0.tar", f"{data}/4.tar")
    with pytest.raises(ValueError, match="written for 4 shards of split 'train', but the data has 5"):
        next(make_train_batches(config_of(data), cache))
    capsys.readouterr()
    common = ["--text-encoder", folder, "--train-data-dir", data, "--caption-column", "txt", "--device", "cpu"]
    assert cli.main(["cache-embeddings", str(cache.folder), *common]) == 2
    assert "a cache that was written with `streaming`" in capsys.readouterr().err
    assert cli.main(["cache-embeddings", str(cache.folder), *common, "--streaming", "--dtype", "float16"]) == 2
    assert "another encoder or data set (shards {'train': 4}, not {'train': 5})" in capsys.readouterr().err
    (cache.folder / "layout.json").write_text('{"format": 1, "shards": {"train": -1}}')
    with pytest.raises(ValueError, match="layout.json is malformed: has no valid `shards`"):
        ShardedCache(cache.folder)
