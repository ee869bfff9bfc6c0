"""Embeddings at padded positions, for networks that attend to them: from the encoder, kept in memory, and on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file
from text_sources import FunctionSource
from tiny_t5 import save_text_parts

from diffusers_imagen.text import TextEmbeddings, TextEncoder
from diffusers_imagen.text.cache import EmbeddingCache
from diffusers_imagen.text.cache_files import render_manifest
from diffusers_imagen.text.cache_writer import CacheWriter, write_cache
from diffusers_imagen.text.identity import identity_mismatch
from diffusers_imagen.text.opening import CachedTextEncoder, open_text
from diffusers_imagen.text.source import ConcatenatedText, EncodedCaptions


CAPTIONS = ["a red apple", "Blue", "  A "]
LENGTH, WIDTH = 9, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_text_parts(tmp_path_factory.mktemp("te"), WIDTH, LENGTH)


@pytest.fixture
def encoder(folder, monkeypatch) -> TextEncoder:
    # what texts are put to is not the subject here, and the same with and without the packages
    monkeypatch.setattr("diffusers_imagen.text.cleanup.is_bs4_available", lambda: False)
    return TextEncoder.from_pretrained(folder, keeps_padding=True, cleans_captions=True)


@pytest.fixture
def cache(encoder, tmp_path) -> EmbeddingCache:
    with CacheWriter(tmp_path / "cache", encoder.identity(), "float16", shard_bytes=2 * LENGTH * WIDTH) as writer:
        assert write_cache(writer, CAPTIONS, encoder, batch_size=2) == len(CAPTIONS) + 1
    return EmbeddingCache(tmp_path / "cache")


def test_a_cache_has_all_positions_and_the_empty_text(cache, encoder, tmp_path):
    assert cache.keeps_padding and cache.cleans_captions and "" in cache and len(cache) == len(CAPTIONS) + 1
    expected, found = encoder.encode(CAPTIONS), cache.encode(CAPTIONS)
    assert found.embeds.dtype == torch.float32 and torch.equal(found.mask, expected.mask)
    assert found.mask.sum(dim=1).tolist() == [9, 6, 3]
    torch.testing.assert_close(found.embeds, expected.embeds, atol=2e-3, rtol=2e-3)
    assert expected.embeds[~expected.mask].abs().mean() > 0.1  # what would be zero otherwise
    assert cache.unpadded("Blue").shape == (6, WIDTH)
    shards = [load_file(tmp_path / "cache" / shard["file"]) for shard in cache.manifest["shards"]]
    assert len(shards) == 2 and [shard["states"].shape for shard in shards] == [(2 * LENGTH, WIDTH)] * 2
    assert sum(shard["tokens"] for shard in cache.manifest["shards"]) == 1 + 3 + 6 + 9
    # by what the caller gives, and not by what is encoded
    assert "blue" not in cache and torch.equal(found.embeds[1], cache.encode(["Blue"]).embeds[0])


def test_no_text_is_the_empty_text_everywhere(cache, encoder):
    text, empty = encoder.encode(CAPTIONS), encoder.encode([""])
    sources = {
        "encoder": encoder,
        "cache": cache,
        "both": CachedTextEncoder(encoder, cache),
        "memory": EncodedCaptions(CAPTIONS, encoder),
        "memory of a cache": EncodedCaptions(CAPTIONS, cache),
        "prepared": encoder.for_captions(CAPTIONS),
    }
    for name, source in sources.items():
        assert (source.keeps_padding, source.cleans_captions, source.max_length) == (True, True, LENGTH), name
        nothing = source.no_text(text)
        torch.testing.assert_close(nothing.embeds, empty.embeds.expand(3, -1, -1), atol=2e-3, rtol=2e-3)
        assert torch.equal(nothing.mask, empty.mask.expand(3, -1)), name
        torch.testing.assert_close(source.encode(CAPTIONS).embeds, text.embeds, atol=2e-3, rtol=2e-3)
    both = ConcatenatedText(encoder, TextEncoder(encoder.tokenizer, encoder.model, keeps_padding=True))
    assert both.cleans_captions and torch.equal(both.no_text(text).embeds, empty.embeds.repeat(3, 1, 2))
    first, second = both.encode(["Blue"]).embeds.split(WIDTH, dim=-1)
    assert torch.equal(first, encoder.encode(["Blue"]).embeds) and not torch.equal(first, second)


def test_embeddings_beyond_the_range_of_float16_are_kept_in_memory():
    def large(texts: list[str]) -> TextEmbeddings:
        return TextEmbeddings(torch.full((len(texts), 2, 3), 1e5), torch.ones(len(texts), 2, dtype=torch.bool))

    kept = EncodedCaptions(["a"], FunctionSource(large, 3))
    assert (kept.encode(["a"]).embeds == 1e5).all()


def test_a_cache_of_another_kind_is_refused_by_the_flags(folder, cache, encoder, tmp_path):
    path = str(cache.folder)
    assert open_text(None, path, None, keeps_padding=True, cleans_captions=True).keeps_padding
    both = open_text(folder, path, None, keeps_padding=True, cleans_captions=True)
    assert both.keeps_padding and both.cleans_captions and both.for_captions(CAPTIONS).keeps_padding
    message = (
        "was written with --keep-padding and --clean-captions, but the network needs one that `diffusers-imagen "
        "cache-embeddings` writes with --keep-padding.$"
    )
    with pytest.raises(ValueError, match=message):
        open_text(None, path, None, keeps_padding=True)
    plain = TextEncoder.from_pretrained(folder)
    with CacheWriter(tmp_path / "plain", plain.identity()) as writer:
        write_cache(writer, CAPTIONS, plain)
    assert not open_text(None, str(tmp_path / "plain"), None).keeps_padding
    message = (
        "was written without --keep-padding and --clean-captions, but .* writes with --keep-padding and --clean-cap"
    )
    with pytest.raises(ValueError, match=message):
        open_text(None, str(tmp_path / "plain"), None, keeps_padding=True, cleans_captions=True)
    with pytest.raises(ValueError, match=r"written by another text encoder \(keeps_padding True, not False\)"):
        cache.check_encoder(TextEncoder.from_pretrained(folder, cleans_captions=True).identity())
    with pytest.raises(ValueError, match=r"a cache of another encoder \(cleans_captions False, not True\)"):
        CacheWriter(tmp_path / "plain", {**plain.identity(), "cleans_captions": True})


def test_descriptions_without_the_flags_are_of_neither():
    older = {"class": "T5EncoderModel", "width": 4, "weights": [0.5]}
    newer = {**older, "keeps_padding": False, "cleans_captions": False}
    assert identity_mismatch(older, newer) is None and identity_mismatch(newer, older) is None
    kept = {**newer, "keeps_padding": True}
    assert identity_mismatch(older, kept) == "keeps_padding False, not True"
    assert identity_mismatch(kept, older) == "keeps_padding True, not False"
    # of several encoders
    assert identity_mismatch({"0": older}, {"0": newer}) is None
    assert identity_mismatch({"0": older}, {"0": kept}) == "keeps_padding False, not True"
    assert identity_mismatch({"0": older}, {"0": None}) == f"0 {older!r}, not None"


def test_a_cache_of_an_earlier_version_is_read_and_continued(folder, tmp_path):
    plain = TextEncoder.from_pretrained(folder)
    older = {key: value for key, value in plain.identity().items() if key not in ("keeps_padding", "cleans_captions")}
    with CacheWriter(tmp_path / "c", older) as writer:
        write_cache(writer, CAPTIONS, plain)
    cache = open_text(folder, str(tmp_path / "c"), None).for_captions(CAPTIONS)
    assert not cache.keeps_padding and "" not in cache
    with CacheWriter(tmp_path / "c", plain.identity()) as writer:
        assert write_cache(writer, [*CAPTIONS, "one more"], plain) == 1
    manifest = EmbeddingCache(tmp_path / "c").manifest
    assert manifest["encoder"]["keeps_padding"] is False and manifest["format"] == 1


def test_the_empty_text_is_asked_for(encoder, tmp_path):
    with CacheWriter(tmp_path / "c", encoder.identity()) as writer:
        writer.add(["a"], *encoder.padded(["a"]))
        writer.flush()
    for captions in (["a"], None):
        with pytest.raises(ValueError, match="lacks 1 of . captions, such as '': run `diffusers-imagen cache-embedd"):
            EmbeddingCache(tmp_path / "c").for_captions(captions)


def test_damage_is_noticed(cache):
    name = cache.manifest["shards"][0]["file"]
    path = cache.folder / name
    whole = path.read_bytes()
    for place in (12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"`embedding_cache` .*{name}.*; run cache-embeddings again to repair it"):
            EmbeddingCache(cache.folder).encode([*CAPTIONS, ""])
    path.write_bytes(whole)
    assert EmbeddingCache(cache.folder).verify() == []
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    for value, message in ((False, f"{name} has different tensors than in manifest.json"), (1, "has 'encoder'")):
        manifest["encoder"]["keeps_padding"] = value
        (cache.folder / "manifest.json").write_text(render_manifest(manifest))
        with pytest.raises(ValueError, match=message):
            EmbeddingCache(cache.folder)


def test_what_is_added_must_have_all_positions(encoder, tmp_path):
    writer = CacheWriter(tmp_path / "c", encoder.identity())
    with pytest.raises(ValueError, match=r"shape \(4, 24\), but should be \(9, 24\)"):
        writer.add(["a"], [torch.zeros(4, WIDTH)], [4])
    with pytest.raises(ValueError, match="`lengths` is None, but should be given if and only if padding is kept"):
        writer.add(["a"], [torch.zeros(LENGTH, WIDTH)])
    with pytest.raises(ValueError, match="`lengths` has 10 for 'a', but should have 0 to 9"):
        writer.add(["a"], [torch.zeros(LENGTH, WIDTH)], [10])
    other = CacheWriter(tmp_path / "d", TextEncoder(encoder.tokenizer, encoder.model).identity())
    with pytest.raises(ValueError, match=r"`lengths` is \[4\], but should be given if and only if"):
        other.add(["a"], [torch.zeros(4, WIDTH)], [4])
