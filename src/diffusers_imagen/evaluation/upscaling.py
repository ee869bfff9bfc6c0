"""Super-resolution metrics, compared with bicubic interpolation: PSNR, SSIM, and consistency with the input."""

from collections.abc import Callable

import torch
from PIL import Image
from tqdm import tqdm

from ..utils.processes import OneProcess, Processes, gather
from .figures import Figure, figure_of_mean
from .picture_sets import PictureSet, fitted, reduced, resized, to_tensor


METHODS = ("super-resolution", "bicubic")
MEASURES = ("PSNR (dB)", "SSIM", "consistency (dB)")
PEAK = 100.0  # dB for identical images, corresponding to a mean squared error of 1e-10


def upscaling_figures(
    drawn: PictureSet,
    real: PictureSet,
    indices: list[int],
    low: int,
    resolution: int,
    state: Processes = OneProcess(),
) -> dict[str, dict[str, Figure]]:
    """Measure super-resolution of downsampled real images, and bicubic interpolation of the same images.

    Args:
        drawn ([`PictureSet`]): Images of `resolution` that a stage generated.
        real ([`PictureSet`]):
            The original images, which were downsampled to `low` as its input, with the same indices.
        state ([`~accelerate.PartialState`], *optional*): Processes that share the work, all of which call this.

    Returns:
        Metrics by method and label.
    """

    def measure(index: int) -> torch.Tensor:
        picture = real.picture(index)
        small, target = reduced(picture, resolution, low), to_tensor(fitted(picture, resolution))
        bicubic = small.resize((resolution, resolution), Image.Resampling.BICUBIC)
        return torch.stack(
            [compare(to_tensor(one), target, to_tensor(small)) for one in (drawn.picture(index), bicubic)]
        )

    found = measure_all(indices, measure, state, f"super-resolution to {resolution} px")  # (N, 2, 3)
    by_method = found.permute(1, 2, 0)
    return {method: dict(zip(MEASURES, map(figure_of_mean, values))) for method, values in zip(METHODS, by_method)}


def measure_all(
    indices: list[int], measure: Callable[[int], torch.Tensor], state: Processes, label: str
) -> torch.Tensor:
    """Measure images, each process its share of them, and stack the results in order; all processes call this."""
    own = indices[state.process_index :: state.num_processes]
    values = [measure(index) for index in tqdm(own, desc=label, unit="picture", disable=not state.is_main_process)]
    found: list[torch.Tensor] = [torch.empty(0)] * len(indices)
    for process, part in enumerate(gather(state, values)):
        found[process :: state.num_processes] = part
    return torch.stack(found)


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


def consistency(
    drawn: PictureSet, below: PictureSet, indices: list[int], low: int, state: Processes = OneProcess()
) -> Figure:
    """Return the PSNR of a stage's images, downsampled again, against those of the previous stage, its input."""

    def measure(index: int) -> torch.Tensor:
        return signal_to_noise(resized(to_tensor(drawn.picture(index)), low), to_tensor(below.picture(index)))

    return figure_of_mean(measure_all(indices, measure, state, f"consistency at {low} px"))
