"""Sources of rows of images and captions: a folder or the Hub, with images that are not decoded yet."""

import glob
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import FILES_TO_IGNORE
from diffusers.utils import logging

from .data_config import DataConfig
from .image_folders import (
    METADATA,
    digest_pictures,
    find_metadata,
    find_pictures,
    find_shards,
    group_by_split,
    list_files,
    picture_columns,
    picture_rows,
)
from .permutation import Permutation
from .shards import MOST_EXAMINED, Shard, check_shards, choose_pictures, read_rows, shard_features
from .slot_draws import SUBSET_SEED, philox_key
from .tables import EmptyTable, check_table, find_damage, find_fault, innermost


logger = logging.get_logger(__name__)

SAVED = ("dataset_dict.json", "state.json")  # files written by `save_to_disk`
TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")
RULES = re.DOTALL | re.MULTILINE
MOST_CARD = 2**16  # maximum characters of a card that are read
MOST_SHARDS = 1024  # maximum shards of a stream of images
ROWS_AT_ONCE = 10_000  # maximum number of rows of which some columns are in memory
ROWS_IN_MEMORY = 10_000  # maximum number of images without a metadata file whose captions are in memory
TEXT_TYPES = ("string", "large_string")


class Rows(NamedTuple):
    """A split of a data set."""

    data: Dataset | IterableDataset
    image_column: str
    folder: str  # base folder of relative file names
    split: str  # of the data set, of which a column may select a part
    low_res_column: str | None = None  # with the low-resolution images, if they are not downsampled images

    @property
    def image_columns(self) -> list[str]:
        """All columns with images."""
        return [self.image_column, *([self.low_res_column] if self.low_res_column else [])]

    @property
    def streaming(self) -> bool:
        return isinstance(self.data, IterableDataset)


def open_rows(config: DataConfig, split: str, with_text: bool = True) -> Rows:
    """Open the rows of a split, with the selected styles.

    Args:
        config (`DataConfig`): Configuration of the data.
        split (`str`): The split's name, or the value of the split column.
        with_text (`bool`): Whether captions are needed.

    Raises:
        ValueError: If there is no such data, column or split, or a caption column does not contain text.
    """
    splits, folder = load_splits(config)
    some = next(iter(splits.values()))
    columns = column_names(some, config)
    image_column = find_image_column(some, columns, config)
    check_columns(some, columns, config, with_text)
    by_column = is_split_by_column(splits, columns, config)
    if not by_column and split not in splits:
        raise ValueError(f"There is no split {split!r}; the data set has {sorted(map(str, splits))}.")
    data = some if by_column else splits[split]
    if not by_column:
        check_columns(data, column_names(data, config), config, with_text)

    wanted = {config.split_column: [split]} if by_column else {}
    if config.styles is not None:
        wanted["style"] = config.styles
    data = keep_rows(data, wanted, split)
    if config.max_train_samples is not None and split == config.train_split:
        data = take(data, config.max_train_samples, config.seed)
    image_columns = [image_column, *([config.low_resolution_column] if config.low_resolution_column else [])]
    for column in image_columns:
        if data.features is not None and isinstance(data.features.get(column), Image):
            data = data.cast_column(column, Image(decode=False))
    if with_text and config.caption is not None:
        data = give_caption(data, config)
    needed = [*image_columns, *(config.caption_column if with_text else []), *draw_columns(config)]
    source = str(next(iter(splits))) if by_column else split
    data = data.select_columns(list(dict.fromkeys(needed)))
    return Rows(data, image_column, folder, source, config.low_resolution_column)


