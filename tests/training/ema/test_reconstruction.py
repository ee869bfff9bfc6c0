"""Snapshots that are damaged, and widths that cannot be: refused by name, with nothing written."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import are_equal, make_unet

from diffusers_imagen import EDMHeunScheduler, ImagenUNetModel
from diffusers_imagen.commands.main import main
from diffusers_imagen.training.ema.snapshots import digest, list_snapshots, read_tensors, snapshot_metadata


PLACES = [(4, 0.05), (4, 0.1), (8, 0.05), (8, 0.1)]
NAME = "000000004-0.1000.safetensors"


def save(folder: Path, step: int, std: float, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> None:
    path = folder / "ema-snapshots" / f"{step:09d}-{std:.4f}.safetensors"
    save_file(tensors, path, metadata=metadata or snapshot_metadata(tensors, step, std))


@pytest.fixture
def run(tmp_path) -> Path:
    """What a run with `ema_type` power leaves, of random weights."""
    folder = tmp_path / "run"
    make_unet().save_pretrained(folder / "unet")
    EDMHeunScheduler().save_pretrained(folder / "scheduler")
    (folder / "ema-snapshots").mkdir()
    for seed, (step, std) in enumerate(PLACES):
        save(folder, step, std, {name: value.half() for name, value in make_unet(seed).named_parameters()})
    return folder


def reconstruct(capsys, run: Path, *arguments) -> tuple[int, str]:
    """Exit code and stderr; nothing may have been written, in files or folders."""
    before = sorted(run.parent.rglob("*"))
    code = main(["reconstruct-ema", str(run), *map(str, arguments)])
    assert code == 0 or sorted(run.parent.rglob("*")) == before
    return code, capsys.readouterr().err


def change(run: Path, **changes) -> None:
    """Writes a snapshot anew, with what is told, and a checksum that is right: what is wrong was saved so."""
    tensors = load_file(run / "ema-snapshots" / NAME)
    tensors |= {name: value for name, value in changes.items() if value is not None}
    save(run, 4, 0.1, {name: value for name, value in tensors.items() if changes.get(name, 0) is not None})


def test_a_width_that_was_tracked_is_read_back(run, capsys):
    record = {"step": 8, "loss": 0.5, "config": {"seed": 3}, "files": {"unet/config.json": "0"}}
    (run / "training.json").write_text(json.dumps(record))
    code, _ = reconstruct(capsys, run, "--ema_std", 0.1)
    assert code == 0
    written = ImagenUNetModel.from_pretrained(run / "ema-0.1", subfolder="unet").state_dict()
    expected = {name: value.half().float() for name, value in make_unet(3).state_dict().items()}
    assert all(torch.allclose(written[name], expected[name], atol=1e-4) for name in expected)
    assert sorted(os.listdir(run / "ema-0.1")) == ["scheduler", "training.json", "unet"]
    written = json.loads((run / "ema-0.1" / "training.json").read_text())
    assert written == {"step": 8, "ema_std": 0.1, "config": {"seed": 3}}
    assert reconstruct(capsys, run, "--ema_std", 0.05, "--step", 4)[0] == 0
    written = ImagenUNetModel.from_pretrained(run / "ema-0.05", subfolder="unet").state_dict()
    expected = {name: value.half().float() for name, value in make_unet(0).state_dict().items()}
    assert all(torch.allclose(written[name], expected[name], atol=1e-4) for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_in.weight": None}, "lacks 1 of the network's"),
        (
            {"conv_in.bias": torch.full((8,), float("nan")).half()},
            "has values that are not finite, in conv_in.bias",
        ),
        (
            {"conv_in.bias": torch.full((8,), float("inf")).half()},
            "has values that are not finite, in conv_in.bias",
        ),
        ({"conv_in.bias": torch.zeros(9).half()}, "has conv_in.bias of shape (9,), but the network's is (8,)"),
        ({"conv_in.bias": torch.zeros(8, dtype=torch.int32)}, "has conv_in.bias in another dtype than F16, BF16, F32"),
        ({"conv_in.other": torch.zeros(8).half()}, "has 'conv_in.other', which is not a parameter of the network"),
    ],
)
def test_a_snapshot_of_other_tensors_is_refused_by_name(run, capsys, changes, message):
    change(run, **changes)
    code, said = reconstruct(capsys, run, "--ema_std", 0.07)
    assert code == 2 and NAME in said and message in said


@pytest.mark.parametrize(
    "metadata",
    [{"a": "b"}, {"step": "4"}, {"step": "four", "std": "0.1"}, {"step": "-4", "std": "0.1"}, {"step": "4", "std": "nan"}]
    + [{"step": "4", "std": "0"}, {"step": "4", "std": "7"}, {"step": "1" * 5000, "std": "0.1"}],
)  # fmt: skip
def test_a_snapshot_that_does_not_say_what_it_is_is_refused_by_name(run, capsys, metadata):
    save(run, 4, 0.1, load_file(run / "ema-snapshots" / NAME), metadata)
    code, said = reconstruct(capsys, run, "--ema_std", 0.07)
    assert code == 2 and NAME in said and said.splitlines()[-1].startswith("diffusers-imagen: error: '")


def test_a_snapshot_without_a_checksum_is_taken(run, capsys):
    save(run, 4, 0.1, load_file(run / "ema-snapshots" / NAME), {"step": "4", "std": "0.1"})
    assert reconstruct(capsys, run, "--ema_std", 0.1)[0] == 0


def test_every_flipped_bit_is_found(run):
    """In the numbers all of them; in the header where it means something."""
    path = run / "ema-snapshots" / NAME
    whole, draw = path.read_bytes(), random.Random(0)
    (expected,) = (snapshot for snapshot in list_snapshots(path.parent) if snapshot.path == path)
    tensors, header = read_tensors(expected), 8 + struct.unpack("<Q", whole[:8])[0]
    harmless = 0
    for place in [*draw.sample(range(header), 120), *draw.sample(range(header, len(whole)), 60)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            (snapshot,) = (snapshot for snapshot in list_snapshots(path.parent) if snapshot.path == path)
            found = read_tensors(snapshot)
        except ValueError as error:
            assert NAME in str(error)
            continue
        assert (snapshot.step, snapshot.std) == (4, 0.1) and are_equal(found, tensors)
        harmless += 1
    assert harmless < 12


def test_a_file_that_is_cut_and_one_that_is_none_are_refused_by_name(run, capsys):
    path = run / "ema-snapshots" / NAME
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        code, said = reconstruct(capsys, run, "--ema_std", 0.07)
        assert code == 2 and NAME in said
    path.unlink()
    os.mkfifo(path)
    code, said = reconstruct(capsys, run, "--ema_std", 0.07)
    assert code == 2 and f"{NAME}' is not a regular file" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ema_std", "nan"], "`ema-std` is nan, but should be a fraction of the run, at least 1e-06 and below 0.25"),
        (["--ema_std", "0"], "`ema-std` is 0.0"),
        (["--ema_std", "1e-300"], "`ema-std` is 1e-300"),
        (["--ema_std", "0.1", "-1"], "`ema-std` is -1.0"),
        (["--ema_std", "0.1", "0.1000000001"], "`ema-std` has 0.1 and 0.1000000001, which would both be written to"),
        (["--ema_std", "0.1", "--step", "3"], "`step` is 3, but should be in the range of the snapshots, 4 to 8"),
        (["--ema_std", "0.1", "--step", "-1"], "`step` is -1"),
        (["--ema_std", "0.1", "--step", "9"], "`step` is 9"),
        (["--ema_std", "0.1", "--output_dir", "/dev/null/a"], "nothing can be written to '/dev/null'"),
        (["--ema_std", "0.1", "0.2", "--output_dir", "a"], "`output-dir` is given, but there are 2 widths"),
    ],
)
def test_widths_steps_and_folders_that_cannot_be_are_refused(run, capsys, arguments, message):
    code, said = reconstruct(capsys, run, *arguments)
    assert code == 2 and message in said


def test_a_run_without_its_stage_is_refused(run, capsys):
    (run / "scheduler" / "scheduler_config.json").unlink()
    assert "which has no scheduler/scheduler_config.json" in reconstruct(capsys, run, "--ema_std", 0.1)[1]
    (run / "unet" / "config.json").write_text(json.dumps([]))
    EDMHeunScheduler().save_pretrained(run / "scheduler")
    assert reconstruct(capsys, run, "--ema_std", 0.1)[0] == 2


def test_the_checksum_is_of_names_types_shapes_numbers_step_and_width():
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(1)}
    others = [
        ({**tensors, "a": torch.arange(4.0).view(2, 2)}, 1, 0.1),
        ({**tensors, "a": torch.arange(4.0).half()}, 1, 0.1),
        ({**tensors, "a": torch.tensor([0.0, 1, 2, 4])}, 1, 0.1),
        ({"a": tensors["a"], "c": tensors["b"]}, 1, 0.1),
        (tensors, 2, 0.1),
        (tensors, 1, 0.2),
    ]
    assert len({digest(tensors, 1, 0.1), *(digest(*other) for other in others)}) == 7
