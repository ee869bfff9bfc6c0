"""The job script for Slurm, with stand-ins for Slurm's own programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "configs" / "slurm" / "launch.sbatch"
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\nnode2\\n'
"""
# starts the first node, and the second one when that listens: here both have one address
SRUN = """#!/bin/bash
[ "$1 $2" = "--kill-on-bad-exit=1 --cpus-per-task=96" ] || exit 9
shift 2
SLURM_NODEID=0 "$@" & first=$!
if [ "$SLURM_NNODES" = 2 ]; then
    until (: < "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do kill -0 $first || exit 8; sleep 0.1; done
    SLURM_NODEID=1 "$@" || exit 7
fi
wait $first
"""
PROGRAM = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
found = {**{name: os.environ[name] for name in names}, "arguments": sys.argv[1:]}
open(os.environ["FOLDER"] + "/" + os.environ["RANK"], "w").write(json.dumps(found))
"""


def test_it_is_a_shell_script_with_one_task_a_node():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--ntasks-per-node=1", "--gpus-per-node=8", "--requeue", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_process_of_every_gpu_of_every_node_is_started(tmp_path, nodes):
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    program, results, job = tmp_path / "program.py", tmp_path / "results", os.getpid() % 10_000
    program.write_text(PROGRAM)
    results.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "96",
        "PORT": str(20000 + job),
        "FOLDER": str(results),
    }
    command = ["bash", SCRIPT, program, "--config", "a b.yaml"]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(path.read_text()) for path in sorted(results.iterdir())]
    assert found == [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "GROUP_RANK": str(rank // 2),
            "WORLD_SIZE": str(2 * nodes),
            "LOCAL_WORLD_SIZE": "2",
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "arguments": ["--config", "a b.yaml"],
        }
        for rank in range(2 * nodes)
    ]
