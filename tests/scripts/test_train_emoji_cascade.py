import importlib
import io
import json
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from script_modules import SCRIPTS, script_module
from text_sources import FunctionSource

from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.checkpoints import list_checkpoints
from diffusers_imagen.training.data import make_train_batches
from diffusers_imagen.training.data.data_config import DataConfig
from diffusers_imagen.training.data.pixels import read_image
from diffusers_imagen.training.data.sources import open_rows
from diffusers_imagen.training.interruption import TrainingInterrupted


NAMES = ("train_emoji_cascade", "emoji_pack", "emoji_parcel", "emoji_plan")
SIDE = 64


@pytest.fixture(scope="module")
def scripts():
    """The script and its neighbours, by name."""
    with script_module(NAMES[0]):
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


def draw(number: int, style: str) -> np.ndarray:
    """A disc on nothing: of one colour and with a soft edge, or with grain as a photograph has."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    alpha = np.clip((20 - np.hypot(x, y)) * 128, 0, 255)
    colour = np.broadcast_to([30 * number, 203 - 30 * number, 77], (SIDE, SIDE, 3)).astype(np.float64)
    if style == "3d":
        colour = colour + np.random.default_rng(number).normal(0, 20, (SIDE, SIDE, 3))
    return np.concatenate([np.clip(colour, 0, 255), alpha[..., None]], axis=-1).round().astype(np.uint8)


@pytest.fixture
def emoji(tmp_path, monkeypatch) -> Path:
    """An image folder as `build_emoji_dataset.py` writes it: six rows of train and two of test_style in two styles."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "emoji"
    (folder / "images").mkdir(parents=True)
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES" / "NOTICE.txt").write_text("flat: by F\n")
    rows = []
    for number in range(8):
        style = "3d" if number % 2 else "flat"
        name = f"images/{style}_{number}.png"
        Image.fromarray(draw(number, style)).save(folder / name)
        parts = {"file_name": name, "text": f"text {number}", "style": style, "concept": f"concept {number}"}
        parts |= {"split": "train" if number < 6 else "test_style", "label": f"label {number}", "group": "g"}
        rows.append({**parts, "tags": [f"tag {number}", "b"], "icon_name": "i", "tone": "", "weight": 1 + number})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def packed(scripts, emoji, tmp_path) -> Path:
    target = tmp_path / "packed" / "emoji.parquet"
    scripts.emoji_pack.pack(emoji, target, ["3d", "flat"])
    return target


# ---- pictures in one file


def test_levels_are_rounded_from_white_on(scripts):
    values = np.arange(256, dtype=np.uint8)
    rounded = scripts.emoji_pack.round_levels(values)
    assert set(rounded) == set(range(0, 256, 5))
    assert np.abs(rounded.astype(int) - values).max() == 2
    assert rounded[253] == 255 and rounded[252] == 250


def test_a_drawing_is_lossless_but_for_rounding_and_a_photograph_is_lossy(scripts, emoji, tmp_path):
    target = tmp_path / "packed" / "emoji.parquet"
    report = scripts.emoji_pack.pack(emoji, target, ["3d", "flat"])
    assert (report["flat"].pictures, report["flat"].rounded) == (4, 4)
    assert (report["3d"].pictures, report["3d"].rounded) == (4, 0)
    rows = open_rows(DataConfig(train_data_dir=str(target.parent)), "train")
    assert len(rows.data) == 6
    errors: dict[str, list[float]] = {"3d": [], "flat": []}
    for row in [*rows.data, *open_rows(DataConfig(train_data_dir=str(target.parent)), "test_style").data]:
        number = int(row["text"].removeprefix("text "))
        style = "3d" if number % 2 else "flat"
        true = np.asarray(read_image(str(emoji / f"images/{style}_{number}.png"))).astype(int)
        read = np.asarray(read_image(row[rows.image_column])).astype(int)
        errors[style].append(float(((read - true) ** 2).mean()))
        if style == "flat":
            np.testing.assert_array_equal(read, scripts.emoji_pack.round_levels(true.astype(np.uint8)))
    for style, found in errors.items():
        assert report[style].psnr == pytest.approx(10 * np.log10(255**2 / np.mean(found)))
        assert report[style].lowest_psnr == pytest.approx(10 * np.log10(255**2 / max(found)))
    assert report["flat"].lowest_psnr > 45
    pictures = sum(found.bytes for found in report.values())
    assert pictures < target.stat().st_size < pictures + 20_000


