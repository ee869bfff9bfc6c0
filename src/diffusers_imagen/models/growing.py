"""Growing of trained networks to twice the resolution or other numbers of residual blocks.

Progressive growing (Karras et al. 2017, arXiv 1710.10196) adds a finer level around a trained network, whose existing
levels keep processing features of the same size in the image. The correspondence of text and layout that was learned
cheaply at low resolution is kept. Residual blocks may be added, initialized as the identity, or removed where they
cost more than they contribute.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from . import ImagenUNetModel
from .attention import zero_init
from .blocks import ImagenBlock
from .config_checks import per_level


def grow_unet(small: ImagenUNetModel) -> ImagenUNetModel:
    """Create a network with one more level than a trained one, of one block and of the first level's width.

    The new level is initialized as resampling: it downsamples by averaging and upsamples by interpolation, with
    residual branches at zero, so that the grown network generates blurred versions of the small network's images.

    Raises:
        ValueError: If residual blocks resample between levels, which cannot be initialized as plain resampling, or
            residual blocks scale their output.
    """
    config = dict(small.config)
    check_starts_as_identity(config)
    if config["resample_type"] != "conv":
        raise ValueError(
            f"`resample_type` is {config['resample_type']!r}, but only networks with 'conv' can be grown."
        )
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    config.update(
        sample_size=2 * config["sample_size"],
        block_out_channels=(widths[0], *widths),
        layers_per_block=(1, *([layers] * len(widths) if isinstance(layers, int) else layers)),
    )
    grown = ImagenUNetModel.from_config(config)
    grown.load_state_dict(
        {**grown.state_dict(), **{inner_key(key): value for key, value in small.state_dict().items()}}
    )
    with torch.no_grad():
        start_as_resampling(grown)
        if config["learned_sinusoidal_dim"] is None:
            shift_noise_level(grown, math.log(2) / 4)
    return grown


def check_starts_as_identity(config: dict[str, Any]) -> None:
    """Raise ValueError for a network whose new residual blocks are not the identity."""
    if config["resnet_out_scale_factor"] != 1:
        raise ValueError(
            f"`resnet_out_scale_factor` is {config['resnet_out_scale_factor']}, but should be 1 in a network that is "
            "given more residual blocks: those start as the identity."
        )


def inner_key(key: str) -> str:
    """Return the key in the grown network of a parameter of the small one: after the new level's block and downsampler."""
    name, _, rest = key.partition(".")
    if name in ("down_blocks", "downsamplers"):
        number, _, rest = rest.partition(".")
        return f"{name}.{int(number) + 1}.{rest}"
    return key  # the decoder is numbered from the deepest level


def start_as_resampling(unet: ImagenUNetModel) -> None:
    """Initialize the outermost level's resampling layers as averaging and interpolation, and its shortcut as a copy."""
    set_depthwise(cast(nn.Conv2d, unet.downsamplers[0]), torch.tensor([1.0, 2.0, 1.0]) / 4)
    set_depthwise(cast(nn.ConvTranspose2d, unet.upsamplers[-1]), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4)
    for block in cast(Iterable[ImagenBlock], unet.up_blocks[-2:]):
        pass_on(block)


def pass_on(block: ImagenBlock) -> None:
    """Initialize the shortcut of a decoder block to copy the coarser features, which precede the skip connection."""
    shortcut = cast(nn.Conv2d, block.resnets[0].conv_shortcut)
    zero_init(shortcut)
    channels = torch.arange(shortcut.out_channels)
    shortcut.weight[channels, channels] = 1.0


def set_depthwise(conv: nn.Conv2d | nn.ConvTranspose2d, kernel: torch.Tensor) -> None:
    """Set the weights to a separable kernel applied to each channel separately."""
    zero_init(conv)
    channels = torch.arange(conv.in_channels)
    conv.weight[channels, channels] = torch.outer(kernel, kernel).to(conv.weight)


def shift_noise_level(unet: ImagenUNetModel, shift: float) -> None:
    """Shift the embedding of a conditioning value to that of `value - shift`: averaging reduces the noise.

    The sinusoids of a shifted value are a rotation of the value's, which is merged into the first linear layer.
    """
    linear = unet.time_embedding.mlp.linear_1
    half = linear.in_features // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
    cos, sin = (frequencies * shift).cos(), (frequencies * shift).sin()
    on_cos, on_sin = linear.weight[:, :half].clone(), linear.weight[:, half:].clone()
    linear.weight[:, :half] = on_cos * cos - on_sin * sin
    linear.weight[:, half:] = on_cos * sin + on_sin * cos


def change_layers(unet: ImagenUNetModel, layers_per_block: list[int]) -> ImagenUNetModel:
    """Create a network with the weights of a trained one and other numbers of residual blocks per level.

    Added blocks are the last of their level and are initialized as the identity: adding blocks does not change the
    output. Removed blocks are the last of their level.

    Raises:
        ValueError: If there is not one number per level, a level other than the first would have no block in the
            encoder, a level without blocks joins levels of different widths, or a level gains blocks in a network
            whose residual blocks scale their output.
    """
    config = unet.config
    layers = per_level("layers_per_block", list(layers_per_block), len(config["block_out_channels"]))
    if min(layers[1:], default=1) < 1 or layers[0] < 0:
        raise ValueError(f"`layers_per_block` is {layers}, but only the first level may have none.")
    if layers[0] == 0 and len(set(config["block_out_channels"][:2])) == 2:
        raise ValueError(
            f"`layers_per_block` is {layers}, but the first level can have none only where the second is as wide: "
            f"`block_out_channels` is {config['block_out_channels']}."
        )
    if any(count > had for count, had in zip(layers, unet.num_layers)):
        check_starts_as_identity(config)
    changed = ImagenUNetModel.from_config({**config, "layers_per_block": layers})
    with torch.no_grad():
        for block in cast(Iterable[ImagenBlock], changed.up_blocks):
            pass_on(block)
    kept = {key: value for key, value in unet.state_dict().items() if not key.startswith(("down_blocks", "up_blocks"))}
    changed.load_state_dict({**changed.state_dict(), **kept})
    for name, extra in (("down_blocks", 0), ("up_blocks", 1)):
        old, new = (blocks_of_levels(network, name, extra) for network in (unet, changed))
        for old_level, new_level in zip(old, new):
            for old_block, new_block in match_blocks(old_level, new_level, extra):
                new_block.load_state_dict(old_block.state_dict())
    return changed


def blocks_of_levels(unet: ImagenUNetModel, name: str, extra: int) -> list[list[ImagenBlock]]:
    """Return the blocks per level in order of execution; the decoder has one more per level and reversed levels."""
    blocks, levels = iter(getattr(unet, name)), []
    for count in unet.num_layers if name == "down_blocks" else reversed(unet.num_layers):
        levels.append([next(blocks) for _ in range(count + extra)])
    return levels


def match_blocks(old: list[ImagenBlock], new: list[ImagenBlock], extra: int) -> list[tuple[ImagenBlock, ImagenBlock]]:
    """Pair the blocks of a level with those whose weights they take; `extra` is 1 in the decoder.

    There the first block reads the level below, and the last one the skip connection from before the level. Blocks are
    added or removed after the first, where the skip connections of the encoder's last blocks are read.
    """
    place, added = extra or min(len(old), len(new)), len(new) - len(old)
    if added > 0:
        new = new[:place] + new[place + added :]
    else:
        old = old[:place] + old[place - added :]
    return list(zip(old, new))
