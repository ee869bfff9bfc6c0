"""CacheWriter and write_cache: writing of an embedding cache, by one process or by several that share the work."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from safetensors.torch import save
from tqdm.auto import tqdm

from ..utils.arguments import shown
from ..utils.files import FolderHold, whole_file, whole_folder
from ..utils.processes import OneProcess, Processes, gather, on_main_process
from .cache import ENCODER, SHARD_BYTES, caption_key
from .cache_files import (
    DTYPES,
    FORMAT,
    MANIFEST,
    as_digests,
    caption_digest,
    check_folder,
    check_manifest,
    content_problem,
    describe_shard,
    keeps_padding,
    open_shard,
    read_index,
    read_manifest,
    remove_leftovers,
    write_manifest,
)
from .distinct_captions import DistinctCaptions
from .encoder import TextEncoder
from .identity import identity_mismatch


logger = logging.get_logger(__name__)


class ShardWriter:
    """Writer of one shard at a time, from the embeddings that are added.

    Args:
        folder (`Path`): The cache.
        manifest (`dict`): Its manifest, which has the dtype and the sizes of embeddings.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest, self.keeps_padding = folder, manifest, keeps_padding(manifest)
        self.clear()

    def clear(self) -> None:
        """Discard the added embeddings."""
        self.keys: list[tuple[int, int]] = []
        self.bytes = 0
        self._embeds: list[torch.Tensor] = []
        self._lengths: list[int] = []

    def add(self, captions: list[str], embeds: list[torch.Tensor], lengths: list[int] | None = None) -> None:
        """Add the embeddings of captions; see `CacheWriter.add`."""
        length, width, dtype = (self.manifest[name] for name in ("max_length", "width", "dtype"))
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
            own = own.to(DTYPES[dtype])
            if not own.isfinite().all():
                raise ValueError(f"The embeddings of {caption!r} are not finite in {dtype}.")
            self.keys.append(caption_key(caption))
            self._embeds.append(own)
            self._lengths.append(tokens)
            self.bytes += own.nbytes

    def write(self, name: str) -> dict[str, Any]:
        """Write the shard to a temporary file, and move it into place; return its entry in the manifest."""
        offsets, keys = np.cumsum([0, *self._lengths]), np.array(self.keys, np.int64)
        # not save_file, which leaves a temporary file if the process is killed
        data = save(
            {"states": torch.cat(self._embeds), "offsets": torch.from_numpy(offsets), "keys": torch.from_numpy(keys)}
        )
        with whole_file(self.folder / name) as partial:
            partial.write_bytes(data)
        self.clear()
        return describe_shard(name, data, keys, offsets)


