"""File format of an embedding cache, and its integrity checks.

A cache is a folder of safetensors shards and a manifest.json. A shard has `states` `(tokens, E)`, the concatenated
embeddings of its captions without padding (the tensor's name is part of the format), `offsets` `(captions + 1,)`, at
which each caption begins, and `keys` `(captions, 2)`, the first 128 bits of the captions' SHA-256. If the encoder has
`keeps_padding`, `states` are `(captions * L, E)`, for all L positions of each caption, and `offsets` still count the
captions' own tokens, which determines the padding. The manifest describes the encoder, and the finished shards with
their sizes and checksums: shards that it does not list are ignored. `encoder/` has the tokenizer and the reference to
the encoder, for stages that are trained with the cache: see reference.py.

Every part is checked before use. The manifest has a checksum of itself, and two per shard: one of its index, which is
the header, `keys` and `offsets`, and one of the whole file. The index is read and checked when a cache is opened, the
whole file when its first embeddings are read. Caches of earlier versions have neither the manifest's checksum nor
those of the indices; their shards are checked completely when they are opened.
"""

import hashlib
import json
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..utils.files import LOCK, OWNER, read_json_object, sha256, write_text
from .identity import LATER


FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TYPE_NAMES = {"bfloat16": "BF16", "float16": "F16"}  # safetensors' names
SHARD = re.compile(r"shard-\d{5,9}\.safetensors")
# unfinished files of a killed build
LEFTOVER = re.compile(rf"\.?({SHARD.pattern}|{re.escape(MANIFEST)}|{re.escape(OWNER)})(\.\d+)?\.partial")
HEADER_BYTES = 2**16  # per shard
CAPTION_NUMBERS = 2**27  # per caption, padded: 512 MiB in float32
MEND = "run cache-embeddings again to repair it"


def caption_digest(caption: str) -> bytes:
    """Return the first 128 bits of a caption's SHA-256."""
    return hashlib.sha256(caption.encode()).digest()[:16]


def as_digests(keys: np.ndarray) -> np.ndarray:
    """Return the keys of a shard `(captions, 2)` as digests `(captions,)`, which can be sorted and searched."""
    return np.ascontiguousarray(keys, "<i8").view("S16").reshape(-1)


class Index(NamedTuple):
    """Index of a shard, read before its embeddings."""

    keys: np.ndarray  # (captions, 2)
    offsets: np.ndarray  # (captions + 1,)
    sha256: str


def is_count(value: Any, lowest: int = 0) -> bool:
    """Return whether a value of a manifest is an integer of at least `lowest`."""
    return type(value) is int and lowest <= value < 2**63


def is_checksum(value: Any) -> bool:
    """Return whether a value of a manifest is a SHA-256."""
    return type(value) is str and re.fullmatch(r"[0-9a-f]{64}", value) is not None


MANIFEST_FIELDS = {
    "format": lambda value: value == FORMAT,
    "encoder": lambda value: is_encoder(value),
    "max_length": lambda value: is_count(value, 1),
    "width": lambda value: is_count(value, 1),
    "dtype": lambda value: type(value) is str and value in DTYPES,
    "shards": lambda value: type(value) is list,
}
SHARD_FIELDS = {
    "file": lambda value: type(value) is str and SHARD.fullmatch(value) is not None,
    "captions": lambda value: is_count(value, 1),
    "tokens": is_count,
    "bytes": lambda value: is_count(value, 1),
    "sha256": is_checksum,
}


def is_encoder(value: Any) -> bool:
    """Return whether a value of a manifest describes an encoder."""
    return (
        type(value) is dict
        and are_numbers(value.get("weights", []))
        and all(type(value.get(name, False)) is bool for name in LATER)
    )


def are_numbers(value: Any) -> bool:
    """Return whether a value of a manifest is a list of numbers."""
    return type(value) is list and all(type(number) in (int, float) for number in value)


