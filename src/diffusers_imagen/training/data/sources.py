"""Rows of images and captions, from a folder or from the Hub, with images not yet decoded."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple, Optional, Union

import numpy as np
from datasets import Dataset, Image, IterableDataset, IterableDatasetDict, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from .config import DataConfig


METADATA = {"metadata.jsonl": "json", "metadata.csv": "csv"}
TEXT_TYPES = ("string", "large_string")


class Rows(NamedTuple):
    """A split of a data set."""

    data: Union[Dataset, IterableDataset]
    image_column: str
    folder: str  # where relative file names begin

    @property
    def streaming(self) -> bool:
        return isinstance(self.data, IterableDataset)


def open_rows(config: DataConfig, split: str, with_text: bool = True) -> Rows:
    """The rows of a split, in the chosen styles.

    Args:
        config (`DataConfig`): Where the data is.
        split (`str`): The split's name, or the value of the split column.
        with_text (`bool`): Whether captions are needed.

    Raises:
        ValueError: If there is no such data, column or split, or a caption column that holds no text.
    """
    splits, folder = load_splits(config)
    some = next(iter(splits.values()))
    columns = column_names(some, config)
    image_column = find_image_column(some, columns, config)
    check_columns(some, columns, config, with_text)
    by_column = len(splits) == 1 and config.split_column in columns
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
        data = take(data, config)
    features = data.features
    if features is not None and isinstance(features.get(image_column), Image):
        data = data.cast_column(image_column, Image(decode=False))
    if with_text and config.caption is not None:
        data = give_caption(data, config)
    needed = [image_column, *(config.caption_column if with_text else []), *draw_columns(config)]
    return Rows(data.select_columns(list(dict.fromkeys(needed))), image_column, folder)


def load_splits(config: DataConfig) -> tuple[dict[str, Union[Dataset, IterableDataset]], str]:
    """All splits by name, and the folder where relative file names begin."""
    options = {"cache_dir": config.cache_dir, "streaming": config.streaming}
    if config.train_data_dir is None:
        if config.dataset_name is None:
            raise ValueError("There is no data: give `train_data_dir` or `dataset_name`.")
        name, argument = config.dataset_name, "dataset_name"
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            return as_splits(load_from_disk(name), config), ""
    else:
        name, argument = config.train_data_dir, "train_data_dir"
        if not Path(name).is_dir():
            raise ValueError(f"`train_data_dir` is {name!r}, which is no folder.")
    try:
        for file, builder in METADATA.items():
            if config.train_data_dir is not None and (Path(name) / file).is_file():
                return as_splits(load_dataset(builder, data_files=str(Path(name) / file), **options), config), name
        return as_splits(load_dataset(name, config.dataset_config_name, **options), config), name
    except StopIteration:  # of datasets' JSON reader, at an empty file
        raise ValueError(f"`{argument}` is {name!r}, whose metadata file is empty.") from None
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"`{argument}` is {name!r}, which cannot be opened: {reason}") from error


def as_splits(data, config: DataConfig) -> dict[str, Union[Dataset, IterableDataset]]:
    """A single data set is a data set of one split."""
    if not isinstance(data, dict):
        data = {"train": data}
    if config.streaming and not isinstance(data, IterableDatasetDict):
        data = {
            name: part if isinstance(part, IterableDataset) else part.to_iterable_dataset()
            for name, part in data.items()
        }
    return dict(data)


def column_names(data: Union[Dataset, IterableDataset], config: DataConfig) -> list[str]:
    """The columns; of a stream that does not say, those of its first row."""
    if data.column_names is not None and not (isinstance(data, Dataset) and len(data) == 0):
        return data.column_names
    first = next(iter(data), None)
    if first is None:
        name = config.train_data_dir or config.dataset_name
        raise ValueError(f"The data set {name!r} is empty.")
    return list(first)


def find_image_column(data, columns: list[str], config: DataConfig) -> str:
    """The configured column; without it that of a metadata file, or the only one with images."""
    if config.image_column in columns:
        return config.image_column
    if "file_name" in columns:
        return "file_name"
    images = [name for name, feature in (data.features or {}).items() if isinstance(feature, Image)]
    if len(images) == 1:
        return images[0]
    raise ValueError(f"`image_column` is {config.image_column!r}, but the data set has the columns {columns}.")


def check_columns(data, columns: list[str], config: DataConfig, with_text: bool) -> None:
    """Checks that the columns exist and that captions are text."""
    captions = config.caption_column if with_text and config.caption is None else []
    needed = {*captions, *draw_columns(config)}
    needed |= {"style"} if config.styles else set()
    missing = needed - set(columns)
    if missing:
        raise ValueError(f"The data set lacks the columns {sorted(missing)}; it has {columns}.")
    for column in captions if data.features is not None else []:
        feature = data.features[column]
        inner = feature.feature if isinstance(feature, List) else feature
        if type(inner).__name__ == "Json":  # of cells of several kinds: those that are no captions are skipped
            continue
        if not (isinstance(inner, Value) and inner.dtype in TEXT_TYPES):
            raise ValueError(
                f"`caption_column` {column!r} holds {getattr(inner, 'dtype', type(inner).__name__)}, but captions are "
                f"text or lists of words: name a text column among {columns}."
            )


def keep_rows(data, wanted: dict[str, list[str]], split: str):
    """Rows whose columns have one of the wanted values."""
    if isinstance(data, IterableDataset):
        if not wanted:
            return data
        return data.filter(lambda row: all(row[column] in values for column, values in wanted.items()))
    keep = np.ones(len(data), dtype=bool)
    for column, values in wanted.items():
        keep &= np.array([value in values for value in data[column][:]], dtype=bool)
    if not keep.any():
        styles = f" and a style among {wanted['style']}" if "style" in wanted else ""
        raise ValueError(f"No row has split {split!r}{styles}.")
    return data if keep.all() else data.select(np.flatnonzero(keep))


def give_caption(data, config: DataConfig):
    """The rows with `config.caption` instead of their own."""
    (column,) = config.caption_column
    if isinstance(data, IterableDataset):
        return data.map(lambda row: {column: config.caption})
    return data.select_columns([name for name in data.column_names if name != column]).add_column(
        column, [config.caption] * len(data)
    )


def take(data, config: DataConfig):
    """`max_train_samples` rows: at random, or of a stream the first."""
    if isinstance(data, IterableDataset):
        return data.take(config.max_train_samples)
    return data.shuffle(seed=config.seed).select(range(min(config.max_train_samples, len(data))))


def draw_columns(config: DataConfig) -> list[str]:
    """The columns that say how often a row is drawn."""
    return [*(config.balance_by or []), *([config.weight_column] if config.weight_column else [])]


def draw_weights(rows: Dataset, config: DataConfig) -> Optional[np.ndarray]:
    """How often each row is drawn, `(N,)`, in proportion; None for all alike.

    Every combination of values in `config.balance_by` is drawn equally often, times `config.weight_column`.

    Raises:
        ValueError: If a weight is no number above 0.
    """
    weights = np.ones(len(rows))
    if config.balance_by:
        keys = list(zip(*(map(str, rows[column][:]) for column in config.balance_by)))
        counts = Counter(keys)
        weights /= [counts[key] for key in keys]
    if config.weight_column is not None:
        for row, weight in enumerate(rows[config.weight_column][:]):
            if not (isinstance(weight, (int, float)) and 0 < weight < float("inf")):
                raise ValueError(
                    f"`weight_column` is {config.weight_column!r}, where row {row} has {weight!r}, but should have a "
                    "number above 0."
                )
            weights[row] *= weight
    return weights if draw_columns(config) else None
