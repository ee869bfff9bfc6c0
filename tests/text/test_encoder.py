"""Texts to embeddings: a tokenizer and an encoder that do not fit are refused in words."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_t5 import save_text_parts
from transformers import BertTokenizerFast

from diffusers_imagen.pipelines.loading.folders import load_text_parts
from diffusers_imagen.text.encoder import TextEncoder


@pytest.mark.parametrize("limit", [{"a": 1}, "8", None, True, 0, -1, 8.5, float("nan"), [8]])
def test_a_limit_that_is_no_number_of_tokens_is_refused(limit, tokenizer, text_encoder):
    tokenizer.model_max_length = limit
    with pytest.raises(ValueError, match="`tokenizer.model_max_length` is .*, but should be a number of tokens"):
        TextEncoder(tokenizer, text_encoder).encode(["a"])


def test_a_limit_that_was_never_set_is_refused(tokenizer, text_encoder):
    tokenizer.model_max_length = 1e30
    with pytest.raises(ValueError, match="`tokenizer.model_max_length` is not set"):
        TextEncoder(tokenizer, text_encoder).encode(["a"])


def test_more_tokens_than_the_encoder_has_positions_are_refused(tokenizer, text_encoder):
    tokenizer.model_max_length = 9
    with pytest.raises(ValueError, match="`text_encoder` does not support the 9 tokens of `tokenizer`: "):
        TextEncoder(tokenizer, text_encoder).encode(["a"])


def test_tokens_that_the_encoder_does_not_know_are_refused(text_encoder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(7)), "new"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=8)
    assert TextEncoder(tokenizer, text_encoder).encode(["6"])[0].shape == (1, 8, 16)
    with pytest.raises(ValueError, match="`tokenizer` returned the token 12, but `text_encoder` has 12 tokens"):
        TextEncoder(tokenizer, text_encoder).encode(["new"])


def test_an_encoder_that_lacks_weights_is_refused_without_transformers_report(
    tokenizer, text_encoder, tmp_path, capfd
):
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights["embeddings.LayerNorm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(ValueError, match="lacks weights: embeddings.LayerNorm.weight"):
        load_text_parts(str(tmp_path))
    assert capfd.readouterr().err == ""


def test_prompts_are_cleaned_once(tmp_path, monkeypatch):
    """Cleaning a text twice may change it: `&amp;lt;` is `&lt;`, and then `<`."""
    encoder = TextEncoder.from_pretrained(save_text_parts(tmp_path), 77, cleans_captions=True)
    cleaned: list[list[str]] = []
    monkeypatch.setattr(encoder, "cleaned", lambda texts: cleaned.append(texts) or [f"x{text}" for text in texts])
    found = encoder.encode_prompts(["ab", "cd", "ef"], slice_size=2)
    assert cleaned == [["ab", "cd", "ef"]]
    monkeypatch.setattr(encoder, "cleaned", lambda texts: texts)
    expected = encoder.encode(["xab", "xcd", "xef"])
    torch.testing.assert_close(found.embeds, expected.embeds, rtol=0, atol=1e-5)