def find_field_problem(value: Any, fields: dict, optional: dict) -> str | None:
    """Describe a field of an object that is missing, invalid or unknown; None if there is none."""
    if type(value) is not dict:
        return f"is {type(value).__name__}, not an object"
    for name, check in (fields | optional).items():
        if name in fields and name not in value:
            return f"lacks {name!r}"
        if name in value and not check(value[name]):
            text = json.dumps(value[name])
            return f"has {name!r}: {text if len(text) <= 60 else f'{text[:60]}...'}"
    unknown = sorted(value.keys() - fields.keys() - optional.keys())
    return f"has {unknown[0][:60]!r}, which is unknown" if unknown else None


def keeps_padding(manifest: dict[str, Any]) -> bool:
    """Return whether a cache has embeddings of all positions, including padding."""
    return manifest["encoder"].get("keeps_padding", LATER["keeps_padding"])


def check_manifest(manifest: dict[str, Any]) -> None:
    """Check the types and ranges of a manifest.

    Raises:
        ValueError: Describes the problem, without the manifest's name.
    """
    problem = find_field_problem(manifest, MANIFEST_FIELDS, {"sha256": is_checksum})
    if problem is None and manifest["max_length"] * manifest["width"] > CAPTION_NUMBERS:
        problem = (
            f"has embeddings of {manifest['max_length']} tokens and width {manifest['width']}, which is too large"
        )
    if problem is not None:
        raise ValueError(problem)
    for i, shard in enumerate(manifest["shards"]):
        problem = find_field_problem(shard, SHARD_FIELDS, {"index_sha256": is_checksum})
        if problem is not None:
            raise ValueError(f"{problem} in shard {i}")
    if len({shard["file"] for shard in manifest["shards"]}) < len(manifest["shards"]):
        raise ValueError("names a shard twice")


def render_manifest(manifest: dict[str, Any]) -> str:
    """Return the manifest as text, with the checksum of its content."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a cache atomically."""
    write_text(folder / MANIFEST, render_manifest(manifest))


def read_manifest(folder: Path, argument: str = "embedding_cache") -> dict[str, Any]:
    """Read and check the manifest of a cache.

    Args:
        folder (`Path`): The cache.
        argument (`str`): The argument's name, for the message.

    Raises:
        ValueError: If there is none, or it was modified or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"`{argument}` is '{folder}', which has no {MANIFEST}: create it with cache-embeddings.")
    try:
        manifest = read_json_object(path)
        if "format" in manifest and manifest["format"] != FORMAT:
            raise ValueError(f"'{path}' has format {str(manifest['format'])[:60]!r}, but should have {FORMAT}")
        try:
            check_manifest(manifest)
        except ValueError as error:
            raise ValueError(f"'{path}' {error}") from error
        if "sha256" in manifest and render_manifest(manifest).encode() != path.read_bytes():
            raise ValueError(f"'{path}' was modified: its checksum does not match")
    except ValueError as error:
        raise ValueError(
            f"`{argument}` is '{folder}', whose manifest is damaged: {error}; delete it and run cache-embeddings "
            "again, which encodes the captions again."
        ) from error
    return manifest


def size_problem(folder: Path, shard: dict[str, Any]) -> str | None:
    """Check that a shard exists and its size; return a description of the problem, or None."""
    path = folder / shard["file"]
    if not path.is_file():
        return f"{shard['file']} is missing"
    if path.stat().st_size != shard["bytes"]:
        return f"{shard['file']} has {path.stat().st_size} bytes, not {shard['bytes']}"
    return None


def checksum_problem(folder: Path, shard: dict[str, Any]) -> str | None:
    """Check a shard's checksum; return a description of the problem, or None."""
    if sha256(folder / shard["file"]) != shard["sha256"]:
        return f"{shard['file']} has a different checksum than in {MANIFEST}"
    return None


def content_problem(folder: Path, manifest: dict[str, Any], shard: dict[str, Any]) -> str | None:
    """Check a shard's size, checksums and content; return a description of the problem, or None."""
    try:
        problem = size_problem(folder, shard) or checksum_problem(folder, shard)
        if problem is not None:
            return problem
        file = open_shard(folder, shard)
        read_index(folder, manifest, shard, file)
        if not file.get_tensor("states").isfinite().all():
            return f"{shard['file']} has embeddings that are not finite"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{shard['file']} cannot be read ({error.strerror or error})"
    return None


