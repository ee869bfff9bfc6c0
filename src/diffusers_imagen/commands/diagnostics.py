"""Checks of data sets, trained stages and embedding caches, for `diffusers-imagen doctor`."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from diffusers import AutoModel, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..conversion.deepfloyd import unet_from_deepfloyd
from ..models.interface import StageNetwork
from ..pipelines.adapted_network import AdaptedNetwork
from ..pipelines.stages import missing_weights
from ..text.cache import EmbeddingCache
from ..text.encoder import TextEncoder
from ..text.identity import encoder_width
from ..text.sharded_cache import ShardedCache, open_cache
from ..training.data.captions import iterate_captions
from ..training.data.data_config import DataConfig
from ..training.data.pixels import BadImage, fit_image, name_image, open_image, read_image
from ..training.data.sources import Rows, open_rows
from ..utils.arguments import class_of
from ..utils.errors import one_line
from ..utils.files import read_json_object
from ..utils.references import REFERENCE, read_reference


SIGMA_TOLERANCE = 0.25  # relative: the preconditioning tolerates this deviation
MANY = 0.01  # share from which a finding is reported as wrong
NAMED = 3


class Finding(NamedTuple):
    """Result of one check."""

    wrong: bool
    text: str


def examine_data(
    config: DataConfig, sigma_data: float = 0.5, text_encoder: str | None = None, num_images: int = 1000
) -> list[Finding]:
    """Check images, captions and duplicates of a data set's training split.

    Args:
        config (`DataConfig`): Configuration of the data.
        sigma_data (`float`): Configured standard deviation of the images in [-1, 1].
        text_encoder (`str`, *optional*): Text encoder whose tokenizer counts tokens.
        num_images (`int`): Number of images to open, spread evenly over the rows.
    """
    rows = open_rows(config, config.train_split)
    if not len(rows.data):
        return [Finding(True, f"there are no rows in split {config.train_split!r}")]
    places = np.unique(np.linspace(0, len(rows.data) - 1, min(num_images, len(rows.data))).round().astype(int))
    findings = [Finding(False, f"{len(rows.data)} rows, of which {len(places)} images are opened")]
    findings += examine_images(rows, places, config, sigma_data)
    findings += examine_captions(rows, config, text_encoder)
    return findings


def examine_images(rows: Rows, places: np.ndarray, config: DataConfig, sigma_data: float) -> list[Finding]:
    """Check modes, sizes, value range, standard deviation, duplicates, and unreadable files."""
    modes: Counter[str] = Counter()
    seen: dict[bytes, str] = {}
    bad: dict[str, str] = {}
    small, copies = [], []
    count, total, squares, low, high = 0, 0.0, 0.0, 255, 0
    for place in tqdm(places.tolist(), desc="Opening images", mininterval=5):
        value = rows.data[place][rows.image_column]
        name = name_image(value, place)
        try:
            modes[open_image(value, rows.folder).mode] += 1
            image = read_image(value, rows.folder, config.background)
        except BadImage as error:
            bad[name] = str(error)
            continue
        if min(image.size) < config.resolution:
            small.append(f"{name} ({image.width}x{image.height})")
        pixels = fit_image(image, config.resolution, config.resolution)
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if digest in seen:
            copies.append(f"{name} of {seen[digest]}")
        seen.setdefault(digest, name)
        values = pixels.astype(np.float64) / 127.5 - 1
        count, total, squares = count + values.size, total + values.sum(), squares + (values**2).sum()
        low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
    findings = [
        Finding(bool(bad), report(bad, len(places), "cannot be read and are skipped in training", "all can be read"))
    ]
    if count == 0:
        return findings
    mean = total / count
    sigma = math.sqrt(max(0.0, squares / count - mean**2))
    findings += [
        Finding(False, "modes: " + ", ".join(f"{mode} {number}" for mode, number in modes.most_common())),
        judge_range(low, high),
        judge_sigma(sigma, sigma_data, f"at {config.resolution} px, mean {mean:+.3f}"),
        Finding(
            len(small) >= max(1, MANY * len(places)),
            report(
                small, len(places), f"are smaller than {config.resolution} px and are upscaled", "none is upscaled"
            ),
        ),
        Finding(
            len(copies) >= max(1, MANY * len(places)),
            report(copies, len(places), "are exact copies of others", "no image is a copy of another"),
        ),
    ]
    return findings


def judge_range(low: int, high: int) -> Finding:
    """Check that pixels use the value range."""
    uniform = high - low < 128
    hint = ": nearly uniform; were they scaled to [0, 1] before they were saved?" if uniform else ""
    return Finding(uniform, f"pixels from {low} to {high} of 255{hint}")


def judge_sigma(sigma: float, sigma_data: float, where: str) -> Finding:
    """Check that the images have the configured standard deviation."""
    off = abs(sigma / sigma_data - 1) > SIGMA_TOLERANCE
    hint = f": set `sigma_data` to {sigma:.2f}" if off and sigma > 0.005 else ""
    return Finding(off, f"measured sigma_data {sigma:.3f} {where}; configured {sigma_data}{hint}")


def examine_captions(rows: Rows, config: DataConfig, text_encoder: str | None) -> list[Finding]:
    """Check for empty and repeated captions, and count those that are cut."""
    captions = list(iterate_captions(rows.data, config.caption_column))
    counts = Counter(captions)
    empty = sum(number for caption, number in counts.items() if not caption.strip())
    common, times = counts.most_common(1)[0]
    repeated = times > max(1, 0.1 * len(captions))
    missing = len(rows.data) * len(config.caption_column) - len(captions)
    findings = [
        Finding(
            missing > 0, f"{missing} captions are missing" + ", and their rows are skipped in training" * bool(missing)
        ),
        Finding(empty > 0, f"{empty} of {len(captions)} captions are empty"),
        Finding(
            repeated,
            f"{len(counts)} distinct captions" + (f"; {times} times the same: {common[:80]!r}" if repeated else ""),
        ),
    ]
    if text_encoder is None:
        return findings + [Finding(False, "token lengths were not counted: pass `text_encoder`")]
    encoder = TextEncoder.from_pretrained(text_encoder, config.tokenizer_max_length)
    distinct = list(counts)
    lengths = []
    for start in range(0, len(distinct), 1000):
        lengths += encoder.count_tokens(distinct[start : start + 1000])
    cut = sum(counts[caption] for caption, length in zip(distinct, lengths) if length > encoder.max_length)
    longest = max(zip(lengths, distinct))
    return findings + [
        Finding(
            cut > MANY * len(captions),
            f"{cut} of {len(captions)} captions ({cut / len(captions):.1%}) are cut at {encoder.max_length} tokens; "
            f"the longest has {longest[0]}: {longest[1][:80]!r}",
        )
    ]


def attempt(what: str, examine: Callable[[], list[Finding]]) -> list[Finding]:
    """Return the findings of a check; an error of any type is a finding too."""
    try:
        return examine()
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        return [Finding(True, f"{what} cannot be read: {kind}{one_line(error)[:500]}")]


def examine_cache(folder: Path) -> list[Finding]:
    """Check size, width and checksums of an embedding cache."""
    return find_irregular(folder) or attempt("the embedding cache", lambda: examine_shards(open_cache(folder)))


def examine_shards(cache: EmbeddingCache | ShardedCache) -> list[Finding]:
    """Check size, width and checksums of an open cache."""
    encoder = cache.identity()
    findings = [
        Finding(
            len(cache) == 0,
            f"{len(cache)} captions, width {cache.width}, up to {cache.max_length} tokens, {cache.dtype}, "
            f"encoded by {encoder.get('class', 'an unnamed encoder')}",
        )
    ]
    problems = cache.verify()
    return findings + ([Finding(True, text) for text in problems] or [Finding(False, "all checksums are correct")])


def find_irregular(folder: Path) -> list[Finding]:
    """Find FIFOs, sockets, devices and broken links in a folder, which cannot be read."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_file() and not path.is_dir()]
    return [Finding(True, f"{path.relative_to(folder)} is not a regular file") for path in paths[:NAMED]]


