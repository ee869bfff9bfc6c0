"""LoRA adapters for every stage of a pipeline, in one file of weights."""

import os
import tempfile
from itertools import count
from pathlib import Path
from typing import Any, Optional, Union

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import is_peft_available, logging

from ..models.unet_base import ConditionalUNet


logger = logging.get_logger(__name__)

StateDict = dict[str, torch.Tensor]
# how PEFT and older files call the first and the second factor of an update
DOWN, UP = (".lora_A.", ".lora.down."), (".lora_B.", ".lora.up.")
HUB_OPTIONS = (
    "weight_name",
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
)


class ImagenLoraLoaderMixin(LoraBaseMixin):
    r"""
    Loads, saves, weighs and fuses LoRA adapters of the networks: `base_unet`, `sr256_unet` and `sr1024_unet` of a
    cascade, `unet` of a pipeline of a single stage. Every method needs peft.

    One file holds the adapters of all stages; its keys begin with the component's name. The configuration of each
    adapter, `lora_alpha` among it, travels in the file's metadata.
    """

    _lora_loadable_modules = ["unet", "base_unet", "sr256_unet", "sr1024_unet"]

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: Union[str, os.PathLike, StateDict],
        metadata: Optional[dict[str, Any]] = None,
        return_lora_metadata: bool = False,
        **kwargs,
    ) -> Union[StateDict, tuple[StateDict, Optional[dict[str, Any]]]]:
        r"""
        Reads the weights of adapters.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A Hub id, a folder, a safetensors file, or the weights themselves.
            metadata (`dict`, *optional*): Configuration of weights that are given as a dict.
            return_lora_metadata (`bool`, defaults to `False`): Whether to return the configuration too.
            kwargs: Where the file is: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`,
                `force_download`, `local_files_only`, `proxies`.

        Returns:
            The weights by key, and with `return_lora_metadata` the configuration, None if the file has none.
        """
        unknown = sorted(set(kwargs) - set(HUB_OPTIONS))
        if unknown:
            raise ValueError(f"`{unknown[0]}` is not an option of loading LoRA weights; those are {HUB_OPTIONS}.")
        source = pretrained_model_name_or_path_or_dict
        state_dict, metadata = _fetch_state_dict(
            source if isinstance(source, dict) else os.fspath(source),
            **{option: kwargs.get(option) for option in HUB_OPTIONS},
            use_safetensors=True,
            allow_pickle=False,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            metadata=metadata,
        )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Union[str, os.PathLike, StateDict],
        adapter_name: Optional[str] = None,
        component: Optional[str] = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        r"""
        Loads adapters into the stages that the file names, and activates them.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A Hub id, a folder, a safetensors file, or the weights themselves.
            adapter_name (`str`, *optional*): Name of the adapter in every stage; the next `default_0`, `default_1`, ...
                if None.
            component (`str`, *optional*):
                The stage that the weights of a single stage are for, whatever name they were saved under: an adapter
                that was trained on a pipeline of one stage (`unet`) serves a cascade with `component="base_unet"`.
            hotswap (`bool`, defaults to `False`): Whether to replace the weights of the adapter of that name in place.
            low_cpu_mem_usage (`bool`, defaults to `True`): Whether to skip the initialisation of what is then loaded.
            kwargs: Passed to [`~ImagenLoraLoaderMixin.lora_state_dict`].

        Raises:
            ValueError: If the weights do not fit the networks of this pipeline; nothing is loaded then.
        """
        require_peft()
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        if component is not None:
            state_dict, metadata = self._readdress(state_dict, metadata, component)
        unets = self._addressed_unets(state_dict)
        for name, unet in unets.items():
            check_fit(name, unet, state_dict)
        adapter_name = choose_adapter_name(adapter_name, unets, hotswap)

        for name, unet in unets.items():
            config = {key: value for key, value in (metadata or {}).items() if key.startswith(f"{name}.")}
            if not config:
                logger.warning(
                    f"The LoRA weights of {name} come without their configuration: lora_alpha is taken to be the rank."
                )
            unet.load_lora_adapter(
                state_dict,
                prefix=name,
                adapter_name=adapter_name,
                metadata=config or None,
                hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=self,
            )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: Union[str, os.PathLike],
        weight_name: Optional[str] = None,
        is_main_process: bool = True,
        **lora: dict[str, Any],
    ) -> None:
        r"""
        Writes adapters of any number of stages as one safetensors file: what a training loop calls.
        [`~ImagenLoraLoaderMixin.save_lora_adapter`] is shorter where a pipeline holds the adapter.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if it does not exist.
            weight_name (`str`, *optional*): Name of the file; `pytorch_lora_weights.safetensors` if None.
            is_main_process (`bool`, defaults to `True`): Only the main process of a distributed run writes.
            lora: `{component}_lora_layers`, the weights as `peft.get_peft_model_state_dict` gives them, and
                `{component}_lora_adapter_metadata`, the adapter's `peft_config` as a dict: `base_unet_lora_layers`, ...
        """
        layers = {name: lora.pop(f"{name}_lora_layers", None) for name in cls._lora_loadable_modules}
        configs = {name: lora.pop(f"{name}_lora_adapter_metadata", None) for name in cls._lora_loadable_modules}
        layers = {name: weights for name, weights in layers.items() if weights}
        if lora or not layers:
            raise ValueError(
                f"`{next(iter(lora), 'lora_layers')}` is not known or missing: give the weights as "
                f"{', '.join(f'`{name}_lora_layers`' for name in cls._lora_loadable_modules)}."
            )
        for name in layers:
            if configs[name] is None:
                logger.warning(f"`{name}_lora_adapter_metadata` is None: lora_alpha will be taken to be the rank.")
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".lora-") as partial:
            cls._save_lora_weights(
                partial,
                lora_layers=layers,
                lora_metadata={name: configs[name] for name in layers},
                weight_name=weight_name,
            )
            for path in Path(partial).iterdir():
                os.replace(path, Path(save_directory, path.name))

    def save_lora_adapter(
        self,
        save_directory: Union[str, os.PathLike],
        adapter_name: Optional[str] = None,
        weight_name: Optional[str] = None,
    ) -> None:
        r"""
        Writes an adapter of this pipeline, of all stages that have it, with its configuration.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if it does not exist.
            adapter_name (`str`, *optional*): May be None if the pipeline has only one.
            weight_name (`str`, *optional*): Name of the file; `pytorch_lora_weights.safetensors` if None.
        """
        require_peft()
        from peft.utils import get_peft_model_state_dict

        adapters = self.get_list_adapters()
        names = sorted({name for names in adapters.values() for name in names})
        if adapter_name is None and len(names) == 1:
            adapter_name = names[0]
        if adapter_name not in names:
            raise ValueError(f"`adapter_name` is {adapter_name!r}, but the adapters of this pipeline are {names}.")
        lora = {}
        for component in (component for component, names in adapters.items() if adapter_name in names):
            unet = getattr(self, component)
            lora[f"{component}_lora_layers"] = get_peft_model_state_dict(unet, adapter_name=adapter_name)
            lora[f"{component}_lora_adapter_metadata"] = unet.peft_config[adapter_name].to_dict()
        self.save_lora_weights(save_directory, weight_name=weight_name, **lora)

    def set_adapters(
        self,
        adapter_names: Union[list[str], str],
        adapter_weights: Union[float, dict[str, float], list[Union[float, dict[str, float]]], None] = None,
    ) -> None:
        r"""
        Activates adapters, and no others, with weights.

        Args:
            adapter_names (`list[str]` or `str`): The adapters.
            adapter_weights (`float`, `dict[str, float]` or a `list` of these, *optional*):
                One weight for all, one each, or weights by component: `{"base_unet": 0.8, "sr256_unet": 0.0}`. What
                is not named has weight 1.
        """
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not isinstance(adapter_weights, list):
            # diffusers takes entries out of a dict, which adapters must not share
            adapter_weights = [
                dict(adapter_weights) if isinstance(adapter_weights, dict) else adapter_weights for _ in adapter_names
            ]
        present = list(self._lora_unets())
        for weights in adapter_weights:
            unknown = sorted(set(weights) - set(present)) if isinstance(weights, dict) else []
            if unknown:
                raise ValueError(
                    f"`adapter_weights` names {unknown}, but the components of this pipeline are {present}."
                )
        super().set_adapters(adapter_names, adapter_weights)

    def fuse_lora(
        self,
        components: Optional[list[str]] = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Optional[list[str]] = None,
    ) -> None:
        r"""
        Adds the adapters to the networks' own weights, which makes them as fast as without.

        Args:
            components (`list[str]`, *optional*): Networks to fuse; all if None.
            lora_scale (`float`, defaults to 1.0): Weight of the adapters, on top of `set_adapters`.
            safe_fusing (`bool`, defaults to `False`): Whether to refuse to fuse weights that are not finite.
            adapter_names (`list[str]`, *optional*): The adapters; those that are active if None.
        """
        super().fuse_lora(self._checked_components(components), lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: Optional[list[str]] = None) -> None:
        r"""
        Takes fused adapters out of the networks' weights again, up to rounding.

        Args:
            components (`list[str]`, *optional*): Networks; all if None.
        """
        super().unfuse_lora(self._checked_components(components))

    def _lora_unets(self) -> dict[str, ConditionalUNet]:
        """The networks that this pipeline has, by component."""
        unets = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        return {name: unet for name, unet in unets.items() if unet is not None}

    def _checked_components(self, components: Optional[list[str]]) -> list[str]:
        present = list(self._lora_unets())
        unknown = [name for name in components or [] if name not in present]
        if unknown or components == []:
            raise ValueError(f"`components` is {components}, but should be among {present}.")
        return components or present

    def _addressed_unets(self, state_dict: StateDict) -> dict[str, ConditionalUNet]:
        """The networks that the keys name; a stage that this pipeline lacks is left out, with a warning."""
        present = self._lora_unets()
        named = list(dict.fromkeys(key.split(".")[0] for key in state_dict))
        foreign = [name for name in named if name not in self._lora_loadable_modules]
        if foreign or not set(named) & set(present):
            raise ValueError(
                f"The LoRA weights are for {named}, but the components of this pipeline are {list(present)}. "
                "`component` says which one the weights of a single stage are for."
            )
        missing = [name for name in named if name not in present]
        if missing:
            logger.warning(f"This pipeline has no {', '.join(missing)}: the LoRA weights for it are left out.")
        return {name: unet for name, unet in present.items() if name in named}

    def _readdress(
        self, state_dict: StateDict, metadata: Optional[dict[str, Any]], component: str
    ) -> tuple[StateDict, Optional[dict[str, Any]]]:
        """The weights of one stage under another component's name."""
        present = list(self._lora_unets())
        if component not in present:
            raise ValueError(f"`component` is {component!r}, but should be one of {present}.")
        named = {key.split(".")[0] for key in state_dict}
        if len(named) != 1:
            raise ValueError(f"`component` is {component!r}, but the LoRA weights are for several: {sorted(named)}.")
        rename = lambda entries: {f"{component}.{key.split('.', 1)[1]}": value for key, value in entries.items()}  # noqa: E731
        return rename(state_dict), metadata and rename(metadata)


