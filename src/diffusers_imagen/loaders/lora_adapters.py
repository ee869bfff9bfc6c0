"""AdaptersMixin: weighting, fusing, disabling and removing of loaded adapters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin, lora_base
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import is_peft_available
from diffusers.utils.torch_utils import unwrap_module

from ..models.interface import StageNetwork
from ..utils.arguments import bad_argument, class_of, is_finite
from .lora_networks import (
    BEFORE_FUSING,
    fused_adapters,
    lora_layers,
    restore_scaling,
    scaled_to_fuse,
    weights_by_layer,
)


class AdaptersMixin(LoraBaseMixin):
    """Methods of [`ImagenLoraLoaderMixin`] for loaded adapters; networks may be compiled."""

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict[str, Any] | list[float | dict[str, Any]] | None = None,
    ) -> None:
        r"""
        Activate adapters, with weights, and deactivate all others.

        Args:
            adapter_names (`list[str]` or `str`): The adapters.
            adapter_weights (`float`, `dict[str, float]` or a `list` of these, *optional*):
                One weight for all, one each, or weights by component: `{"base_unet": 0.8, "sr256_unet": 0.0}`, or by
                component and block: `{"base_unet": {"down": 0.5, "mid": 1, "up": {"block_1": 0.2}}}`. The default is
                weight 1.

        Raises:
            ValueError: If there is no such adapter or component, a weight is not a finite number, or adapters are fused.
        """
        adapter_names = self._checked_adapters(adapter_names)
        check_unfused(self._lora_unets(), "adapter_names")
        each = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(adapter_names)
        # each gets a separate dict, because diffusers removes entries
        self._networks().set_adapters(adapter_names, [self._expanded_weights(weights) for weights in each])
        for layer in lora_layers(self._lora_unets().values()):
            vars(layer).pop(BEFORE_FUSING, None)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        r"""
        Merge the adapters into the networks' weights, which then run as fast as without adapters.

        Args:
            components (`list[str]`, *optional*): Networks to fuse, some of which may be missing; all if None.
            lora_scale (`float`, defaults to 1.0):
                Weight of the adapters while they are fused, on top of `set_adapters`; fused ones are not scaled again.
            safe_fusing (`bool`, defaults to `False`): Whether to raise an error if merged weights are not finite.
            adapter_names (`list[str]`, *optional*): The adapters; the active ones if None.
        """
        components = self._checked_components(components)
        if not is_finite(lora_scale):
            raise bad_argument("lora_scale", lora_scale, "a number")
        adapter_names = None if adapter_names is None else self._checked_adapters(adapter_names)
        networks = self._networks()
        layers = lora_layers(self._lora_unets()[name] for name in components)
        try:
            with scaled_to_fuse(layers, lora_scale, adapter_names):
                networks.fuse_lora(components, 1.0, safe_fusing, adapter_names)
        finally:
            self._merged_adapters = networks._merged_adapters

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        r"""
        Remove fused adapters from the networks' weights, up to rounding; they have the weights of `set_adapters` again.
        Adapters that were unloaded or deleted while they were fused remain in the weights.

        Args:
            components (`list[str]`, *optional*): Networks, some of which may be missing; all if None.
        """
        networks = self._networks()
        components = self._checked_components(components)
        networks.unfuse_lora(components)
        restore_scaling(lora_layers(self._lora_unets()[name] for name in components))
        self._merged_adapters = networks._merged_adapters

    def unload_lora_weights(self) -> None:
        """Remove all adapters from the networks; fused weights remain."""
        self._networks().unload_lora_weights()

    def disable_lora(self) -> None:
        """Disable all adapters until `enable_lora`."""
        self._networks().disable_lora()

    def enable_lora(self) -> None:
        """Enable the adapters again."""
        self._networks().enable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Delete adapters of these names from all networks; fused weights remain."""
        self._networks().delete_adapters(self._checked_adapters(adapter_names))

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        active: dict[str, None] = {}
        for name, unet in self._lora_unets().items():
            networks = LoraNetworks({name: unet}, set())
            active |= dict.fromkeys(networks.get_active_adapters())
        return list(active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all adapters by component."""
        require_peft()
        return LoraNetworks(self._lora_unets(), self._merged_adapters).get_list_adapters()

    def set_lora_device(self, adapter_names: list[str] | str, device: torch.device | str | int) -> None:
        """Move adapters to a device, for example to the CPU while they are inactive."""
        self._networks().set_lora_device(self._checked_adapters(adapter_names), device)

    def enable_lora_hotswap(self, **kwargs) -> None:
        """Prepare the networks for hotswapping adapters, before the first is loaded.

        Args:
            kwargs: `target_rank`, the maximum rank of all adapters, and `check_compiled`, as in diffusers.
        """
        self._networks().enable_lora_hotswap(**kwargs)

    @contextmanager
    def scaled_adapters(self, cross_attention_kwargs: dict[str, float] | None) -> Iterator[None]:
        """Context manager that scales the adapters by `{"scale": 0.5}`, in addition to `set_adapters`.

        Raises:
            ValueError: If there are other entries, or the adapters are fused.
        """
        options = {} if cross_attention_kwargs is None else cross_attention_kwargs
        if not isinstance(options, dict) or set(options) - {"scale"} or not is_finite(options.get("scale", 1.0)):
            raise bad_argument("cross_attention_kwargs", options, "{'scale': a number}")
        if options.get("scale", 1.0) != 1.0:
            check_unfused(self._lora_unets(), "cross_attention_kwargs")
        with scaled_layers(self._lora_unets().values() if options else [], options.get("scale", 1.0)):
            yield

    def _all_unets(self) -> dict[str, StageNetwork]:
        """Return the networks of this pipeline by component, without torch.compile's wrapper."""
        unets = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        return {name: unwrap_module(unet) for name, unet in unets.items() if unet is not None}

    def _lora_unets(self) -> dict[str, StageNetwork]:
        """Return the networks that support adapters."""
        return {name: unet for name, unet in self._all_unets().items() if isinstance(unet, PeftAdapterMixin)}

    def _check_adaptable(self, components: Iterable[str] | None = None) -> None:
        """Raise ValueError if one of these components does not support adapters; if None, if no network does."""
        if components is None:
            components = [] if self._lora_unets() else self._lora_loadable_modules
        for name, unet in self._all_unets().items():
            if name in components:
                check_adaptable(name, unet)

    def _networks(self) -> "LoraNetworks":
        """Return a wrapper of the networks for diffusers' methods."""
        require_peft()
        self._check_adaptable()
        return LoraNetworks(self._lora_unets(), self._merged_adapters)

    def _checked_components(self, components: list[str] | None) -> list[str]:
        """Return the components that this pipeline has; all if None."""
        present = list(self._lora_unets())
        if components is None:
            return present
        if not isinstance(components, (list, tuple, set)):
            raise bad_argument("components", components, f"a list among {present}")
        self._check_adaptable(components)
        found = [name for name in present if name in components]
        if not found or not all(name in self._lora_loadable_modules for name in components):
            raise bad_argument("components", components, f"among {present}")
        return found

    def _checked_adapters(self, adapter_names: list[str] | str) -> list[str]:
        """Check and return names of adapters as a list."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise bad_argument("adapter_names", adapter_names, "a name or a list of names")
        self._check_adaptable()
        present = {name for names in self.get_list_adapters().values() for name in names}
        unknown = [name for name in names if name not in present]
        if unknown:
            raise ValueError(f"`adapter_names` has {unknown}, not in the list of present adapters: {sorted(present)}.")
        return list(names)

    def _expanded_weights(self, weights: Any) -> Any:
        """Expand an adapter's weights for diffusers: a number, or by component a number or numbers by layer."""
        if not isinstance(weights, dict):
            if weights is not None and not is_finite(weights):
                raise ValueError(f"`adapter_weights` has {weights!r}, but should have numbers.")
            return weights
        present = self._lora_unets()
        strangers = sorted(set(weights) - set(self._lora_loadable_modules), key=str)
        if strangers:  # e.g. text encoders; diffusers' pipelines warn too
            lora_base.logger.warning(
                f"The following components in `adapter_weights` are not part of the pipeline: {strangers}. They are "
                "ignored."
            )
            weights = {name: weight for name, weight in weights.items() if name not in strangers}
        self._check_adaptable(weights)
        unknown = sorted(set(weights) - set(present))
        if unknown:
            raise ValueError(
                f"`adapter_weights` names {unknown}, but the components of this pipeline are {list(present)}."
            )
        expanded = {}
        for component, weight in weights.items():
            if isinstance(weight, dict):
                weight = weights_by_layer(present[component], weight, component)
            elif weight is not None and not is_finite(weight):
                raise ValueError(f"`adapter_weights` has {weight!r} for {component}, but should have a number.")
            expanded[component] = weight
        return expanded


@contextmanager
def scaled_layers(unets: Iterable[StageNetwork], scale: float) -> Iterator[None]:
    """Context manager that multiplies the weights of all adapters, and restores them at the end."""
    layers = lora_layers(unets)
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: value * scale for name, value in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling.update(scaling)


class LoraNetworks(LoraBaseMixin):
    """Wrapper that passes networks to diffusers' pipeline methods, which ignore compiled modules."""

    def __init__(self, unets: dict[str, StageNetwork], merged_adapters: set[str]):
        self.components = unets
        self._lora_loadable_modules = list(unets)
        self._merged_adapters = merged_adapters
        self.__dict__.update(unets)


def require_peft() -> None:
    """Raise ValueError if peft is not installed."""
    if not is_peft_available():
        raise ValueError("LoRA adapters need peft: pip install peft")


def check_adaptable(name: str, unet: StageNetwork) -> None:
    """Raise ValueError for a network that does not derive from diffusers' `PeftAdapterMixin`."""
    if not isinstance(unet, PeftAdapterMixin):
        raise ValueError(
            f"`{name}` is {class_of(unet)}, but should be of a class of diffusers' PeftAdapterMixin to have LoRA "
            "adapters."
        )


def check_unfused(unets: dict[str, StageNetwork], argument: str) -> None:
    """Raise ValueError if adapters are fused, because merged weights can neither be scaled nor added to."""
    fused = fused_adapters(unets)
    if fused:
        raise ValueError(
            f"`{argument}` cannot be applied while adapters are fused, here {fused}: call `unfuse_lora` first, or "
            "`unload_lora_weights` to keep the fused weights without their adapters."
        )
