"""Embedding caches: what is read is what was encoded, whatever was killed in between."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffusers_imagen.commands import main as cli
from diffusers_imagen.text.cache import EmbeddingCache, caption_key
from diffusers_imagen.text.cache_writer import CacheWriter, write_cache
from diffusers_imagen.text.encoder import TextEncoder
from diffusers_imagen.text.opening import CachedTextEncoder
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import make_train_batches


CAPTIONS = ["a red apple", "blue", "a", "red red red red red red red red", "apple blue"]


@pytest.fixture
def encoder(folder) -> TextEncoder:
    return TextEncoder.from_pretrained(folder)


@pytest.fixture
def cache(encoder, tmp_path) -> EmbeddingCache:
    writer = CacheWriter(tmp_path / "cache", encoder.identity(), "bfloat16", shard_bytes=300)
    assert write_cache(writer, CAPTIONS, encoder, batch_size=2) == len(CAPTIONS)
    return EmbeddingCache(tmp_path / "cache")


def test_states_are_those_of_the_encoder(cache, encoder):
    expected, mask = encoder.encode(CAPTIONS)
    text, text_mask = cache.encode(CAPTIONS)
    assert text.dtype == torch.float32 and torch.equal(mask, text_mask)
    # encoded together with captions of other lengths, and kept in bfloat16
    torch.testing.assert_close(text, expected, atol=1e-4, rtol=2**-7)
    assert not text[~mask].any()
    assert len(cache) == len(CAPTIONS) and len(cache.manifest["shards"]) > 1
    assert cache.unpadded("blue").shape == (int(mask[1].sum()), cache.width)


def test_each_caption_is_kept_once_without_padding(cache, encoder, tmp_path):
    tokens = sum(encoder.encode(CAPTIONS)[1].sum(dim=1).tolist())
    shards = [load_file(tmp_path / "cache" / shard["file"]) for shard in cache.manifest["shards"]]
    assert sum(len(shard["states"]) for shard in shards) == tokens
    assert all(shard["states"].dtype == torch.bfloat16 for shard in shards)
    writer = CacheWriter(tmp_path / "cache", encoder.identity(), "bfloat16")
    assert write_cache(writer, CAPTIONS + ["red"], encoder) == 1
    assert len(EmbeddingCache(tmp_path / "cache")) == len(CAPTIONS) + 1


def test_a_writer_knows_the_captions_of_every_way_of_adding(encoder, tmp_path):
    with CacheWriter(tmp_path / "cache", encoder.identity()) as writer:
        assert write_cache(writer, ["a", "blue"], encoder) == 2
        assert ["a" in writer, "blue" in writer, "red" in writer] == [True, True, False]
        writer.add(["red"], list(encoder.unpadded(["red"])))
        assert "red" in writer
        assert write_cache(writer, ["red", "apple"], encoder) == 1
        writer.flush()
    with CacheWriter(tmp_path / "cache", encoder.identity()) as writer:
        assert all(caption in writer for caption in ("a", "blue", "red", "apple"))
    assert len(EmbeddingCache(tmp_path / "cache")) == 4


@pytest.mark.parametrize("call", range(6))
def test_a_killed_run_is_continued(encoder, tmp_path, monkeypatch, call):
    """Killed at each of the moves that make shards and manifest visible, and just before them."""
    moves = []
    replace_file = os.replace

    def killed(source, target):
        moves.append(target)
        if len(moves) == call // 2 + 1:
            if call % 2:
                replace_file(source, target)
            raise KeyboardInterrupt
        replace_file(source, target)

    def build() -> int:
        writer = CacheWriter(tmp_path / "cache", encoder.identity(), "float16", shard_bytes=100)
        return write_cache(writer, CAPTIONS, encoder, batch_size=1)

    (tmp_path / "cache").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        build()
    if (tmp_path / "cache" / "manifest.json").exists():
        done = len(EmbeddingCache(tmp_path / "cache"))
    else:
        done = 0
        for path in (tmp_path / "cache").iterdir():
            path.unlink()
    assert build() == len(CAPTIONS) - done
    cache = EmbeddingCache(tmp_path / "cache")
    assert cache.verify() == [] and all(caption in cache for caption in CAPTIONS) and "unknown" not in cache
    assert sum(shard["captions"] for shard in cache.manifest["shards"]) == len(CAPTIONS)


def test_damage_is_found(cache, encoder, tmp_path):
    path = tmp_path / "cache" / cache.manifest["shards"][0]["file"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert EmbeddingCache(tmp_path / "cache").verify() == [
        f"{path.name} has a different checksum than in manifest.json"
    ]
    path.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=rf"{path.name} has {len(data) - 10} bytes, not {len(data)}; run cache-emb"):
        EmbeddingCache(tmp_path / "cache")
    writer = CacheWriter(tmp_path / "cache", encoder.identity(), "bfloat16")
    assert write_cache(writer, CAPTIONS, encoder) == cache.manifest["shards"][0]["captions"]
    assert EmbeddingCache(tmp_path / "cache").verify() == []


def test_another_encoder_or_length_is_refused(cache, encoder, folder, tmp_path, text_encoder):
    cache.check_encoder(encoder.identity())
    half = TextEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    cache.check_encoder(half.identity())  # the same weights in another precision
    with pytest.raises(ValueError, match=r"written by another text encoder \(max_length 8, not 5\)"):
        cache.check_encoder(TextEncoder.from_pretrained(folder, max_length=5).identity())
    with torch.no_grad():
        for weight in text_encoder.parameters():
            weight.mul_(1.05)
    text_encoder.save_pretrained(tmp_path / "te" / "text_encoder")
    other = TextEncoder.from_pretrained(folder).identity()
    with pytest.raises(ValueError, match=r"written by another text encoder \(other weights\)"):
        cache.check_encoder(other)
    with pytest.raises(ValueError, match=r"a cache of another encoder \(other weights\)"):
        CacheWriter(tmp_path / "cache", other, "bfloat16")
    with pytest.raises(ValueError, match=r"a cache of another encoder \(dtype bfloat16, not float16\)"):
        CacheWriter(tmp_path / "cache", encoder.identity(), "float16")


def test_what_is_no_cache_is_refused(tmp_path, encoder):
    with pytest.raises(ValueError, match=r"which has no manifest.json: create it with cache-embeddings"):
        EmbeddingCache(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("all my work")
    with pytest.raises(ValueError, match="neither an empty folder nor a cache"):
        CacheWriter(tmp_path / "x", encoder.identity())
    with pytest.raises(ValueError, match="`dtype` is 'int8'"):
        CacheWriter(tmp_path / "y", encoder.identity(), "int8")
    writer = CacheWriter(tmp_path / "y", {"width": 4, "max_length": 3}, "float16")
    with pytest.raises(ValueError, match=r"shape \(4, 4\), but should be \(up to 3, 4\)"):
        writer.add(["a"], [torch.zeros(4, 4)])
    with pytest.raises(ValueError, match="not finite in float16"):
        writer.add(["a"], [torch.full((3, 4), 1e6)])


def test_keys_tell_captions_apart_also_where_they_begin_alike(cache, monkeypatch):
    assert caption_key("a") != caption_key("b") and caption_key("ü") == caption_key("ü")
    copy = pickle.loads(pickle.dumps(cache))  # as for a worker process
    assert torch.equal(copy.encode(CAPTIONS)[0], cache.encode(CAPTIONS)[0])
    expected = cache.encode(CAPTIONS)
    cache.keys[:, 0] = 7
    seconds = {caption: caption_key(caption)[1] for caption in CAPTIONS}
    monkeypatch.setattr("diffusers_imagen.text.cache.caption_key", lambda text: (7, seconds[text]))
    assert torch.equal(cache.encode(CAPTIONS)[0], expected[0])


@pytest.fixture
def config(imagefolder) -> TrainingConfig:
    return TrainingConfig(train_data_dir=imagefolder, preset="emoji_base_64", resolution=8, train_batch_size=6)


@pytest.mark.parametrize("in_memory, workers", [(True, 0), (False, 2)])
def test_batches_from_a_cache_are_those_of_the_encoder(config, encoder, folder, tmp_path, capsys, in_memory, workers):
    command = ["cache-embeddings", str(tmp_path / "c"), "--text_encoder", folder, "--dtype", "float16"]
    command += ["--train_data_dir", config.train_data_dir, "--device", "cpu"]
    assert cli.main(command) == 0
    assert "8 captions" in capsys.readouterr().out  # of all splits
    assert cli.main(["cache-embeddings", str(tmp_path / "c"), "--verify"]) == 0
    assert "bytes per caption, verified" in capsys.readouterr().out

    cached = replace(config, embedding_cache=str(tmp_path / "c"), in_memory=in_memory, dataloader_num_workers=workers)
    cache = EmbeddingCache(tmp_path / "c")
    stream = make_train_batches(cached, cache)
    assert not stream.needs_encoder
    batch, expected = next(stream), next(make_train_batches(config, encoder))
    assert torch.equal(batch.images, expected.images) and torch.equal(batch.text_mask, expected.text_mask)
    torch.testing.assert_close(batch.text, expected.text, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match=r"lacks 6 of 6 captions, such as 'tag 0, b': run `diffusers-imagen cache-e"):
        make_train_batches(replace(cached, caption_column=["tags"]), cache)
    with pytest.raises(ValueError, match=r"written by another text encoder \(max_length 8, not 6\)"):
        make_train_batches(cached, CachedTextEncoder(TextEncoder.from_pretrained(folder, max_length=6), cache))


def test_the_command_says_what_is_missing(config, tmp_path, capsys):
    def run(*arguments) -> str:
        assert cli.main(["cache-embeddings", str(tmp_path / "c"), *arguments]) == 2
        return capsys.readouterr().err

    assert "`text-encoder` is not given" in run("--train_data_dir", config.train_data_dir)
    assert "whose tokenizer cannot be loaded" in run(
        "--train_data_dir", config.train_data_dir, "--text_encoder", str(tmp_path)
    )
    assert "`batch-size` is 0" in run("--batch_size", "0")
    assert "`splits` has ['a']" in run(
        "--text_encoder", "t", "--train_data_dir", config.train_data_dir, "--splits", "a"
    )
    assert "which has no manifest.json" in run("--verify")
    assert not (tmp_path / "c").exists()


def test_the_manifest_is_readable(cache, tmp_path):
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["encoder"]["class"] == "BertModel" and manifest["max_length"] == 8
    assert not list((tmp_path / "cache").glob("*.partial"))
