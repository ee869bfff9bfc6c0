"""Rows of a data set as an evaluation sees them: pictures and captions by number."""

from pathlib import Path
from typing import Any

from PIL import Image

from ..training.data.captions import BadCaption, caption_text
from ..training.data.data_config import DataConfig
from ..training.data.fingerprint import describe_data
from ..training.data.pixels import name_image, read_image
from ..training.data.sources import SAVED, open_rows
from ..utils.images import BadImage


class DataPictures:
    """The pictures of a split, with their captions or without.

    Args:
        argument (`str`): The argument that named it, for messages.
        source (`str`): Folder or Hub id.
        split (`str`): The split.
        image_column (`str`): Where the pictures are.
        styles (`list[str]`, *optional*): Values of the column `style` that rows should have.
        caption_column (`str`, *optional*): Where the captions are, if there should be some; rows without are left out.

    Raises:
        ValueError: If there is no such data.
    """

    has_pictures = True

    def __init__(
        self,
        argument: str,
        source: str,
        split: str,
        image_column: str,
        styles: list[str] | None = None,
        caption_column: str | None = None,
    ):
        is_folder = Path(source).is_dir() and not any((Path(source) / file).is_file() for file in SAVED)
        config = DataConfig(
            train_data_dir=source if is_folder else None,
            dataset_name=None if is_folder else source,
            image_column=image_column,
            caption_column=[caption_column or "text"],
            styles=styles,
        )
        try:
            self.rows = open_rows(config, split, with_text=caption_column is not None)
        except ValueError as error:
            raise ValueError(f"`{argument}` is '{source}', which cannot be used: {error}") from error
        self.argument, self.name = argument, f"{Path(source).name}, {split}"
        self.numbers = list(range(len(self.rows.data)))
        self.captions: list[str] | None = None
        if caption_column is not None:
            found = [(i, text) for i, text in enumerate(map(text_of, self.rows.data[caption_column][:])) if text]
            if not found:
                raise ValueError(f"`{argument}` is '{source}', none of whose rows has a caption.")
            self.numbers, self.captions = [number for number, _ in found], [text for _, text in found]
        self.data_identity = {
            **describe_data(self.rows, config),
            "split": split,
            "styles": styles,
            "rows": len(self.numbers),
        }

    def __len__(self) -> int:
        return len(self.numbers)

    def caption(self, index: int) -> str:
        return "" if self.captions is None else self.captions[index]

    def picture(self, index: int) -> Image.Image:
        cell = self.rows.data[self.numbers[index]][self.rows.image_column]
        try:
            return read_image(cell, self.rows.folder)
        except (BadImage, OSError) as error:
            name = name_image(cell, self.numbers[index])
            raise ValueError(f"`{self.argument}` has {name}, which cannot be read: {error}") from error

    def identity(self) -> dict[str, Any]:
        return self.data_identity


def text_of(cell: Any) -> str:
    """A cell's caption; empty for one that holds none."""
    try:
        return caption_text(cell).strip()
    except BadCaption:
        return ""