def test_the_trainer_reads_pictures_and_every_column_of_captions(packed):
    config = DataConfig(
        train_data_dir=str(packed.parent),
        caption_column=["text", "label", "tags"],
        caption_probabilities=[0.0, 0.0, 1.0],
        balance_by=["concept", "style"],
        resolution=16,
        train_batch_size=6,
    )
    seen: list[str] = []

    def encode(captions):
        seen.extend(captions)
        return torch.zeros(len(captions), 1, 4), torch.ones(len(captions), 1, dtype=torch.bool)

    batch = next(make_train_batches(config, FunctionSource(encode, 4)))
    assert batch.images.shape == (6, 3, 16, 16)
    assert batch.images[:, :, 0, 0].eq(1).all()  # white stays white
    captions = [(f"text {number}", f"label {number}", f"tag {number}, b") for number in range(6)]
    assert set(seen) == {caption for row in captions for caption in row}


def test_styles_and_a_few_rows_of_each_split_can_be_chosen(scripts, emoji):
    rows = scripts.emoji_pack.choose_rows(emoji, ["flat"], most_each=2)
    assert [row["file_name"] for row in rows] == ["images/flat_0.png", "images/flat_4.png", "images/flat_6.png"]
    with pytest.raises(ValueError, match=r"^`styles` has 'noto', but .* has \['3d', 'flat'\]\.$"):
        scripts.emoji_pack.choose_rows(emoji, ["flat", "noto"])


def test_some_pictures_come_back_as_an_image_folder(scripts, packed, tmp_path):
    folder = tmp_path / "images"
    assert scripts.emoji_pack.unpack(packed, folder, {"train": 3, "test_style": 9}) == 5
    rows = open_rows(DataConfig(train_data_dir=str(folder)), "train")
    assert len(rows.data) == 3
    both = open_rows(DataConfig(train_data_dir=str(packed.parent)), "train").data
    bytes_of = {row["text"]: row["image"]["bytes"] for row in both}
    for row in rows.data:
        assert (folder / row[rows.image_column]).read_bytes() == bytes_of[row["text"]]


def test_notices_travel_with_the_pictures(scripts, packed, emoji, tmp_path):
    scripts.emoji_pack.write_metadata(packed, tmp_path / "notices")
    assert (tmp_path / "notices" / "LICENSES" / "NOTICE.txt").read_text() == "flat: by F\n"
    rows = [json.loads(line) for line in (tmp_path / "notices" / "metadata.jsonl").read_text().splitlines()]
    theirs = {row["text"]: row for row in map(json.loads, (emoji / "metadata.jsonl").read_text().splitlines())}
    assert len(rows) == 8
    assert all(value == theirs[row["text"]][name] for row in rows for name, value in row.items())
    other = tmp_path / "other.parquet"
    other.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="which is not a file written by --pack"):
        scripts.emoji_pack.read_notices(other)


# ---- the plan


def test_super_resolution_comes_before_the_text_encoder_where_it_reads_no_text(scripts):
    order = scripts.emoji_plan.phase_order(upscaler_reads_text=False)
    assert order[:4] == ["data", "super_resolution", "embeddings", "base_32"]
    order = scripts.emoji_plan.phase_order(upscaler_reads_text=True)
    assert order[:4] == ["data", "embeddings", "super_resolution", "base_32"]
    assert order[4:] == ["base_64", "pairs", "refine", "build", "evaluate"]


