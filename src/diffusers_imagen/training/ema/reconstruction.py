"""Reconstruction of averages of any width from snapshots (EDM2, Karras et al. 2024, arXiv 2312.02696, app. C.4)."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

from ...utils.bounds import MAX_STD, MIN_STD
from ...utils.files import read_json_object, whole_folder, write_json
from ...utils.references import REFERENCE, read_reference, write_reference
from ..network import load_unet
from .averages import SNAPSHOTS, std_to_gamma
from .snapshots import Snapshot, check_shapes, list_snapshots, read_tensors


logger = logging.get_logger(__name__)

RECORD = "training.json"
MAX_ERROR = 0.1  # of the profile, relative to its norm; above it there are too few snapshots


def profile_product(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """
    Return the inner product of the weights `(gamma + 1) tau^gamma / step^(gamma + 1)` on `[0, step]`, in closed form.
    """
    shorter = np.minimum(step_a, step_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * shorter)
    return scale * (shorter / step_a) ** (gamma_a + 1) * (shorter / step_b) ** (gamma_b + 1)


def solve_coefficients(
    steps: list[int], stds: list[float], target_step: int, target_std: float
) -> tuple[np.ndarray, float]:
    """
    Return coefficients `(N,)` of the snapshots whose sum is closest to the target's weights, and the relative error.
    """
    step, gamma = np.array(steps, dtype=np.float64), np.array([std_to_gamma(std) for std in stds])
    goal = np.array(target_step, dtype=np.float64), np.array(std_to_gamma(target_std))
    products = profile_product(step[:, None], gamma[:, None], step, gamma)
    with_goal = profile_product(step, gamma, *goal)
    norm = profile_product(*goal, *goal)
    # profiles are scaled to unit norm, because early snapshots, short and steep, would worsen the conditioning
    scale = np.sqrt(np.diag(products))
    scaled = np.linalg.lstsq(products / np.outer(scale, scale), with_goal / scale, rcond=1e-14)[0]
    coefficients = scaled / scale
    error = norm - 2 * coefficients @ with_goal + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(error, 0) / norm))


def find_snapshots(run: Path, step: int | None, shapes: dict[str, tuple[int, ...]]) -> tuple[list[Snapshot], int]:
    """Find the snapshots of a run up to a step, by default its last, and check that they fit the network.

    Raises:
        ValueError: If there are none, or one is damaged or of another network; names it.
    """
    snapshots = list_snapshots(run / SNAPSHOTS)
    if not snapshots:
        raise ValueError(f"`run` is '{run}', which has no {SNAPSHOTS}/: train it with `ema_type` power.")
    first, last = (choose(snapshot.step for snapshot in snapshots) for choose in (min, max))
    step = last if step is None else step
    if not first <= step <= last:
        raise ValueError(f"`step` is {step}, but should be in the range of the snapshots, {first} to {last}.")
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    for snapshot in used:
        check_shapes(snapshot, shapes)
    return used, step


def sum_snapshots(snapshots: list[Snapshot], coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the weighted sum of snapshots, in float32.

    Raises:
        ValueError: If a snapshot is damaged or not finite; names it.
    """
    weights: dict[str, torch.Tensor] = {}
    for snapshot, coefficient in zip(tqdm(snapshots, desc="Summing snapshots"), coefficients):
        for name, tensor in read_tensors(snapshot).items():
            part = float(coefficient) * tensor.float()
            weights[name] = weights[name].add_(part) if name in weights else part
    return weights


def write_reconstructed(run: Path, outputs: dict[float, Path], step: int | None = None) -> dict[float, float]:
    """Write a complete stage folder for each width of the average; return the profiles' relative errors.

    Args:
        run (`Path`): Folder of a run with `ema_type` power.
        outputs (`dict[float, Path]`): Folder to write for each width, a fraction of the steps up to `step`.
        step (`int`, *optional*): Last step of the average; by default that of the last snapshot.

    Raises:
        ValueError: Before anything is written: if a width is out of bounds, a folder exists or is named twice, the run
            has no stage or no snapshots up to that step, or one of them is damaged; names it.
    """
    check_outputs(outputs)
    for part in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (run / part).is_file():
            raise ValueError(f"`run` is '{run}', which has no {part}: the run has not exported its stage yet.")
    record = read_json_object(run / RECORD) if (run / RECORD).is_file() else {}
    try:
        unet = load_unet(str(run))
    except ValueError as error:
        raise ValueError(f"`run` is '{run}', whose unet/ cannot be loaded: {error}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    snapshots, step = find_snapshots(run, step, shapes)
    errors = {}
    for std, output in outputs.items():
        steps, stds = [snapshot.step for snapshot in snapshots], [snapshot.std for snapshot in snapshots]
        coefficients, errors[std] = solve_coefficients(steps, stds, step, std)
        if errors[std] > MAX_ERROR:
            logger.warning(
                f"{len(snapshots)} snapshots give width {std} with a relative error of {errors[std]:.2f}: save more "
                "of them (`ema_snapshot_steps`), or request a width closer to the recorded ones."
            )
        unet.load_state_dict(sum_snapshots(snapshots, coefficients), strict=False)  # buffers are not averaged
        with whole_folder(output) as partial:
            unet.save_pretrained(partial / "unet")
            shutil.copytree(run / "scheduler", partial / "scheduler")
            if (run / "model_index.json").is_file():
                shutil.copyfile(run / "model_index.json", partial / "model_index.json")
            copy_encoder(run, partial, output)
            if record:  # without losses and checksums, which are those of the weights that the run exported
                settings = {"config": record["config"]} if "config" in record else {}
                write_json(partial / RECORD, {"step": step, "ema_std": std, **settings})
    return errors


def copy_encoder(run: Path, folder: Path, place: Path) -> None:
    """Copy a stage's text encoder to a folder that will be moved to `place`, to which paths are relative."""
    for part in ("tokenizer", "text_encoder"):
        if (run / part).is_dir():
            shutil.copytree(run / part, folder / part)
    if (run / "text_encoder" / REFERENCE).is_file():
        write_reference(folder / "text_encoder", read_reference(run / "text_encoder"), place / "text_encoder")


def check_outputs(outputs: dict[float, Path]) -> None:
    """Check widths, and that their folders can be written."""
    taken: dict[Path, float] = {}
    for std, output in outputs.items():
        if not MIN_STD <= std < MAX_STD:
            raise ValueError(
                f"`ema_std` is {std}, but should be a fraction of the run, at least {MIN_STD} and below {MAX_STD}."
            )
        if output.exists() or output.is_symlink():
            raise ValueError(f"`output_dir` is '{output}', which exists already.")
        there = next(parent for parent in output.absolute().parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"`output_dir` is '{output}', but nothing can be written to '{there}'.")
        other = taken.setdefault(output.absolute(), std)
        if other != std:
            raise ValueError(f"`ema_std` has {other} and {std}, which would both be written to '{output}'.")
