"""Names of layers in files of adapters: the network's own, and those of diffusers for DeepFloyd IF's networks."""

from torch import nn

from ..conversion.deepfloyd import layer_names
from ..models import ImagenUNetModel


# Projections of the text, and those of the image beside them, which cross-attention has not.
PROJECTIONS = {"add_k_proj": "to_k", "add_v_proj": "to_v"}


def diffusers_names(unet: nn.Module) -> dict[str, str]:
    """Return the layers of a network of DeepFloyd IF's kind by diffusers' name, each with its own; none for other networks."""
    if not isinstance(unet, ImagenUNetModel):
        return {}
    try:
        return layer_names(unet.config)
    except ValueError:
        return {}


def top_level_names(unet: nn.Module) -> set[str]:
    """Return what the names of a network's layers begin with, up to the first dot; its own, and diffusers' if there are any."""
    return {name.partition(".")[0] for name in [*dict(unet.named_children()), *diffusers_names(unet)]}


def idle_layers(names: dict[str, str]) -> set[str]:
    """Layers that diffusers' files before 0.18 adapt although the network lacks them: of the image in cross-attention.

    Args:
        names: As `diffusers_names` gives them.
    """
    attentions = [name.rpartition(".") for name in names]
    idle = {f"{attention}.{PROJECTIONS[layer]}" for attention, _, layer in attentions if layer in PROJECTIONS}
    return idle - names.keys()
