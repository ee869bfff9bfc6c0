"""Progressive growing (Karras et al. 2017, arXiv 1710.10196) of a U-Net: a network for images of twice the side.

A finer level is put around a trained network, whose own levels go on seeing what they saw: features of the same size
in the picture. So the meaning of words and the layout of pictures, learned cheaply at low resolution, are kept.
"""

import math

import torch

from ..models import ImagenUNetModel


def grow_unet(small: ImagenUNetModel) -> ImagenUNetModel:
    """A network with one more level, of one block and of the first level's width, around a trained one.

    The new level starts as resampling: down by averaging, up by interpolation, its residual branches at zero, so that
    the grown network draws blurred what the small one drew sharp.

    Raises:
        ValueError: If the levels are joined by residual blocks, which cannot start as resampling.
    """
    config = dict(small.config)
    if config["resample_type"] != "conv":
        raise ValueError(
            f"`resample_type` is {config['resample_type']!r}, but only networks with 'conv' can be grown."
        )
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    config.update(
        sample_size=2 * config["sample_size"],
        block_out_channels=(widths[0], *widths),
        layers_per_block=(1, *([layers] * len(widths) if isinstance(layers, int) else layers)),
        time_embedding_dim=small.time_embedding.mlp.linear_2.out_features,
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


def inner_key(key: str) -> str:
    """Where a parameter of the small network sits in the grown one: after the new level's block and downsampler."""
    name, _, rest = key.partition(".")
    if name in ("down_blocks", "downsamplers"):
        number, _, rest = rest.partition(".")
        return f"{name}.{int(number) + 1}.{rest}"
    return key  # the way up is counted from the deepest level


def start_as_resampling(unet: ImagenUNetModel) -> None:
    """Sets the resampling layers of the outermost level to averaging and interpolation, its first shortcut to a pass."""
    set_depthwise(unet.downsamplers[0], torch.tensor([1.0, 2.0, 1.0]) / 4)
    set_depthwise(unet.upsamplers[-1], torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4)
    for block in unet.up_blocks[-2:]:
        # the input is the coarser level's image and then the skip connection; only the former passes
        shortcut = block.resnets[0].conv_shortcut
        shortcut.weight.zero_()
        shortcut.bias.zero_()
        channels = torch.arange(shortcut.out_channels)
        shortcut.weight[channels, channels] = 1.0


def set_depthwise(conv: torch.nn.Module, kernel: torch.Tensor) -> None:
    """The separable kernel on each channel alone."""
    conv.weight.zero_()
    conv.bias.zero_()
    channels = torch.arange(conv.in_channels)
    conv.weight[channels, channels] = torch.outer(kernel, kernel).to(conv.weight)


def shift_noise_level(unet: ImagenUNetModel, shift: float) -> None:
    """Makes the embedding of a conditioning value that of `value - shift`: coarse features average the noise away.

    The sinusoids of a shifted value are those of the value, rotated; the rotation goes into the first linear layer.
    """
    linear = unet.time_embedding.mlp.linear_1
    half = linear.in_features // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
    cos, sin = (frequencies * shift).cos(), (frequencies * shift).sin()
    on_cos, on_sin = linear.weight[:, :half].clone(), linear.weight[:, half:].clone()
    linear.weight[:, :half] = on_cos * cos - on_sin * sin
    linear.weight[:, half:] = on_cos * sin + on_sin * cos
