"""Snapshots: files of averaged weights, with checksums."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open

from ...utils.bounds import MAX_STD, MIN_STD


logger = logging.get_logger(__name__)

DTYPES = ("F16", "BF16", "F32")


class Snapshot(NamedTuple):
    """A saved average."""

    path: Path
    step: int
    std: float
    sha256: str | None


def snapshot_metadata(tensors: dict[str, torch.Tensor], step: int, std: float) -> dict[str, str]:
    """Return the metadata of a snapshot: step, width, and the SHA-256 of both and all tensors."""
    return {"step": str(step), "std": repr(std), "sha256": digest(tensors, step, std)}


def digest(tensors: dict[str, torch.Tensor], step: int, std: float) -> str:
    """Return the SHA-256 of an average's step, width, names, dtypes, shapes and values."""
    sha = hashlib.sha256(f"{step} {std!r}".encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def list_snapshots(folder: Path) -> list[Snapshot]:
    """List the snapshots in a folder, oldest first.

    Raises:
        ValueError: If a file is not a snapshot; names it.
    """
    paths = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    return [read_head(path) for path in paths]


def read_head(path: Path) -> Snapshot:
    """Read step, width and checksum of a snapshot."""
    if not path.is_file():  # opening a FIFO would wait
        raise ValueError(f"'{path}' is not a regular file.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from error
    try:
        step, std = int(metadata["step"]), float(metadata["std"])
    except (KeyError, ValueError):
        raise ValueError(f"'{path}' has no `step` and `std`: it is not a snapshot, or damaged.") from None
    if not (0 < step <= 10**9 and MIN_STD <= std < MAX_STD):
        raise ValueError(f"'{path}' has the step {step} and the std {std}, which are invalid: it is damaged.")
    return Snapshot(path, step, std, metadata.get("sha256"))


def check_shapes(snapshot: Snapshot, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check by its header that a snapshot has exactly the parameters of a network.

    Raises:
        ValueError: If not; names the file.
    """
    with safe_open(snapshot.path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        found = {name: tuple(part.get_shape()) for name, part in parts.items()}
        wrong = sorted(name for name, part in parts.items() if part.get_dtype() not in DTYPES)
    missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    other = sorted(name for name in shapes.keys() & found.keys() if shapes[name] != found[name])
    reason = None
    if missing:
        reason = f"lacks {len(missing)} of the network's {len(shapes)} parameters, such as {missing[0]}"
    elif unknown:
        reason = f"has {unknown[0]!r}, which is not a parameter of the network"
    elif other:
        name = other[0]
        reason = f"has {name} of shape {found[name]}, but the network's is {shapes[name]}"
    elif wrong:
        reason = f"has {wrong[0]} in another dtype than {', '.join(DTYPES)}"
    if reason is not None:
        raise ValueError(f"'{snapshot.path}' {reason}.")


def read_tensors(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """Read the tensors of a snapshot.

    Raises:
        ValueError: If they differ from those that were saved, or are not finite; names the file.
    """
    try:
        with safe_open(snapshot.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'{snapshot.path}' cannot be read: {error}") from error
    if snapshot.sha256 is None:
        logger.warning(
            f"'{snapshot.path}' has no checksum, which earlier versions did not write: it is used without a check."
        )
    elif digest(tensors, snapshot.step, snapshot.std) != snapshot.sha256:
        raise ValueError(f"'{snapshot.path}' is damaged: its content does not match its checksum.")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"'{snapshot.path}' has values that are not finite, in {broken[0]}.")
    return tensors
