"""Text states on disk: made once, read by memory mapping.

A cache is a folder of safetensors shards and a manifest.json. A shard has `states` `(tokens, E)`, the states of its
captions one after another without padding, `offsets` `(captions + 1,)`, where each begins, and `keys` `(captions, 2)`,
the first 128 bits of the captions' SHA-256. The manifest names the encoder, and the finished shards with their sizes
and checksums: a shard that it does not name does not exist.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .text import identity_mismatch


logger = logging.get_logger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 128 * 2**20


def caption_key(caption: str) -> tuple[int, int]:
    """128 bits of a caption's SHA-256, as two signed numbers."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:16], "little", signed=True)


class EmbeddingCache:
    """Reads a cache; only keys and offsets are kept in memory, 32 bytes a caption.

    Args:
        folder (`str` or `Path`): The cache.

    Raises:
        ValueError: If it is no cache, or one of its shards is not what the manifest says.
    """

    needs_encoder = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._files: dict[int, safe_open] = {}
        self.offsets: list[np.ndarray] = []
        keys = []
        for i, shard in enumerate(self.manifest["shards"]):
            problem = size_problem(self.folder, shard)
            if problem is not None:
                raise ValueError(
                    f"`embedding_cache` {str(folder)!r}: {problem}; run cache-embeddings again to mend it."
                )
            keys.append(self._file(i).get_tensor("keys").numpy())
            self.offsets.append(self._file(i).get_tensor("offsets").numpy())
        keys = np.concatenate(keys) if keys else np.zeros((0, 2), np.int64)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        self.keys = keys[order]
        shards = np.repeat(np.arange(len(self.offsets)), [len(offsets) - 1 for offsets in self.offsets])
        within = [np.arange(len(offsets) - 1) for offsets in self.offsets]
        within = np.concatenate(within) if within else np.zeros(0, np.int64)
        self.places = np.stack([shards, within], axis=1).astype(np.int32)[order]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def width(self) -> int:
        """Width of the states."""
        return self.manifest["width"]

    @property
    def max_length(self) -> int:
        """Tokens that states are padded to."""
        return self.manifest["max_length"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # each process opens its own

    def __contains__(self, caption: str) -> bool:
        return self._find(caption) is not None

    def unpadded(self, caption: str) -> torch.Tensor:
        """States of a caption's tokens `(tokens, E)`, in the cache's precision.

        Raises:
            KeyError: If the caption is not in the cache.
        """
        place = self._find(caption)
        if place is None:
            raise KeyError(caption)
        shard, i = self.places[place]
        start, end = self.offsets[shard][i : i + 2]
        return self._file(int(shard)).get_slice("states")[int(start) : int(end)]

    def states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States `(B, L, E)` in float32, zero at padded positions, and mask `(B, L)`; L is the limit of tokens.

        The networks normalise and pool over padded positions too, so that all batches have the pipelines' length.
        """
        text = torch.zeros(len(captions), self.max_length, self.width)
        mask = torch.zeros(len(captions), self.max_length, dtype=torch.bool)
        for i, caption in enumerate(captions):
            states = self.unpadded(caption)
            text[i, : len(states)] = states
            mask[i, : len(states)] = True
        return text, mask

    def check_encoder(self, identity: dict[str, Any]) -> None:
        """Refuses a cache of another encoder or length."""
        difference = identity_mismatch(self.manifest["encoder"], identity)
        if difference is not None:
            raise ValueError(
                f"`embedding_cache` {str(self.folder)!r} was made by another text encoder ({difference}): give that "
                "one as `text_encoder`, or make a cache with this one."
            )

    def check_captions(self, captions: Iterable[str]) -> None:
        """Refuses a cache that lacks captions."""
        total, missing = 0, []
        for caption in captions:
            total += 1
            if caption not in self:
                missing.append(caption)
        if missing:
            raise ValueError(
                f"`embedding_cache` {str(self.folder)!r} lacks {len(missing)} of {total} captions, such as "
                f"{missing[0]!r}: run `diffusers-imagen cache-embeddings` with this data and these columns."
            )

    def verify(self) -> list[str]:
        """What is wrong with the shards, by checksum and content; empty if nothing is."""
        problems = []
        for i, shard in enumerate(tqdm(self.manifest["shards"], desc="Verifying", mininterval=5)):
            if checksum(self.folder / shard["file"]) != shard["sha256"]:
                problems.append(f"{shard['file']} has another checksum than manifest.json says")
            elif not self._file(i).get_tensor("states").isfinite().all():
                problems.append(f"{shard['file']} has states that are not finite")
        return problems

    def _file(self, shard: int) -> safe_open:
        if shard not in self._files:
            path = self.folder / self.manifest["shards"][shard]["file"]
            try:
                self._files[shard] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"`embedding_cache`: {path} is damaged ({error}).") from error
        return self._files[shard]

    def _find(self, caption: str) -> Optional[int]:
        first, second = caption_key(caption)
        place = int(np.searchsorted(self.keys[:, 0], first))
        while place < len(self.keys) and self.keys[place, 0] == first:
            if self.keys[place, 1] == second:
                return place
            place += 1
        return None


class CacheWriter:
    """Adds captions to a cache, shard by shard; what a killed run finished is kept.

    Args:
        folder (`str` or `Path`): The cache; made if it is not there.
        encoder (`dict`): The identity of the encoder, with `width` and `max_length`.
        dtype (`str`): "bfloat16" or "float16".
        shard_bytes (`int`): A shard is written when its states reach this size.

    Raises:
        ValueError: If the folder holds a cache of another encoder or precision.
    """

    def __init__(
        self, folder: str | Path, encoder: dict[str, Any], dtype: str = "bfloat16", shard_bytes: int = SHARD_BYTES
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
        if (self.folder / MANIFEST).exists():
            self._continue(read_manifest(self.folder))
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"`output_dir` is '{self.folder}', which is neither an empty folder nor a cache.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()

    def _clear(self) -> None:
        self._states: list[torch.Tensor] = []
        self._keys: list[tuple[int, int]] = []
        self._bytes = 0

    def _continue(self, found: dict[str, Any]) -> None:
        difference = identity_mismatch(found["encoder"], self.manifest["encoder"])
        if difference is None and found["dtype"] != self.manifest["dtype"]:
            difference = f"dtype {found['dtype']}, not {self.manifest['dtype']}"
        if difference is not None:
            raise ValueError(f"`output_dir` is '{self.folder}', a cache of another encoder ({difference}).")
        for shard in found["shards"]:
            problem = size_problem(self.folder, shard)
            if problem is not None:
                logger.warning(f"{problem}: its captions are encoded again.")
                continue
            with safe_open(self.folder / shard["file"], framework="pt") as file:
                self.known.update(map(tuple, file.get_tensor("keys").tolist()))
            self.manifest["shards"].append(shard)

    def __contains__(self, caption: str) -> bool:
        return caption_key(caption) in self.known

    def add(self, caption: str, states: torch.Tensor) -> None:
        """Adds the states `(tokens, E)` of a caption that is not there yet.

        Raises:
            ValueError: If they have another width, too many tokens, or are not finite in the cache's precision.
        """
        if states.ndim != 2 or states.shape[1] != self.manifest["width"] or len(states) > self.manifest["max_length"]:
            raise ValueError(
                f"The states of {caption!r} have shape {tuple(states.shape)}, but should be (up to "
                f"{self.manifest['max_length']}, {self.manifest['width']})."
            )
        states = states.to(self.dtype)
        if not states.isfinite().all():
            raise ValueError(f"The states of {caption!r} are not finite in {self.manifest['dtype']}.")
        key = caption_key(caption)
        self.known.add(key)
        self._keys.append(key)
        self._states.append(states)
        self._bytes += states.nbytes
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what was added as a shard: beside its place, moved there, and only then named in the manifest."""
        if not self._keys:
            return
        taken = {shard["file"] for shard in self.manifest["shards"]}
        number = next(i for i in range(len(taken) + 1) if f"shard-{i:05d}.safetensors" not in taken)
        name = f"shard-{number:05d}.safetensors"
        partial = self.folder / f"{name}.partial"
        offsets = np.cumsum([0] + [len(states) for states in self._states])
        tensors = {
            "states": torch.cat(self._states),
            "offsets": torch.from_numpy(offsets),
            "keys": torch.tensor(self._keys, dtype=torch.int64),
        }
        save_file(tensors, partial)
        shard = {"file": name, "captions": len(self._keys), "tokens": int(offsets[-1])}
        shard |= {"bytes": partial.stat().st_size, "sha256": checksum(partial)}
        os.replace(partial, self.folder / name)
        self.manifest["shards"].append(shard)
        partial = self.folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(self.manifest, indent=1) + "\n")
        os.replace(partial, self.folder / MANIFEST)
        self._clear()


