"""Super-resolution metrics, compared with bicubic interpolation: PSNR, SSIM, and consistency with the input."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from .figures import Figure, figure_of_mean
from .picture_sets import PictureSet, fitted, reduced, resized, to_tensor


METHODS = ("super-resolution", "bicubic")
MEASURES = ("PSNR (dB)", "SSIM", "consistency (dB)")
PEAK = 100.0  # dB that stand for pictures without a difference, as for one of 1e-10 in the mean square


def upscaling_figures(
    drawn: PictureSet,
    real: PictureSet,
    indices: list[int],
    low: int,
    resolution: int,
    state: PartialState | None = None,
) -> dict[str, dict[str, Figure]]:
    """Measure super-resolution of downsampled real images, and bicubic interpolation of the same images.

    Args:
        drawn ([`PictureSet`]): Pictures of `resolution` that a stage drew.
        real ([`PictureSet`]): The pictures that were reduced to `low` for it, of the same numbers.
        state ([`~accelerate.PartialState`], *optional*): Processes that share the work, all of which call this; without
            it this one does all of it.

    Returns:
        Metrics by method and label.
    """
    place, count = (0, 1) if state is None else (state.process_index, state.num_processes)
    label = f"super-resolution to {resolution} px"
    own = []
    for number in tqdm(range(place, len(indices), count), desc=label, unit="picture", disable=place > 0):
        picture, index = real.picture(indices[number]), indices[number]
        small, target = reduced(picture, resolution, low), to_tensor(fitted(picture, resolution))
        bicubic = small.resize((resolution, resolution), Image.Resampling.BICUBIC)
        found = [compare(to_tensor(one), target, to_tensor(small)) for one in (drawn.picture(index), bicubic)]
        own.append((number, torch.stack(found)))
    rows = own if count == 1 else gather_object(own)
    by_method = torch.stack([found for _, found in sorted(rows, key=lambda row: row[0])], dim=-1)  # (2, 3, N)
    return {method: dict(zip(MEASURES, map(figure_of_mean, values))) for method, values in zip(METHODS, by_method)}


def compare(picture: torch.Tensor, target: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """Return PSNR and SSIM of an image, and PSNR of the downsampled image against the low-resolution one: `(3,)`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    structure = structural_similarity_index_measure(picture[None], target[None], data_range=1.0)
    assert isinstance(structure, torch.Tensor)
    again = resized(picture, small.shape[-1])
    return torch.stack([signal_to_noise(picture, target), structure, signal_to_noise(again, small)])


def signal_to_noise(picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(picture, target, data_range=1.0).clamp(max=PEAK)


def consistency(drawn: PictureSet, below: PictureSet, indices: list[int], low: int) -> Figure:
    """Return the PSNR of a stage's images, downsampled again, against those of the previous stage, its input."""
    values = [
        signal_to_noise(resized(to_tensor(drawn.picture(index)), low), to_tensor(below.picture(index)))
        for index in indices
    ]
    return figure_of_mean(torch.stack(values))
