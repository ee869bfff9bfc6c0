#!/usr/bin/env python
"""Measure sampling error against network evaluations, and write docs/solvers.md and its plots.

The networks are mixtures of Gaussians, whose denoised image is known in closed form: the reference mixture, and random
ones. The error is the mean absolute distance to the end of the exact trajectory, from the same noise. The second part,
`deepfloyd_solvers.py`, first trains small networks of DeepFloyd IF's architecture.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from deepfloyd_solvers import DEEPFLOYD_CALLS, compare_deepfloyd
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from diffusers_imagen import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler
from diffusers_imagen.commands.parser import Parser, check_numbers
from diffusers_imagen.diffusion import edm
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import check_writable, whole_file, write_text


ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "fixtures" / "edm" / "edm_sampler_gmm.safetensors"
CALLS = (5, 10, 18, 35, 71)
SCHEDULERS = {
    "EDMAdams": lambda: EDMAdamsScheduler(),
    "EDMHeun": lambda: EDMHeunScheduler(),
    "ContinuousDDPM, eta 0": lambda: ContinuousDDPMScheduler(preconditioning="edm", clip_sample=False, eta=0.0),
    "diffusers EDMEuler": lambda: EDMEulerScheduler(),
    "diffusers EDMDPMSolver 2": lambda: EDMDPMSolverMultistepScheduler(solver_order=2),
    "diffusers EDMDPMSolver 3": lambda: EDMDPMSolverMultistepScheduler(solver_order=3),
}
COLOURS = ("#d62728", "#1f77b4", "#7f7f7f", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
Results = dict[str, dict[str, list[float]]]  # errors by network and scheduler, one per number of calls

MIXTURES = """# Solvers

Sampling error against network evaluations. This page is written by `scripts/compare_solvers.py`.

## Mixtures of Gaussians

The error is the mean absolute distance to the exact end of the trajectory, from the same noise.

![error against evaluations](solvers.png)

"""
DEEPFLOYD = """## Networks of DeepFloyd IF's architecture

{networks} They have discrete betas and six output channels, and use the thresholding of IF's repositories. They compare solvers on a trained network of this architecture and do not predict the quality of IF's images.

The error is the relative L2 distance, over {num_images} images, to 600 steps of `EDMHeunScheduler` from index 990 of the betas, where IF's 100 steps begin (sigma 71.3), and from the same noise. Every solver starts there. Those of diffusers, configured like the repositories' scheduler, use evenly spaced indices down to 0; those of this package use their own noise levels, so that the comparison includes solver and noise levels. `EDMHeun` makes an odd number of calls, one less than an even number in the header.

- `diffusers DDIM` is what `IFPipeline` runs: it continues from the noise that the network predicts, although the predicted image was thresholded. Where thresholding applies this is a different differential equation, so that more steps do not converge to this reference. `clipped` is DDIM with `use_clipped_model_output=True`, which takes the noise from the thresholded image, as all others do; `ContinuousDDPMScheduler` with `eta=0` makes the same steps.
- `diffusers DDPM`, the repositories' own scheduler, adds noise at every step, here with the posterior's variance. It generates another image of the same caption, so that its distance is not an error of the solver and does not decrease with more steps.

![error against evaluations](solvers_deepfloyd.png)

