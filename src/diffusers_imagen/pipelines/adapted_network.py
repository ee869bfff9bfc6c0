"""AdaptedNetwork: reference to the network that a trained LoRA adapter belongs to, in the folder of the adapter."""

import os
from pathlib import Path
from typing import Any

from diffusers import AutoModel, ModelMixin, UNet2DConditionModel

from ..conversion.deepfloyd import unet_from_deepfloyd
from ..models.interface import StageNetwork
from ..models.unet_base import ConditionalUNet
from ..schedulers import EDMHeunScheduler
from ..text.identity import identity_mismatch, sample_weights
from ..utils.arguments import class_of
from ..utils.errors import one_line
from ..utils.references import Reference, attempts, read_reference
from .pipeline_imagen import ImagenPipeline
from .pipeline_imagen_superresolution import ImagenSuperResolutionPipeline


ADAPTER = "default"


class AdaptedNetwork(StageNetwork, ModelMixin):
    """
    Placeholder in `model_index.json` for a network that is saved elsewhere, with an adapter in the pipeline's folder.
    It is never instantiated: `from_pretrained` returns the network, with the adapter loaded as `default`.
    """

    names_another = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load the network that a folder's reference.json refers to, with the adapter in the parent folder.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): The folder: `unet/` in the folder of an adapter.
            kwargs: Options of diffusers' `from_pretrained` for the network.

        Raises:
            ValueError: If the file is malformed, or the network or the adapter cannot be loaded.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "")
        try:
            reference = read_reference(folder)
            unet = load_network(reference, **kwargs)
            difference = identity_mismatch(reference.identity, sample_weights(unet))
            if difference is not None:
                raise ValueError(f"'{reference.source}' has another network ({difference})")
        except ValueError as error:
            raise ValueError(
                f"'{folder}' names the network that the adapter was trained on, but {error}: load the network's own "
                "pipeline, then the adapter by `load_lora_weights`."
            ) from error
        pipeline_class: Any = ImagenSuperResolutionPipeline if unet.takes_low_res else ImagenPipeline
        pipeline_class(unet, EDMHeunScheduler()).load_lora_weights(os.fspath(folder.parent), adapter_name=ADAPTER)
        return unet


def load_network(reference: Reference, **options: Any) -> Any:
    """Load a network; networks of DeepFloyd IF in diffusers' format are converted.

    Raises:
        ValueError: If it does not exist, or cannot be loaded.
    """
    if reference.is_local and not os.path.isdir(reference.source):
        raise ValueError(f"it is not in '{reference.source}'")
    options |= {"subfolder": reference.subfolder or None}
    options |= {key: value for key in ("revision", "variant") if (value := getattr(reference, key)) is not None}
    for attempt in attempts(reference):
        try:
            config = ConditionalUNet.load_config(
                reference.source, subfolder=reference.subfolder or None, revision=reference.revision, **attempt
            )
            if config.get("_class_name") == UNet2DConditionModel.__name__:
                return unet_from_deepfloyd(
                    UNet2DConditionModel.from_pretrained(reference.source, **options, **attempt)
                )
            found = AutoModel.from_pretrained(reference.source, trust_remote_code=False, **options, **attempt)
        except Exception as error:  # for any content of its files
            reason = error
            continue
        if not isinstance(found, StageNetwork):
            raise ValueError(f"'{reference.source}' has a network {class_of(found)}")
        return found
    raise ValueError(f"'{reference.source}' cannot be loaded ({one_line(reason)})") from reason