def find_networks(folder: Path) -> list[Path]:
    """Find the folders of networks: a stage's `unet/`, a cascade's `base_unet/` and others, or the folder itself."""
    inside = sorted(path.parent for path in folder.glob("*unet/config.json"))
    return inside or [folder] * (folder / "config.json").exists()


def examine_stage(folder: Path, text_encoder: str | None = None) -> list[Finding]:
    """Check weights, widths and losses of a stage folder, or of all stages of a cascade."""
    findings = find_irregular(folder)
    if findings:  # reading a FIFO would never end
        return findings
    encoder = text_encoder or (str(folder) if (folder / "text_encoder").is_dir() else None)
    for path in [folder / "model_index.json", *sorted(folder.glob("*scheduler/scheduler_config.json"))]:
        if path.exists():
            findings += attempt(str(path.relative_to(folder)), partial(examine_json, path))
    for path in find_networks(folder):
        own = attempt("the network", partial(examine_network, path, encoder))
        findings += [finding._replace(text=f"{path.name}: {finding.text}") for finding in own]
    if (folder / "losses.jsonl").exists():
        findings += attempt("losses.jsonl", lambda: examine_losses(read_losses(folder / "losses.jsonl")))
    return findings


def examine_json(path: Path) -> list[Finding]:
    """Check that a file is a JSON object, without further findings."""
    read_json_object(path)
    return []