"""


class Mixture(NamedTuple):
    """Gaussians of standard deviations `stds` (K,) around `means` (K, D)."""

    name: str
    means: torch.Tensor
    weights: torch.Tensor
    stds: torch.Tensor

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the mean of the clean points given noisy ones `(B, D)`."""
        variance = self.stds**2 + sigma**2  # (K,)
        offset = x[:, None] - self.means  # (B, K, D)
        log_density = -offset.square().sum(-1) / (2 * variance) - self.means.shape[1] / 2 * variance.log()
        posterior = (self.weights.log() + log_density).softmax(-1)
        return (posterior[..., None] * (self.means + (self.stds**2 / variance)[:, None] * offset)).sum(1)

    def network(self, x_in: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        """Return the raw output F of an ideal EDM network."""
        sigma = edm.c_noise_to_sigma(c_noise.double())
        c_skip, c_out, c_in = edm.scalings(sigma, 0.5)
        x = x_in / c_in
        return (self.denoise(x, sigma) - c_skip * x) / c_out


def random_mixture(name: str, seed: int, components: int, dimensions: int, std: float) -> Mixture:
    """Draw means of standard deviation 0.5, unequal weights, and standard deviations within a factor of 2 of `std`."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    weights = torch.rand(components, **draw) + 0.05
    stds = std * 2 ** (2 * torch.rand(components, **draw) - 1)
    return Mixture(name, torch.randn(components, dimensions, **draw) / 2, weights / weights.sum(), stds)


def mixtures() -> list[Mixture]:
    stored = load_file(REFERENCE)
    means, weights, std = (stored[f"mixture_{name}"].double() for name in ("means", "weights", "std"))
    return [
        Mixture("reference: 2 in the plane", means, weights, std.expand(len(means))),
        random_mixture("4 in the plane, std 0.3", 1, 4, 2, 0.3),
        random_mixture("12 in the plane, std 0.1", 2, 12, 2, 0.1),
        random_mixture("40 in the plane, std 0.01", 3, 40, 2, 0.01),
        random_mixture("20 in 32 dimensions, std 0.1", 4, 20, 32, 0.1),
        random_mixture("50 in 64 dimensions, std 0.03", 5, 50, 64, 0.03),
    ]


def sample(scheduler, steps: int, mixture: Mixture, noise: torch.Tensor) -> torch.Tensor:
    """Run the sampling loop of diffusers' pipelines."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(mixture.network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def measure(mixture: Mixture, make: Callable, calls: int, noise: torch.Tensor, exact: torch.Tensor) -> float:
    scheduler = make()
    if scheduler.order == 2 and calls % 2 == 0:
        return math.nan  # N steps are 2 N - 1 calls
    steps = (calls + 1) // 2 if scheduler.order == 2 else calls
    return (sample(scheduler, steps, mixture, noise) - exact).abs().mean().item()


def compare(num_points: int) -> Results:
    """Return errors by mixture and scheduler, one for each of CALLS."""
    results = {}
    for mixture in mixtures():
        noise = torch.randn(num_points, mixture.means.shape[1], generator=torch.Generator().manual_seed(0)).double()
        exact = sample(EDMAdamsScheduler(), 600, mixture, noise)
        results[mixture.name] = {
            name: [measure(mixture, make, calls, noise, exact) for calls in CALLS] for name, make in SCHEDULERS.items()
        }
        print(mixture.name, flush=True)
    return results


def table(results: Results, calls: tuple[int, ...]) -> str:
    lines = []
    for mixture, rows in results.items():
        lines += [
            f"### {mixture}",
            "",
            f"| evaluations | {' | '.join(map(str, calls))} |",
            "|---" * (len(calls) + 1) + "|",
        ]
        best = [min(error for error in errors if error == error) for errors in zip(*rows.values())]
        for name, errors in rows.items():
            cells = (
                f"**{e:.4f}**" if e == least else f"{e:.4f}".replace("nan", "–") for e, least in zip(errors, best)
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(
    results: Results,
    calls: tuple[int, ...],
    columns: int,
    powers: tuple[float, float],
    resolution: int = 420,
    margin: int = 62,
) -> Image.Image:
    """Plot one panel per network, both axes logarithmic; errors are shown between two powers of ten."""
    font = ImageFont.load_default(15)
    rows, names = math.ceil(len(results) / columns), list(next(iter(results.values())))
    legend = 14 + 28 * math.ceil(len(names) / columns)
    image = Image.new("RGB", (columns * resolution, rows * resolution + legend), "white")
    draw = ImageDraw.Draw(image)
    low, high = powers
    for panel, (mixture, errors) in enumerate(results.items()):
        left, top = panel % columns * resolution + margin, panel // columns * resolution + 34
        width, height = resolution - margin - 14, resolution - 34 - 40

        def place(count, error):
            x = math.log(count / calls[0]) / math.log(calls[-1] / calls[0])
            y = (high - math.log10(max(error, 10**low))) / (high - low)
            return left + x * width, top + min(max(y, 0), 1) * height

        draw.text((left, top - 24), mixture, "black", font)
        for power in range(math.ceil(low), math.floor(high) + 1):
            y = place(calls[0], 10.0**power)[1]
            draw.line([(left, y), (left + width, y)], "#dddddd")
            draw.text((left - 6, y), f"{10.0**power:g}", "black", font, anchor="rm")
        for count in calls:
            draw.text((place(count, 1)[0], top + height + 6), str(count), "black", font, anchor="ma")
        for colour, values in reversed(list(zip(COLOURS, errors.values()))):
            points = [place(count, error) for count, error in zip(calls, values) if error == error]
            draw.line(points, colour, 3, joint="curve")
            for x, y in points:
                draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
    for index, (colour, name) in enumerate(zip(COLOURS, names)):
        x, y = 30 + index % columns * resolution, rows * resolution + 10 + index // columns * 28
        draw.line([(x, y + 9), (x + 30, y + 9)], colour, 4)
        draw.text((x + 38, y), name, "black", font)
    return image


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs")
    parser.add_number("--num_points", int, 1, 10**5, default=64, help="trajectories of each mixture")
    parser.add_number("--num_images", int, 1, 10**4, default=6, help="of each network of DeepFloyd IF's kind")
    parser.add_number("--train_steps", int, 1, 10**6, default=700, help="of each network of DeepFloyd IF's kind")
    args = parser.parse_args()
    check_numbers(args)
    for name in ("solvers.md", "solvers.png", "solvers_deepfloyd.png"):
        check_writable(args.output_dir / name, "output_dir")
    mixed = compare(args.num_points)
    networks, trained = compare_deepfloyd(args.train_steps, args.num_images)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plots = {
        "solvers.png": plot(mixed, CALLS, 3, (-4.5, 0.0)),
        "solvers_deepfloyd.png": plot(trained, DEEPFLOYD_CALLS, 2, (-3.5, 0.3)),
    }
    for name, picture in plots.items():
        with whole_file(args.output_dir / name) as partial:
            picture.save(partial, format="PNG", optimize=True)
    deepfloyd = DEEPFLOYD.format(networks=networks, num_images=args.num_images)
    page = MIXTURES + table(mixed, CALLS) + "\n" + deepfloyd + table(trained, DEEPFLOYD_CALLS)
    write_text(args.output_dir / "solvers.md", page)


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "compare_solvers.py"))