def write_cache(writer: CacheWriter, captions: list[str], encoder, batch_size: int = 256) -> int:
    """Encodes the captions that the cache lacks; returns how many they were.

    Args:
        writer (`CacheWriter`): The cache.
        captions (`list[str]`): Distinct captions.
        encoder (`TextEncoder`): Has `unpadded(captions)`.
        batch_size (`int`): Captions encoded at once.
    """
    # captions of like length together: a batch is as long as its longest
    missing = sorted((caption for caption in captions if caption not in writer), key=lambda text: (len(text), text))
    with tqdm(total=len(captions), initial=len(captions) - len(missing), desc="Encoding", mininterval=1) as progress:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            for caption, states in zip(part, encoder.unpadded(part)):
                writer.add(caption, states)
            progress.update(len(part))
    writer.flush()
    return len(missing)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"`embedding_cache` is '{folder}', which has no {MANIFEST}: make it with cache-embeddings.")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"`embedding_cache`: '{path}' is not JSON ({error}).") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"`embedding_cache`: '{path}' has format {manifest.get('format')!r}, but should have {FORMAT}."
        )
    return manifest


def size_problem(folder: Path, shard: dict[str, Any]) -> Optional[str]:
    """What is wrong with a shard, as far as a glance tells."""
    path = folder / shard["file"]
    if not path.is_file():
        return f"{shard['file']} is missing"
    if path.stat().st_size != shard["bytes"]:
        return f"{shard['file']} has {path.stat().st_size} bytes, not {shard['bytes']}"
    return None


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
