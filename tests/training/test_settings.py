"""Settings that no run can have, by the error that names them."""

import math
import re
import types
from dataclasses import fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from diffusers_imagen.training import DreamBoothTrainingConfig, LoraTrainingConfig, TrainingConfig
from diffusers_imagen.training.config import settings_of_choices
from diffusers_imagen.training.settings import BOUNDS, hints_of
from diffusers_imagen.training.stage_card import public_settings


CLASSES = {
    TrainingConfig: {"preset": "emoji_base_64"},
    LoraTrainingConfig: {"pretrained_model_name_or_path": "a"},
    DreamBoothTrainingConfig: {
        "pretrained_model_name_or_path": "a",
        "instance_data_dir": "a",
        "instance_prompt": "a",
        "with_prior_preservation": True,
        "class_data_dir": "b",
        "class_prompt": "b",
        "rank": 2,
    },
}
# what lets a setting count at all
WITH = {
    "snr_gamma": {"preconditioning": "variance_preserving", "loss_weighting": "min_snr"},
    "ema_snapshot_steps": {"ema_type": "power"},
    "caption_probabilities": {"caption_column": ["a", "b"], "caption": None},
    "layers_per_block": {"pretrained_model_name_or_path": "a", "preset": None},
    "degradation_blur_sigma": {"low_resolution": 8},
    "degradation_jpeg_quality": {"low_resolution": 8},
    "crop_size": {"low_resolution": 8},
}


def kinds(hint) -> tuple[type, bool]:
    """What a setting is, and whether it is a list of it; the kind of a choice is Literal."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    return get_origin(hint) or hint, False


FIELDS = {field.name: (config, *kinds(hints_of(config)[field.name])) for config in CLASSES for field in fields(config)}
NUMBERS = {name: (config, is_list) for name, (config, kind, is_list) in FIELDS.items() if kind in (int, float)}


def construct(config: type, name: str, value):
    return config(**{**CLASSES[config], **WITH.get(name, {}), name: value})


def test_every_number_has_bounds_within_which_its_default_is():
    assert set(NUMBERS) == set(BOUNDS), "each number has a line in BOUNDS of training/settings.py"
    for config in CLASSES:
        for field in fields(config):
            default = getattr(config(**CLASSES[config]), field.name)
            if field.name in BOUNDS and default is not None:
                assert all(map(BOUNDS[field.name].has, default if isinstance(default, list) else [default]))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_bounds_or_of_another_kind_is_refused_by_name(name):
    config, is_list = NUMBERS[name]
    assert name in BOUNDS, f"`{name}` has no line in BOUNDS of training/settings.py"
    bounds, kind = BOUNDS[name], FIELDS[name][1]
    wrong = [bounds.low - 1, bounds.high * 2 + 1, 10**400, -(10**30), "abc", "1", True, [[1]], {}, b"1", object(), 1j]
    wrong += [math.nan, math.inf, -math.inf] + [1.5] * (kind is int)
    wrong += [bounds.low] * bounds.above + [bounds.high] * bounds.below
    for value in wrong:
        with pytest.raises(ValueError, match=f"^`{name}` is ") as caught:
            construct(config, name, [value, value] if is_list else value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in NUMBERS])
def test_what_is_no_number_is_refused_by_name_too(name):
    config, kind, is_list = FIELDS[name]
    wrong = (
        [0.5, [1], {"a": 1}, b"a", object()]
        + ([] if is_list else [["a"]])
        + (["a"] if kind is not str or is_list else [])
    )
    for value in [*wrong, *(["a", 1],) * is_list]:
        with pytest.raises(ValueError, match=f"^`{name}` is "):
            construct(config, name, value)


def test_the_error_says_value_and_bounds():
    with pytest.raises(ValueError, match=r"^`learning_rate` is nan, but should be at least 0 and at most 1\.$"):
        TrainingConfig(preset="a", learning_rate=math.nan)
    with pytest.raises(
        ValueError, match="^`layers_per_block` is .1000000., but should be numbers at least 0 and at most 100"
    ):
        TrainingConfig(pretrained_model_name_or_path="a", layers_per_block=[1000000])
    with pytest.raises(ValueError, match="^`max_train_steps` is 'abc', but should be an integer"):
        TrainingConfig(preset="a", max_train_steps="abc")
    with pytest.raises(ValueError, match="^`max_train_steps` is of class int, but should be at least 1"):
        TrainingConfig(preset="a", max_train_steps=10**5000)  # which Python does not print


OF_CHOICES = settings_of_choices()


@pytest.mark.parametrize("setting", OF_CHOICES)
def test_a_setting_of_one_choice_is_refused_with_another(setting):
    """The help of such a setting begins with the choices that it is for."""
    choices = get_args(hints_of(TrainingConfig)[setting])
    assert set(OF_CHOICES[setting]) <= set(choices)
    said = {choice: set() for choice in choices}
    for field in fields(TrainingConfig):
        for choice in field.metadata["help"].partition(":")[0].split(", "):
            said.get(choice, set()).add(field.name)
    listed = {choice: set(OF_CHOICES[setting].get(choice, ())) for choice in choices}
    for choice in choices:
        assert said[choice] <= listed[choice], (
            f"settings_of_choices lacks {said[choice] - listed[choice]} of {choice!r}"
        )
        assert listed[choice] <= set().union(*said.values()) | {"snr_gamma"}, "help should begin with the choice"


SPEAKS_OF_PLACES = re.compile(r"\b(folder|directory|path|Hub id)\b", re.IGNORECASE)
NAME_OF_A_PLACE = re.compile(r"(^|_)(dir|folder|file|path|cache|images)($|_)")
NO_PLACES = {"hub_model_id", "image_column"}  # `file_name` is a column


def test_a_setting_that_can_be_a_place_is_marked_as_one():
    """What is not marked is published as it is, with the names of a user's folders."""
    for field in fields(DreamBoothTrainingConfig):
        config, kind, _ = FIELDS[field.name]
        is_place = SPEAKS_OF_PLACES.search(field.metadata["help"]) or NAME_OF_A_PLACE.search(field.name)
        marked = field.metadata.get("place") in ("local", "local_or_hub")
        if kind is str and field.name not in NO_PLACES:
            assert marked == bool(is_place), (
                f"`{field.name}` should say `place` in `arg`, or its help not speak of one"
            )


