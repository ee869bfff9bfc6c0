"""What a training run is told about its data. Field names are those of diffusers' training scripts where they exist."""

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import ImageColor

from ..settings import check_settings


# width to height, from a panorama to a portrait of a whole person
ASPECT_RATIOS = (2.0, 16 / 9, 3 / 2, 4 / 3, 5 / 4, 1.0, 4 / 5, 3 / 4, 2 / 3, 9 / 16, 1 / 2)


def arg(default: Any, help: str, place: Literal["local", "local_or_hub"] | None = None) -> Any:
    """A field with its help; a list is copied for each instance.

    Args:
        default: Its value if it is not given.
        help (`str`): What it means, a sentence.
        place (`str`, *optional*): "local" for a path, or "local_or_hub" for a path or a Hub id: what is published has no
            more of a path than its last name.
    """
    metadata = {"help": help} if place is None else {"help": help, "place": place}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Where images and captions come from, and what is done to them. Sizes are in pixels."""

    train_data_dir: str | None = arg(
        None,
        "Folder of images, with a metadata.jsonl, .csv or .parquet or a .txt beside each, of Parquet files, or of "
        "WebDataset tar shards.",
        place="local",
    )
    dataset_name: str | None = arg(
        None, "Data set on the Hub, or a folder that `datasets` wrote.", place="local_or_hub"
    )
    dataset_config_name: str | None = arg(None, "Configuration of that data set.")
    cache_dir: str | None = arg(None, "Where `datasets` keeps what it downloads.", place="local")
    streaming: bool = arg(False, "Read the data set in order, without writing it to disk first.")
    shuffle_buffer_size: int = arg(1000, "Rows that a streaming run shuffles at a time.")
    image_column: str = arg(
        "image", "Column with the images; `file_name` of a metadata file serves too, and any picture of tar shards."
    )
    caption_column: list[str] = arg(["text"], "Columns with captions; several are drawn from by turns.")
    caption_probabilities: list[float] | None = field(
        default=None, metadata={"help": "Probability of each caption column; equal if not given."}
    )
    caption: str | None = arg(None, "One caption for all images, instead of columns.")
    train_split: str = arg("train", "Split to train on.")
    validation_split: str | None = arg(None, "Split to measure the validation loss and metrics on.")
    split_column: str = arg("split", "Where the data set has this column, splits are its values, not those it names.")
    styles: list[str] | None = field(default=None, metadata={"help": "Keep rows of these `style` values only."})
    balance_by: list[str] | None = field(
        default=None, metadata={"help": "Draw each combination of values in these columns equally often."}
    )
    weight_column: str | None = arg(None, "Column with numbers above 0: rows are drawn in proportion to them.")
    max_train_samples: int | None = arg(None, "Train on so many rows only.")
    in_memory: bool | None = arg(
        None, "Keep all images as pixels in memory; without it, small sets of centre crops are kept."
    )

    resolution: int = arg(64, "Resolution of the images: their height and width.")
    center_crop: bool = arg(True, "Crop images that are not square at the centre; else at random.")
    random_flip: bool = arg(False, "Mirror every second image, except where its caption speaks of left or right.")
    background: str = arg("white", "Colour behind transparent images.")
    min_resolution: int | None = arg(None, "Skip images whose height or width is below this.")
    aspect_ratio_buckets: str | None = arg(
        None, "Shapes of batches: 'height,width;...', or 'auto' for areas about resolution^2; without it, squares."
    )
    bucket_step: int = arg(16, "Height and width of automatic buckets are multiples of this.")

    low_resolution: int | None = arg(None, "Resolution of the conditioning image of a super-resolution stage.")
    low_resolution_column: str | None = arg(
        None, "Column with the images that super-resolution enlarges; without it, reductions of the images."
    )
    crop_size: int | None = arg(None, "Height and width of the aligned random crops that super-resolution trains on.")
    degradation_blur_sigma: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest sigma of a blur of the low-resolution image, in its pixels."},
    )
    degradation_jpeg_quality: list[int] | None = field(
        default=None, metadata={"help": "Lowest and highest JPEG quality of the low-resolution image, 1 to 100."}
    )

    embedding_cache: str | None = arg(None, "Folder that `diffusers-imagen cache-embeddings` wrote.", place="local")
    tokenizer_max_length: int | None = arg(None, "Tokens of a caption; the tokenizer's own limit if not given.")
    train_batch_size: int = arg(16, "Images a device and a step.")
    gradient_accumulation_steps: int = arg(1, "Batches before an optimizer step.")
    dataloader_num_workers: int = arg(0, "Processes that read images; 0 reads them in the training process.")
    seed: int = arg(0, "Seed of all draws.")

    def __post_init__(self):
        check_settings(self)
        if self.train_data_dir is not None and self.dataset_name is not None:
            raise ValueError("`train_data_dir` and `dataset_name` are both given, but the data is in one of them.")
        self._check_captions()
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"`background` is {self.background!r}, but should be a colour like 'white' or '#ffffff'."
            ) from None
        if self.crop_size is not None and self.low_resolution is None:
            raise ValueError(f"`crop_size` is {self.crop_size}, but only super-resolution (`low_resolution`) crops.")
        if self.low_resolution_column is not None and self.low_resolution is None:
            column = self.low_resolution_column
            raise ValueError(f"`low_resolution_column` is {column!r}, but there is no `low_resolution` to read it at.")
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
            raise ValueError(f"`{name}` is {value}, but only super-resolution (`low_resolution`) has it.")
        if len(value) != 2 or not lowest <= value[0] <= value[1] <= highest:
            limits = f"from {lowest} to {highest}" if highest < float("inf") else f"from {lowest} up"
            raise ValueError(f"`{name}` is {value}, but should be the lowest and the highest value, {limits}.")

    def _check_order(self) -> None:
        """Refuses what needs every row at hand where rows come in a stream, and what needs squares without them."""
        for name in ("balance_by", "weight_column", "aspect_ratio_buckets", "in_memory"):
            if self.streaming and getattr(self, name):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but `streaming` reads rows as they come.")
        if self.in_memory and self.aspect_ratio_buckets:
            raise ValueError("`in_memory` is True, but only squares are kept in memory, not `aspect_ratio_buckets`.")
        if self.in_memory and not self.center_crop:
            raise ValueError("`in_memory` is True, but only centre crops are kept in memory: set `center_crop`.")

    @property
    def factor(self) -> int:
        """How many times smaller the conditioning image is; 1 without one."""
        return 1 if self.low_resolution is None else self.resolution // self.low_resolution

    def bucket_shapes(self) -> list[tuple[int, int]] | None:
        """Height and width of every bucket, or None for squares.

        Raises:
            ValueError: If a height or width is no multiple of the super-resolution factor, or smaller than the crops.
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
    """Height and width of one bucket for each aspect ratio: areas about resolution^2, both multiples of `step`."""
    shapes = []
    for ratio in ASPECT_RATIOS:
        height, width = resolution / ratio**0.5, resolution * ratio**0.5
        shape = tuple(max(step, round(length / step) * step) for length in (height, width))
        if shape not in shapes:
            shapes.append(shape)
    return shapes