def test_phases_share_what_the_others_have_left(scripts):
    plan = scripts.emoji_plan
    assert sum(plan.SHARES.values()) == pytest.approx(1)
    assert plan.phase_seconds("base_64", [], {}, 1500) == pytest.approx(0.34 * 1500)
    # 480 s are spent by phases of 22 % of the time; base_64 has had 100 s, which are its own
    done, seconds = ["data", "super_resolution"], {"data": 30.0, "super_resolution": 450.0, "base_64": 100.0}
    assert plan.phase_seconds("base_64", done, seconds, 1500) == pytest.approx((1500 - 480) * 0.34 / 0.78)
    assert plan.phase_seconds("base_64", done, {"data": 1600.0}, 1500) == 0
    # phases that take what they are given end with the time that there is
    seconds, done = {}, []
    for phase in plan.phase_order(False):
        seconds[phase] = plan.phase_seconds(phase, done, seconds, 1500)
        done.append(phase)
    assert sum(seconds.values()) == pytest.approx(1500)


def test_steps_are_those_that_there_is_time_for(scripts):
    plan = scripts.emoji_plan
    assert plan.plan_steps(40, 0.1, 100) == 40 + 970
    assert plan.plan_steps(40, 0.1, 100, most=500) == 500
    assert plan.plan_steps(40, 0.1, -3) == 41  # one step ends the run
    assert plan.plan_steps(40, 0.1, 100, most=40) == 41
    # what the next call takes to begin again is no time for steps
    assert plan.seconds_for_steps(budget=600, had=50, call_left=540, start=45) == 530
    assert plan.seconds_for_steps(budget=600, had=50, call_left=500, start=45) == 485