def load_splits(config: DataConfig) -> tuple[dict[str, Dataset | IterableDataset], str]:
    """
    Load all splits by name; return the base folder of relative file names, or the data set's name on the Hub, too.
    """
    argument = "dataset_name" if config.train_data_dir is None else "train_data_dir"
    name = config.train_data_dir or config.dataset_name
    if name is None:
        raise ValueError("There is no data: set `train_data_dir` or `dataset_name`.")
    if config.train_data_dir is not None and not Path(name).is_dir():
        raise ValueError(f"`train_data_dir` is {name!r}, which is not a folder.")
    try:
        if argument == "dataset_name" and any((Path(name) / file).is_file() for file in SAVED):
            return as_splits(load_from_disk(name), config), ""
        if Path(name).is_dir():
            return as_splits(load_folder(name, config), config), name
        return as_splits(load_dataset(name, config.dataset_config_name, **load_options(config)), config), name
    except (EmptyTable, StopIteration):  # StopIteration: from datasets' JSON reader, for an empty file
        raise ValueError(f"`{argument}` is {name!r}, whose metadata file is empty.") from None
    # damaged files raise errors of any type
    except Exception as error:
        raise ValueError(f"`{argument}` is {name!r}, which cannot be opened: {innermost(error)}") from error


def is_split_by_column(splits: Collection[str], columns: list[str], config: DataConfig) -> bool:
    """Return whether the splits of a data set are the values of a column: if it has the column, and a single split."""
    return len(splits) == 1 and config.split_column in columns


def load_options(config: DataConfig) -> dict[str, Any]:
    """Return the options of `datasets` for reading a data set."""
    return {"cache_dir": config.cache_dir, "streaming": config.streaming}


def load_folder(folder: str, config: DataConfig) -> Any:
    """
    Load a local folder: with a metadata file, of images, of tar shards, or of another format that `datasets` supports.

    Raises:
        ValueError: If files would be ignored, or are damaged.
    """
    for file in METADATA:
        if os.path.lexists(os.path.join(folder, file)):
            return load_table(folder, file, config)
    files = list_files(folder)
    pictures, shards, tables = find_pictures(files), find_shards(files), find_metadata(files)
    if config.dataset_config_name is not None or is_configured(folder):
        return load_dataset(folder, config.dataset_config_name, **load_options(config))
    if tables:
        groups = group_by_split(tables, by_file_name=False)
        return {split: join([load_table(folder, file, config) for file in group]) for split, group in groups.items()}
    if pictures and shards:
        raise ValueError(
            f"it has images, such as '{pictures[0]}', and tar shards, such as '{shards[0]}': move one of them away."
        )
    if shards:
        return load_shards(folder, shards, config)
    others = [file for file in files if file.endswith((".parquet", ".arrow", ".zip"))]
    if len(pictures) > len(others):
        if others:
            logger.warning(
                f"{folder!r} has {len(pictures)} images; {len(others)} other files, such as {others[0]!r}, are not "
                "read"
            )
        groups = group_by_split(pictures, by_file_name=False)
        return {split: load_pictures(folder, group, config) for split, group in groups.items()}
    return load_tables(folder, files, config)


def is_configured(folder: str) -> bool:
    """Return whether the card of a folder configures which files belong to which split."""
    card = Path(folder) / "README.md"
    return (
        card.is_file()
        and re.match(r"---\n.*?^configs:.*?^---", card.read_text("utf-8", "replace")[:MOST_CARD], RULES) is not None
    )


def load_table(folder: str, file: str, config: DataConfig) -> Dataset | IterableDataset:
    """Load the rows of a metadata file, whose file names are relative to its folder."""
    path = os.path.join(folder, file)
    check_table(path)
    place, name = os.path.split(file)
    try:
        data = load_dataset(METADATA[name], data_files=glob.escape(path), split="train", **load_options(config))
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read: {innermost(error)}") from error
    return data.map(place_file, fn_kwargs={"place": place}) if place else data


