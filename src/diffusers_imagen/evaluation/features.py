"""Features of images, made by several processes and kept in files: what is there is not made again."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..utils.files import whole_file
from ..utils.processes import on_main_process
from .drawing import digest_json
from .feature_networks import FeatureNetwork
from .picture_sets import PictureSet, fitted


SHARD = 512  # images of a file
BATCH = 32  # images at once


class Features:
    """The features of some images of a set at a resolution, in a folder of the cache that is theirs alone.

    Args:
        cache (`Path`): The folder of all features.
        network ([`FeatureNetwork`]): What makes them.
        images ([`PictureSet`]): Of what.
        indices (`list[int]`): Of which images of it.
        resolution (`int`): To which images of another size are brought first.
    """

    def __init__(
        self, cache: Path, network: FeatureNetwork, pictures: PictureSet, indices: list[int], resolution: int
    ):
        self.network, self.pictures, self.indices, self.resolution = network, pictures, indices, resolution
        identity = [pictures.identity(), indices, resolution, network.identity()]
        self.folder = cache / digest_json(identity)

    @property
    def shards(self) -> list[Path]:
        """The files."""
        return [self.folder / f"{start:08d}.safetensors" for start in range(0, len(self.indices), SHARD)]

    def make(self, state: PartialState) -> None:
        """Make what is not there yet; all processes call this, and each makes its share."""
        todo = on_main_process(state, self.prepare)
        own = todo[state.process_index :: state.num_processes]
        label = f"features of {self.pictures.name} at {self.resolution} px"
        for number in tqdm(own, desc=label, unit="shard", disable=not state.is_main_process or not own):
            self.make_shard(number)
        state.wait_for_everyone()

    def prepare(self) -> list[int]:
        """Return the numbers of the files that are to be made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.partial"):
            leftover.unlink()
        return [number for number, path in enumerate(self.shards) if not path.is_file()]

    def make_shard(self, number: int) -> None:
        """Make a file."""
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
        """All of them, `(N, D)` by name."""
        parts = []
        for path in self.shards:
            try:
                parts.append(load_file(path))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"'{path}' cannot be read: {error}; delete it, and it is made anew.") from error
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
