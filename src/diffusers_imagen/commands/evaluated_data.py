"""Rows of a data set for an evaluation, selected by a command's arguments."""

from pathlib import Path

from ..training.data.data_config import DataConfig
from ..training.data.row_pictures import RowPictures
from ..training.data.sources import SAVED, open_rows


class DataPictures(RowPictures):
    """The images of a split, with or without their captions.

    Args:
        argument (`str`): Name of the argument, for messages.
        source (`str`): Folder or Hub id.
        split (`str`): The split.
        image_column (`str`): Column with images.
        styles (`list[str]`, *optional*): Accepted values of the column `style`.
        caption_column (`str`, *optional*): Column with captions; rows without a caption are skipped.

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
