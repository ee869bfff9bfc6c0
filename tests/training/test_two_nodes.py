"""A run over two hosts, through torchrun's rendezvous and gloo."""

import json
import re
from pathlib import Path

import pytest
import tiny_runs
import torch
from groups import free_port
from nodes import torchrun, two_nodes
from tiny_runs import are_equal, encode, exported, losses, make_unet, settings, weights_of

from diffusers_imagen.training import TrainingConfig, train


OPTIONS = {"max_train_steps": 6, "checkpointing_steps": 2, "text_drop_rate": 0.3}
PROGRAM = Path(tiny_runs.__file__).with_name("node_run.py")
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    # else an agent that comes back waits for an address that was told once, and workers find those of their predecessors:
    # https://github.com/pytorch/pytorch/issues/135712
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def test_a_run_that_loses_a_worker_and_then_a_host_ends_as_one_process(imagefolder, tmp_path, fresh_accelerator):
    """Its agents start the workers again, which go on from the last checkpoint; one agent is started again by hand."""
    unet = make_unet()
    train(TrainingConfig(**settings(imagefolder, tmp_path / "one", **OPTIONS, train_batch_size=8)), unet, encode)

    shared = {**OPTIONS, "train_batch_size": 4, "resume_from_checkpoint": "latest"}
    run = tmp_path / "settings.json"
    run.write_text(json.dumps(settings(imagefolder, tmp_path / "two", **shared)))
    killed = tmp_path / "killed.json"
    killed.write_text(json.dumps({"worker": [3], "agent": [5]}))
    with two_nodes() as nodes:
        endpoint = f"{nodes[0].address}:{free_port()}"
        logs = [tmp_path / f"node-{node.rank}.txt" for node in nodes]
        commands = [torchrun(node, endpoint, 3, PROGRAM, run, killed) for node in nodes]
        agents = [node.start(command, log, **ENVIRONMENT) for node, command, log in zip(nodes, commands, logs)]
        try:
            assert agents[1].wait(timeout=300) == -9, logs[1].read_text()
            agents[1] = nodes[1].start(commands[1], logs[1], **ENVIRONMENT)
            assert [agent.wait(timeout=300) for agent in agents] == [0, 0], logs[0].read_text() + logs[1].read_text()
        finally:
            for agent in agents:
                agent.kill()

    assert (tmp_path / "worker-3").exists() and (tmp_path / "agent-5").exists()
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert are_equal(first, second)
    for name, value in weights_of(unet).items():
        torch.testing.assert_close(first[name], value, atol=2e-5, rtol=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert exported(tmp_path / "two").keys() == first.keys()
    for log in logs:  # the first bar of each start
        assert re.findall(r"Training: +\d+%\|[^|]*\| (\d)/6 \[00:00<\?", log.read_text()) == ["0", "2", "4"]
