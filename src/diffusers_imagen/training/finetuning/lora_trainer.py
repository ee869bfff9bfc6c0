"""LoRA fine-tuning (Hu et al. 2021, arXiv 2106.09685) of a stage: the loop, with an adapter for the weights."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from ...loaders.lora_adapters import check_adaptable, require_peft
from ...loaders.lora_names import diffusers_names
from ...models.interface import StageNetwork
from ...pipelines import ImagenPipeline
from ...pipelines.origin import list_origins
from ..compatibility import check_objective
from ..devices import inner_network, is_spread
from ..export import CARD_FILE, model_card, parts_of, write_record
from ..loop import Trainer
from ..network import find_network, fresh_weights
from ..states import NetworkState
from .finetuning_config import TARGET_MODULES, LoraTrainingConfig


ADAPTER = "default"

USAGE = """import diffusers_imagen
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{stage}")
pipe.load_lora_weights("{{name}}"{component})"""


class LoraTrainer(Trainer):
    """A run of which only an adapter is trained, averaged, checkpointed and exported.

    Args:
        config (`LoraTrainingConfig`): The settings.
        unet (`StageNetwork`): The network; its adapter is added in place, its own weights stay as they are.
        text (`TextSource`, *optional*): As `train`.
    """

    config: LoraTrainingConfig

    def adapt(self, unet: StageNetwork) -> None:
        require_peft()
        check_adaptable("unet", unet)
        from peft import LoraConfig

        config, accelerator = self.config, self.accelerator
        if is_spread(accelerator):
            raise ValueError(f"An adapter is small: train it with DDP, not {accelerator.distributed_type.value}.")
        check_objective(config)
        targets = find_targets(unet, config.lora_target_modules)
        self.subfolder, self.base_digest = find_network(config), digest(unet)
        unet.requires_grad_(False)
        alpha = config.rank if config.lora_alpha is None else config.lora_alpha
        with fresh_weights(config.seed):
            unet.add_adapter(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets), ADAPTER)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "base weights": self.base_digest}

    def network_state(self) -> dict[str, NetworkState]:
        """The adapter alone: the frozen weights are not in a checkpoint."""
        return {"adapter": NetworkState(inner_network(self.accelerator, self.unet), self.names)}

    def export(self, unet: StageNetwork, done: int, results: dict[str, float]) -> None:
        from peft.utils import get_peft_model_state_dict

        stage = str(self.config.pretrained_model_name_or_path)
        component = "" if self.subfolder in ("unet", None) else f', component="{self.subfolder}"'
        usage = USAGE.format(stage=Path(stage).name if Path(stage).is_dir() else stage, component=component)
        with parts_of(self.config) as partial:
            ImagenPipeline.save_lora_weights(
                partial,
                unet=unet,
                unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=ADAPTER),
                unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
            )
            write_record(partial, self.config, done, results)
            origins = list_origins(self.pretrained.origin)
            card = model_card(unet, self.config, done, results, origins, usage, adapter_of=Path(stage).name)
            (partial / CARD_FILE).write_text(card, encoding="utf-8")


def find_targets(unet: StageNetwork, targets: list[str]) -> list[str]:
    """The layers of these names, by the ends of their names or in whole; a network has not all of the default ones.

    In a network of DeepFloyd IF's kind a name that no layer has is taken for diffusers': `add_k_proj` of a network that
    only has cross-attention is `to_k` here.

    Raises:
        ValueError: If there are none of a name.
    """
    own, theirs = [name for name, _ in unet.named_modules()], diffusers_names(unet)
    found: dict[str, list[str]] = {}
    for target in targets:
        ends = f".{target}" if target else "\0"
        known = any(f".{name}".endswith(ends) for name in own)
        found[target] = [target] if known else [theirs[name] for name in theirs if f".{name}".endswith(ends)]
    missing = [target for target, names in found.items() if not names]
    if missing and (list(targets) != TARGET_MODULES or len(missing) == len(targets)):
        raise ValueError(f"`lora_target_modules` has {missing}, but no layer of the network has such a name.")
    return [name for names in found.values() for name in names]


def digest(unet: StageNetwork) -> str:
    """SHA-256 of a network's weights: an adapter belongs to them."""
    sha = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
