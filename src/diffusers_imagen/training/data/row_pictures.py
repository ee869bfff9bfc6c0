"""Rows of a data set for evaluation: images and captions by index."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from ...utils.images import BadImage
from .captions import BadCaption, caption_text
from .data_config import DataConfig
from .fingerprint import describe_data
from .pixels import name_image, read_image
from .sources import Rows


class RowPictures:
    """The images of a split, with or without their captions: a `PictureSet` of `evaluation`.

    Args:
        rows (`Rows`): The rows, with random access.
        config (`DataConfig`):
            Configuration that they were opened with; captions are those of its first caption column.
        split (`str`): The split.
        argument (`str`): Name of the argument, for messages.
        with_text (`bool`): Whether captions are needed; rows without a caption are then skipped.

    Raises:
        ValueError: If no row has a caption.
    """

    has_pictures = True

    def __init__(self, rows: Rows, config: DataConfig, split: str, argument: str, with_text: bool):
        self.rows, self.background, self.argument = rows, config.background, argument
        source = str(config.train_data_dir or config.dataset_name)
        self.name = f"{Path(source).name}, {split}"
        self.numbers = list(range(len(rows.data)))
        self.captions: list[str] | None = None
        if with_text:
            cells = rows.data[config.caption_column[0]][:]
            found = [(number, text) for number, text in enumerate(map(text_of, cells)) if text.strip()]
            if not found:
                raise ValueError(f"`{argument}`: none of the rows of '{source}', {split!r}, has a caption.")
            self.numbers, self.captions = [number for number, _ in found], [text for _, text in found]
        self.data_identity = {
            **describe_data(rows, config),
            "split": split,
            "styles": config.styles,
            "rows": len(self.numbers),
            "background": config.background,
        }

    def __len__(self) -> int:
        return len(self.numbers)

    def caption(self, index: int) -> str:
        return "" if self.captions is None else self.captions[index]

    def picture(self, index: int) -> Image.Image:
        cell = self.rows.data[self.numbers[index]][self.rows.image_column]
        try:
            return read_image(cell, self.rows.folder, self.background)
        except (BadImage, OSError) as error:
            name = name_image(cell, self.numbers[index])
            raise ValueError(f"`{self.argument}` has {name}, which cannot be read: {error}") from error

    def identity(self) -> dict[str, Any]:
        return self.data_identity


def text_of(cell: Any) -> str:
    """Return a cell's caption; empty if it has none."""
    try:
        return caption_text(cell)
    except BadCaption:
        return ""


def at_hand(rows: Rows, count: int) -> Rows:
    """Return rows with random access: of a stream the first `count`, whose encoded image files are kept in memory."""
    if not rows.streaming:
        return rows
    return rows._replace(data=Dataset.from_list(list(rows.data.take(count)), features=rows.data.features))
