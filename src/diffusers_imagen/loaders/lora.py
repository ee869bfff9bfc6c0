"""ImagenLoraLoaderMixin: loading and saving of LoRA adapters for all stages of a pipeline, in one file."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module

from ..models.interface import StageNetwork
from ..utils.arguments import bad_argument, class_of
from ..utils.files import HUB_OPTIONS, whole_file
from .lora_adapters import AdaptersMixin, check_unfused, require_peft
from .lora_conversion import ALPHA, BARE, Adapter, Update, check_finite, group_weights, make_adapter, plain_name
from .lora_files import SOURCE, StateDict, read_source
from .lora_names import diffusers_names, top_level_names
from .lora_networks import check_hotswap, describe_adapter, hotswap_adapter, restored_after_error


logger = logging.get_logger(__name__)

FILE_OPTIONS = ("weight_name", "use_safetensors")
PLACE_OPTIONS = ("subfolder", *HUB_OPTIONS)


class ImagenLoraLoaderMixin(AdaptersMixin):
    r"""
    Mixin that loads, saves, weights and fuses LoRA adapters of the networks: `base_unet`, `sr256_unet` and
    `sr1024_unet` of a cascade, `unet` of a pipeline with a single stage. Every method needs peft.

    One file has the adapters of all stages; its keys begin with the component's name. The configuration of each
    adapter, including `lora_alpha`, is in the file's metadata.

    Adapters of DeepFloyd IF networks are saved with diffusers' layer names, as expected by
    `IFPipeline.load_lora_weights`, and are loaded with diffusers' names or this package's.
    """

    _lora_loadable_modules: list[str]  # names of the pipeline's networks

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | StateDict,
        metadata: dict[str, Any] | None = None,
        return_lora_metadata: bool = False,
        **kwargs,
    ) -> StateDict | tuple[StateDict, dict[str, Any] | None]:
        r"""
        Read the weights of adapters, under the keys with which they were saved.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A Hub id, a folder, a file of safetensors or of torch.save, or the weights themselves.
            metadata (`dict`, *optional*): Configuration of the weights, instead of the file's.
            return_lora_metadata (`bool`, defaults to `False`): Whether to return the configuration too.
            kwargs: Location of the file: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`,
                `force_download`, `local_files_only`, `proxies`; `use_safetensors`, False for a file of torch.save,
                which is read by torch's weights-only unpickler.

        Returns:
            The weights by key, and with `return_lora_metadata` the configuration, None if the file has none.

        Raises:
            ValueError: If there are no weights, or they are damaged.
        """
        options = FILE_OPTIONS + PLACE_OPTIONS
        unknown = sorted(set(kwargs) - set(options))
        if unknown:
            raise ValueError(f"`{unknown[0]}` is not an option of loading LoRA weights, which are {options}.")
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, (str, os.PathLike, dict)) or source == "":
            raise bad_argument(SOURCE, source, "a path, a Hub id or weights by key")
        if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(key, str) for key in metadata)):
            raise ValueError(f"`metadata` is {class_of(metadata)}, but should be a dict with names as keys.")
        check_options(kwargs)
        if isinstance(source, dict):
            state_dict, found = dict(source), None
        else:
            hub = {name: kwargs[name] for name in PLACE_OPTIONS if kwargs.get(name) is not None}
            file = {name: kwargs.get(name) for name in FILE_OPTIONS}
            state_dict, found = read_source(os.fspath(source), **file, has_metadata=metadata is not None, **hub)
        metadata = found if metadata is None else metadata
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | StateDict,
        adapter_name: str | None = None,
        component: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        r"""
        Load adapters into the stages named in the file, and activate them. LoRA and DoRA of diffusers, of peft (a
        folder with `adapter_config.json`) and of kohya's scripts are supported.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A Hub id, a folder, a file of safetensors or of torch.save, or the weights themselves.
            adapter_name (`str`, *optional*): Name of the adapter in every stage; the next `default_0`, `default_1`,
                ... if None.
            component (`str`, *optional*):
                The stage to which the weights of a single stage are assigned, instead of the name under which they
                were saved: use `component="base_unet"` to load an adapter of a single-stage pipeline (`unet`), or one
                without a stage's name, such as peft's and kohya's, into a cascade.
            hotswap (`bool`, defaults to `False`): Whether to replace the weights of the adapter of that name in place.
            low_cpu_mem_usage (`bool`, defaults to `True`): Whether to skip initialization of the weights that are
                loaded.
            kwargs: Passed to [`~ImagenLoraLoaderMixin.lora_state_dict`].

        Raises:
            ValueError: If the weights are damaged, of another method than LoRA, or do not match the networks of this
                pipeline; nothing is loaded then.
        """
        require_peft()
        present = self._lora_unets()
        self._check_adaptable(None if component is None else [component])
        if component is not None and component not in list(present):
            raise bad_argument("component", component, f"one of {list(present)}")
        check_adapter_name(adapter_name, present, hotswap)
        loaded = self.lora_state_dict(pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs)
        state_dict, metadata = cast(tuple[StateDict, dict[str, Any] | None], loaded)
        if state_dict and all(isinstance(key, str) and "lora" in key and "." not in key for key in state_dict):
            logger.warning(
                f"No key of the LoRA weights names a layer, as {next(iter(state_dict))!r}: nothing is loaded."
            )
            return
        adapters = self._adapters_of(state_dict, metadata, component)
        unets = {name: present[name] for name in adapters}
        adapter_name = choose_adapter_name(adapter_name, unets, hotswap)
        if hotswap:
            for name, unet in unets.items():
                check_hotswap(name, unet, adapter_name, adapters[name])
        else:
            check_unfused(unets, "adapter_name")
        with self._without_offloading(), restored_after_error(list(unets.values())):
            for name, unet in unets.items():
                if hotswap:
                    hotswap_adapter(unet, adapter_name, adapters[name], low_cpu_mem_usage)
                    continue
                unet.load_lora_adapter(
                    adapters[name].state_dict,
                    prefix=None,
                    adapter_name=adapter_name,
                    metadata=adapters[name].config,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        weight_name: str | None = None,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        **lora: Any,
    ) -> None:
        r"""
        Save adapters of any number of stages to one file, in a training loop. For adapters of a pipeline, use
        [`~ImagenLoraLoaderMixin.save_lora_adapter`].

        Args:
            save_directory (`str` or `os.PathLike`): Folder, created if it does not exist.
            weight_name (`str`, *optional*): Name of the file; `pytorch_lora_weights.safetensors` if None.
            is_main_process (`bool`, defaults to `True`): Whether this is the main process, the only one that writes.
            save_function (`Callable`, *optional*): Writes weights by key to a path; safetensors or torch.save if None.
            safe_serialization (`bool`, defaults to `True`):
                Whether to write safetensors; otherwise a file of torch.save, which cannot store a configuration.
            lora: `{component}_lora_layers`, the weights from `peft.get_peft_model_state_dict`, and
                `{component}_lora_adapter_metadata`, the adapter's `peft_config` as a dict: `base_unet_lora_layers`,
                ... Those of text encoders must be None. `{component}`, the network itself, *optional*: with it, an
                adapter of a DeepFloyd IF network is written with diffusers' layer names.

        Raises:
            ValueError: If weights are missing, or not finite; nothing is written then.
        """
        for name in [name for name in lora if name.startswith("text_encoder") and not lora[name]]:
            del lora[name]
        layers = {name: lora.pop(f"{name}_lora_layers", None) for name in cls._lora_loadable_modules}
        configs = {name: lora.pop(f"{name}_lora_adapter_metadata", None) for name in cls._lora_loadable_modules}
        unets = {name: lora.pop(name, None) for name in cls._lora_loadable_modules}
        layers = {name: plain_weights(f"{name}_lora_layers", weights) for name, weights in layers.items() if weights}
        if lora or not layers:
            raise ValueError(
                f"`{next(iter(lora), 'lora_layers')}` is unknown or missing: pass the weights as "
                f"{', '.join(f'`{name}_lora_layers`' for name in cls._lora_loadable_modules)}."
            )
        configs = {name: configs[name] for name in layers}
        check_serialization(save_directory, weight_name, save_function, safe_serialization, configs)
        for name in layers:
            layers[name], configs[name] = named_for_diffusers(name, unets[name], layers[name], configs[name])
            if configs[name] is None:
                logger.warning(f"`{name}_lora_adapter_metadata` is None: lora_alpha will be taken to be the rank.")
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        weight_name = weight_name or (LORA_WEIGHT_NAME_SAFE if safe_serialization else LORA_WEIGHT_NAME)
        with whole_file(Path(save_directory, weight_name)) as partial:
            cls._save_lora_weights(
                str(partial.parent),
                lora_layers=layers,
                lora_metadata=configs,
                weight_name=partial.name,
                save_function=save_function,
                safe_serialization=safe_serialization,
            )

    def save_lora_adapter(
        self, save_directory: str | os.PathLike, adapter_name: str | None = None, weight_name: str | None = None
    ) -> None:
        r"""
        Save an adapter of this pipeline, of all stages that have it, with its configuration.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, created if it does not exist.
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
        lora: dict[str, Any] = {}
        for component in (component for component, names in adapters.items() if adapter_name in names):
            unet = self._lora_unets()[component]
            lora[component] = unet
            lora[f"{component}_lora_layers"] = get_peft_model_state_dict(unet, adapter_name=adapter_name)
            lora[f"{component}_lora_adapter_metadata"] = describe_adapter(unet, adapter_name)
        self.save_lora_weights(save_directory, weight_name=weight_name, **lora)

    @contextmanager
    def _without_offloading(self) -> Iterator[None]:
        """Context manager that removes offloading from all stages, and restores it at the end or on error."""
        by_model, by_layer, by_group = self._optionally_disable_offloading(self)
        try:
            yield
        finally:
            if by_model:
                self.enable_model_cpu_offload()
            elif by_layer:
                self.enable_sequential_cpu_offload()
            elif by_group:
                for component in self.components.values():
                    if isinstance(component, torch.nn.Module):
                        _maybe_remove_and_reapply_group_offloading(component)

    def _adapters_of(
        self, state_dict: StateDict, metadata: dict[str, Any] | None, component: str | None
    ) -> dict[str, Adapter]:
        """Return the adapter of each network; weights for missing stages are skipped with a warning."""
        present = self._lora_unets()
        if not state_dict:
            raise ValueError(f"`{SOURCE}` has no weights.")
        updates = group_weights(state_dict, self._known_prefixes(state_dict, component))
        self._check_adaptable(updates)
        if component is not None and len(updates) != 1:
            raise ValueError(f"`component` is {component!r}, but the LoRA weights are for several: {sorted(updates)}.")
        places = {place: component or self._place_of(place, updates) for place in updates}
        missing = [name for name in places.values() if name not in present]
        if missing:
            logger.warning(f"This pipeline has no {', '.join(missing)}: the LoRA weights for it are left out.")
        adapters = {}
        for place, name in places.items():
            if name not in present:
                continue
            config = config_of(metadata, place)
            if not config and not any(ALPHA in update.parts for update in updates[place].values()):
                logger.warning(
                    f"The LoRA weights of {name} come without their configuration: lora_alpha is taken to be the rank."
                )
            adapters[name] = make_adapter(name, present[name], updates[place], config)
        return adapters

    def _known_prefixes(self, state_dict: StateDict, component: str | None) -> list[str]:
        """Return the allowed prefixes of keys; with `component`, any common prefix."""
        known = list(self._lora_loadable_modules)
        if component is not None:
            named = {str(key).split(".")[0] for key in state_dict}
            children = top_level_names(self._lora_unets()[component])
            if len(named) == 1 and not named & {*children, "base_model", "module", "_orig_mod"}:
                known += [name for name in named if not name.startswith(("lora_", "text_encoder"))]
        return known

    def _place_of(self, place: str, updates: dict[str, dict[str, Update]]) -> str:
        """Return the component of weights, if `component` does not specify it."""
        present = self._lora_unets()
        if place in self._lora_loadable_modules and set(updates) & set(present):
            return place
        layers = [layer for updated in updates.values() for layer in updated] if place == BARE else []
        children = {name for unet in present.values() for name in top_level_names(unet)}
        firsts = list(dict.fromkeys(layer.split(".")[0] for layer in layers if not layer.startswith("lora_unet_")))
        foreign = [name for name in firsts if name not in children]
        if place == BARE and not foreign and len(present) == len(updates) == 1:
            return next(iter(present))
        named = foreign or [name for name in updates if name != BARE]
        raise ValueError(
            f"The LoRA weights {f'are for {named}' if named else 'do not say which network they are for'}, but the "
            f"components of this pipeline are {list(present)}. Set `component` to the one of the weights of a single "
            "stage."
        )


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for invalid options that locate a file."""
    for name in ("weight_name", "subfolder", "revision", "cache_dir"):
        if not isinstance(options.get(name) or "", (str, os.PathLike)) or "\0" in str(options.get(name)):
            raise bad_argument(name, str(options[name]), "a string")
    if options.get("use_safetensors") not in (None, True, False):
        raise bad_argument("use_safetensors", options["use_safetensors"], "a bool")


def config_of(metadata: dict[str, Any] | None, place: str) -> dict[str, Any]:
    """Return the configuration of a component's weights, or one without a component's name, as in peft."""
    metadata = metadata or {}
    own = {key.removeprefix(f"{place}."): value for key, value in metadata.items() if key.startswith(f"{place}.")}
    return own or {key: value for key, value in metadata.items() if "." not in key}


def check_adapter_name(adapter_name: str | None, unets: dict[str, StageNetwork], hotswap: bool) -> None:
    """Raise ValueError, before weights are read, for an invalid name, or with `hotswap` for a name that is not loaded."""
    if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name):
        raise bad_argument("adapter_name", adapter_name, "a name without dots")
    if hotswap and not any(adapter_name in getattr(unet, "peft_config", {}) for unet in unets.values()):
        taken = {name: list(getattr(unet, "peft_config", {})) for name, unet in unets.items()}
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which `hotswap` cannot replace: there is {taken}.")


def choose_adapter_name(adapter_name: str | None, unets: dict[str, StageNetwork], hotswap: bool) -> str:
    """Return the given name, or the first default that no network uses.

    Raises ValueError if the name is taken, or with `hotswap` if no network has an adapter of that name.
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


def plain_weights(argument: str, layers: StateDict | torch.nn.Module) -> StateDict:
    """Return finite weights to save, under keys without torch.compile's prefix."""
    layers = layers.state_dict() if isinstance(layers, torch.nn.Module) else layers
    if not isinstance(layers, dict) or not all(isinstance(value, torch.Tensor) for value in layers.values()):
        raise ValueError(f"`{argument}` is {class_of(layers)}, but should have tensors by key.")
    for key, value in layers.items():
        check_finite(key, value)
    return {plain_name(key): value.contiguous() for key, value in layers.items()}


def named_for_diffusers(
    component: str, unet: StageNetwork | None, layers: StateDict, config: dict[str, Any] | None
) -> tuple[StateDict, dict[str, Any] | None]:
    """Return weights and configuration to save, with diffusers' layer names for DeepFloyd IF networks."""
    if unet is not None and not isinstance(unwrap_module(unet), StageNetwork):
        raise bad_argument(component, unet, "a network of a stage, or None")
    names = {} if unet is None else {own: name for name, own in diffusers_names(unwrap_module(unet)).items()}
    if not names:
        return layers, config
    adapter = make_adapter(component, unwrap_module(unet), group_weights(layers, [])[BARE], config, names)
    return adapter.state_dict, None if config is None else adapter.config


def check_serialization(
    save_directory: str | os.PathLike,
    weight_name: str | None,
    save_function: Callable | None,
    safe_serialization: bool,
    configs: dict[str, dict[str, Any] | None],
) -> None:
    """Raise ValueError for weights that cannot be saved with these options."""
    if not isinstance(save_directory, (str, os.PathLike)) or os.path.isfile(save_directory):
        raise bad_argument("save_directory", save_directory, "a folder")
    if weight_name is not None and (not isinstance(weight_name, str) or Path(weight_name).name != weight_name):
        raise bad_argument("weight_name", weight_name, "the name of a file")
    if save_function is not None and not callable(save_function):
        raise ValueError(f"`save_function` is {class_of(save_function)}, but should be callable.")
    for name, config in configs.items():
        if config is not None and not isinstance(config, dict):
            raise ValueError(f"`{name}_lora_adapter_metadata` is {class_of(config)}, but should be a dict.")
    if not safe_serialization and any(configs.values()):
        name = next(name for name, config in configs.items() if config)
        raise ValueError(
            f"`safe_serialization` is False, but only safetensors keep `{name}_lora_adapter_metadata`, and with it "
            "lora_alpha: leave one of the two out."
        )