def read_losses(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run's losses; raise ValueError for an invalid line, with its number."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            float(record.get("loss") or 0)
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"line {number} is not a record with a `loss`: {line[:80]!r}") from error
        records.append(record)
    return records


def examine_network(folder: Path, text_encoder: str | None) -> list[Finding]:
    """Check the weights of a network, and that it fits the text encoder."""
    # the folder of an adapter has only a reference to its network
    network_class = AdaptedNetwork if (folder / REFERENCE).is_file() else AutoModel
    unet = network_class.from_pretrained(str(folder))
    if isinstance(unet, UNet2DConditionModel):  # as DeepFloyd IF is published
        unet = unet_from_deepfloyd(unet)
    if not isinstance(unet, StageNetwork):
        return [Finding(True, f"it is {class_of(unet)}, but should be ImagenUNetModel or EfficientUNetModel")]
    missing = missing_weights(unet)
    if missing:
        return [Finding(True, f"{len(missing)} weights are missing, such as {missing[0]}")]
    findings = [examine_weights(unet)]
    if text_encoder is not None:
        findings += attempt("the text encoder", lambda: [examine_width(unet.text_width, text_encoder)])
    return findings


def examine_weights(unet: StageNetwork) -> Finding:
    """Check that the weights are finite, and not those of a new network."""
    parameters = dict(unet.named_parameters())
    broken = [name for name, value in parameters.items() if not value.isfinite().all()]
    count = sum(value.numel() for value in parameters.values())
    if broken:
        return Finding(True, f"{len(broken)} weights are not finite, such as {broken[0]}: training diverged")
    if unet.is_untrained():
        return Finding(True, "the last layers of all residual branches are zero, as in a new network: it is untrained")
    trained = " and trained" if unet.zero_initialized() else ""
    return Finding(False, f"{type(unet).__name__}: {count:,} weights, finite{trained}")


def examine_width(width: int | None, text_encoder: str) -> Finding:
    """Check that the network's text embeddings have the width of the encoder's."""
    if width is None:
        return Finding(False, "the network is not conditioned on text")
    subfolder = "text_encoder" if (Path(text_encoder) / "text_encoder").is_dir() else ""
    if (Path(text_encoder) / subfolder / REFERENCE).is_file():
        reference = read_reference(Path(text_encoder) / subfolder)
        if reference.is_local and not Path(reference.source).is_dir():
            return Finding(True, f"the text encoder is not in '{reference.source}', where {REFERENCE} says")
    actual = encoder_width(AutoConfig.from_pretrained(text_encoder, subfolder=subfolder, trust_remote_code=False))
    wrong = width != actual
    text = f"the text encoder's embeddings have width {actual}"
    return Finding(wrong, text + (f", but the network needs width {width}" if wrong else ", as the network needs"))


def examine_losses(records: list[dict[str, Any]]) -> list[Finding]:
    """Check that a loss curve is finite and decreases."""
    losses = [float(record["loss"]) for record in records if record.get("loss") is not None]
    for record in records:
        if not math.isfinite(float(record.get("loss") or 0)):
            return [Finding(True, f"the loss is {record['loss']} at step {record.get('step')}: training diverged")]
    if len(losses) < 3:
        return [Finding(False, f"number of recorded losses: {len(losses)}, too few to judge")]
    lowest, last = min(losses), losses[-1]
    rises = last > 1.1 * lowest and last > losses[0] * 0.9
    text = f"loss: first {losses[0]:.4f}, lowest {lowest:.4f}, last {last:.4f}"
    return [Finding(rises, text + (": it increases; lower `learning_rate`, or check the data" if rises else ""))]


def report(found: dict | list, total: int, what: str, nothing: str) -> str:
    """Return a count of images, with the names of the first ones."""
    if not found:
        return f"images: {nothing}"
    named = [f"{name}: {found[name]}" if isinstance(found, dict) else name for name in list(found)[:NAMED]]
    return f"{len(found)} of {total} images {what}: {'; '.join(named)}" + ("; ..." if len(found) > NAMED else "")
