"""LoRA fine-tuning (Hu et al. 2021, arXiv 2106.09685) of a stage: the loop, with an adapter for the weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType

from ...loaders.lora import require_peft
from ...models.unet_base import ConditionalUNet
from ...pipelines import ImagenPipeline
from ..compatibility import check_objective
from ..config import TrainingConfig
from ..data.data_config import arg
from ..devices import inner_network
from ..export import CARD_FILE, model_card, parts_of, write_record
from ..loop import Trainer
from ..network import find_network, fresh_weights
from ..states import NetworkState


TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
ADAPTER = "default"

USAGE = """import diffusers_imagen
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{stage}")
pipe.load_lora_weights("{{name}}"{component})"""


@dataclass
class LoraTrainingConfig(TrainingConfig):
    """Settings of a run that trains an adapter of a stage."""

    rank: int = arg(4, "Rank of the adapter's updates.")
    lora_alpha: float | None = arg(None, "Updates are scaled by lora_alpha / rank; the rank if not given.")
    lora_target_modules: list[str] = arg(TARGET_MODULES, "Layers that are adapted, by the ends of their names.")

    def __post_init__(self):
        super().__post_init__()
        check_adapter(self)

    def tags(self) -> list[str]:
        return ["lora"]


def check_adapter(config: TrainingConfig) -> None:
    """Checks what an adapter is told, and that there is a trained stage to adapt.

    Raises:
        ValueError: If not.
    """
    if config.pretrained_model_name_or_path is None or config.grow or config.layers_per_block:
        raise ValueError(
            "Fine-tuning begins with a trained stage: give `pretrained_model_name_or_path`, not `grow` or "
            "`layers_per_block`."
        )
    if config.rank is None:  # of DreamBooth, which trains whole networks too
        if config.lora_alpha is not None or config.lora_target_modules != TARGET_MODULES:
            raise ValueError("`lora_alpha` or `lora_target_modules` is given, but without `rank` there is no adapter.")
        return
    if not config.lora_target_modules:
        raise ValueError("`lora_target_modules` is empty, but should name layers.")
    if config.use_ema and config.ema_type == "power":
        raise ValueError("`ema_type` is 'power', but only averages of whole networks can be reconstructed.")


class LoraTrainer(Trainer):
    """A run of which only an adapter is trained, averaged, checkpointed and exported.

    Args:
        config (`LoraTrainingConfig`): The settings.
        unet (`ConditionalUNet`): The network; its adapter is added in place, its own weights stay as they are.
        text (`TextSource`, *optional*): As `train`.
    """

    def adapt(self, unet: ConditionalUNet) -> None:
        require_peft()
        from peft import LoraConfig

        config, accelerator = self.config, self.accelerator
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(f"An adapter is small: train it with DDP, not {accelerator.distributed_type.value}.")
        check_objective(config)
        check_targets(unet, config.lora_target_modules)
        self.base_digest = digest(unet)
        unet.requires_grad_(False)
        alpha = config.rank if config.lora_alpha is None else config.lora_alpha
        with fresh_weights(config.seed):
            unet.add_adapter(
                LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.lora_target_modules)), ADAPTER
            )

    def describe(self, unet: ConditionalUNet) -> dict[str, Any]:
        return {**super().describe(unet), "base weights": self.base_digest}

    def network_state(self) -> dict[str, NetworkState]:
        """The adapter alone: the frozen weights are not in a checkpoint."""
        return {"adapter": NetworkState(inner_network(self.accelerator, self.unet), self.names)}

    def export(self, unet: ConditionalUNet, done: int, results: dict[str, float]) -> None:
        from peft.utils import get_peft_model_state_dict

        stage = self.config.pretrained_model_name_or_path
        subfolder = find_network(self.config)
        component = "" if subfolder in ("unet", None) else f', component="{subfolder}"'
        usage = USAGE.format(stage=Path(stage).name if Path(stage).is_dir() else stage, component=component)
        with parts_of(self.config) as partial:
            ImagenPipeline.save_lora_weights(
                partial,
                unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=ADAPTER),
                unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
            )
            write_record(partial, self.config, done, results)
            card = model_card(unet, self.config, done, results, usage, adapter_of=Path(stage).name)
            (partial / CARD_FILE).write_text(card, encoding="utf-8")


def check_targets(unet: ConditionalUNet, targets: list[str]) -> None:
    """Checks that there are layers of these names; a network has not all of the default ones.

    Raises:
        ValueError: If not.
    """
    names = [f".{name}" for name, _ in unet.named_modules()]
    missing = [target for target in targets if not target or not any(name.endswith(f".{target}") for name in names)]
    if missing and (list(targets) != TARGET_MODULES or len(missing) == len(targets)):
        raise ValueError(f"`lora_target_modules` has {missing}, but no layer of the network has such a name.")


def digest(unet: ConditionalUNet) -> str:
    """SHA-256 of a network's weights: an adapter belongs to them."""
    sha = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