def test_progress_goes_on_with_what_a_killed_call_had(scripts, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(scripts.emoji_plan.time, "monotonic", lambda: now[0])
    make = lambda scale=1.0: scripts.emoji_plan.Progress(tmp_path / "progress.json", {"scale": scale}, 1000, 700)  # noqa: E731
    progress = make()
    progress.open(resume=False)
    progress.begin("data")
    now[0] += 20
    progress.finish()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emoji.parquet").touch()
    progress.begin("base_32")
    progress.steps["base_32"] = 77
    for _ in range(3):  # the third tick comes too soon to be written
        now[0] += 8
        progress.tick()
    assert progress.call_left == 700 - 144

    with pytest.raises(ValueError, match="`work_dir` is .* set --resume"):
        make().open(resume=False)
    with pytest.raises(ValueError, match=r"^`scale` is 0\.5, but .* has 1\.0\.$"):
        make(0.5).open(resume=True)
    again = make()
    again.open(resume=True)
    assert (again.done, again.steps, again.seconds) == (["data"], {"base_32": 77}, {"data": 20, "base_32": 16})


def test_what_was_lost_with_a_machine_is_made_again_if_it_is_read(scripts, tmp_path):
    find_lost, phases = scripts.emoji_plan.find_lost, list(scripts.emoji_plan.SHARES)
    done = ["data", "super_resolution", "embeddings", "base_32"]
    assert find_lost(tmp_path, done) == ["data", "embeddings"]
    (tmp_path / "embeddings").mkdir()
    assert find_lost(tmp_path, done) == ["data"]
    assert find_lost(tmp_path, [phase for phase in phases if phase != "evaluate"]) == ["data", "build"]
    assert find_lost(tmp_path, phases) == []


# ---- runs


@pytest.fixture
def recipe(scripts, tmp_path, packed):
    """A recipe's trainer of a tiny network on the packed pictures."""

    def train(call_end: float, most: int = 12):
        tiny_runs.reset_accelerate()
        progress = scripts.emoji_plan.Progress(tmp_path / "progress.json", {}, 1000.0, call_end)
        progress.open(resume=True)
        progress.begin("base_32")
        last = progress.steps.get("base_32", 10**7)
        settings = tiny_runs.settings(packed.parent, tmp_path / "runs" / "base_32", max_train_steps=last)
        settings |= {"resume_from_checkpoint": "latest", "validation_split": "test_style", "ema_type": "power"}
        config = TrainingConfig(**settings)
        trainer = scripts.train_emoji_cascade.TimedTrainer(
            config, tiny_runs.make_unet(), progress, most, text=tiny_runs.encode
        )
        trainer.train()
        return progress

    return train


def test_a_run_stops_with_its_call_and_goes_on_in_the_next(scripts, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.train_emoji_cascade, "TIMED_STEPS", 3)
    folder = tmp_path / "runs" / "base_32"
    with pytest.raises(TrainingInterrupted):
        recipe(call_end=time.monotonic())  # the call is over before the first step that is not timed
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4"]
    assert json.loads((folder / "training.json").read_text())["step"] == 4
    saved = json.loads((tmp_path / "progress.json").read_text())
    assert saved["steps"] == {"base_32": 12} and saved["done"] == []

    progress = recipe(call_end=time.monotonic() + 1000)
    assert list_checkpoints(folder)[-1].name == "checkpoint-12"
    record = json.loads((folder / "training.json").read_text())
    assert (record["step"], record["config"]["max_train_steps"]) == (12, 12)
    assert record["validation_loss"] > 0
    assert progress.seconds["base_32"] > saved["seconds"]["base_32"]
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    recipe(call_end=time.monotonic() + 1000)  # nothing is left to do
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_a_run_without_its_checkpoints_begins_another_with_its_weights(scripts, tmp_path):
    cascade = scripts.train_emoji_cascade
    recipe = cascade.Recipe(SimpleNamespace(work_dir=tmp_path), None)
    runs = tmp_path / "runs"
    assert cascade.choose_start(recipe, "base_32") == (runs / "base_32", None)
    (runs / "base_32" / "unet").mkdir(parents=True)
    assert cascade.choose_start(recipe, "base_64") == (runs / "base_64", runs / "base_32")
    (runs / "base_64" / "unet").mkdir(parents=True)
    (runs / "base_64" / "checkpoint-50").mkdir()
    assert cascade.choose_start(recipe, "base_64") == (runs / "base_64", runs / "base_32")
    (runs / "base_64" / "checkpoint-50").rmdir()
    assert cascade.choose_start(recipe, "base_64") == (runs / "base_64.2", runs / "base_64")
    (runs / "base_64.2" / "checkpoint-5").mkdir(parents=True)
    assert cascade.choose_start(recipe, "base_64") == (runs / "base_64.2", runs / "base_64")


def test_every_stage_has_settings_that_the_trainer_takes(scripts, tmp_path):
    cascade = scripts.train_emoji_cascade
    for earlier in ("base_32", "super_resolution"):
        (tmp_path / "runs" / earlier / "checkpoint-9").mkdir(parents=True)
    args = cascade.parse_args(["--work_dir", str(tmp_path), "--scale", "0.01"])
    recipe = cascade.Recipe(args, SimpleNamespace(steps={"base_64": 99}))
    configs = {stage: cascade.stage_config(recipe, stage) for stage in cascade.SETTINGS}
    assert configs["base_32"].preset == "emoji_base_32"
    assert configs["base_32"].embedding_cache == str(tmp_path / "embeddings")
    assert configs["base_64"].pretrained_model_name_or_path == str(tmp_path / "runs" / "base_32")
    assert configs["base_64"].grow and configs["base_64"].max_train_steps == 99
    upscaler = cascade.network_of("emoji_sr_256")
    config = configs["super_resolution"]
    assert (config.text_encoder is None) == (upscaler.text_width is None)
    assert bool(config.noise_conditioning_augmentation) == upscaler.takes_low_res_noise_level
    assert config.train_batch_size == 4
    assert configs["refine"].train_data_dir == str(tmp_path / "pairs")
    assert configs["refine"].pretrained_model_name_or_path == str(tmp_path / "runs" / "super_resolution")
    (tmp_path / "runs" / "base_32" / "checkpoint-9").rmdir()
    (tmp_path / "runs" / "base_32").rmdir()
    config = cascade.stage_config(recipe, "base_64")  # at once, where nothing was trained at 32 px
    assert (config.preset, config.grow) == ("emoji_base_64", False)


def test_a_phase_is_not_begun_where_its_call_is_too_short(scripts, tmp_path, capsys):
    cascade = scripts.train_emoji_cascade
    for phase, enough, too_little in (("build", 46, 44), ("base_64", 61, 59), ("evaluate", 61, 59)):
        for left in (enough, too_little):
            progress = scripts.emoji_plan.Progress(tmp_path / "p.json", {}, 1500.0, time.monotonic() + left)
            progress.begin(phase)
            if left == enough:
                cascade.check_call(progress)
            else:
                with pytest.raises(cascade.CallOver, match="of the call are left"):
                    cascade.check_call(progress)

    # the phases before are done, and the call is over: nothing is begun, and what is done is kept
    progress.done = list(scripts.emoji_plan.SHARES)[:4]
    progress.seconds = dict.fromkeys(progress.done, 1.0)
    cascade.make(cascade.Recipe(SimpleNamespace(phases=None), progress))
    assert "Continue with --resume." in capsys.readouterr().out
    assert json.loads((tmp_path / "p.json").read_text())["done"] == progress.done


# ---- what is brought home


def test_weights_come_home_in_parts_and_in_half_precision(scripts, tmp_path, monkeypatch):
    parcel = scripts.emoji_parcel
    folder = tmp_path / "work"
    for run in ("base_32", "base_64", "super_resolution"):
        (folder / "runs" / run / "unet").mkdir(parents=True)
        (folder / "runs" / run / "training.json").write_text("{}")
        save_file({"w": torch.full((200,), 1 / 3)}, folder / "runs" / run / "unet" / "model.safetensors")
        (folder / "runs" / run / "checkpoint-1").mkdir()
        (folder / "runs" / run / "checkpoint-1" / "model.safetensors").write_bytes(b"not brought home")
    (folder / "progress.json").write_text('{"done": []}')
    monkeypatch.setattr(parcel, "PART_BYTES", 4096)
    paths = parcel.write_parcel(folder, tmp_path / "out")
    assert [path.name for path in paths] == [f"cascade.tar.{number}" for number in range(len(paths))]
    assert len(paths) > 1 and max(path.stat().st_size for path in paths) == 4096

    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in paths))) as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    weights = {name for name in files if name.endswith(".safetensors")}
    assert weights == {f"runs/{run}/unet/model.safetensors" for run in ("base_64", "super_resolution")}
    assert files["progress.json"] == b'{"done": []}' and "runs/base_32/training.json" in files
    brought = load(files["runs/base_64/unet/model.safetensors"])["w"]
    torch.testing.assert_close(brought, load_file(folder / "runs/base_64/unet/model.safetensors")["w"].half())
    monkeypatch.setattr(parcel, "PART_BYTES", 512)
    with pytest.raises(ValueError, match="`output_dir`: .* are more than 4 files"):
        parcel.write_parcel(folder, tmp_path / "out")


def test_packages_that_a_machine_lacks_are_named(scripts, monkeypatch):
    parcel, setup = scripts.emoji_parcel, SCRIPTS.parent / "setup.cfg"
    assert parcel.find_missing(setup) == []
    versions = parcel.metadata.version

    def version(name):
        if name == "dill":  # of `datasets`
            raise parcel.metadata.PackageNotFoundError(name)
        return "4.0.1" if name == "filelock" else versions(name)

    monkeypatch.setattr(parcel.metadata, "version", version)
    missing = parcel.find_missing(setup)
    assert "filelock>=4.1 (it has 4.0.1)" in missing
    assert [name for name in missing if name.startswith("dill")] and len(missing) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Exactly one of `pack` and `work_dir` should be given"),
        (["--work_dir", "w", "--scale", "2"], "`scale` is 2.0, but should be from 1e-06 to 1."),
        (["--work_dir", "w", "--quality", "0"], "`quality` is 0, but should be from 1 to 100."),
        (["--work_dir", "w", "--data", "no-such"], "`data` is 'no-such', which does not exist."),
    ],
)
def test_options_that_cannot_be_are_refused(scripts, argv, message):
    with pytest.raises(ValueError, match=message):
        scripts.train_emoji_cascade.parse_args(argv)