def place_file(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Make the file name of a row relative to the data set's folder."""
    name = row.get("file_name")
    return {**row, "file_name": os.path.join(place, name) if isinstance(name, str) else name}


def join(parts: list) -> Dataset | IterableDataset:
    """Concatenate several tables."""
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def load_pictures(folder: str, pictures: list[str], config: DataConfig) -> Dataset | IterableDataset:
    """Load images without a metadata file, with the captions next to them; many of them as a table on disk."""
    columns = picture_columns(folder, pictures)
    features = Features(dict.fromkeys(columns, Value("string")))
    given: dict[str, Any] = {"folder": folder, "pictures": pictures, "columns": columns}
    if len(pictures) <= ROWS_IN_MEMORY:
        data = Dataset.from_list(list(picture_rows(**given)), features=features)
    else:
        data = Dataset.from_generator(
            picture_rows,
            features=features,
            cache_dir=config.cache_dir,
            gen_kwargs=given,
            fingerprint=digest_pictures(**given),
        )
    return data.to_iterable_dataset(min(len(data), MOST_SHARDS)) if config.streaming else data


def load_shards(folder: str, files: list[str], config: DataConfig) -> dict[str, Dataset | IterableDataset]:
    """
    Load the samples of tar shards, all of which must be complete; of a stream's many shards some are read completely.
    """
    groups = group_by_split(files, by_file_name=True)
    shards = {file: Shard.at(os.path.join(folder, file)) for file in files}
    contents = check_shards(list(shards.values()), MOST_EXAMINED if config.streaming else len(shards))
    if not any(found.samples for found in contents):
        raise ValueError(f"its {len(files)} tar shards have no samples.")
    pictures = tuple(choose_pictures(contents, config.image_column))
    features = shard_features(contents, config.image_column)
    options = {"features": features} | ({} if config.streaming else {"cache_dir": config.cache_dir})
    kind = IterableDataset if config.streaming else Dataset
    given = {"pictures": pictures, "features": features}
    return {
        split: kind.from_generator(read_rows, gen_kwargs={"shards": [shards[f] for f in group], **given}, **options)
        for split, group in groups.items()
    }


def load_tables(folder: str, files: list[str], config: DataConfig) -> Any:
    """Load a folder by `datasets`, for example of Parquet files, and check that no file is ignored."""
    # in a stream an error would occur in the middle of the run
    find_fault(folder, files if config.streaming else [file for file in files if file.endswith(".parquet")])
    try:
        builder = load_dataset_builder(folder, cache_dir=config.cache_dir)
        used = {os.path.realpath(path) for paths in (builder.config.data_files or {}).values() for path in paths}
        endings = {os.path.splitext(path)[1] for path in used} & set(TABLES)
        lost = [
            f for f in files if f.endswith(tuple(endings)) and os.path.realpath(os.path.join(folder, f)) not in used
        ]
        lost = [file for file in lost if os.path.basename(file) not in FILES_TO_IGNORE] if endings else []
        if lost:
            raise ValueError(
                f"{len(lost)} of its files belong to no split, such as '{lost[0]}', while others are named after one: "
                "rename or move them."
            )
        return load_dataset(folder, **load_options(config))
    except Exception:
        find_damage(folder, files)
        raise


def as_splits(data, config: DataConfig) -> dict[str, Dataset | IterableDataset]:
    """Return a data set as splits; a single data set is the split `train`."""
    if not isinstance(data, dict):
        data = {"train": data}
    if config.streaming:
        data = {
            name: part if isinstance(part, IterableDataset) else part.to_iterable_dataset()
            for name, part in data.items()
        }
    return dict(data)


def column_names(data: Dataset | IterableDataset, config: DataConfig) -> list[str]:
    """Return the columns; for a stream that does not declare them, those of its first row."""
    if data.column_names is not None and not (isinstance(data, Dataset) and len(data) == 0):
        return data.column_names
    first = next(iter(data), None)
    if first is None:
        name = config.train_data_dir or config.dataset_name
        raise ValueError(f"The data set {name!r} is empty.")
    return list(first)


def find_image_column(data, columns: list[str], config: DataConfig) -> str:
    """Return the configured column, or else that of a metadata file, or the only one with images."""
    if config.image_column in columns:
        return config.image_column
    if "file_name" in columns:
        return "file_name"
    images = [name for name, feature in (data.features or {}).items() if isinstance(feature, Image)]
    if len(images) == 1:
        return images[0]
    raise ValueError(f"`image_column` is {config.image_column!r}, but the data set has the columns {columns}.")


def check_columns(data, columns: list[str], config: DataConfig, with_text: bool) -> None:
    """Check that the columns exist and that captions are text."""
    captions = config.caption_column if with_text and config.caption is None else []
    needed = {*captions, *draw_columns(config)}
    needed |= {"style"} if config.styles else set()
    needed |= {config.low_resolution_column} if config.low_resolution_column else set()
    missing = needed - set(columns)
    if missing:
        hint = (
            ": name a column of captions as `caption_column`, or set `caption` for all"
            if missing & {*captions}
            else ""
        )
        raise ValueError(f"The data set lacks the columns {sorted(missing)}; it has {columns}{hint}.")
    for column in captions if data.features is not None else []:
        feature = data.features[column]
        inner = feature.feature if isinstance(feature, List) else feature
        if type(inner).__name__ == "Json":  # cells of several types: those that are not captions are skipped
            continue
        if not (isinstance(inner, Value) and inner.dtype in TEXT_TYPES):
            raise ValueError(
                f"`caption_column` {column!r} has {getattr(inner, 'dtype', type(inner).__name__)}, but should have "
                f"text or lists of words: choose a text column among {columns}."
            )


def keep_rows(data, wanted: dict[str, list[str]], split: str):
    """Select rows whose columns have one of the given values."""
    if isinstance(data, IterableDataset):
        if not wanted:
            return data
        return data.filter(lambda row: all(row[column] in values for column, values in wanted.items()))
    keep = np.ones(len(data), dtype=bool)
    for column, values in wanted.items():
        keep &= np.fromiter((value in values for (value,) in iterate_cells(data, [column])), bool, len(data))
    if not keep.any():
        styles = f" and a style among {wanted['style']}" if "style" in wanted else ""
        raise ValueError(f"No row has split {split!r}{styles}.")
    return data if keep.all() else data.select(np.flatnonzero(keep))


def give_caption(data, config: DataConfig):
    """Replace the captions of the rows by `config.caption`."""
    (column,) = config.caption_column
    if isinstance(data, IterableDataset):
        return data.map(lambda row: {column: config.caption})
    return data.select_columns([name for name in data.column_names if name != column]).add_column(
        column, [config.caption] * len(data)
    )


def take(data, number: int, seed: int):
    """Select a number of rows: at random, or the first rows of a stream."""
    if isinstance(data, IterableDataset):
        return data.take(number)
    order = Permutation(len(data), philox_key(seed, SUBSET_SEED))
    return data.select(order(np.arange(min(number, len(data)))))


def iterate_cells(data: Dataset, columns: list[str]) -> Iterator[tuple]:
    """Iterate over the cells of some columns, row by row, with few rows in memory."""
    for part in data.select_columns(columns).iter(batch_size=ROWS_AT_ONCE):
        yield from zip(*(part[column] for column in columns))


def draw_columns(config: DataConfig) -> list[str]:
    """Return the columns that determine how often a row is drawn."""
    return [*(config.balance_by or []), *([config.weight_column] if config.weight_column else [])]


def draw_weights(rows: Dataset, config: DataConfig) -> np.ndarray | None:
    """Return the relative frequency of each row, `(N,)`; None for uniform frequencies.

    Every combination of values in `config.balance_by` is drawn equally often, times `config.weight_column`.

    Raises:
        ValueError: If a weight is not a number above 0.
    """
    if not draw_columns(config):
        return None
    weights = np.ones(len(rows))
    if config.balance_by:
        groups: dict[tuple, int] = {}
        keys = (tuple(map(str, cells)) for cells in iterate_cells(rows, config.balance_by))
        found = np.fromiter((groups.setdefault(key, len(groups)) for key in keys), np.int32, len(rows))
        weights /= np.bincount(found)[found]
    if config.weight_column is not None:
        for row, (weight,) in enumerate(iterate_cells(rows, [config.weight_column])):
            if not (isinstance(weight, (int, float)) and 0 < weight < float("inf")):
                raise ValueError(
                    f"`weight_column` is {config.weight_column!r}, where row {row} has {weight!r}, but should have a "
                    "number above 0."
                )
            weights[row] *= weight
    return weights
