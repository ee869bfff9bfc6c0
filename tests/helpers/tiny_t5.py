"""A T5 of a few thousand parameters with random weights, and a tokenizer of single characters, as DeepFloyd IF has them."""

import string

import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer


CHARACTERS = string.ascii_lowercase + string.digits + "#&<>/:;.,'\"-@%жкот"
TOKENS = 77


def tiny_tokenizer(max_length: int = TOKENS) -> T5Tokenizer:
    """Of characters; others are unknown to it."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *CHARACTERS]
    vocabulary = [(piece, -1.0 if i > 2 else 0.0) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def tiny_t5(width: int = 24, seed: int = 0) -> T5EncoderModel:
    """An encoder, of T5 v1.1's kind."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=4 + len(CHARACTERS),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def save_text_parts(folder, width: int = 24, max_length: int = TOKENS) -> str:
    """The folder with both, in `tokenizer/` and `text_encoder/` as in IF's repositories."""
    tiny_tokenizer(max_length).save_pretrained(f"{folder}/tokenizer")
    tiny_t5(width).save_pretrained(f"{folder}/text_encoder")
    return str(folder)
