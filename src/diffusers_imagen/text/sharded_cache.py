"""ShardedCache: text embeddings of a stream's captions, one cache for each shard of the data, in the order of its rows.

The folder has `layout.json`, which names the splits with their numbers of shards and the encoder, and a folder for each
shard, `part-000000` and so on, split by split. Each is a cache as cache_files.py describes it, and complete: it is written
under a temporary name and then moved. A run reads the parts in the order of its shards, and has the index of one part in
memory at a time.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..utils.files import read_json_object, whole_folder, write_json
from .cache import SHARD_BYTES, EmbeddingCache
from .cache_files import DTYPES, find_problems, is_encoder, read_manifest
from .cache_writer import CacheWriter
from .encoder import TextEncoder
from .identity import identity_mismatch
from .reference import EncoderParts
from .source import TextSource
from .text_embeddings import PackedText, TextEmbeddings


LAYOUT = "layout.json"
FORMAT = 1
MOST_OPEN = 2  # parts: a batch may begin in one shard and end in the next
BATCHES_AT_ONCE = 8  # batches of captions that are sorted by length, encoded, and written in the order of the rows


def is_sharded(folder: str | Path) -> bool:
    """Return whether a folder is a sharded cache."""
    return (Path(folder) / LAYOUT).is_file()


def open_cache(folder: str | Path) -> "EmbeddingCache | ShardedCache":
    """Open a cache of either kind."""
    return ShardedCache(folder) if is_sharded(folder) else EmbeddingCache(folder)


class Layout:
    """Which part of a sharded cache belongs to which shard of the data.

    Args:
        folder (`str` or `Path`): The cache.
        shards (`dict[str, int]`): Number of shards of each split.
        encoder (`dict`): Identity of the encoder.
        dtype (`str`): Data type of the embeddings.
    """

    def __init__(self, folder: str | Path, shards: dict[str, int], encoder: dict[str, Any], dtype: str):
        self.folder, self.shards, self.encoder, self.dtype = Path(folder), shards, encoder, dtype

    @classmethod
    def read(cls, folder: str | Path, argument: str = "embedding_cache") -> "Layout":
        """Read the layout of a cache.

        Raises:
            ValueError: If it is missing or malformed.
        """
        path = Path(folder) / LAYOUT
        try:
            content: dict[str, Any] = {"shards": None, "encoder": None, "dtype": None} | read_json_object(path)
            shards, encoder, dtype = content["shards"], content["encoder"], content["dtype"]
            counts = list(shards.values()) if isinstance(shards, dict) else []
            if content.get("format") != FORMAT:
                raise ValueError(f"has format {str(content.get('format'))[:60]!r}, but should have {FORMAT}")
            if not counts or not all(type(count) is int and 0 < count < 10**6 for count in counts):
                raise ValueError("has no valid `shards`")
            if not is_encoder(encoder) or dtype not in DTYPES:
                raise ValueError("has no valid `encoder` or `dtype`")
        except (ValueError, OSError) as error:
            raise ValueError(f"`{argument}` is '{folder}', whose {LAYOUT} is malformed: {error}.") from error
        return cls(folder, shards, encoder, dtype)

    def write(self) -> None:
        """Write the layout atomically."""
        content = {"format": FORMAT, "shards": self.shards, "encoder": self.encoder, "dtype": self.dtype}
        write_json(self.folder / LAYOUT, content)

    def part(self, split: str, shard: int) -> Path:
        """Return the folder of a part."""
        names = list(self.shards)
        first = sum(self.shards[name] for name in names[: names.index(split)])
        return self.folder / f"part-{first + shard:06d}"

    def parts(self) -> list[Path]:
        """Return the folders of all parts."""
        return [self.part(split, shard) for split, count in self.shards.items() for shard in range(count)]

    def check_same(self, other: "Layout") -> None:
        """Raise ValueError if a cache with this layout cannot be continued with another."""
        difference = identity_mismatch(self.encoder, other.encoder)
        for name in ("dtype", "shards"):
            if difference is None and getattr(self, name) != getattr(other, name):
                difference = f"{name} {getattr(self, name)}, not {getattr(other, name)}"
        if difference is not None:
            raise ValueError(
                f"`output_dir` is '{self.folder}', a cache of another encoder or data set ({difference})."
            )


class ShardedCache(TextSource):
    """Text source that reads the cache of one shard of the data at a time; for streams.

    Args:
        folder (`str` or `Path`): The cache.

    Raises:
        ValueError: If the folder is not a sharded cache, or some parts are missing or damaged.
    """

    needs_encoder = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.layout = Layout.read(folder)
        parts = self.layout.parts()
        missing = [part.name for part in parts if not part.is_dir()]
        if missing:
            raise ValueError(
                f"`embedding_cache` is '{folder}', which lacks {len(missing)} of {len(parts)} parts, such as {missing[0]}: "
                "run cache-embeddings again to complete it."
            )
        self.first = EmbeddingCache(parts[0])
        self.width, self.max_length = self.first.width, self.first.max_length
        self.keeps_padding, self.cleans_captions = self.first.keeps_padding, self.first.cleans_captions
        self.dtype = self.layout.dtype
        self._open: dict[Path, EmbeddingCache] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return sum(shard["captions"] for part in self.layout.parts() for shard in read_manifest(part)["shards"])

    def at(self, split: str, shard: int, num_shards: int) -> EmbeddingCache:
        """Return the cache of the captions in one shard of the data.

        Raises:
            ValueError: If the data has other shards than the cache, or the part is damaged.
        """
        found = self.layout.shards.get(split)
        if found != num_shards:
            raise ValueError(
                f"`embedding_cache` is '{self.folder}', which was written for {found or 'no'} shards of split {split!r}, but "
                f"the data has {num_shards}: run cache-embeddings with this data."
            )
        folder = self.layout.part(split, shard)
        if folder not in self._open:
            while len(self._open) >= MOST_OPEN:
                del self._open[next(iter(self._open))]
            self._open[folder] = self._open_part(folder)
        return self._open[folder]

    def _open_part(self, folder: Path) -> EmbeddingCache:
        part = EmbeddingCache(folder)
        if part.manifest["encoder"] != self.first.manifest["encoder"]:
            raise ValueError(
                f"`embedding_cache`: '{folder}' was written by another text encoder than '{self.first.folder}'."
            )
        return part

    def _search(self, texts: Iterable[str]) -> dict[str, PackedText]:
        """Return the embeddings of texts that any part has; for the few that are not captions of a known shard."""
        wanted, found = set(texts), {}
        for folder in self.layout.parts():
            if not wanted:
                break
            part = self._open_part(folder)
            for text in [text for text in wanted if text in part]:
                found[text] = part.pack([text])
                wanted.remove(text)
        return found

    def __contains__(self, text: str) -> bool:
        return text in self._search([text])

    def encode(self, texts: list[str]) -> TextEmbeddings:
        """Return embeddings as `EmbeddingCache.encode`, from whichever part has them: use `at` where the shard is known."""
        found = self._search(texts)
        return PackedText.join([found[text] for text in texts]).padded()

    def identity(self) -> dict[str, Any]:
        return self.first.identity()

    def parts(self) -> EncoderParts | None:
        return self.first.parts()

    def check_encoder(self, identity: dict[str, Any]) -> None:
        """Check the encoder like `EmbeddingCache.check_encoder`."""
        self.first.check_encoder(identity)

    def check_kind(self, keeps_padding: bool, cleans_captions: bool) -> None:
        """Check the kind of the embeddings like `EmbeddingCache.check_kind`."""
        self.first.check_kind(keeps_padding, cleans_captions)

    def for_captions(self, captions: Iterable[str] | None) -> TextSource:
        """Return the cache itself, for a stream.

        Raises:
            ValueError: If the data is not a stream, or the empty text is missing where it is needed.
        """
        if captions is not None:
            raise ValueError(
                f"`embedding_cache` is '{self.folder}', which cache-embeddings wrote with --streaming: set `streaming`, or "
                "write a cache without it."
            )
        self.first.for_captions(None)
        return self

    def verify(self) -> list[str]:
        """Check the checksums and content of all parts; return a list of problems, empty if there are none."""
        return [
            f"{folder.name}: {problem}"
            for folder in tqdm(self.layout.parts(), desc="Verifying parts", mininterval=5)
            for problem in find_problems(folder, read_manifest(folder))
        ]


def write_part(
    folder: Path,
    captions: Iterable[str],
    encoder: TextEncoder,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    batch_size: int = 256,
) -> int:
    """Write the cache of one shard of the data, in the order of its captions; return the number of distinct captions.

    The folder appears when it is complete.

    Args:
        folder (`Path`): The part; must not exist.
        captions (`Iterable[str]`): Captions of the shard, with repetitions.
        encoder (`TextEncoder`): Has `unpadded(captions)`, or `padded(captions)` if padding is kept.
        dtype (`str`), shard_bytes (`int`): As for `CacheWriter`.
        batch_size (`int`): Captions encoded at once.
    """
    with whole_folder(folder) as partial:
        with CacheWriter(partial, encoder.identity(), dtype, shard_bytes) as writer:
            distinct = iter(dict.fromkeys(captions) | ({"": None} if encoder.keeps_padding else {}))
            count = 0
            while window := list(islice(distinct, BATCHES_AT_ONCE * batch_size)):
                writer.add(window, *encode_window(window, encoder, batch_size))
                count += len(window)
            writer.flush()
    return count


def encode_window(captions: list[str], encoder: TextEncoder, batch_size: int) -> Iterator[list]:
    """Encode captions in batches of similar length; return the embeddings in the order of the captions, and if padding is
    kept the numbers of tokens."""
    # sorted by length: a batch is padded to its longest caption
    order = sorted(range(len(captions)), key=lambda i: (len(captions[i]), captions[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    texts = ([captions[i] for i in batch] for batch in batches)
    parts: list[tuple[list, ...]]
    if encoder.keeps_padding:
        parts = [encoder.padded(batch) for batch in texts]
    else:
        parts = [(encoder.unpadded(batch),) for batch in texts]
    places = sorted(range(len(order)), key=order.__getitem__)
    for values in zip(*parts):
        joined = [value for part in values for value in part]
        yield [joined[place] for place in places]
