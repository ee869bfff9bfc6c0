"""EmbeddingCache: text embeddings on disk, read by memory mapping; cache_files.py describes the files."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..utils.arguments import shown
from ..utils.errors import describe_fault
from ..utils.files import FolderHold, whole_file, whole_folder
from ..utils.references import read_reference
from .cache_files import (
    DTYPES,
    FORMAT,
    MANIFEST,
    MEND,
    check_manifest,
    checksum_problem,
    content_problem,
    describe_shard,
    find_problems,
    hold_cache,
    keeps_padding,
    open_shard,
    read_index,
    read_manifest,
    remove_leftovers,
    size_problem,
    write_manifest,
)
from .encoder import TextEncoder
from .identity import LATER, identity_mismatch
from .pretrained import load_tokenizer_of_pipeline
from .reference import EncoderParts
from .source import TextSource
from .text_embeddings import TextEmbeddings, stack_padded, stack_unpadded


logger = logging.get_logger(__name__)

SHARD_BYTES = 128 * 2**20
ENCODER = "encoder"  # folder of a cache
FLAGS = ("--keep-padding", "--clean-captions")  # of cache-embeddings


def caption_key(caption: str) -> tuple[int, int]:
    """Return the first 128 bits of a caption's SHA-256, as two signed integers."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:16], "little", signed=True)


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
        """Those that `save_parts` wrote.

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
        except Exception as error:  # whatever is in the files
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
        found = [self.read(text) for text in texts]
        states, lengths = [states for states, _ in found], [tokens for _, tokens in found]
        if self.keeps_padding:
            return stack_padded(states, lengths)
        return stack_unpadded(states, self.max_length, self.width)

    def check_encoder(self, identity: dict[str, Any]) -> None:
        """Raise ValueError if the cache was computed by another encoder or for another length."""
        difference = identity_mismatch(self.manifest["encoder"], identity)
        if difference is not None:
            raise ValueError(
                f"`embedding_cache` {str(self.folder)!r} was made by another text encoder ({difference}): set `text_encoder` "
                "to that one, or build a cache with this one."
            )

    def check_kind(self, keeps_padding: bool, cleans_captions: bool) -> None:
        """Raise ValueError if the network needs embeddings of another kind; the message names the flags to build them."""
        if (self.keeps_padding, self.cleans_captions) == (keeps_padding, cleans_captions):
            return
        raise ValueError(
            f"`embedding_cache` {str(self.folder)!r} was made {describe_flags(self.keeps_padding, self.cleans_captions)}, "
            f"but the network needs one that `diffusers-imagen cache-embeddings` makes "
            f"{describe_flags(keeps_padding, cleans_captions)}."
        )

    def for_captions(self, captions: Iterable[str] | None) -> TextSource:
        """Return the cache itself; raise ValueError if captions are missing, or the empty text where it is needed."""
        total, missing = 0, []
        for caption in chain(captions or (), [""] if self.keeps_padding else []):
            total += 1
            if caption not in self:
                missing.append(caption)
        if missing:
            raise ValueError(
                f"`embedding_cache` {str(self.folder)!r} lacks {len(missing)} of {total} captions, such as "
                f"{missing[0]!r}: run `diffusers-imagen cache-embeddings` with this data and these columns."
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


class CachedTextEncoder(TextSource):
    """Text encoder with a cache of the data's captions; prompts need not be in the cache."""

    def __init__(self, encoder: TextEncoder, cache: EmbeddingCache):
        self.encoder, self.cache = encoder, cache
        self.width, self.max_length = cache.width, cache.max_length
        self.keeps_padding, self.cleans_captions = encoder.keeps_padding, encoder.cleans_captions

    def encode(self, texts: list[str]) -> TextEmbeddings:
        return self.encoder.encode(texts)

    def identity(self) -> dict[str, Any]:
        return self.cache.identity()

    def parts(self) -> EncoderParts | None:
        return self.encoder.parts()

    def release(self) -> None:
        self.encoder.release()

    def for_captions(self, captions: Iterable[str] | None) -> TextSource:
        self.cache.check_encoder(self.encoder.identity())
        return self.cache.for_captions(captions)


def describe_flags(keeps_padding: bool, cleans_captions: bool) -> str:
    """Describe the flags of `diffusers-imagen cache-embeddings` for embeddings of a kind."""
    flags = [flag for flag, is_set in zip(FLAGS, (keeps_padding, cleans_captions)) if is_set]
    return f"with {' and '.join(flags)}" if flags else f"without {' and '.join(FLAGS)}"


