"""A tiny run as a program for torchrun, of which a host may be lost: see tests/training/test_two_nodes.py.

    torchrun ... node_run.py SETTINGS.json [KILLED.json]

Each process leaves its weights in `weights-RANK.pt`, beside the output folder. KILLED.json has steps, counted from 0, at
which the last process ends as by SIGKILL, once: `{"worker": [3], "agent": [5]}`, with its agent or without.
"""

import json
import os
import signal
import sys
from pathlib import Path

import tiny_runs
import torch

from diffusers_imagen.training import Trainer


def kill_at(killed: dict[str, list[int]], folder: Path) -> None:
    """Makes the steps at which this process ends."""
    train_step = Trainer.train_step

    def step_or_end(self, step: int) -> None:
        for victim in [name for name, steps in killed.items() if step in steps]:
            mark = folder / f"{victim}-{step}"
            if not mark.exists():  # else it happened before
                mark.touch()
                if victim == "agent":
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        train_step(self, step)

    Trainer.train_step = step_or_end


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(settings["output_dir"]).parent
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        for path in sys.argv[2:]:
            kill_at(json.loads(Path(path).read_text()), folder)
    unet = tiny_runs.run(settings)
    torch.save(unet.state_dict(), folder / f"weights-{os.environ['RANK']}.pt")
