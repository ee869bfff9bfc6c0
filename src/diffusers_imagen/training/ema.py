"""Averages of the weights over a run."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from .config import TrainingConfig
from .devices import join, own_part
from .snapshots import snapshot_metadata


SNAPSHOTS = "ema-snapshots"


class PowerFunctionEMA(EMAModel):
    """The average over all steps tau with weights proportional to `tau^gamma` (EDM2, arXiv 2312.02696, section 3.1).

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): What is averaged.
        std (`float`): Width of the weights as a share of the run so far: `sigma_rel` of the paper.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], std: float):
        super().__init__(parameters, foreach=True)
        self.std, self.gamma = std, std_to_gamma(std)

    def get_decay(self, optimization_step: int) -> float:
        """`(1 - 1 / t)^(gamma + 1)`, 0 at the first step."""
        return (1 - 1 / optimization_step) ** (self.gamma + 1)


def std_to_gamma(std: float) -> float:
    """The exponent of a width: the largest root of `std^2 (gamma + 2)^2 (gamma + 3) = gamma + 1`."""
    square = std**2
    roots = np.roots([square, 7 * square, 16 * square - 1, 12 * square - 1])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


class WeightAverages:
    """The averages that a run keeps: none, one, or one for each width.

    Each process averages its own part of parameters that are spread over processes.

    Args:
        config (`TrainingConfig`): Which.
        parameters (`Iterable[torch.nn.Parameter]`): What is averaged, where it is trained.
    """

    def __init__(self, config: TrainingConfig, parameters: Iterable[torch.nn.Parameter]):
        parameters = [own_part(parameter) for parameter in parameters]
        self.models: list[EMAModel] = []
        if config.use_ema and config.ema_type == "power":
            self.models = [PowerFunctionEMA(parameters, std) for std in config.ema_stds]
        elif config.use_ema:
            constant = config.ema_type == "constant"
            self.models = [
                EMAModel(
                    parameters,
                    decay=config.ema_decay,
                    min_decay=config.ema_decay if constant else 0.0,
                    use_ema_warmup=not constant,
                    power=0.75,
                    foreach=True,
                )
            ]

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Takes the weights after a step into the averages."""
        parameters = [own_part(parameter) for parameter in parameters]
        for model in self.models:
            model.step(parameters)

    @contextmanager
    def applied(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """The parameters have the first average's values inside, and their own again after."""
        if not self.models:
            yield
            return
        parameters, model = [own_part(parameter) for parameter in parameters], self.models[0]
        model.store(parameters)
        model.copy_to(parameters)
        try:
            yield
        finally:
            model.restore(parameters)

    def save_snapshots(
        self, output_dir: str, parameters: dict[str, torch.nn.Parameter], step: int, is_main_process: bool = True
    ) -> None:
        """Writes the averages of parameters in half precision, for `reconstruct`, each beside its place at first.

        All processes take part, since each may have parts; the main process writes.
        """
        folder = Path(output_dir) / SNAPSHOTS
        for model in self.models:
            pairs = zip(parameters.items(), model.shadow_params)
            tensors = {name: join(value, parameter).half() for (name, parameter), value in pairs}
            if not is_main_process:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{step:09d}-{model.std:.4f}.safetensors"
            partial = path.with_name(f".{path.name}.partial")
            tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
            save_file(tensors, partial, metadata=snapshot_metadata(tensors, step, model.std))
            os.replace(partial, path)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": [model.state_dict() for model in self.models]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for model, saved in zip(self.models, state["averages"]):
            device = model.shadow_params[0].device
            # the run's own settings win over those that were saved
            own = {name: getattr(model, name) for name in ("decay", "min_decay", "use_ema_warmup", "power")}
            model.load_state_dict({**saved, **own})
            model.to(device)
