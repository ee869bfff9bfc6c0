"""LoRA fine-tuning of a stage (Hu et al. 2021, arXiv 2106.09685): the training loop for an adapter."""

import hashlib
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from ...loaders.lora_adapters import check_adaptable, require_peft
from ...loaders.lora_names import diffusers_names
from ...models.interface import StageNetwork
from ...pipelines import ImagenPipeline
from ...pipelines.adapted_network import ADAPTER
from ...text.identity import sample_weights
from ...utils.files import read_json_object, write_json
from ...utils.references import reference_to, write_reference
from ..compatibility import check_objective
from ..devices import inner_network, is_spread
from ..export import INDEX, parts_of, save_parts, write_card, write_record
from ..loop import Trainer
from ..network import find_network, fresh_weights
from ..sampling import StagePipeline
from ..stage_card import ADAPTER_USE, DRAW, WITH_NETWORK, CardFacts, drawn_prompt, model_card, public_name
from ..states import NetworkState
from .finetuning_config import TARGET_MODULES, LoraTrainingConfig


class LoraTrainer(Trainer):
    """Training of which only an adapter is trained, averaged, checkpointed and exported.

    Args:
        config (`LoraTrainingConfig`): The configuration.
        unet (`StageNetwork`): The network; an adapter is added in place, and its own weights are not changed.
        text (`TextSource`, *optional*): As in `train`.
    """

    config: LoraTrainingConfig

    def adapt(self, unet: StageNetwork) -> None:
        require_peft()
        check_adaptable("unet", unet)
        from peft import LoraConfig

        config, accelerator = self.config, self.accelerator
        if is_spread(accelerator):
            raise ValueError(
                f"LoRA adapters do not support {accelerator.distributed_type.value}, and are small: train them with "
                "DDP."
            )
        check_objective(config)
        targets = find_targets(unet, config.lora_target_modules)
        self.subfolder, self.base_digest = find_network(config), digest(unet)
        name = str(config.pretrained_model_name_or_path)
        options = config.hub_options(name)
        self.network = reference_to(name, self.subfolder or "", identity=sample_weights(unet), **options)
        unet.requires_grad_(False)
        alpha = config.rank if config.lora_alpha is None else config.lora_alpha
        with fresh_weights(config.seed):
            unet.add_adapter(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets), ADAPTER)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "base weights": self.base_digest}

    def network_state(self) -> dict[str, NetworkState]:
        """Return the state of the adapter: frozen weights are not saved in a checkpoint."""
        return {"adapter": NetworkState(inner_network(self.accelerator, self.unet), self.names)}

    def export(self, unet: StageNetwork, done: int, results: dict[str, float]) -> None:
        """Write the adapter, and a stage that refers to the network, which opens as a pipeline."""
        from peft.utils import get_peft_model_state_dict

        config = self.config
        with parts_of(config) as partial:
            ImagenPipeline.save_lora_weights(
                partial,
                unet=unet,
                unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=ADAPTER),
                unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
            )
            pipe = self.pipeline(unet)
            save_parts(pipe, config, self.encoder, partial)
            self.save_network(partial)
            write_record(partial, config, done, results)
            facts = self.describe_use(pipe)
            write_card(partial, config, done, facts, model_card(unet, config, done, results, facts))

    def save_network(self, folder: Path) -> None:
        """Write the reference to the network, and the scheduler of its stage, replacing that of the run."""
        write_reference(folder / "unet", self.network, Path(self.config.output_dir) / "unet")
        entries = {"unet": ["diffusers_imagen", "AdaptedNetwork"]}
        scheduler = self.pretrained.scheduler
        scheduler_class = getattr(diffusers, str((scheduler or {}).get("_class_name")), None)
        if scheduler is not None and isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin):
            write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
            entries["scheduler"] = [scheduler_class.__module__.split(".")[0], scheduler_class.__name__]
        write_json(folder / INDEX, {**read_json_object(folder / INDEX), **entries})

    def describe_use(self, pipe: StagePipeline) -> CardFacts:
        """Describe the origin and the use of the adapter for the model card."""
        config, stage = self.config, str(public_name(self.config.pretrained_model_name_or_path))
        component = "" if self.subfolder in ("unet", None) else f', component="{self.subfolder}"'
        call = pipe.model_card_call(None if self.encoder is None else drawn_prompt(config))
        further = ADAPTER_USE.replace("{stage}", stage).replace("{component}", component)
        usage = DRAW.replace("{call}", call)
        if config.push_to_hub and self.network.is_local:  # only the adapter is uploaded
            usage, further = WITH_NETWORK.replace("{stage}", stage).replace("{component}", component), ""
            usage = usage.replace("{call}", call)
        return CardFacts(self.pretrained, usage, further, Path(stage).name)


def find_targets(unet: StageNetwork, targets: list[str]) -> list[str]:
    """Return the layers of these names, by the ends of their names or in full; default layers may be missing.

    In networks of DeepFloyd IF's architecture, a name that no layer has is interpreted as diffusers': `add_k_proj` of
    a network with only cross-attention is `to_k` here.

    Raises:
        ValueError: If there are no layers of a name.
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
    """Return the SHA-256 of a network's weights, which identifies the network of an adapter."""
    sha = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
