"""A function as a source of embeddings."""

from collections.abc import Callable

import torch

from diffusers_imagen.text.source import TextSource
from diffusers_imagen.text.text_embeddings import TextEmbeddings


class FunctionSource(TextSource):
    """Embeddings and masks that a function of texts gives; called, it is that function."""

    def __init__(self, function: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]], width: int):
        self.function, self.width = function, width

    def encode(self, texts: list[str]) -> TextEmbeddings:
        return TextEmbeddings(*self.function(texts))

    __call__ = encode
