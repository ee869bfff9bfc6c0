#!/usr/bin/env python
"""Trains a small network on two interleaved spirals in the plane, and draws samples of each scheduler beside the truth.

Runs in under a minute on an idle CPU core, and writes one picture.
"""

import argparse
import math
from pathlib import Path

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from diffusers_imagen import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler
from diffusers_imagen.diffusion import edm
from diffusers_imagen.diffusion.objectives import edm_example


SIGMA_DATA = 0.5
SIDE = 240
# scheduler, steps, calls of the network
RUNS = [
    (EDMAdamsScheduler(), 8, 8),
    (EDMHeunScheduler(), 4, 7),
    (EDMEulerScheduler(), 8, 8),
    (EDMDPMSolverMultistepScheduler(), 8, 8),
    (EDMAdamsScheduler(), 18, 18),
    (EDMHeunScheduler(), 18, 35),
    (EDMHeunScheduler(s_churn=20.0, s_min=0.05), 36, 71),
    (ContinuousDDPMScheduler(preconditioning="edm", clip_sample=False), 100, 100),
]


class Network(torch.nn.Module):
    """An MLP that sees the scaled point and Fourier features of c_noise."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(-1, 4))
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(12, width), torch.nn.SiLU(),
            torch.nn.Linear(width, width), torch.nn.SiLU(),
            torch.nn.Linear(width, width), torch.nn.SiLU(),
            torch.nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        angle = c_noise.reshape(-1, 1).expand(len(x), 1) * self.frequencies  # (B, 5)
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], dim=-1))  # (B, 2)


def spirals(count: int, generator: torch.Generator) -> torch.Tensor:
    """Points `(count, 2)` of two spirals, of standard deviation near 0.5."""
    turn = 0.5 + 2.5 * torch.rand(count, generator=generator).sqrt()
    arm = torch.randint(2, (count,), generator=generator) * math.pi
    angle = math.pi * turn + arm
    points = torch.stack([angle.cos(), angle.sin()], dim=-1) * turn[:, None] / 3
    return points + 0.015 * torch.randn(count, 2, generator=generator)


def train(steps: int, batch_size: int, generator: torch.Generator) -> Network:
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="training"):
        x_0 = spirals(batch_size, generator)
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
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def scatter(points: torch.Tensor, title: str) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE + 42), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    draw.multiline_text((SIDE / 2, 4), title, "black", font, anchor="ma", align="center")
    for x, y in ((points / 1.15 + 1) / 2 * SIDE).tolist():
        draw.ellipse([x - 1, y + 41, x + 1, y + 43], "#1f4e9c")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/toy_2d.png"))
    parser.add_argument("--steps", type=int, default=2500, help="training steps")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_points", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)  # of the network's initial weights and of the stochastic samplers
    generator = torch.Generator().manual_seed(args.seed)
    network = train(args.steps, args.batch_size, generator)
    noise = torch.randn(args.num_points, 2, generator=generator)
    panels = [scatter(spirals(args.num_points, generator), "truth")]
    for scheduler, steps, calls in RUNS:
        churn = ", churn" if scheduler.config.get("s_churn") else ""
        name = type(scheduler).__name__.removesuffix("Scheduler")
        panels.append(scatter(sample(network, scheduler, steps, noise), f"{name}{churn}\n{calls} calls"))
    columns = 3
    picture = Image.new("RGB", (columns * SIDE, math.ceil(len(panels) / columns) * (SIDE + 42)), "white")
    for index, panel in enumerate(panels):
        picture.paste(panel, (index % columns * SIDE, index // columns * (SIDE + 42)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output, optimize=True)
    print(args.output)


if __name__ == "__main__":
    main()
