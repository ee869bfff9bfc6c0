"""Averages of any width after the run, from snapshots of two (EDM2, Karras et al. 2024, arXiv 2312.02696, app. C.4)."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from diffusers import AutoModel
from diffusers.utils import logging
from safetensors import safe_open
from tqdm.auto import tqdm

from .ema import SNAPSHOTS, std_to_gamma


logger = logging.get_logger(__name__)

MAX_ERROR = 0.1  # of the profile, relative to its norm; beyond it the snapshots are too few


class Snapshot(NamedTuple):
    """A saved average."""

    path: Path
    step: int
    std: float


def list_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first.

    Raises:
        ValueError: If there are none.
    """
    found = []
    for path in sorted((run / SNAPSHOTS).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        found.append(Snapshot(path, int(metadata["step"]), float(metadata["std"])))
    if not found:
        raise ValueError(f"`run` is '{run}', which has no {SNAPSHOTS}/: train it with `ema_type` power.")
    return found


def profile_product(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner product of the weights `(gamma + 1) tau^gamma / step^(gamma + 1)` on `[0, step]`, in closed form."""
    shorter = np.minimum(step_a, step_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * shorter)
    return scale * (shorter / step_a) ** (gamma_a + 1) * (shorter / step_b) ** (gamma_b + 1)


def solve_coefficients(
    steps: list[int], stds: list[float], target_step: int, target_std: float
) -> tuple[np.ndarray, float]:
    """Coefficients `(N,)` of the snapshots whose sum comes closest to the target's weights, and the relative error."""
    step, gamma = np.array(steps, dtype=np.float64), np.array([std_to_gamma(std) for std in stds])
    goal = np.float64(target_step), np.float64(std_to_gamma(target_std))
    products = profile_product(step[:, None], gamma[:, None], step, gamma)
    with_goal = profile_product(step, gamma, *goal)
    norm = profile_product(*goal, *goal)
    # profiles scaled to unit norm, so that early snapshots, short and steep, do not spoil the conditioning
    scale = np.sqrt(np.diag(products))
    scaled = np.linalg.lstsq(products / np.outer(scale, scale), with_goal / scale, rcond=1e-14)[0]
    coefficients = scaled / scale
    error = norm - 2 * coefficients @ with_goal + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(error, 0) / norm))


def reconstruct(run: Path, std: float, step: Optional[int] = None) -> tuple[dict[str, torch.Tensor], float]:
    """The weights of a run averaged with another width, in float32, and the relative error of the profile.

    Args:
        run (`Path`): Folder of a run with `ema_type` power.
        std (`float`): Width as a share of the steps up to `step`.
        step (`int`, *optional*): As if the run had ended there; by default at its last snapshot.

    Raises:
        ValueError: If there are no snapshots up to that step, or the width is out of reach.
    """
    if not 0 < std < 0.25:
        raise ValueError(f"`ema_std` is {std}, but should be a share of the run between 0 and 0.25.")
    snapshots = list_snapshots(run)
    last = max(snapshot.step for snapshot in snapshots)
    step = last if step is None else step
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    if not used or step > last:
        first = min(snapshot.step for snapshot in snapshots)
        raise ValueError(f"`step` is {step}, but the snapshots are of steps {first} to {last}.")
    coefficients, error = solve_coefficients([s.step for s in used], [s.std for s in used], step, std)
    if error > MAX_ERROR:
        logger.warning(
            f"{len(used)} snapshots give width {std} with a relative error of {error:.2f}: save more of them "
            "(`ema_snapshot_steps`), or ask for a width nearer to those tracked."
        )
    weights: dict[str, torch.Tensor] = {}
    for snapshot, coefficient in zip(tqdm(used, desc="Summing snapshots"), coefficients):
        with safe_open(snapshot.path, "pt") as file:
            for name in file.keys():
                part = float(coefficient) * file.get_tensor(name).float()
                weights[name] = weights[name].add_(part) if name in weights else part
    return weights, error


def write_reconstructed(run: Path, output_dir: Path, std: float, step: Optional[int] = None) -> float:
    """Writes a stage folder with reconstructed weights beside its place and then into it; returns the relative error.

    Raises:
        ValueError: If `output_dir` exists, or as `reconstruct`.
    """
    if output_dir.exists():
        raise ValueError(f"`output_dir` is '{output_dir}', which exists already.")
    if not (run / "unet" / "config.json").is_file():
        raise ValueError(f"`run` is '{run}', which has no unet/: the run has not exported its stage yet.")
    weights, error = reconstruct(run, std, step)
    unet = AutoModel.from_pretrained(str(run), subfolder="unet")
    unet.load_state_dict(weights, strict=False)  # buffers are not averaged
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    unet.save_pretrained(partial / "unet")
    shutil.copytree(run / "scheduler", partial / "scheduler")
    for name in ("model_index.json", "training.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, partial / name)
    os.replace(partial, output_dir)
    return error