def require_peft() -> None:
    """Says how to get what adapters need."""
    if not is_peft_available():
        raise ValueError("LoRA adapters need peft: pip install peft")


def choose_adapter_name(adapter_name: Optional[str], unets: dict[str, ConditionalUNet], hotswap: bool) -> str:
    """The given name, or the first default that no network uses.

    Raises:
        ValueError: If the name is taken, or, to hotswap, if there is nothing of that name to replace.
    """
    taken = {name: list(getattr(unet, "peft_config", {})) for name, unet in unets.items()}
    if hotswap and not all(adapter_name in names for names in taken.values()):
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which `hotswap` cannot replace: there is {taken}.")
    if not hotswap and any(adapter_name in names for names in taken.values()):
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which is taken: there is {taken}.")
    if adapter_name is not None:
        return adapter_name
    used = {name for names in taken.values() for name in names}
    return next(name for name in map("default_{}".format, count()) if name not in used)


def check_fit(component: str, unet: ConditionalUNet, state_dict: StateDict) -> None:
    """Checks that every layer that the weights change is there, and as wide.

    Raises:
        ValueError: If not.
    """
    modules = dict(unet.named_modules())
    for key, weight in state_dict.items():
        factor = next((factor for factor in DOWN + UP if factor in key), None)
        if not key.startswith(f"{component}.") or factor is None:
            continue
        layer = key.removeprefix(f"{component}.").split(factor)[0]
        if layer not in modules:
            raise ValueError(f"The LoRA weights change {component}.{layer}, which this network does not have.")
        side = 1 if factor in DOWN else 0
        width = modules[layer].weight.shape[side]
        if key.endswith("weight") and weight.shape[side] != width:
            raise ValueError(
                f"The LoRA weights for {component}.{layer} have width {weight.shape[side]}, but the layer has {width}."
            )
