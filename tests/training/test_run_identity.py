"""What makes a run another one, and what a user may change."""

import json
import shutil
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
from text_sources import FunctionSource
from tiny_runs import are_equal, encode, make_unet, weights_of

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.training import DreamBoothTrainingConfig, TrainingConfig, run_identity, train
from diffusers_imagen.training.data import make_train_batches
from diffusers_imagen.training.network import make_unet as make_network


CLASSES = ("ANOTHER_RUN", "BY_CONTENT", "AT_THE_START", "CHANGEABLE", "NOT_COMPARED")


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_setting_belongs_to_one_class():
    """A new setting has to say whether a resumed run may change it."""
    classes = {name: getattr(run_identity, name) for name in CLASSES}
    found = sorted(name for settings in classes.values() for name in settings)
    names = sorted(f.name for f in fields(DreamBoothTrainingConfig))  # which has those of LoRA and the data too
    assert set(names) - set(found) == set(), (
        f"each should be in one of {', '.join(CLASSES)} of training/run_identity.py"
    )
    assert found == names


CHANGES = [
    {"seed": 1},
    {"loss": "l1"},
    {"p_mean": -1.0},
    {"p_std": 1.0},
    {"text_drop_rate": 0.5},
    {"caption": "text 3"},
    {"random_flip": True},
    {"use_ema": False},
    {"max_train_samples": 3},
    {"stratified_noise": True},
]


@pytest.fixture
def finished(make_config):
    config = make_config(max_train_steps=1)
    train(config, make_unet(), encode)
    return config


@pytest.fixture
def refusal(finished, make_config):
    """What a run that goes on otherwise is told."""

    def refusal(**changes) -> str:
        with pytest.raises(ValueError) as refused:
            train(make_config(resume_from_checkpoint="latest", **changes), make_unet(), encode)
        return str(refused.value)

    return refusal


def test_settings_that_make_another_run_are_refused_by_name(refusal, tmp_path):
    before = (tmp_path / "stage" / "metrics.jsonl").read_bytes()
    for change in CHANGES:
        ((name, value),) = change.items()
        assert f"was trained with {name} " in refusal(**change) and f"has {value!r}." in refusal(**change)
    assert "x processes = 4, but this run has 2." in refusal(train_batch_size=2)
    assert (tmp_path / "stage" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["caption", "image", "row"])
def test_other_data_are_refused_by_name(refusal, imagefolder, rows, change):
    folder = Path(imagefolder)
    if change == "caption":
        rows[1]["text"] = "text 3"
    elif change == "image":
        shutil.copyfile(folder / "images" / "5.png", folder / "images" / "1.png")
    else:
        del rows[1]
    write_rows(folder, rows)
    what = {"caption": "a digest of the captions", "image": "a digest of the images", "row": "rows of the data 6"}
    assert f"was trained with {what[change]}" in refusal()


