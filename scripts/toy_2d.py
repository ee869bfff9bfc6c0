#!/usr/bin/env python
"""Train a small network on eight Gaussians in the plane, and plot samples of each scheduler next to the data.

python scripts/toy_2d.py --output outputs/toy_2d.png
"""

import math
import sys
from pathlib import Path

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from diffusers_imagen import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler
from diffusers_imagen.commands.parser import Parser, check_numbers
from diffusers_imagen.diffusion import edm
from diffusers_imagen.diffusion.training_examples import edm_example
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import check_writable, whole_file


SIGMA_DATA = 0.5
RESOLUTION = 240  # per panel, in pixels
# scheduler, steps, network calls
RUNS = [
    (EDMAdamsScheduler(), 8, 8),
    (EDMDPMSolverMultistepScheduler(), 8, 8),
    (EDMEulerScheduler(), 8, 8),
    (EDMHeunScheduler(), 5, 9),
    (EDMAdamsScheduler(), 18, 18),
    (EDMHeunScheduler(), 18, 35),
    (EDMHeunScheduler(s_churn=20.0, s_min=0.05), 36, 71),
    (ContinuousDDPMScheduler(preconditioning="edm", clip_sample=False), 100, 100),
]


class Network(torch.nn.Module):
    """MLP on Fourier features of the scaled point and of c_noise."""

    def __init__(self, width: int = 192):
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(-1, 4))
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3 * 11 - 1, width), torch.nn.SiLU(),
            torch.nn.Linear(width, width), torch.nn.SiLU(),
            torch.nn.Linear(width, width), torch.nn.SiLU(),
            torch.nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([x, c_noise.reshape(-1, 1).expand(len(x), 1)], dim=-1)  # (B, 3)
        angles = (inputs[..., None] * self.frequencies).flatten(1)  # (B, 15)
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], dim=-1))  # (B, 2)


def draw_points(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw points `(count, 2)` from eight Gaussians on a circle, with standard deviation 0.5 in each coordinate."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centres = torch.stack([angle.cos(), angle.sin()], dim=-1) * SIGMA_DATA * math.sqrt(2)
    return centres + 0.03 * torch.randn(count, 2, generator=generator)


def train(steps: int, batch_size: int, generator: torch.Generator) -> Network:
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="Training"):
        x_0 = draw_points(batch_size, generator)
        sigma = edm.draw_sigma(batch_size, generator=generator, stratified=True)
        example = edm_example(x_0, torch.randn(x_0.shape, generator=generator), sigma, SIGMA_DATA)
        output = network(example.model_input, example.timestep)
        loss = (example.weight * (output - example.target).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def sample(network: Network, scheduler, steps: int, noise: torch.Tensor) -> torch.Tensor:
    """Run the sampling loop of diffusers' pipelines."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def scatter(points: torch.Tensor, title: str) -> Image.Image:
    image = Image.new("RGB", (RESOLUTION, RESOLUTION + 42), "white")
    draw = ImageDraw.Draw(image)
    draw.multiline_text((RESOLUTION / 2, 4), title, "black", ImageFont.load_default(13), anchor="ma", align="center")
    points = points[(points.abs() < 0.99).all(dim=-1)]  # points outside the panel are not drawn
    for x, y in ((points + 1) / 2 * RESOLUTION).tolist():
        draw.ellipse([x - 1, y + 41, x + 1, y + 43], "#1f4e9c")
    return image


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/toy_2d.png"))
    parser.add_number("--steps", int, 1, 10**7, default=4000, help="training steps")
    parser.add_number("--batch_size", int, 1, 10**5, default=256)
    parser.add_number("--num_points", int, 1, 10**6, default=2000)
    parser.add_number("--seed", int, 0, 2**63 - 1, default=0)
    args = parser.parse_args()
    check_numbers(args)
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"`output` is '{args.output}', but should end in .png.")
    check_writable(args.output, "output")
    torch.manual_seed(args.seed)  # diffusers' schedulers and the network's initialization use the global generator
    generator = torch.Generator().manual_seed(args.seed)
    network = train(args.steps, args.batch_size, generator)
    noise = torch.randn(args.num_points, 2, generator=generator)
    panels = [scatter(draw_points(args.num_points, generator), "the truth")]
    for scheduler, steps, calls in RUNS:
        churn = ", churn" if scheduler.config.get("s_churn") else ""
        name = type(scheduler).__name__.removesuffix("Scheduler")
        panels.append(scatter(sample(network, scheduler, steps, noise), f"{name}{churn}\n{calls} calls"))
    columns = 3
    picture = Image.new("RGB", (columns * RESOLUTION, math.ceil(len(panels) / columns) * (RESOLUTION + 42)), "white")
    for index, panel in enumerate(panels):
        picture.paste(panel, (index % columns * RESOLUTION, index // columns * (RESOLUTION + 42)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(args.output) as partial:
        picture.save(partial, format="PNG", optimize=True)
    print(args.output)


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "toy_2d.py"))
