"""Computation of image features by several processes, cached in files."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..utils.files import list_names, whole_file
from ..utils.processes import on_main_process
from .drawing import digest_json
from .feature_networks import FeatureNetwork
from .picture_sets import PictureSet, fitted


SHARD = 512  # images per file
BATCH = 32  # images per batch


class Features:
    """Features of images of a set at a resolution, in a separate folder of the cache.

    Args:
        cache (`Path`): The folder of all features.
        network ([`FeatureNetwork`]): The feature network.
        pictures ([`PictureSet`]): Set of images.
        indices (`list[int]`): Indices of the images to use.
        resolution (`int`): Resolution to which images of another size are resized first.
    """

    def __init__(
        self, cache: Path, network: FeatureNetwork, pictures: PictureSet, indices: list[int], resolution: int
    ):
        self.network, self.pictures, self.indices, self.resolution = network, pictures, indices, resolution
        identity = [pictures.identity(), indices, resolution, network.identity()]
        self.folder = cache / digest_json(identity)

    @property
    def shards(self) -> list[Path]:
        """Paths of the files."""
        return [self.folder / f"{start:08d}.safetensors" for start in range(0, len(self.indices), SHARD)]

    def make(self, state: PartialState) -> None:
        """Compute missing features; all processes call this, and each computes its share."""
        todo = on_main_process(state, self.prepare)
        own = todo[state.process_index :: state.num_processes]
        label = f"features of {self.pictures.name} at {self.resolution} px"
        for number in tqdm(own, desc=label, unit="shard", disable=not state.is_main_process or not own):
            self.make_shard(number)
        state.wait_for_everyone()

    def prepare(self) -> list[int]:
        """Return the numbers of the missing files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.partial"):
            leftover.unlink()
        exist = list_names(self.folder)
        return [number for number, path in enumerate(self.shards) if path.name not in exist]

    def make_shard(self, number: int) -> None:
        """Compute and write one file of features."""
        indices = self.indices[number * SHARD : (number + 1) * SHARD]
        parts = []
        for start in range(0, len(indices), BATCH):
            some = indices[start : start + BATCH]
            pictures = [fitted(self.pictures.picture(index), self.resolution) for index in some]
            parts.append(self.network(pictures, [self.pictures.caption(index) for index in some]))
        tensors: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError(f"The features of {self.pictures.name} are not finite.")
        with whole_file(self.shards[number]) as partial:
            save_file(tensors, partial)

    def load(self) -> dict[str, torch.Tensor]:
        """Load all features, `(N, D)` by name."""
        parts = []
        for path in self.shards:
            try:
                parts.append(load_file(path))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"'{path}' cannot be read: {error}; delete it to compute it again.") from error
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
