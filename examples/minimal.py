"""Train and sample a small text-to-image model, from "red circle" to "orange triangle": a minute or two on a CPU.

python examples/minimal.py minimal.png
"""

import sys

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from diffusers_imagen import EDMAdamsScheduler, EfficientUNetModel
from diffusers_imagen.diffusion import classifier_free_guidance, edm
from diffusers_imagen.diffusion.training_examples import edm_example


SIZE, SIGMA_DATA = 16, 0.7
COLORS, SHAPES = ("red", "green", "blue", "orange"), {"circle": 60, "square": 4, "triangle": 3}  # names and corners
PROMPTS = [(color, shape) for color in COLORS for shape in SHAPES]
WORDS = dict(zip((*COLORS, *SHAPES), torch.eye(8)))  # instead of a text encoder: one axis per word
TEXTS = torch.stack([torch.stack([WORDS[word] for word in prompt]) for prompt in PROMPTS])  # (12, 2, 8)


def draw(color: str, shape: str, generator: torch.Generator) -> torch.Tensor:
    """Draw a shape of random position and size on white, in [-1, 1]: (3, SIZE, SIZE)."""
    x, y, radius = (torch.tensor([28, 28, 20]) + torch.rand(3, generator=generator) * torch.tensor([8, 8, 4])).tolist()
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).regular_polygon((x, y, radius), SHAPES[shape], fill=color)
    pixels = torch.tensor(list(image.reduce(64 // SIZE).tobytes())).reshape(SIZE, SIZE, 3)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def train(unet: EfficientUNetModel, steps: int, generator: torch.Generator, batch_size: int = 64) -> list[float]:
    optimizer = torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    losses = []
    for _ in (progress := tqdm(range(steps), "Training")):
        chosen = torch.randint(len(PROMPTS), (batch_size,), generator=generator)
        x_0 = torch.stack([draw(*PROMPTS[i], generator) for i in chosen])  # (B, 3, SIZE, SIZE)
        has_text = torch.rand(batch_size, 1, 1, generator=generator) > 0.1  # images without text are for guidance
        sigma = edm.draw_sigma(batch_size, generator=generator)  # (B,)
        example = edm_example(x_0, torch.randn(x_0.shape, generator=generator), sigma, SIGMA_DATA)
        output = unet(example.model_input, example.timestep, TEXTS[chosen] * has_text).sample
        loss = (example.weight * (output - example.target).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def sample(unet: EfficientUNetModel, generator: torch.Generator, steps: int = 16, scale: float = 1.5) -> torch.Tensor:
    """Generate an image of every prompt: (12, 3, SIZE, SIZE)."""
    scheduler = EDMAdamsScheduler(sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(steps)
    x = torch.randn(len(PROMPTS), 3, SIZE, SIZE, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        conditional, unconditional = unet(x_in, t, TEXTS).sample, unet(x_in, t, 0 * TEXTS).sample
        x = scheduler.step(classifier_free_guidance(conditional, unconditional, scale), t, x).prev_sample
    return x


def main(output: str = "minimal.png", steps: int = 800) -> None:
    torch.manual_seed(0)  # for the network's initial weights
    unet = EfficientUNetModel(SIZE, 3, 3, (32, 64, 64), (1, 2, 1), attention_types=(None, None, "fused"), encoder_hid_dim=8,
                              attention_head_dim=32, norm_num_groups=8, low_res_conditioning=False)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    train(unet, steps, generator)
    rows = torch.stack([sample(unet, generator) for _ in range(4)])  # (4, 12, 3, SIZE, SIZE)
    pixels = rows.permute(0, 3, 1, 4, 2).reshape(4 * SIZE, -1, 3).clamp(-1, 1) * 127.5 + 127.5
    Image.fromarray(pixels.round().byte().numpy()).resize((12 * 64, 4 * 64), Image.Resampling.NEAREST).save(output)


if __name__ == "__main__":
    main(*sys.argv[1:2])