class CacheWriter:
    """Writer that adds captions to a cache, shard by shard; finished shards of an interrupted run are kept.

    Existing shards are checked; captions in damaged ones count as missing. The folder is locked until `close`, or the
    end of the process, so that no other process writes to it; readers do not need the lock.

    Args:
        folder (`str` or `Path`): The cache; created if it does not exist.
        encoder (`dict`): The identity of the encoder, with `width` and `max_length`. If it has `keeps_padding`, the
            cache has embeddings of all positions.
        dtype (`str`): "bfloat16" or "float16".
        shard_bytes (`int`): Size of embeddings in bytes at which a shard is written.
        is_held (`bool`): Whether the caller has locked the folder.

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
        is_held: bool = False,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}, but should be one of {', '.join(DTYPES)}.")
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self._listed = no_digests()  # of captions in shards, sorted
        self._added: set[bytes] = set()
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
            self._shard = ShardWriter(self.folder, self.manifest)
        except ValueError as error:
            raise ValueError(f"`encoder` is not valid for a cache: its manifest {error}.") from error
        check_folder(self.folder)
        self._hold = ExitStack()
        if not is_held:
            self._hold.enter_context(FolderHold(self.folder, "output_dir"))
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

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
        self._hold.close()
        self._shard.clear()

    def _continue(self, found: dict[str, Any]) -> None:
        difference = identity_mismatch(found["encoder"], self.manifest["encoder"])
        for name in ("width", "max_length", "dtype"):
            if difference is None and found[name] != self.manifest[name]:
                difference = f"{name} {found[name]}, not {self.manifest[name]}"
        if difference is not None:
            raise ValueError(f"`output_dir` is '{self.folder}', a cache of another encoder ({difference}).")
        self.manifest["encoder"] = {**self.manifest["encoder"], **found["encoder"]}
        listed = [no_digests()]
        for shard in tqdm(found["shards"], desc="Checking existing shards", mininterval=5):
            problem = content_problem(self.folder, found, shard)
            if problem is not None:
                logger.warning(f"{problem}: its captions are encoded again.")
                continue
            index = read_index(self.folder, found, shard, open_shard(self.folder, shard))
            listed.append(as_digests(index.keys))
            self.manifest["shards"].append({**shard, "index_sha256": index.sha256})
        self._listed = np.unique(np.concatenate(listed))

    def __contains__(self, caption: str) -> bool:
        key = np.array(caption_digest(caption), "S16")
        place = np.searchsorted(self._listed, key)
        return key.tobytes() in self._added or bool((self._listed[place : place + 1] == key).any())

    def digests(self) -> np.ndarray:
        """Return the digests of all captions that it contains, `(captions,)`."""
        return np.concatenate([self._listed, np.array([*self._added], "S16")])

    def add(self, captions: list[str], embeds: list[torch.Tensor], lengths: list[int] | None = None) -> None:
        """Add the embeddings `(tokens, E)` of new captions, all to one shard.

        If padding is kept, the embeddings are `(max_length, E)`, and `lengths` is the number of tokens of each
        caption.

        Raises:
            ValueError: If some have another width, too many tokens, or are not finite in the cache's precision.
        """
        self._shard.add(captions, embeds, lengths)
        self._added.update(map(caption_digest, captions))
        if self._shard.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the added embeddings as a shard, and list it in the manifest."""
        if self._shard.keys:
            self.list_shards([self._shard.write(*free_names(self.manifest, 1))])

    def list_captions(self, captions: DistinctCaptions) -> None:
        """Remember captions that were written to listed shards by others than `add`."""
        self._listed = np.union1d(self._listed, captions.entries["key"])

    def list_shards(self, entries: list[dict[str, Any]]) -> None:
        """Add shards that were written to the manifest."""
        self.manifest["shards"] = sorted([*self.manifest["shards"], *entries], key=lambda shard: shard["file"])
        write_manifest(self.folder, self.manifest)


def free_names(manifest: dict[str, Any], count: int) -> list[str]:
    """Return the first names of shards that the manifest does not list."""
    taken = {shard["file"] for shard in manifest["shards"]}
    names = (f"shard-{number:05d}.safetensors" for number in range(len(taken) + count))
    return [name for name in names if name not in taken][:count]


def save_parts(folder: Path, encoder: TextEncoder) -> None:
    """Write the tokenizer and the reference to the encoder into a cache, for stages that are trained with it."""
    parts = encoder.parts()
    if parts is not None and not (folder / ENCODER).is_dir():
        with whole_folder(folder / ENCODER) as partial:
            parts.save(partial, folder / ENCODER)


def write_cache(
    writer: CacheWriter | None,
    captions: list[str] | DistinctCaptions,
    encoder: TextEncoder,
    batch_size: int = 256,
    state: Processes = OneProcess(),
) -> int:
    """Encode missing captions, and the empty text if padding is kept; return their number.

    All processes call this, and each encodes and writes its share of the shards. Which captions are encoded together
    and stored in which shard is planned first, and does not depend on the number of processes or on interruptions: an
    encoder's rounding depends on the content of a batch. The main process lists the shards in the manifest each time
    that every process has written one.

    Args:
        writer (`CacheWriter`, *optional*): The cache, in the main process; None in the others.
        captions (`list[str]` or `DistinctCaptions`): The captions, the same in all processes.
        encoder (`TextEncoder`):
            Has `unpadded(captions)` and `count_tokens(captions)`, or `padded(captions)` if padding is kept.
        batch_size (`int`): Captions encoded at once.
        state ([`~accelerate.PartialState`], *optional*): The processes.

    Raises:
        ValueError: If the processes have different captions.
    """
    folder, manifest, shard_bytes = on_main_process(state, lambda: describe_build(writer))
    captions = captions if isinstance(captions, DistinctCaptions) else DistinctCaptions.of(captions)
    captions = captions.with_empty() if keeps_padding(manifest) else captions
    known = listed_digests(folder, manifest) if writer is None else writer.digests()
    missing = captions.without(known).by_length()  # a batch is padded to its longest caption
    check_same(state, missing)
    batches = [slice(start, start + batch_size) for start in range(0, len(missing), batch_size)]
    shards = list(plan_shards(batches, count_bytes(missing, batches, manifest, encoder, state), shard_bytes))
    names = free_names(manifest, len(shards))
    with tqdm(
        total=len(captions),
        initial=len(captions) - len(missing),
        desc="Encoding",
        mininterval=1,
        disable=not state.is_main_process,
    ) as progress:
        for first in range(0, len(shards), state.num_processes):
            own, entry = first + state.process_index, None
            if own < len(shards):
                texts = (missing[batch] for batch in shards[own])
                entry = write_shard(ShardWriter(folder, manifest), names[own], texts, encoder, progress)
            entries = [entry for entry in gather(state, entry) if entry is not None]
            if writer is not None:
                writer.list_shards(entries)
            progress.update(sum(entry["captions"] for entry in entries[1:]))
    if writer is not None:
        writer.list_captions(missing)
    return len(missing)


