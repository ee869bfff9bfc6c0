"""What a checkpoint of DeepSpeed may have in it.

DeepSpeed reads its own files with pickle, which can run anything. They are looked at before: one that names something
else than DeepSpeed's own few classes is not given to it.
"""

from pathlib import Path

import torch


# what DeepSpeed's files name besides what `torch.load(weights_only=True)` allows
KNOWN = {
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def check_files(folder: Path) -> None:
    """Refuses files that could run code.

    Raises:
        ValueError: If there is one.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == "latest":
            continue
        if path.suffix != ".pt":
            raise ValueError(f"{path.name} is no file of DeepSpeed's")
        try:
            unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - KNOWN
        except Exception as error:  # whatever a broken file brings it to
            raise ValueError(f"{path.name} cannot be looked into ({type(error).__name__})") from error
        if unknown:
            raise ValueError(f"{path.name} names {sorted(unknown)[0]}, which could run code")