def test_the_same_data_elsewhere_and_what_a_user_may_change_go_on(
    finished, make_config, imagefolder, tmp_path, caplog
):
    shutil.copytree(imagefolder, tmp_path / "moved" / "data")
    changed = {"learning_rate": 1e-3, "train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3}
    config = make_config(max_train_steps=2, resume_from_checkpoint="latest", **changed)
    config.train_data_dir = str(tmp_path / "moved" / "data")
    with caplog.at_level("INFO", "diffusers_imagen"):
        train(config, make_unet(), encode)
    assert "checkpoint-1, with train_batch_size 2 (it was 4), gradient_acc" in caplog.text
    assert (
        "max_train_steps 2 (it was 1), learning_rate 0.001 (it was 0.003), logging_steps 3 (it was 1)" in caplog.text
    )


def test_a_network_of_a_checkpoint_from_before_an_option_has_its_default(make_config):
    own = run_identity.describe_run(make_config(), make_unet(), "no")
    defaults = {f"unet {name}": p.default for name, p in signature(ImagenUNetModel.__init__).parameters.items()}
    defaults |= {f.name: f.default for f in fields(TrainingConfig)}
    assert run_identity.LATER_OPTIONS.items() <= defaults.items()
    saved = {key: value for key, value in own.items() if key not in run_identity.LATER_OPTIONS}
    assert len(own) - len(saved) == len(run_identity.LATER_OPTIONS)
    for partly in (False, True):
        assert run_identity.find_difference(saved, own, partly) is None
        other = {**own, "unet act_fn": "gelu"}
        difference = "was trained with unet act_fn 'silu', but this run has 'gelu'"
        assert run_identity.find_difference(saved, other, partly) == difference


@pytest.mark.parametrize("streaming", [False, True])
def test_data_are_known_by_what_is_drawn_from_them(make_config, imagefolder, rows, tmp_path, streaming):
    def content(folder: str) -> dict:
        options = {"streaming": streaming, "shuffle_buffer_size": 3}
        config = TrainingConfig(**{**vars(make_config(**options)), "train_data_dir": folder})
        return make_train_batches(config, encode).content

    other = str(shutil.copytree(imagefolder, tmp_path / "moved" / "data"))
    assert content(imagefolder) == content(other)
    rows[0]["text"] = "text 7"
    write_rows(Path(other), rows)
    assert content(imagefolder) != content(other)


class Encoder(FunctionSource):
    """A text encoder that says which it is."""

    def __init__(self, weight: float):
        super().__init__(encode, encode.width)
        self.weight = weight

    def identity(self) -> dict:
        return {"class": "Encoder", "max_length": 2, "weights": [self.weight]}


def test_another_text_encoder_is_refused(make_config):
    train(make_config(max_train_steps=1), make_unet(), Encoder(1.0))
    config = make_config(max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="was trained with another text encoder .other weights"):
        train(config, make_unet(), Encoder(2.0))
    train(config, make_unet(), Encoder(1.0))


def test_the_seed_decides_fresh_weights_and_the_callers_generator_is_left_alone(make_config, tmp_path):
    make_unet().save_pretrained(tmp_path / "small" / "unet")
    trained = {"preset": None, "pretrained_model_name_or_path": str(tmp_path / "small")}
    starts = (
        {"preset": None, "model_config_name_or_path": str(tmp_path / "small")},
        {**trained, "grow": True, "resolution": 32},
        {**trained, "layers_per_block": [2, 2]},
    )
    for options in starts:
        state = torch.get_rng_state()
        first, again, other = (weights_of(make_network(make_config(seed=seed, **options))) for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert are_equal(first, again) and not are_equal(first, other)
        torch.rand(1)


def test_dropout_draws_what_belongs_to_its_step(make_config, tmp_path):
    """A resumed run, in a process whose generators are elsewhere, is the run that was not stopped."""
    config = {**make_unet().config, "dropout": 0.5}
    network = type(make_unet())
    runs = []
    for name, steps in (("whole", (3,)), ("resumed", (2, 3))):
        for last in steps:
            unet = network.from_config(config)
            unet.load_state_dict(make_unet().state_dict())
            options = {"max_train_steps": last, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
            train(make_config(output_dir=tmp_path / name, **options), unet, encode)
        runs.append(weights_of(unet))
    assert are_equal(*runs)


def test_neither_secrets_nor_places_are_published(make_config, tmp_path, monkeypatch):
    """In files for others, and in what is uploaded of a folder with whatever else in it."""
    from huggingface_hub.utils import filter_repo_objects

    from diffusers_imagen.training import export, stage_card

    (tmp_path / "small").mkdir()
    make_unet().save_pretrained(tmp_path / "small" / "unet")
    start = type(make_unet()).from_pretrained(tmp_path / "small", subfolder="unet")
    uploads = {}
    repository = type("Repository", (), {"repo_id": "me/stage"})
    monkeypatch.setattr(export, "create_repo", lambda name, **kwargs: repository)
    monkeypatch.setattr(export, "upload_folder", lambda **kwargs: uploads.update(kwargs))
    config = make_config(
        preset=None,
        pretrained_model_name_or_path=str(tmp_path / "small"),
        text_encoder=str(tmp_path / "encoder"),
        validation_prompts=["text 1"],
        max_train_steps=2,
        checkpointing_steps=1,
        ema_type="power",
        report_to="tensorboard",
        logging_dir="unet-logs",
        push_to_hub=True,
        hub_model_id="me/stage",
        hub_token="hf_secret",
    )
    train(config, start, encode)
    folder = Path(config.output_dir)
    (folder / "notes.txt").write_text("mine")
    (folder / "set-aside-1").mkdir()
    (folder / "set-aside-1" / "README.md").write_text("mine")
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    kinds = {name: uploads[name] for name in ("allow_patterns", "ignore_patterns")}
    uploaded = sorted(filter_repo_objects(paths, **kinds))
    assert uploaded == [
        "README.md",
        "card_images/0.png",
        "model_index.json",
        "samples/step-000002.png",
        "scheduler/scheduler_config.json",
        "training.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    for name in uploaded:
        content = (folder / name).read_bytes()
        assert str(tmp_path).encode() not in content and b"hf_secret" not in content
    settings = json.loads((folder / "training.json").read_text())["config"]
    assert settings["pretrained_model_name_or_path"] == "small" and settings["text_encoder"] == "encoder"
    assert settings["hub_model_id"] == "me/stage" and stage_card.public_name("me/model") == "me/model"
