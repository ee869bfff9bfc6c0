"""Rows of a data set that a command names, as an evaluation sees them."""

from pathlib import Path

from ..training.data.data_config import DataConfig
from ..training.data.row_pictures import RowPictures
from ..training.data.sources import SAVED, open_rows


class DataPictures(RowPictures):
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
        with_text = caption_column is not None
        try:
            rows = open_rows(config, split, with_text)
        except ValueError as error:
            raise ValueError(f"`{argument}` is '{source}', which cannot be used: {error}") from error
        super().__init__(rows, config, split, argument, with_text)