@pytest.mark.parametrize(
    "name", [f.name for f in fields(DreamBoothTrainingConfig) if "place" in f.metadata and f.name != "train_data_dir"]
)
def test_no_more_than_the_last_name_of_a_place_is_published(name, tmp_path):
    secret = str(tmp_path / "mine")
    options = {**CLASSES[DreamBoothTrainingConfig], name: secret}
    if name == "dataset_name":
        options["instance_data_dir"] = None
    if name == "model_config_name_or_path":
        options = {name: secret}
    if name == "validation_images":
        options |= {name: [secret], "validation_prompts": ["a"], "low_resolution": 8}
    if name in ("validation_features", "validation_clip_model"):
        options |= {"validation_metrics": ["kid", "clip"], "validation_split": "a"}
    config = (TrainingConfig if name == "model_config_name_or_path" else DreamBoothTrainingConfig)(**options)
    settings = public_settings(config)
    assert str(tmp_path) not in str(settings) and settings[name] in ("mine", ["mine"])


def test_what_json_cannot_hold_becomes_plain():
    config = TrainingConfig(
        preset="a", output_dir=Path("b"), seed=np.int64(3), p_mean=np.float32(0.5), caption_column=("c",)
    )
    assert (config.output_dir, config.seed, config.p_mean, config.caption_column) == ("b", 3, 0.5, ["c"])
    assert [type(value) for value in (config.output_dir, config.seed, config.p_mean)] == [str, int, float]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "piecewise_constant"}, "`lr_scheduler` is 'piecewise_constant', but should be one of 'constant', "),
        ({"lr_scheduler": "cosin"}, "`lr_scheduler` is 'cosin', but should be one of 'constant', 'constant_with_warmup'"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "`learning_rate` is 1e-08, but should be above 1e-07, at which `lr_scheduler` 'polynomial' ends"),
        ({"ema_type": "power", "ema_stds": [0.05, 0.05001]}, "`ema_stds` is .*, but should differ in their first four digits"),
        ({"report_to": "nonsense"}, "`report_to` is 'nonsense', but should be one of 'tensorboard', 'wandb'"),
        ({"push_to_hub": True, "hub_token": "hf_a", "hub_model_id": "a b"}, "`hub_model_id` is 'a b', and 'a b' cannot be"),
        ({"push_to_hub": True, "hub_token": "hf_a", "hub_model_id": "a/b/c"}, "`hub_model_id` is 'a/b/c'"),
        ({"push_to_hub": True, "hub_token": "hf_a", "output_dir": "."}, "`hub_model_id` is None, and '' cannot be"),
        ({"push_to_hub": True, "hub_token": "hf_a\n"}, "`hub_token` has invalid characters"),
        ({"push_to_hub": True, "hub_token": ""}, "`push_to_hub` is True, but there is no token"),
        ({"push_to_hub": True}, "`push_to_hub` is True, but there is no token: pass `hub_token`"),
    ],
)  # fmt: skip
def test_what_no_run_can_do_is_refused(monkeypatch, options, message):
    monkeypatch.setattr("diffusers_imagen.training.config.get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        TrainingConfig(preset="emoji_base_64", **options)


@pytest.mark.parametrize("text", ["\udcff", "a\0b"])  # the first is what a shell's byte 0xff becomes
@pytest.mark.parametrize("name", ["output_dir", "validation_prompts", "text_encoder"])
def test_what_is_no_text_is_refused_by_name(name, text):
    with pytest.raises(ValueError, match=f"^`{name}` has .*, but should be text in UTF-8, without null characters"):
        TrainingConfig(preset="emoji_base_64", **{name: [text] if name == "validation_prompts" else text})


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, tracker):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"`report_to` is '{tracker}', which is not installed: pip install {tracker}"):
        TrainingConfig(preset="emoji_base_64", report_to=tracker)


def test_the_schedules_are_those_of_diffusers_but_for_the_one_with_rules():
    from diffusers.optimization import SchedulerType

    choices = get_type_hints(TrainingConfig)["lr_scheduler"]
    assert get_origin(choices) is Literal
    assert set(get_args(choices)) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}
