"""Layer names in adapter files: the network's own, and diffusers' for DeepFloyd IF networks."""

from torch import nn

from ..conversion.deepfloyd import layer_names
from ..models import ImagenUNetModel


# Projections of the text, and the image's corresponding ones, which cross-attention lacks.
PROJECTIONS = {"add_k_proj": "to_k", "add_v_proj": "to_v"}


def diffusers_names(unet: nn.Module) -> dict[str, str]:
    """Map diffusers' layer names of a DeepFloyd IF network to this package's; empty for other networks."""
    if not isinstance(unet, ImagenUNetModel):
        return {}
    try:
        return layer_names(unet.config)
    except ValueError:
        return {}


def top_level_names(unet: nn.Module) -> set[str]:
    """Return the first components of a network's layer names, its own and diffusers' if there are any."""
    return {name.partition(".")[0] for name in [*dict(unet.named_children()), *diffusers_names(unet)]}


def idle_layers(names: dict[str, str]) -> set[str]:
    """Return layers in files of diffusers before 0.18 that the network lacks: the image's, in cross-attention.

    Args:
        names: Result of `diffusers_names`.
    """
    attentions = [name.rpartition(".") for name in names]
    idle = {f"{attention}.{PROJECTIONS[layer]}" for attention, _, layer in attentions if layer in PROJECTIONS}
    return idle - names.keys()
