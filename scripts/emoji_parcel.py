"""Requirements and results of the machine that trains the emoji cascade; part of `train_emoji_cascade.py`."""

import io
import tarfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from safetensors.torch import load_file, save

from diffusers_imagen.utils.files import whole_file


PART_BYTES = 16 * 2**20 - 2**16
MOST_PARTS = 4


def write_parcel(folder: Path, target: Path) -> list[Path]:
    """Pack stages with weights in half precision, losses and metrics as a tar in parts: `cat cascade.tar.* | tar x`.

    Returns:
        The parts, each at most 16 MiB.

    Raises:
        ValueError: If there would be more than four.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in parcel_files(folder):
            data = path.read_bytes()
            if path.suffix == ".safetensors":
                weights = load_file(path)
                data = save({name: weight.half() for name, weight in weights.items()}, {"format": "pt"})
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    content = file.getvalue()
    parts = [content[start : start + PART_BYTES] for start in range(0, len(content), PART_BYTES)]
    if len(parts) > MOST_PARTS:
        raise ValueError(f"`output_dir`: {len(content) / 2**20:.1f} MiB are more than {MOST_PARTS} files of 16 MiB.")
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / f"cascade.tar.{number}" for number in range(len(parts))]
    for path, part in zip(paths, parts):
        with whole_file(path) as partial:
            partial.write_bytes(part)
    return paths


def parcel_files(folder: Path) -> list[Path]:
    """Return the results in a recipe's folder; weights only of runs whose weights a later stage does not include."""
    runs = sorted(path for path in folder.glob("runs/*") if (path / "training.json").is_file())
    last = {path.name.partition(".")[0]: path for path in runs}
    for earlier, later in (("base_32", "base_64"), ("super_resolution", "refine")):
        if later in last:
            last.pop(earlier, None)
    files = [folder / "progress.json"]
    for run in runs:
        files += [run / name for name in ("training.json", "losses.jsonl", "metrics.jsonl", "model_index.json")]
        files += [*run.glob("scheduler/*.json"), *run.glob("unet/*.json")]
        files += run.glob("unet/*.safetensors") if run in last.values() else []
    for name in ("results.json", "report.html", "*.png"):
        files += sorted(folder.glob(f"evaluation/*/{name}"))
    return [path for path in files if path.is_file()]


def find_missing(setup: Path) -> list[str]:
    """Return the missing requirements of the package, and of its extras `diffusers` and `datasets`."""
    parser = ConfigParser()
    parser.read(setup)
    texts = parser["options"]["install_requires"].splitlines() + parser["options.extras_require"]["train"].splitlines()
    texts = [text for text in texts if text.strip() and not text.lstrip().startswith("#")]
    wanted = [
        requirement for requirement in map(Requirement, texts) if requirement.name not in ("tensorboard", "peft")
    ]
    for name in ("diffusers", "datasets"):
        try:
            theirs = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        wanted += [item for item in theirs if item.marker is None or item.marker.evaluate({"extra": ""})]
    missing = []
    for requirement in wanted:
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier} (it has {found})")
    return missing