def describe_build(writer: CacheWriter | None) -> tuple[Path, dict[str, Any], int]:
    """Return the settings of a writer for other processes: folder, manifest and size of shards in bytes."""
    assert writer is not None  # in the main process
    return writer.folder, writer.manifest, writer.shard_bytes


def no_digests() -> np.ndarray:
    """Return an empty array of digests of captions."""
    return np.empty(0, "S16")


def listed_digests(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Return the digests of all captions in the shards of a manifest, `(captions,)`."""
    indices = (read_index(folder, manifest, shard, open_shard(folder, shard)) for shard in manifest["shards"])
    return np.concatenate([no_digests(), *(as_digests(index.keys) for index in indices)])


def check_same(state: Processes, captions: DistinctCaptions) -> None:
    """Check that all processes have the same captions in the same order.

    Raises:
        ValueError: In all processes, if they do not.
    """
    digest = hashlib.sha256(captions.entries["key"].tobytes())
    found = gather(state, (len(captions), digest.hexdigest()))
    other = next((process for process, own in enumerate(found) if own != found[0]), None)
    if other is not None:
        raise ValueError(
            f"The data set has {found[0][0]:,} captions to encode in the main process, but {found[other][0]:,}, or "
            f"others, in process {other}: all of them need the same data."
        )


def count_bytes(
    captions: DistinctCaptions,
    batches: list[slice],
    manifest: dict[str, Any],
    encoder: TextEncoder,
    state: Processes,
) -> list[int]:
    """Return the size of each batch's embeddings in bytes; each process tokenizes its share of the batches."""
    length = manifest["max_length"]
    per_token = manifest["width"] * DTYPES[manifest["dtype"]].itemsize
    if keeps_padding(manifest):
        return [len(captions.entries[batch]) * length * per_token for batch in batches]
    own = [
        sum(min(tokens, length) for tokens in encoder.count_tokens(captions[batch])) * per_token
        for batch in batches[state.process_index :: state.num_processes]
    ]
    sizes = [0] * len(batches)
    for process, part in enumerate(gather(state, own)):
        sizes[process :: state.num_processes] = part
    return sizes


def plan_shards(batches: list[slice], sizes: list[int], shard_bytes: int) -> Iterator[list[slice]]:
    """Group batches to shards, each of which ends with the batch that fills it."""
    shard: list[slice] = []
    filled = 0
    for batch, size in zip(batches, sizes, strict=True):
        shard.append(batch)
        filled += size
        if filled >= shard_bytes:
            yield shard
            shard, filled = [], 0
    if shard:
        yield shard


def write_shard(
    shard: ShardWriter, name: str, batches: Iterable[list[str]], encoder: TextEncoder, progress: tqdm
) -> dict[str, Any]:
    """Encode the batches of a shard and write it; return its entry in the manifest."""
    for batch in batches:
        if shard.keeps_padding:
            shard.add(batch, *encoder.padded(batch))
        else:
            shard.add(batch, encoder.unpadded(batch))
        progress.update(len(batch))
    return shard.write(name)
