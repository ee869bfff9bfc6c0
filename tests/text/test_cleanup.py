"""Texts as DeepFloyd IF encodes them: cleaned by the same method, with and without the packages that it needs."""

import logging
import warnings

import pytest
import torch
from deepfloyd_networks import STAGE_1
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from diffusers.utils import is_bs4_available, is_ftfy_available
from networks import randomize
from tiny_t5 import tiny_t5, tiny_tokenizer

from diffusers_imagen import ImagenPipeline
from diffusers_imagen.conversion.deepfloyd import unet_from_deepfloyd
from diffusers_imagen.text import TextEncoder
from diffusers_imagen.text.cleanup import clean_captions, warn_of_missing_packages


THEIRS = "diffusers.pipelines.deepfloyd_if.pipeline_if"
OURS = "diffusers_imagen.text.cleanup"
needs_packages = pytest.mark.skipif(
    not (is_bs4_available() and is_ftfy_available()), reason="needs beautifulsoup4 and ftfy"
)
CAPTIONS = [
    " A <b>Red</b> Cat &amp;amp; dog &quot;",
    "see https://shop.example.com/a/b_c?d=e or www.cats.co for MORE",
    "кот 🐱 “quoted” — with ‘dashes’",
    "#123 #12345 and 1234567, jc6640vc",
    "红色的猫 a cat 猫",
    "my_little_cat_in_a_hat.jpg by @nick",
    "this-is-my-cute-cat",
    "photo.png",
    "",
]


@pytest.fixture
def without_packages(monkeypatch):
    for module in (THEIRS, OURS):
        monkeypatch.setattr(f"{module}.is_bs4_available", lambda: False)
    warn_of_missing_packages.cache_clear()
    yield
    warn_of_missing_packages.cache_clear()


def pipelines() -> tuple[ImagenPipeline, IFPipeline]:
    network = randomize(UNet2DConditionModel(**STAGE_1))
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_t5(), "scheduler": DDPMScheduler()}
    others = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    theirs = IFPipeline(unet=network, **parts, **others, requires_safety_checker=False)
    return ImagenPipeline(unet=unet_from_deepfloyd(network), **parts, clean_caption=True), theirs


def check_embeddings() -> None:
    ours, theirs = pipelines()
    for negative in (None, list(reversed(CAPTIONS))):
        with torch.no_grad():
            expected = theirs.encode_prompt(CAPTIONS, negative_prompt=negative, clean_caption=True)
        embeds, _, negative_embeds, _ = ours.encode_prompt(CAPTIONS, negative_prompt=negative)
        torch.testing.assert_close(embeds, expected[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(negative_embeds, expected[1], atol=1e-6, rtol=0)
    ours.register_to_config(clean_caption=False)
    assert (ours.encode_prompt(CAPTIONS)[0] - expected[0]).abs().max() > 0.1


@needs_packages
def test_embeddings_are_those_of_diffusers():
    check_embeddings()


def test_embeddings_are_those_of_diffusers_without_the_packages(without_packages):
    check_embeddings()


@needs_packages
def test_texts_are_cleaned_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cleaned = clean_captions(CAPTIONS)
    assert cleaned[0] == 'a red cat ; dog "' and cleaned[4] == "a cat" and cleaned[7] == ""
    assert clean_captions(["A <![ rejected"]) == ["a <![ rejected"]  # ParserRejectedMarkup


@needs_packages
@pytest.mark.parametrize("text", ["a." * 50_000, "x" + " " * 99_999 + "x", "<a " * 30_000, "é" * 100_000])
def test_of_long_texts_the_beginning_is_cleaned(text):
    """All of it would take minutes."""
    assert clean_captions([text]) == clean_captions([text[:2000]])


def test_a_text_with_a_long_number_is_not_cleaned():
    """diffusers' expressions take half a minute for this one."""
    text = f"{'1' * 1000}X{'1' * 998}_"
    assert clean_captions([text]) == [text.lower()]


def test_missing_packages_are_named_once(without_packages, caplog):
    caplog.set_level(logging.WARNING)
    assert clean_captions([" A <b>Cat "]) == ["a <b>cat"] and clean_captions(["B"]) == ["b"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "pip install diffusers-imagen[deepfloyd]" in message and "beautifulsoup4 or ftfy" in message


def test_a_cut_text_is_named_as_it_is_encoded(without_packages, caplog):
    encoder = TextEncoder(tiny_tokenizer(8), tiny_t5(), cleans_captions=True)
    text = encoder.encode_prompts(["  ABCDEFGHIJ  "])
    (message,) = [record.getMessage() for record in caplog.records if "is truncated" in record.getMessage()]
    assert "'abcdefghij' is truncated to 8 tokens: 'ghij' is lost" in message
    plain = TextEncoder(tiny_tokenizer(8), tiny_t5()).encode(["abcdefghij"])
    assert torch.equal(text.embeds, plain.embeds)
    assert encoder.count_tokens(["  ABC  "]) == [5]
    with_cases = TextEncoder(tiny_tokenizer(8), tiny_t5()).encode(["  ABCDEFGHIJ  "])
    assert not torch.equal(text.embeds, with_cases.embeds)
