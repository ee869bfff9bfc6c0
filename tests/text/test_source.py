"""What training asks of text: padding, the absence of text, an encoder beside a cache, and two encoders at once."""

import copy

import pytest
import torch
from tiny_runs import make_unet

from diffusers_imagen.text.cache import EmbeddingCache
from diffusers_imagen.text.cache_writer import CacheWriter, write_cache
from diffusers_imagen.text.encoder import TextEncoder
from diffusers_imagen.text.opening import CachedTextEncoder, open_text
from diffusers_imagen.text.source import ConcatenatedText, TextSource
from diffusers_imagen.text.text_embeddings import (
    PackedText,
    TextEmbeddings,
    drop_text,
    pad_tokens,
    without_text,
    zero_padding,
)
from diffusers_imagen.training import train


CAPTIONS = [f"text {i}" for i in range(8)]


@pytest.fixture
def cache(folder, tmp_path) -> str:
    encoder = TextEncoder.from_pretrained(folder)
    with CacheWriter(tmp_path / "cache", encoder.identity()) as writer:
        write_cache(writer, CAPTIONS, encoder)
    return str(tmp_path / "cache")


def test_padding_is_zero_and_masked_wherever_it_comes_from():
    states, lengths = torch.rand(6, 3).bfloat16(), torch.tensor([[2], [4]])
    text = PackedText.of(states, torch.arange(5) < lengths, keeps_padding=False).padded()
    assert text.embeds.shape == (2, 5, 3) and text.mask.sum(dim=1).tolist() == [2, 4]
    assert text.embeds.dtype == torch.float32 and torch.equal(text.embeds[text.mask], states.float())
    for other in (
        pad_tokens(PackedText.of(states, torch.arange(4) < lengths, keeps_padding=False).padded(), 5),
        zero_padding(text.embeds + ~text.mask[..., None], text.mask),
    ):
        assert torch.equal(other.embeds, text.embeds) and torch.equal(other.mask, text.mask)


@pytest.mark.parametrize("keeps_padding", [False, True])
def test_packed_texts_are_those_that_were_encoded(keeps_padding):
    class Source(TextSource):
        width, max_length = 3, 5

        def encode(self, texts: list[str]) -> TextEmbeddings:
            mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]) > 0
            embeds = torch.rand(3, 5, 3, generator=torch.Generator().manual_seed(0))
            return TextEmbeddings(embeds, mask) if keeps_padding else zero_padding(embeds, mask)

    source = Source()
    source.keeps_padding = keeps_padding
    expected, packed = source.encode([]), source.pack([])
    assert packed.states.shape == (15 if keeps_padding else 7, 3)
    for given, wanted in zip(packed.padded(), expected):
        assert torch.equal(given, wanted)


def test_no_text_is_the_same_in_training_and_in_sampling():
    text = TextEmbeddings(torch.rand(3, 4, 2), torch.rand(3, 4) > 0.5)
    nothing = without_text(text)
    assert torch.equal(nothing.embeds, drop_text(text.embeds, torch.ones(3, dtype=torch.bool)))
    assert torch.equal(nothing.mask, text.mask)
    some = drop_text(text.embeds, torch.tensor([True, False, True]))
    assert torch.equal(some[1], text.embeds[1]) and not some[0].any() and not some[2].any()


def test_settings_name_an_encoder_a_cache_or_both(folder, cache):
    assert open_text(None, None, None) is None
    assert open_text(folder, None, 6).max_length == 6
    assert len(open_text(None, cache, None)) == len(CAPTIONS)
    both = open_text(folder, cache, None)
    encoder, captions = TextEncoder.from_pretrained(folder), EmbeddingCache(cache)
    assert both.identity() == captions.identity() == encoder.identity() and both.width == encoder.width
    # prompts by the encoder, captions of the data as they were cached, in bfloat16
    assert "never seen" in both and torch.equal(both.encode(["text 1"]).embeds, encoder.encode(["text 1"]).embeds)
    source = both.for_captions(iter(CAPTIONS))
    assert not source.needs_encoder and "never seen" not in source
    assert torch.equal(source.encode(["text 1"]).embeds, captions.encode(["text 1"]).embeds)
    with pytest.raises(ValueError, match="lacks 1 of 1 captions"):
        both.for_captions(["never seen"])


def test_a_run_opens_what_its_settings_name(make_config, folder, cache, tmp_path):
    names = {"encoder": {"text_encoder": folder}, "cache": {"embedding_cache": cache}}
    for name, options in names.items():
        result = train(make_config(max_train_steps=1, output_dir=tmp_path / name, **options), make_unet(text_width=16))
        given = CachedTextEncoder(TextEncoder.from_pretrained(folder), EmbeddingCache(cache))
        text = given.encoder if name == "encoder" else given
        again = train(
            make_config(max_train_steps=1, output_dir=tmp_path / f"{name}-2"), make_unet(text_width=16), text
        )
        assert again["loss"] == result["loss"]


class Pair(TextSource):
    """Two encoders whose embeddings stand side by side."""

    def __init__(self, *encoders: TextEncoder):
        self.encoders = encoders
        self.width = sum(encoder.width for encoder in encoders)

    def encode(self, texts: list[str]) -> TextEmbeddings:
        parts = [encoder.encode(texts) for encoder in self.encoders]
        return TextEmbeddings(torch.cat([part.embeds for part in parts], dim=-1), parts[0].mask)


def test_a_second_encoder_is_another_source(make_config, folder):
    text = Pair(TextEncoder.from_pretrained(folder), TextEncoder.from_pretrained(folder))
    config = make_config(max_train_steps=1, validation_prompts=["a red apple"])
    assert train(config, make_unet(text_width=text.width), text)["loss"] > 0


def test_several_encoders_are_one_source(tokenizer, text_encoder):
    encoder = TextEncoder(tokenizer, text_encoder)
    both = ConcatenatedText(encoder, encoder)
    embeds, mask = encoder.encode(["a red apple", "a cat"])
    text = both.encode(["a red apple", "a cat"])
    assert both.width == 2 * encoder.width and both.max_length == encoder.max_length
    assert torch.equal(text.embeds, torch.cat([embeds, embeds], dim=-1)) and torch.equal(text.mask, mask)
    assert both.identity() == {"0": encoder.identity(), "1": encoder.identity()}
    other = copy.copy(tokenizer)
    other.model_max_length = 5
    with pytest.raises(ValueError, match=r"`sources` have \[8, 5\] tokens, but should all have the same number"):
        ConcatenatedText(encoder, TextEncoder(other, text_encoder))
    with pytest.raises(
        ValueError, match=r"`sources` have `keeps_padding` \[False, True\], but should all have the same"
    ):
        ConcatenatedText(encoder, TextEncoder(tokenizer, text_encoder, keeps_padding=True))
