"""What processes agree on: all of them go on, or all of them end with the same error."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from groups import environments, exit_codes, make_process

from diffusers_imagen.text.cache_writer import check_same
from diffusers_imagen.text.distinct_captions import DistinctCaptions
from diffusers_imagen.utils import processes
from diffusers_imagen.utils.processes import OneProcess, check_shared, gather, in_turn, leave_group, on_main_process


def agree(environment: dict[str, str], folder: Path) -> None:
    """One of two processes: each has a folder of its own, one that both see, and captions."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    state, rank = PartialState(cpu=True), int(environment["RANK"])
    assert gather(state, rank) == [0, 1]
    assert on_main_process(state, lambda: rank) == 0
    assert in_turn(state, lambda: rank) == rank

    def fail() -> None:
        raise OSError("the disk is full")

    with pytest.raises((OSError, ValueError), match="the disk is full"):
        on_main_process(state, fail)
    check_shared(state, folder, "output_dir")
    processes.SIGHT = 0.1
    own = folder / str(rank)
    own.mkdir()
    with pytest.raises(ValueError, match=f"`output_dir` is '{own}', which .* does not see as the main process does"):
        check_shared(state, own, "output_dir")
    check_same(state, DistinctCaptions.of(["a", "b"]))
    with pytest.raises(
        ValueError, match="has 2 captions to encode in the main process, but 3, or others, in process 1"
    ):
        check_same(state, DistinctCaptions.of(["a", "b", "c"][: 2 + rank]))
    with pytest.raises(ValueError, match="but 2, or others, in process 1"):
        check_same(state, DistinctCaptions.of(["a", "bc"] if rank else ["ab", "c"]))
    leave_group(state)


def test_two_processes_agree(tmp_path):
    assert exit_codes([make_process(agree, own, tmp_path) for own in environments(2)]) == [0, 0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "1"]


def test_one_process_agrees_with_itself(tmp_path):
    state = OneProcess()
    assert gather(state, 3) == [3] and in_turn(state, lambda: 4) == 4
    check_shared(state, tmp_path / "nowhere", "output_dir")
