"""Configuration of the training data. Field names are those of diffusers' training scripts where they exist."""

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import ImageColor

from ..settings import check_settings


Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]  # names of Pillow

# width to height, from a panorama to a full-length portrait
ASPECT_RATIOS = (2.0, 16 / 9, 3 / 2, 4 / 3, 5 / 4, 1.0, 4 / 5, 3 / 4, 2 / 3, 9 / 16, 1 / 2)


def arg(default: Any, help: str, place: Literal["local", "local_or_hub"] | None = None) -> Any:
    """Define a field with its help; lists are copied for each instance.

    Args:
        default: Default value.
        help (`str`): Description, one sentence.
        place (`str`, *optional*):
            "local" for a path, or "local_or_hub" for a path or a Hub id: only the last part of a path is published.
    """
    metadata = {"help": help} if place is None else {"help": help, "place": place}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Configuration of the data source and its processing. Sizes are in pixels."""

    train_data_dir: str | None = arg(
        None,
        "Folder of images, with a metadata.jsonl, .csv or .parquet, or a .txt for each image; of Parquet files; or of "
        "WebDataset tar shards.",
        place="local",
    )
    dataset_name: str | None = arg(
        None, "Data set on the Hub, or a folder written by `datasets`.", place="local_or_hub"
    )
    dataset_config_name: str | None = arg(None, "Configuration of the data set on the Hub.")
    cache_dir: str | None = arg(None, "Download folder of `datasets`.", place="local")
    streaming: bool = arg(False, "Read the data set in order, without writing it to disk first.")
    shuffle_buffer_size: int = arg(1000, "Number of rows that are shuffled at a time with streaming.")
    image_column: str = arg(
        "image", "Column with images; also accepted: `file_name` of a metadata file, and any image of tar shards."
    )
    caption_column: list[str] = arg(["text"], "Columns with captions; one of several is drawn for each image.")
    caption_probabilities: list[float] | None = field(
        default=None, metadata={"help": "Probability of each caption column; equal if not given."}
    )
    caption: str | None = arg(None, "Caption for all images, instead of columns.")
    train_split: str = arg("train", "Split for training.")
    validation_split: str | None = arg(None, "Split for the validation loss and metrics.")
    split_column: str = arg("split", "Column whose values are the splits, if the data set has it.")
    styles: list[str] | None = field(default=None, metadata={"help": "Use only rows with these `style` values."})
    balance_by: list[str] | None = field(
        default=None, metadata={"help": "Draw each combination of values in these columns equally often."}
    )
    weight_column: str | None = arg(None, "Column with weights above 0: rows are drawn in proportion to them.")
    max_train_samples: int | None = arg(None, "Maximum number of rows for training.")
    in_memory: bool | None = arg(
        None, "Keep the pixels of all images in memory; by default only for small sets of center crops."
    )

    resolution: int = arg(64, "Resolution of the images: their height and width.")
    center_crop: bool = arg(True, "Crop images that are not square at the center; else at random.")
    image_interpolation_mode: Interpolation = arg(
        "bicubic", "Resampling filter, also of low-resolution images; all except nearest are antialiased."
    )
    random_flip: bool = arg(False, "Mirror half of the images, except if the caption mentions left or right.")
    background: str = arg("white", "Background color of transparent images.")
    min_resolution: int | None = arg(None, "Skip images whose height or width is below this.")
    aspect_ratio_buckets: str | None = arg(
        None, "Shapes of batches: 'height,width;...', or 'auto' for areas of about resolution^2; by default squares."
    )
    bucket_step: int = arg(16, "Divisor of height and width of automatic buckets.")

    low_resolution: int | None = arg(None, "Resolution of the conditioning image of a super-resolution stage.")
    low_resolution_column: str | None = arg(
        None, "Column with low-resolution images for super-resolution; by default the images are downsampled."
    )
    crop_size: int | None = arg(None, "Height and width of aligned random crops for training super-resolution.")
    degradation_blur_sigma: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest sigma of a blur of the low-resolution image, in its pixels."},
    )
    degradation_jpeg_quality: list[int] | None = field(
        default=None, metadata={"help": "Lowest and highest JPEG quality of the low-resolution image, 1 to 100."}
    )

    embedding_cache: str | None = arg(None, "Folder written by `diffusers-imagen cache-embeddings`.", place="local")
    tokenizer_max_length: int | None = arg(None, "Maximum tokens per caption; by default the tokenizer's limit.")
    train_batch_size: int = arg(16, "Images per device and micro-batch.")
    gradient_accumulation_steps: int = arg(1, "Micro-batches per optimizer step.")
    dataloader_num_workers: int = arg(0, "Number of processes that read images; 0 uses the training process.")
    seed: int = arg(0, "Seed of all draws.")

    def __post_init__(self):
        check_settings(self)
        if self.train_data_dir is not None and self.dataset_name is not None:
            raise ValueError("`train_data_dir` and `dataset_name` are both given, but only one of them can be used.")
        self._check_captions()
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"`background` is {self.background!r}, but should be a color such as 'white' or '#ffffff'."
            ) from None
        if self.crop_size is not None and self.low_resolution is None:
            raise ValueError(
                f"`crop_size` is {self.crop_size}, but only super-resolution (`low_resolution`) uses crops."
            )
        if self.low_resolution_column is not None and self.low_resolution is None:
            column = self.low_resolution_column
            raise ValueError(f"`low_resolution_column` is {column!r}, but there is no `low_resolution`.")
        if self.low_resolution is not None:
            self._check_pyramid(self.low_resolution)
        self._check_degradation("degradation_blur_sigma", 0, float("inf"))
        self._check_degradation("degradation_jpeg_quality", 1, 100)
        self._check_order()
        self.bucket_shapes()

    def _check_captions(self) -> None:
        if not self.caption_column:
            raise ValueError("`caption_column` is empty, but should name a column.")
        if self.caption is not None and self.caption_column != ["text"]:
            raise ValueError(f"`caption` and `caption_column` {self.caption_column} are both given: choose one.")
        probabilities = self.caption_probabilities
        if probabilities is None:
            return
        if len(probabilities) != len(self.caption_column):
            raise ValueError(
                f"`caption_probabilities` has {len(probabilities)} entries, "
                f"but `caption_column` has {len(self.caption_column)}."
            )
        if sum(probabilities) <= 0:
            raise ValueError(f"`caption_probabilities` is {probabilities}, but should be positive.")

    def _check_pyramid(self, low_resolution: int) -> None:
        if low_resolution < 1 or self.resolution % low_resolution:
            raise ValueError(f"`low_resolution` is {low_resolution}, but should divide {self.resolution}.")
        factor = self.resolution // low_resolution
        if self.crop_size is not None and (self.crop_size % factor or not 0 < self.crop_size <= self.resolution):
            raise ValueError(
                f"`crop_size` is {self.crop_size}, but should be a multiple of {factor} up to {self.resolution}."
            )

    def _check_degradation(self, name: str, lowest: float, highest: float) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if self.low_resolution is None:
            raise ValueError(f"`{name}` is {value}, but only super-resolution (`low_resolution`) uses it.")
        if len(value) != 2 or not lowest <= value[0] <= value[1] <= highest:
            limits = f"from {lowest} to {highest}" if highest < float("inf") else f"from {lowest} up"
            raise ValueError(f"`{name}` is {value}, but should be the lowest and the highest value, {limits}.")

    def _check_order(self) -> None:
        """
        Raise ValueError for settings that need all rows with streaming, and for settings that need square images.
        """
        for name in ("balance_by", "weight_column", "aspect_ratio_buckets", "in_memory"):
            if self.streaming and getattr(self, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but is not supported with `streaming`, which reads rows "
                    "in order."
                )
        if self.in_memory and self.aspect_ratio_buckets:
            raise ValueError("`in_memory` is True, but only squares are kept in memory, not `aspect_ratio_buckets`.")
        if self.in_memory and not self.center_crop:
            raise ValueError("`in_memory` is True, but only center crops are kept in memory: set `center_crop`.")

    @property
    def factor(self) -> int:
        """Ratio of the image's size to that of the low-resolution image; 1 without one."""
        return 1 if self.low_resolution is None else self.resolution // self.low_resolution

    def bucket_shapes(self) -> list[tuple[int, int]] | None:
        """Return height and width of every bucket, or None for squares.

        Raises:
            ValueError: If a height or width is not a multiple of the super-resolution factor, or smaller than the
                crops.
        """
        if self.aspect_ratio_buckets is None:
            return None
        if self.aspect_ratio_buckets == "auto":
            shapes = make_buckets(self.resolution, self.bucket_step)
        else:
            from diffusers.training_utils import parse_buckets_string

            try:
                shapes = parse_buckets_string(self.aspect_ratio_buckets)
            except ValueError as error:
                raise ValueError(
                    f"`aspect_ratio_buckets` is {self.aspect_ratio_buckets!r}, but should be 'auto' or "
                    f"'height,width;height,width': {error}"
                ) from error
        for shape in shapes:
            if shape[0] % self.factor or shape[1] % self.factor or min(shape) < (self.crop_size or 1):
                raise ValueError(
                    f"`aspect_ratio_buckets` has {shape[0]}x{shape[1]}, but height and width should be multiples of "
                    f"{self.factor}, at least {self.crop_size or self.factor}."
                )
        return shapes


def make_buckets(resolution: int, step: int) -> list[tuple[int, int]]:
    """
    Return height and width of one bucket per aspect ratio: areas of about resolution^2, both multiples of `step`.
    """
    shapes = []
    for ratio in ASPECT_RATIOS:
        height, width = resolution / ratio**0.5, resolution * ratio**0.5
        shape = tuple(max(step, round(length / step) * step) for length in (height, width))
        if shape not in shapes:
            shapes.append(shape)
    return shapes
