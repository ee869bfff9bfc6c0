"""Text encoders for training: captions to states, in the form that the pipelines give the networks."""

from typing import Callable

import torch
from transformers import AutoModel, AutoTokenizer

from ..pipelines.text import encode_text


def load_text_encoder(folder: str) -> Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]:
    """A function from captions to states `(B, L, E)` and mask `(B, L)`, from `text_encoder/` and `tokenizer/`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = AutoModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32).eval()
    return torch.no_grad()(lambda captions: encode_text(tokenizer, encoder, captions))
