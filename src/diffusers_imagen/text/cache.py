"""EmbeddingCache: text embeddings on disk, read by memory mapping; cache_files.py describes the files."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from safetensors import safe_open
from transformers import AutoConfig

from ..utils.errors import describe_fault
from ..utils.references import read_reference
from .cache_files import (
    MEND,
    caption_digest,
    checksum_problem,
    find_problems,
    keeps_padding,
    open_shard,
    read_index,
    read_manifest,
    size_problem,
)
from .identity import LATER, identity_mismatch
from .pretrained import load_tokenizer_of_pipeline
from .reference import EncoderParts
from .source import TextSource
from .text_embeddings import PackedText, TextEmbeddings


logger = logging.get_logger(__name__)

SHARD_BYTES = 128 * 2**20
ENCODER = "encoder"  # folder of a cache
FLAGS = ("--keep-padding", "--clean-captions")  # options of cache-embeddings


def caption_key(caption: str) -> tuple[int, int]:
    """Return the first 128 bits of a caption's SHA-256, as two signed integers."""
    digest = caption_digest(caption)
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


class EmbeddingCache(TextSource):
    """Text source that reads a cache; only keys and offsets are kept in memory, 32 bytes per caption.

    All data are checked before use: the manifest, keys and offsets on opening, and a shard's embeddings when a process
    first reads one of them (a forked process relies on the checks of its parent). A cache may be read while it is
    built; captions added after it was opened are not visible.

    Args:
        folder (`str` or `Path`): The cache.

    Raises:
        ValueError: If the folder is not a cache, or one of its shards does not match the manifest.
    """

    needs_encoder = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.width, self.max_length = self.manifest["width"], self.manifest["max_length"]
        self.dtype = self.manifest["dtype"]
        self.keeps_padding = keeps_padding(self.manifest)
        self.cleans_captions = self.manifest["encoder"].get("cleans_captions", LATER["cleans_captions"])
        self._files: dict[int, safe_open] = {}
        self._checked: set[int] = set()  # shards whose embeddings have been checked
        self.offsets: list[np.ndarray] = []
        keys = [np.zeros((0, 2), np.int64)]
        for i, shard in enumerate(self.manifest["shards"]):
            with self._reading():
                problem = size_problem(self.folder, shard)
                if problem is not None:
                    raise ValueError(problem)
                if "index_sha256" not in shard:  # written by an earlier version
                    self._check(i)
                index = read_index(self.folder, self.manifest, shard, self._file(i))
            keys.append(index.keys)
            self.offsets.append(index.offsets)
        joined = np.concatenate(keys)
        order = np.lexsort((joined[:, 1], joined[:, 0]))
        self.keys = joined[order]
        shards = np.repeat(np.arange(len(self.offsets)), [len(offsets) - 1 for offsets in self.offsets])
        within = np.concatenate([np.arange(0), *(np.arange(len(offsets) - 1) for offsets in self.offsets)])
        self.places = np.stack([shards, within], axis=1).astype(np.int32)[order]

    def __len__(self) -> int:
        return len(self.keys)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the encoder that computed the embeddings."""
        return self.manifest["encoder"]

    def parts(self) -> EncoderParts | None:
        """Load the tokenizer and the reference to the encoder that `save_parts` wrote.

        Raises:
            ValueError: If they cannot be read.
        """
        folder = self.folder / ENCODER
        if not folder.is_dir():
            return None  # of an earlier version, or of NeMo's embeddings
        try:
            tokenizer = load_tokenizer_of_pipeline(str(folder), {})
            config = AutoConfig.from_pretrained(folder / "text_encoder", trust_remote_code=False)
            return EncoderParts(tokenizer, config, read_reference(folder / "text_encoder"))
        except Exception as error:  # for any content of the files
            raise ValueError(
                f"`embedding_cache` is '{self.folder}', whose {ENCODER}/ is malformed: {describe_fault(error)}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_checked": set()}  # each process opens and checks shards itself

    def __contains__(self, caption: str) -> bool:
        return self._find(caption) is not None

    def unpadded(self, caption: str) -> torch.Tensor:
        """Return the embeddings of a caption's tokens `(tokens, E)`, in the cache's dtype; errors as in `read`."""
        states, tokens = self.read(caption)
        return states[:tokens]

    def read(self, caption: str) -> tuple[torch.Tensor, int]:
        """Return a caption's embeddings, in the cache's dtype, and its number of tokens.

        Returns:
            Embeddings `(tokens, E)`, or `(max_length, E)` if padding is kept, and the number of tokens.

        Raises:
            KeyError: If the caption is not in the cache.
            ValueError: If its shard is damaged.
        """
        place = self._find(caption)
        if place is None:
            raise KeyError(caption)
        shard, i = self.places[place]
        start, end = map(int, self.offsets[shard][i : i + 2])
        tokens = end - start
        if self.keeps_padding:
            start, end = int(i) * self.max_length, (int(i) + 1) * self.max_length
        with self._reading():
            if int(shard) not in self._checked:
                self._check(int(shard))
            return self._file(int(shard)).get_slice("states")[start:end], tokens

    def encode(self, texts: list[str]) -> TextEmbeddings:
        """Return embeddings in float32, padded to the encoder's maximum length, as in pipelines."""
        return self.pack(texts).padded()

    def pack(self, texts: list[str]) -> PackedText:
        """Return embeddings like `encode`, in the cache's dtype, without padding where it is zero."""
        states, lengths = zip(*map(self.read, texts))
        mask = torch.arange(self.max_length) < torch.tensor(lengths)[:, None]
        return PackedText.of(states[0] if len(states) == 1 else torch.cat(states), mask, self.keeps_padding)

    def check_encoder(self, identity: dict[str, Any]) -> None:
        """Raise ValueError if the cache was computed by another encoder or for another length."""
        difference = identity_mismatch(self.manifest["encoder"], identity)
        if difference is not None:
            raise ValueError(
                f"`embedding_cache` {str(self.folder)!r} was written by another text encoder ({difference}): set "
                "`text_encoder` to that one, or build a cache with this one."
            )

    def check_kind(self, keeps_padding: bool, cleans_captions: bool) -> None:
        """
        Raise ValueError if the network needs embeddings of another kind; the message names the flags to build them.
        """
        if (self.keeps_padding, self.cleans_captions) == (keeps_padding, cleans_captions):
            return
        raise ValueError(
            f"`embedding_cache` {str(self.folder)!r} was written "
            f"{describe_flags(self.keeps_padding, self.cleans_captions)}, but the network needs one that "
            f"`diffusers-imagen cache-embeddings` writes {describe_flags(keeps_padding, cleans_captions)}."
        )

    def for_captions(self, captions: Iterable[str] | None) -> TextSource:
        """Return the cache itself; raise ValueError if captions are missing, or the empty text where it is needed."""
        total, missing, first = 0, 0, ""
        for caption in chain(captions or (), [""] if self.keeps_padding else []):
            total += 1
            if caption not in self:
                missing, first = missing + 1, first or caption
        if missing:
            raise ValueError(
                f"`embedding_cache` {str(self.folder)!r} lacks {missing} of {total} captions, such as {first!r}: run "
                "`diffusers-imagen cache-embeddings` with this data and these columns."
            )
        return self

    def verify(self) -> list[str]:
        """Check the checksums and content of all shards; return a list of problems, empty if there are none."""
        return find_problems(self.folder, self.manifest)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Context in which errors name this cache and how to repair it."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"`embedding_cache` '{self.folder}': {error}; {MEND}.") from error

    def _file(self, shard: int) -> safe_open:
        if shard not in self._files:
            self._files[shard] = open_shard(self.folder, self.manifest["shards"][shard])
        return self._files[shard]

    def _check(self, shard: int) -> None:
        """Raise ValueError if a shard's checksum differs; reads the whole file."""
        problem = checksum_problem(self.folder, self.manifest["shards"][shard])
        if problem is not None:
            raise ValueError(problem)
        self._checked.add(shard)

    def _find(self, caption: str) -> int | None:
        first, second = caption_key(caption)
        place = int(np.searchsorted(self.keys[:, 0], first))
        while place < len(self.keys) and self.keys[place, 0] == first:
            if self.keys[place, 1] == second:
                return place
            place += 1
        return None


def describe_flags(keeps_padding: bool, cleans_captions: bool) -> str:
    """Describe the flags of `diffusers-imagen cache-embeddings` for embeddings of a kind."""
    flags = [flag for flag, is_set in zip(FLAGS, (keeps_padding, cleans_captions)) if is_set]
    return f"with {' and '.join(flags)}" if flags else f"without {' and '.join(FLAGS)}"
