"""The fixtures of training, a pipeline, and a text encoder in a folder."""

import pytest
from training_fixtures import *  # noqa: F403


@pytest.fixture
def folder(tokenizer, text_encoder, tmp_path) -> str:
    """The folder of a tiny text encoder, with its tokenizer."""
    tokenizer.save_pretrained(tmp_path / "te" / "tokenizer")
    text_encoder.save_pretrained(tmp_path / "te" / "text_encoder")
    return str(tmp_path / "te")