def open_text(
    text_encoder: str | None,
    embedding_cache: str | None,
    max_length: int | None,
    keeps_padding: bool = False,
    cleans_captions: bool = False,
    **options: Any,
) -> TextSource | None:
    """Open the text source of a run from its settings; None if neither encoder nor cache is given.

    Args:
        text_encoder (`str`, *optional*): Folder or Hub id.
        embedding_cache (`str`, *optional*): Folder of a cache.
        max_length (`int`, *optional*): Tokens of a text; the tokenizer's own limit without.
        keeps_padding (`bool`), cleans_captions (`bool`): What the network was, or is to be, trained with.
        options: Of `TextEncoder.from_pretrained`, such as `revision` and `variant`.

    Raises:
        ValueError: If they cannot be opened, or the cache has embeddings of another kind.
    """
    encoder = None
    if text_encoder:
        encoder = TextEncoder.from_pretrained(
            text_encoder, max_length, keeps_padding=keeps_padding, cleans_captions=cleans_captions, **options
        )
    if embedding_cache is None:
        return encoder
    cache = EmbeddingCache(embedding_cache)
    cache.check_kind(keeps_padding, cleans_captions)
    return cache if encoder is None else CachedTextEncoder(encoder, cache)


class CacheWriter:
    """Writer that adds captions to a cache, shard by shard; finished shards of an interrupted run are kept.

    Existing shards are checked; captions in damaged ones count as missing. The folder is locked until `close`, or the
    end of the process, so that no other process writes to it.

    Args:
        folder (`str` or `Path`): The cache; created if it does not exist.
        encoder (`dict`): The identity of the encoder, with `width` and `max_length`. If it has `keeps_padding`, the
            cache has embeddings of all positions.
        dtype (`str`): "bfloat16" or "float16".
        shard_bytes (`int`): Size of embeddings in bytes at which a shard is written.
        hold (`FolderHold`, *optional*): The folder's lock, if `hold_cache` was called before.

    Raises:
        ValueError: If the folder has other content, or a cache of another encoder or dtype, or another process writes
            to it.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: dict[str, Any],
        dtype: str = "bfloat16",
        shard_bytes: int = SHARD_BYTES,
        hold: FolderHold | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}, but should be one of {', '.join(DTYPES)}.")
        self.folder = Path(folder)
        self.dtype = DTYPES[dtype]
        self.shard_bytes = shard_bytes
        self.known: set[tuple[int, int]] = set()
        self.manifest = {
            "format": FORMAT,
            "encoder": encoder,
            "max_length": encoder["max_length"],
            "width": encoder["width"],
            "dtype": dtype,
            "shards": [],
        }
        try:
            check_manifest(self.manifest)
            self.keeps_padding = keeps_padding(self.manifest)
        except ValueError as error:
            raise ValueError(f"`encoder` is not valid for a cache: its manifest {error}.") from error
        self._hold = hold_cache(self.folder) if hold is None else hold
        try:
            self._begin()
        except BaseException:
            self.close()
            raise
        self._clear()

    def _begin(self) -> None:
        """Load existing shards, and write the manifest before any shard."""
        found = None
        if (self.folder / MANIFEST).exists():
            found = read_manifest(self.folder, "output_dir")
            self._continue(found)
        if found is None or {**found, "sha256": ""} != {**self.manifest, "sha256": ""} or "sha256" not in found:
            write_manifest(self.folder, self.manifest)
        remove_leftovers(self.folder, self.manifest)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder; captions added since the last shard was written are discarded."""
        self._hold.release()
        self._clear()

    def _clear(self) -> None:
        self._embeds: list[torch.Tensor] = []
        self._lengths: list[int] = []
        self._keys: list[tuple[int, int]] = []
        self._bytes = 0

    def _continue(self, found: dict[str, Any]) -> None:
        difference = identity_mismatch(found["encoder"], self.manifest["encoder"])
        for name in ("width", "max_length", "dtype"):
            if difference is None and found[name] != self.manifest[name]:
                difference = f"{name} {found[name]}, not {self.manifest[name]}"
        if difference is not None:
            raise ValueError(f"`output_dir` is '{self.folder}', a cache of another encoder ({difference}).")
        self.manifest["encoder"] = {**self.manifest["encoder"], **found["encoder"]}
        for shard in tqdm(found["shards"], desc="Checking existing shards", mininterval=5):
            problem = content_problem(self.folder, found, shard)
            if problem is not None:
                logger.warning(f"{problem}: its captions are encoded again.")
                continue
            index = read_index(self.folder, found, shard, open_shard(self.folder, shard))
            self.known.update(map(tuple, index.keys.tolist()))
            self.manifest["shards"].append({**shard, "index_sha256": index.sha256})

    def __contains__(self, caption: str) -> bool:
        return caption_key(caption) in self.known

    def add(self, captions: list[str], embeds: list[torch.Tensor], lengths: list[int] | None = None) -> None:
        """Add the embeddings `(tokens, E)` of new captions, all to one shard.

        A resumed run thereby encodes the same batches as an uninterrupted one: an encoder's rounding depends on the
        content of the batch. If padding is kept, the embeddings are `(max_length, E)`, and `lengths` is the number of
        tokens of each caption.

        Raises:
            ValueError: If some have another width, too many tokens, or are not finite in the cache's precision.
        """
        length, width = self.manifest["max_length"], self.manifest["width"]
        if self.keeps_padding is (lengths is None):
            raise ValueError(f"`lengths` is {shown(lengths)}, but should be given if and only if padding is kept.")
        up_to = "" if self.keeps_padding else "up to "
        for caption, own, tokens in zip(captions, embeds, lengths or map(len, embeds), strict=True):
            if own.ndim != 2 or own.shape[1] != width or len(own) > length or (not up_to and len(own) < length):
                raise ValueError(
                    f"The embeddings of {caption!r} have shape {tuple(own.shape)}, but should be "
                    f"({up_to}{length}, {width})."
                )
            if not 0 <= tokens <= len(own):
                raise ValueError(f"`lengths` has {tokens} for {caption!r}, but should have 0 to {length}.")
            own = own.to(self.dtype)
            if not own.isfinite().all():
                raise ValueError(f"The embeddings of {caption!r} are not finite in {self.manifest['dtype']}.")
            self._keys.append(caption_key(caption))
            self.known.add(self._keys[-1])
            self._embeds.append(own)
            self._lengths.append(tokens)
            self._bytes += own.nbytes
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the added embeddings as a shard: to a temporary file, moved into place, then listed in the manifest."""
        if not self._keys:
            return
        taken = {shard["file"] for shard in self.manifest["shards"]}
        number = next(i for i in range(len(taken) + 1) if f"shard-{i:05d}.safetensors" not in taken)
        name = f"shard-{number:05d}.safetensors"
        offsets, keys = np.cumsum([0, *self._lengths]), np.array(self._keys, np.int64)
        # not save_file, which leaves a temporary file if the process is killed
        data = save(
            {"states": torch.cat(self._embeds), "offsets": torch.from_numpy(offsets), "keys": torch.from_numpy(keys)}
        )
        with whole_file(self.folder / name) as partial:
            partial.write_bytes(data)
        shards = [*self.manifest["shards"], describe_shard(name, data, keys, offsets)]
        self.manifest["shards"] = sorted(shards, key=lambda shard: shard["file"])
        write_manifest(self.folder, self.manifest)
        self._clear()


def save_parts(folder: Path, encoder: TextEncoder) -> None:
    """Writes into a cache where its encoder is, with the tokenizer, for the stages that are trained with the cache."""
    parts = encoder.parts()
    if parts is not None and not (folder / ENCODER).is_dir():
        with whole_folder(folder / ENCODER) as partial:
            parts.save(partial, folder / ENCODER)


def write_cache(writer: CacheWriter, captions: list[str], encoder: TextEncoder, batch_size: int = 256) -> int:
    """Encode missing captions, and the empty text if padding is kept; return their number.

    Args:
        writer (`CacheWriter`): The cache.
        captions (`list[str]`): Distinct captions.
        encoder (`TextEncoder`): Has `unpadded(captions)`, and if padding is kept `padded(captions)`.
        batch_size (`int`): Captions encoded at once.
    """
    if writer.keeps_padding and "" not in captions:
        captions = [*captions, ""]
    # sorted by length: a batch is padded to its longest caption
    missing = sorted((caption for caption in captions if caption not in writer), key=lambda text: (len(text), text))
    with tqdm(total=len(captions), initial=len(captions) - len(missing), desc="Encoding", mininterval=1) as progress:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            if writer.keeps_padding:
                writer.add(part, *encoder.padded(part))
            else:
                writer.add(part, encoder.unpadded(part))
            progress.update(len(part))
    writer.flush()
    return len(missing)