def find_problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Check all shards of a manifest; return a list of problems, empty if there are none."""
    shards = tqdm(manifest["shards"], desc="Verifying", mininterval=5)
    problems = [content_problem(folder, manifest, shard) for shard in shards]
    return [problem for problem in problems if problem is not None]


def open_shard(folder: Path, shard: dict[str, Any]) -> safe_open:
    """Open a shard by memory mapping.

    Raises:
        ValueError: If it is not a safetensors file.
    """
    try:
        return safe_open(folder / shard["file"], framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{shard['file']} is damaged ({error})") from error


def read_index(folder: Path, manifest: dict[str, Any], shard: dict[str, Any], file: safe_open) -> Index:
    """Read and check the keys and offsets of a shard.

    Raises:
        ValueError: If they were modified, or do not match the manifest.
    """
    name, captions, tokens = shard["file"], shard["captions"], shard["tokens"]
    rows = captions * manifest["max_length"] if keeps_padding(manifest) else tokens
    expected = {
        "keys": ([captions, 2], "I64"),
        "offsets": ([captions + 1], "I64"),
        "states": ([rows, manifest["width"]], TYPE_NAMES[manifest["dtype"]]),
    }
    found = {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}
    if found != expected:
        raise ValueError(f"{name} has different tensors than in {MANIFEST}")
    keys, offsets = file.get_tensor("keys").numpy(), file.get_tensor("offsets").numpy()
    with open(folder / name, "rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        index = Index(keys, offsets, hash_index(raw.read(min(length, HEADER_BYTES)), keys, offsets))
    if shard.get("index_sha256", index.sha256) != index.sha256:
        raise ValueError(f"{name} has a different index than in {MANIFEST}")
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != tokens or lengths.min() < 0 or lengths.max() > manifest["max_length"]:
        raise ValueError(f"{name} has offsets that do not match its embeddings")
    return index


def hash_index(header: bytes, keys: np.ndarray, offsets: np.ndarray) -> str:
    """Return the checksum of a shard's index."""
    return hashlib.sha256(header + keys.tobytes() + offsets.tobytes()).hexdigest()


def describe_shard(name: str, data: bytes, keys: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    """Create the manifest's entry for a shard with this content."""
    (length,) = struct.unpack("<Q", data[:8])
    return {
        "file": name,
        "captions": len(keys),
        "tokens": int(offsets[-1]),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "index_sha256": hash_index(data[8 : 8 + length], keys, offsets),
    }


def check_folder(folder: Path) -> None:
    """Check that a cache can be built in a folder: it must be new, empty or a cache.

    Without a manifest, unfinished files of a killed build are allowed.

    Raises:
        ValueError: If it is not a folder, or has other files and no manifest.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"`output_dir` is '{folder}', which is neither an empty folder nor a cache.")
    if (folder / MANIFEST).is_file():
        return
    for entry in sorted(os.listdir(folder)):
        if not (entry in (LOCK, OWNER) or is_shard(folder / entry) or LEFTOVER.fullmatch(entry)):
            raise ValueError(
                f"`output_dir` is '{folder}', which is neither an empty folder nor a cache: it has {entry[:100]!r}."
            )


def is_shard(path: Path) -> bool:
    """Return whether a file is a shard of a cache, by its name and tensors."""
    if not SHARD.fullmatch(path.name) or not path.is_file():
        return False
    try:
        return set(safe_open(path, framework="pt").keys()) == {"keys", "offsets", "states"}
    except SafetensorError:
        return False


def remove_leftovers(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove unfinished files of killed builds, and shards that the manifest does not list."""
    named = {shard["file"] for shard in manifest["shards"]}
    for name in os.listdir(folder):
        if LEFTOVER.fullmatch(name) or (SHARD.fullmatch(name) and name not in named):
            (folder / name).unlink()
