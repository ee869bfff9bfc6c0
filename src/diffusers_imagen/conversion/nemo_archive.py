"""Reading of NeMo's checkpoint files: `.nemo` archives, Lightning checkpoints and their folders."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..utils.arguments import bad_argument, shown
from ..utils.yaml import read_yaml
from .nemo_distributed import is_distributed, open_distributed
from .nemo_weights import ZIP, RankWeights, TorchFile, Weights
from .safe_tar import extract_members


CONFIG, WEIGHTS = "model_config.yaml", "model_weights"
HPARAMS = "hparams.yaml"  # written by Lightning's loggers, next to the folder of checkpoints
EMA = "-EMA"  # suffix of the name of the averaged weights
PICKLE = b"\x80"  # first byte of torch's older files
RANK = re.compile(r"mp_rank_\d+|tp_rank_\d+(_pp_rank_\d+)?")

Config = str | os.PathLike | Mapping[str, Any]


class NemoCheckpoint(NamedTuple):
    """An open checkpoint."""

    name: str  # name of the file
    config: dict[str, Any]  # the `model:` section
    weights: Weights
    left_out: dict[str, str]  # content that is not converted, and why


@contextmanager
def open_nemo(
    source: str | os.PathLike,
    config: Config | None = None,
    ema: bool = False,
    name: str = "source",
    scratch: Path | None = None,
) -> Iterator[NemoCheckpoint]:
    """Open an archive or checkpoint, as a context manager.

    Args:
        source: A `.nemo` archive (tar, plain or gzip-compressed), the folder it was unpacked to, a Lightning `.ckpt`,
            or the folder of a distributed one.
        config: NeMo's configuration, if `source` has none or to override it: a YAML file or a mapping, complete, the
            `model:` section, or Lightning's `hparams.yaml`.
        ema: Whether to use the averaged weights, which NeMo writes next to it as `NAME-EMA.ckpt`.
        name: The argument's name, for messages.
        scratch: A temporary folder for the weights of an archive; by default the system's.

    Raises:
        ValueError: If the checkpoint does not exist, is damaged, would execute code, or has no configuration.
    """
    path = find_source(source, ema, name)
    what = f"`{name}` is '{path}', which"
    given = None if config is None else read_config(config, f"{name}_config")
    if path.is_dir():
        yield describe(path, path, given, what)
    elif kind_of(path, what) == "torch":
        yield describe(path, None, given, what)
    else:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".nemo-") as folder:
            extract_members(path, Path(folder), is_needed)
            yield describe(path, Path(folder), given, what)


def find_source(source: str | os.PathLike, ema: bool, name: str) -> Path:
    """Return the file or folder to open; raise ValueError if it does not exist."""
    if not isinstance(source, (str, os.PathLike)) or "\0" in os.fspath(source):
        raise bad_argument(name, source, "a file or folder of NeMo's")
    path = averaged(Path(source), name) if ema else Path(source)
    if not path.exists():
        raise ValueError(f"`{name}` is '{path}', which does not exist.")
    return path


def averaged(path: Path, name: str) -> Path:
    """Return the file of the averaged weights next to a checkpoint."""
    if path.stem.endswith(EMA):
        return path
    companion = path.with_name(f"{path.stem}{EMA}{path.suffix}")
    if not companion.exists():
        raise ValueError(
            f"`ema` is given, but `{name}` is '{path}', next to which there is no '{companion.name}': NeMo writes averages "
            "there, or as the weights of the archive itself; specify the file, or omit `ema`."
        )
    return companion


def kind_of(path: Path, what: str) -> str:
    """Return "torch" for a file of `torch.save`, detected by its first bytes, else "tar"."""
    if not path.is_file():
        raise ValueError(f"{what} is not a regular file.")  # a pipe might never end
    with open(path, "rb") as file:
        begin = file.read(4)
    return "torch" if begin == ZIP or begin[:1] == PICKLE else "tar"


def is_needed(name: PurePosixPath) -> bool:
    """Return whether a member of an archive is needed: only the configuration and weights are."""
    return name.name == CONFIG or name.suffix == ".ckpt" or WEIGHTS in name.parts[:-1]


def describe(path: Path, folder: Path | None, given: dict[str, Any] | None, what: str) -> NemoCheckpoint:
    """Open the checkpoint of a file, or of the folder that an archive was unpacked to."""
    weights = TorchFile(path, what) if folder is None else open_folder(folder, what)
    files = list(weights.ranks.values()) if isinstance(weights, RankWeights) else [weights]
    left_out = {
        section: "not part of a network: training continues from the weights with a new optimizer"
        for file in files
        if isinstance(file, TorchFile)
        for section in file.sections
    }
    left_out |= dict.fromkeys(getattr(weights, "dropped", ()), "not a tensor of weights")
    settings = [file.settings for file in files if isinstance(file, TorchFile)]
    return NemoCheckpoint(path.name, find_config(path, folder, given, settings, what), weights, left_out)


def open_folder(folder: Path, what: str) -> Weights:
    """Open the weights in a folder, in any of NeMo's formats."""
    places = [folder, *(place for place in folder.rglob(WEIGHTS) if place.is_dir())]
    distributed = [place for place in places if is_distributed(place)]
    if distributed:
        return open_distributed(distributed[0], what)
    files = sorted(path for path in folder.rglob("*.ckpt") if path.is_file())
    ranks = {path.parent.name: path for path in files if RANK.fullmatch(path.parent.name)}
    if ranks and len(ranks) == len(files):
        opened = {name: TorchFile(path, f"{what} has {shown(name)}, which") for name, path in ranks.items()}
        return RankWeights(opened, what)
    if len(files) != 1:
        raise ValueError(
            f"{what} has {len(files)} files of weights, {[path.name for path in files[:5]]}, but should have one, one per "
            "rank, or a distributed checkpoint."
        )
    return TorchFile(files[0], what)


def find_config(
    path: Path, folder: Path | None, given: dict[str, Any] | None, settings: list[dict | None], what: str
) -> dict[str, Any]:
    """Return the `model:` section: the given one, or from the archive, the checkpoint, or its folder."""
    if given is not None:
        return given
    places = [] if folder is None else sorted(folder.rglob(CONFIG))[:1]
    beside = [path.parent / HPARAMS, path.parent.parent / HPARAMS]
    found = model_section(next((part for part in settings if part), None))
    if places:
        found = model_section(read_yaml(places[0], CONFIG, number_keys=True))
    elif found is None:
        files = [place for place in beside if place.is_file()]
        found = model_section(read_yaml(files[0], HPARAMS, number_keys=True)) if files else None
    if found is None:
        raise ValueError(
            f"{what} has no configuration with a section `unet`: specify NeMo's YAML, or put Lightning's {HPARAMS} next to it."
        )
    return found


def read_config(config: Config, name: str) -> dict[str, Any]:
    """Return the `model:` section of a given configuration."""
    if isinstance(config, (str, os.PathLike)):
        found = model_section(read_yaml(config, name, number_keys=True))
    else:
        found = model_section(config)
    if found is None:
        raise bad_argument(name, config, "a configuration of NeMo's, with a section `unet`")
    return found


def model_section(config: Any) -> dict[str, Any] | None:
    """Return the section that has `unet`: the whole, or `model`, or Lightning's `cfg`."""
    for _ in range(4):
        if not isinstance(config, Mapping):
            return None
        if "unet" in config:
            return dict(config)
        config = config.get("cfg", config.get("model"))
    return None
