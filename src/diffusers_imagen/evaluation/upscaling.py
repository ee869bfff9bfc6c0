"""Super-resolution against bicubic interpolation: PSNR, SSIM, and agreement with the small image."""

import torch
from PIL import Image
from tqdm import tqdm

from .figures import Figure, figure_of_mean
from .picture_sets import PictureSet, fitted, reduced, resized, to_tensor


PEAK = 100.0  # dB that stand for images without a difference, as for one of 1e-10 in the mean square


def upscaling_figures(
    drawn: PictureSet, real: PictureSet, indices: list[int], low: int, resolution: int
) -> dict[str, dict[str, Figure]]:
    """Return what super-resolution makes of reduced real images, against what bicubic interpolation makes of them.

    Args:
        drawn ([`PictureSet`]): Images of `resolution` that a stage drew.
        real ([`PictureSet`]): The images that were reduced to `low` for it, of the same numbers.

    Returns:
        By method, by label.
    """
    rows: dict[str, list[torch.Tensor]] = {"super-resolution": [], "bicubic": []}
    for index in tqdm(indices, desc=f"super-resolution to {resolution} px", unit="picture"):
        small = reduced(real.picture(index), resolution, low)
        target = to_tensor(fitted(real.picture(index), resolution))
        bicubic = small.resize((resolution, resolution), Image.Resampling.BICUBIC)
        for method, picture in (("super-resolution", drawn.picture(index)), ("bicubic", bicubic)):
            rows[method].append(compare(to_tensor(picture), target, to_tensor(small)))
    labels = ("PSNR (dB)", "SSIM", "consistency (dB)")
    return {
        method: {label: figure_of_mean(values) for label, values in zip(labels, torch.stack(found).T)}
        for method, found in rows.items()
    }


def compare(picture: torch.Tensor, target: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """PSNR and SSIM of an image against its target, and PSNR of the reduced image against the small one: `(3,)`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    structure = structural_similarity_index_measure(picture[None], target[None], data_range=1.0)
    assert isinstance(structure, torch.Tensor)
    again = resized(picture, small.shape[-1])
    return torch.stack([signal_to_noise(picture, target), structure, signal_to_noise(again, small)])


def signal_to_noise(picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PSNR in dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(picture, target, data_range=1.0).clamp(max=PEAK)


def consistency(drawn: PictureSet, below: PictureSet, indices: list[int], low: int) -> Figure:
    """PSNR of a stage's images, reduced again, against those of the stage before it, from which it drew them."""
    values = [
        signal_to_noise(resized(to_tensor(drawn.picture(index)), low), to_tensor(below.picture(index)))
        for index in indices
    ]
    return figure_of_mean(torch.stack(values))
