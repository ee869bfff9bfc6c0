"""Exponential moving averages and power function averages of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from ...utils.files import whole_file
from ..config import TrainingConfig
from ..devices import join, own_part
from ..states import copy_into
from .snapshots import snapshot_metadata


SNAPSHOTS = "ema-snapshots"


class PowerFunctionEMA(EMAModel):
    """Average over all steps tau with weights proportional to `tau^gamma` (EDM2, arXiv 2312.02696, section 3.1).

    Args:
        parameters (`Iterable[torch.Tensor]`): Parameters to average.
        std (`float`): Width of the weights as a fraction of the run so far: `sigma_rel` of the paper.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], std: float):
        super().__init__(parameters, foreach=True)
        self.std, self.gamma = std, std_to_gamma(std)

    def get_decay(self, optimization_step: int) -> float:
        """Return `(1 - 1 / t)^(gamma + 1)`, which is 0 at the first step."""
        return (1 - 1 / optimization_step) ** (self.gamma + 1)


def std_to_gamma(std: float) -> float:
    """Return the exponent of a width: the largest root of `std^2 (gamma + 2)^2 (gamma + 3) = gamma + 1`."""
    square = std**2
    roots = np.roots([square, 7 * square, 16 * square - 1, 12 * square - 1])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


class WeightAverages:
    """The averages of a run: none, one, or one per width.

    Each process averages its own part of parameters that are sharded over processes.

    Args:
        config (`TrainingConfig`): Configuration of the averages.
        parameters (`Iterable[torch.nn.Parameter]`): Parameters to average, on the training device.
    """

    def __init__(self, config: TrainingConfig, parameters: Iterable[torch.nn.Parameter]):
        own = [own_part(parameter) for parameter in parameters]
        self.models: list[EMAModel] = []
        if config.use_ema and config.ema_type == "power":
            self.models = [PowerFunctionEMA(own, std) for std in config.ema_stds]
        elif config.use_ema:
            constant = config.ema_type == "constant"
            self.models = [
                EMAModel(
                    own,
                    decay=config.ema_decay,
                    min_decay=config.ema_decay if constant else 0.0,
                    use_ema_warmup=not constant,
                    power=0.75,
                    foreach=True,
                )
            ]

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Update the averages with the weights after a step."""
        own = [own_part(parameter) for parameter in parameters]
        for model in self.models:
            model.step(own)

    @contextmanager
    def applied(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Context manager in which the parameters have the first average's values."""
        if not self.models:
            yield
            return
        own, model = [own_part(parameter) for parameter in parameters], self.models[0]
        model.store(own)
        model.copy_to(own)
        try:
            yield
        finally:
            model.restore(own)

    def save_snapshots(
        self, output_dir: str, parameters: dict[str, torch.nn.Parameter], step: int, is_main_process: bool = True
    ) -> None:
        """Write the averages of parameters in half precision, for `reconstruct-ema`, as complete files.

        Called by all processes, each of which may have a part; the main process writes.

        Raises:
            FloatingPointError: If an average is too large for half precision.
        """
        folder = Path(output_dir) / SNAPSHOTS
        for model in self.models:
            pairs = zip(parameters.items(), model.shadow_params)
            tensors = {name: join(value, parameter).half() for (name, parameter), value in pairs}
            if not is_main_process:
                continue
            tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
            wrong = [name for name, value in tensors.items() if not value.isfinite().all()]
            if wrong:
                raise FloatingPointError(f"The average of {wrong[0]} is not finite in half precision at step {step}.")
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / f"{step:09d}-{model.std:.4f}.safetensors") as partial:
                save_file(tensors, partial, metadata=snapshot_metadata(tensors, step, model.std))

    def tensors(self) -> list[torch.Tensor]:
        """Return all averages, without copies."""
        return [average for model in self.models for average in model.shadow_params]

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": [model.optimization_step for model in self.models],
            "averages": [model.shadow_params for model in self.models],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the averages of a saved run; their decay is that of this run."""
        if not len(self.models) == len(state["steps"]) == len(state["averages"]):
            raise ValueError(f"it has {len(state['averages'])} averages, but should have {len(self.models)}")
        for model, step, averages in zip(self.models, state["steps"], state["averages"]):
            if not isinstance(step, int) or step < 0 or len(averages) != len(model.shadow_params):
                raise ValueError(
                    f"an average of {step!r} steps has {len(averages)} parts, but should have "
                    f"{len(model.shadow_params)}"
                )
            model.optimization_step = step
            for place, (own, saved) in enumerate(zip(model.shadow_params, averages)):
                copy_into(own, saved, f"average {place}")
