"""Checkpoints that are damaged, malformed, or made to do harm."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import are_equal, encode, make_unet, weights_of

from diffusers_imagen.training import train
from diffusers_imagen.training.checkpoints import (
    MANIFEST,
    OWN_DIGEST,
    digest_of,
    find_damage,
    list_checkpoints,
    seal,
)
from diffusers_imagen.training.states import SavedStates, check_deepspeed_files, load_state, save_state
from diffusers_imagen.utils.files import read_json_object


@pytest.fixture
def run(make_config):
    """A run of two steps with a checkpoint after each, its weights, and what goes on with it."""
    unet = make_unet()
    train(make_config(max_train_steps=2, checkpointing_steps=1, ema_type="power"), unet, encode)

    def go_on(**options):
        options = {"max_train_steps": 2, "checkpointing_steps": 1, "ema_type": "power", **options}
        resumed = make_unet(seed=1)
        train(make_config(resume_from_checkpoint=options.pop("name", "latest"), **options), resumed, encode)
        return weights_of(resumed)

    return Path(make_config().output_dir), weights_of(unet), go_on


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def test_any_flipped_bit_is_noticed(run):
    folder, _, _ = run
    newest = folder / "checkpoint-2"
    assert find_damage(newest) is None
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    names = {"model", "optimizer", "averages", "process-0", "checkpoint"}
    assert {path.stem for path in files} == names
    for path in files:
        whole = path.read_bytes()
        for place in (0.0, 0.1, 0.25, 0.5, 0.9):
            flip(path, place)
            assert find_damage(newest) is not None
            path.write_bytes(whole)


def test_the_checkpoint_before_takes_over_and_the_damaged_one_is_set_aside(run, caplog):
    folder, weights, go_on = run
    flip(folder / "checkpoint-2" / "optimizer.safetensors", 0.7)
    damaged = (folder / "checkpoint-2" / "optimizer.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is damaged: optimizer.safetensors has another SHA-256"):
        go_on(name=str(folder / "checkpoint-2"))
    assert are_equal(go_on(), weights)
    assert "checkpoint-2 is damaged (optimizer.safetensors has another SHA-256" in caplog.text
    assert (folder / "set-aside-1" / "checkpoint-2" / "optimizer.safetensors").read_bytes() == damaged
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]


FILE = {"bytes": 1, "sha256": ""}
MALFORMED = [
    [],
    {},
    "text",
    {"step": "2"},
    {"step": -1},
    {"step": True},
    {"step": 10**40},
    {"files": []},
    {"files": {"/etc/passwd": FILE}},
    {"files": {"../x": FILE}},
    {"files": {"a": 1.5}},
    {"files": {"a\0b": FILE}},
    {"run": None},
    {"settings": 3},
    {"format": None},
]


def test_a_malformed_manifest_is_damage(run):
    """Also one whose own SHA-256 is right, as of somebody who wrote it on purpose."""
    folder, _, go_on = run
    path = folder / "checkpoint-2" / MANIFEST
    whole = read_json_object(path)
    for change in MALFORMED:
        content = change
        if isinstance(change, dict) and change:
            content = {**whole, **change}
            if "format" not in change:
                content[OWN_DIGEST] = digest_of(content)
        path.write_text(json.dumps(content))
        assert find_damage(path.parent) is not None, change
        with pytest.raises(ValueError, match="`resume_from_checkpoint` is .*, which is damaged: "):
            go_on(name=str(path.parent))


class Hostile:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


# what accelerate reads of a checkpoint
PICKLES = [
    "custom_checkpoint_0.pkl",
    "optimizer.bin",
    "random_states_0.pkl",
    "scheduler.bin",
    "sampler.bin",
    "scaler.pt",
]


def test_nothing_in_a_checkpoint_runs_code(run, tmp_path):
    """Pickles of the names that accelerate reads, and in place of the files that are read, in a sealed checkpoint."""
    folder, weights, go_on = run
    checkpoint, trace = folder / "checkpoint-2", tmp_path / "trace"
    manifest = read_json_object(checkpoint / MANIFEST)
    record = {name: manifest[name] for name in ("format", "step", "run", "settings")}
    (checkpoint / MANIFEST).unlink()
    for name in PICKLES:
        torch.save(Hostile(trace), checkpoint / name)
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(trace)))
    seal(checkpoint, record)
    assert are_equal(go_on(), weights)  # they are not read
    for file in ("model", "optimizer", "averages", "process-0"):
        path = checkpoint / f"{file}.safetensors"
        whole = path.read_bytes()
        for content in (pickle.dumps(Hostile(trace)), b"", b"\0" * 100, (2**62).to_bytes(8, "little") + b"{}"):
            path.write_bytes(content)
            (checkpoint / MANIFEST).unlink()
            seal(checkpoint, record)
            with pytest.raises(ValueError, match="does not contain the state of this run: .*is not a saved state"):
                go_on()
        path.write_bytes(whole)
    assert not trace.exists()


def test_a_state_that_does_not_fit_is_refused(run):
    folder, _, go_on = run
    checkpoint = folder / "checkpoint-2"
    manifest = read_json_object(checkpoint / MANIFEST)
    record = {name: manifest[name] for name in ("format", "step", "run", "settings")}

    def check(name: str, state, message: str) -> None:
        path = checkpoint / f"{name}.safetensors"
        whole = path.read_bytes()
        save_state(path, state)
        (checkpoint / MANIFEST).unlink()
        seal(checkpoint, record)
        with pytest.raises(ValueError, match=message):
            go_on()
        path.write_bytes(whole)

    states = {
        name: load_state(checkpoint / f"{name}.safetensors")
        for name in ("model", "optimizer", "averages", "process-0")
    }
    model = states["model"]
    check("model", {**model, "conv_in.bias": model["conv_in.bias"][:-1]}, "conv_in.bias has shape")
    check("model", {**model, "conv_in.bias": model["conv_in.bias"].int()}, "conv_in.bias has shape")
    check("model", {**model, "conv_in.bias": model["conv_in.bias"] / 0}, "weights or averages that are not finite")
    check("model", {name: model[name] for name in list(model)[1:]}, "the network lacks")
    check("model", [1, 2], "does not contain the state")
    moments = states["optimizer"]["moments"]
    check("optimizer", {"moments": {**moments, 9999: moments[0]}, "scaler": None}, "moments of a parameter 9999")
    short = {**moments[0], "exp_avg": torch.zeros(1)}
    check("optimizer", {"moments": {**moments, 0: short}, "scaler": None}, "exp_avg has shape")
    check("averages", {**states["averages"], "steps": [-5, -5]}, "an average of -5 steps")
    check("averages", {"steps": [], "averages": []}, "it has 0 averages")
    own = states["process-0"]
    check("process-0", {**own, "data": {"images_seen": 9}}, "has seen 9 images, but should have seen 8 after 2 steps")
    check(
        "process-0", {**own, "data": {"images_seen": "x"}}, "has seen 'x' images, but should have seen 8 after 2 steps"
    )
    check("process-0", {**own, "losses": {"loss": "x"}}, "its losses are not numbers")
    check("process-0", {**own, "monitor": {}}, "does not contain the state")


def test_a_checkpoint_of_an_earlier_version_is_refused(run):
    folder, _, go_on = run
    path = folder / "checkpoint-2" / MANIFEST
    path.write_text(json.dumps({"step": 2, "run": {}, "files": {"model.safetensors": 5}}))
    with pytest.raises(ValueError, match="was written by another version of diffusers-imagen"):
        go_on()


def test_a_checkpoint_whose_settings_had_other_names_is_refused(run):
    """Of format 2, where a variance-preserving run was called "ddpm"."""
    folder, _, go_on = run
    path = folder / "checkpoint-2" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest |= {"format": 2, "run": {**manifest["run"], "preconditioning": "ddpm"}}
    path.write_text(json.dumps({**manifest, OWN_DIGEST: digest_of(manifest)}))
    with pytest.raises(
        ValueError, match="was written by another version of diffusers-imagen. To continue training from its weights"
    ):
        go_on()


def test_a_state_is_what_was_saved(tmp_path):
    state = {"a": {0: torch.arange(3), "b.c": [1, 2.5, None, "x", True]}, "a.0": torch.zeros(()), "n": float("inf")}
    shared = torch.zeros(4, 4)
    state["views"] = [shared[:2], shared.t()]
    save_state(tmp_path / "s.safetensors", state)
    found = load_state(tmp_path / "s.safetensors")
    assert found["a"]["b.c"] == state["a"]["b.c"] and found["n"] == state["n"] and list(found["a"]) == [0, "b.c"]
    assert torch.equal(found["a"][0], torch.arange(3)) and found["views"][0].shape == (2, 4)
    tensors = load_file(tmp_path / "s.safetensors")
    for tree in ('["tensor", "zzz"]', '["dict", 5]', '["what", []]', "[" * 100_000, "{", '["dict", [[[], 1]]]'):
        save_file(tensors, tmp_path / "t.safetensors", metadata={"state": tree})
        with pytest.raises(ValueError, match="is not a saved state"):
            load_state(tmp_path / "t.safetensors")
    with pytest.raises(TypeError, match="has a value of class set at 'a'"):
        save_state(tmp_path / "u.safetensors", {"a": set()})


def test_states_of_several_files_are_read_when_they_are_asked_for(tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths[:2]):
        save_state(path, {"data": {"place": number}, "other": torch.zeros(2)})
    states = SavedStates(paths, "data")  # the third file does not exist
    assert len(states) == 3 and [states[0], states[1]] == [{"place": 0}, {"place": 1}]
    with pytest.raises(ValueError, match="2.safetensors' is not a saved state"):
        list(states)


def test_files_of_deepspeed_that_could_run_code_are_not_given_to_it(tmp_path):
    (tmp_path / "state").mkdir()
    torch.save({"module": {"a": torch.zeros(2)}}, tmp_path / "state" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("state")
    check_deepspeed_files(tmp_path)
    torch.save({"a": Hostile(tmp_path / "trace")}, tmp_path / "state" / "other.pt")
    with pytest.raises(ValueError, match="other.pt refers to .*mkdir, which could execute code"):
        check_deepspeed_files(tmp_path)
    (tmp_path / "state" / "other.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "trace")))
    with pytest.raises(ValueError, match="other.pt cannot be checked"):
        check_deepspeed_files(tmp_path)
    shutil.move(tmp_path / "state" / "other.pt", tmp_path / "state" / "other.bin")
    with pytest.raises(ValueError, match="other.bin is not a file of DeepSpeed"):
        check_deepspeed_files(tmp_path)
    assert not (tmp_path / "trace").exists()
