"""Processes that are forked from one that has made its imports and has no threads yet; some share work through gloo."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from pathlib import Path
from tempfile import gettempdir
from unittest.mock import patch

import datasets
import hub_server
import torch

from diffusers_imagen.commands import main as cli


# the packages themselves import nothing until a name of theirs is used
IMPORTS = [
    "diffusers_imagen.commands.cache_embeddings",
    "diffusers_imagen.commands.generate",
    "diffusers_imagen.evaluation.evaluator",
    "diffusers_imagen.pipelines.pipeline_imagen_cascade",
    "diffusers_imagen.text.cache_writer",
    "diffusers_imagen.training.finetuning.lora_trainer",
    "diffusers_imagen.training.loop",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
]


# What the imports read for all processes: the Hub of the tests, and a link to the folder that hub_client.py sets for each.
HUB_HOME = Path(gettempdir(), f"hub-of-the-tests-{os.getpid()}")
HUB = {
    "HF_ENDPOINT": hub_server.URL,
    "HF_HOME": str(HUB_HOME),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def without_hub(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the settings of the Hub."""
    return {name: value for name, value in environment.items() if not name.startswith(("HF_", "HUGGING"))}


def make_process(target: Callable, *arguments) -> multiprocessing.Process:
    """A process that runs a function."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with patch.dict(os.environ, without_hub(os.environ) | HUB, clear=True):
        forkserver.ensure_running()
    return context.Process(target=target, args=arguments)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environments(count: int, **more: str) -> list[dict[str, str]]:
    """What torchrun tells each process of a group on this host."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def exit_codes(processes: list[multiprocessing.Process]) -> list[int | None]:
    """Starts the processes and waits for their end."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
        process.kill()
    return [process.exitcode for process in processes]


def command(arguments: list[str], environment: dict[str, str], log: Path, killed: tuple[str, int] | None) -> None:
    """A command of `diffusers-imagen`, for a process of its own that ends before a change in a folder, if that is given."""
    from kills import Killer  # which imports this module

    os.environ.update(environment)
    datasets.config.HF_DATASETS_CACHE = log.parent / "cache"
    torch.set_num_threads(1)
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        if killed is not None:
            Killer(*killed)
        code = cli.main(arguments)
    sys.exit(code)


def run_command(
    logs: Path, count: int, *arguments: object, killed: tuple[str, int] | None = None
) -> tuple[list[int | None], list[str]]:
    """A command that processes share, of which the last may be killed; their exit codes and what they printed."""
    paths = [logs / f"process-{rank}.txt" for rank in range(count)]
    processes = [
        make_process(command, [*map(str, arguments)], own, path, killed if rank == count - 1 else None)
        for rank, (own, path) in enumerate(zip(environments(count), paths))
    ]
    return exit_codes(processes), [path.read_text() for path in paths]
