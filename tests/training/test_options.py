import json
from pathlib import Path

import pytest

from diffusers_imagen.training import parse_args
from diffusers_imagen.training.config import TrainingConfig
from diffusers_imagen.training.finetuning.finetuning_config import DreamBoothTrainingConfig


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_takes_the_names_of_the_flags_and_flags_win(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "preset: emoji_base_64\nlearning_rate: 1e-4\np_mean: -0.8\nuse_ema: false\nsnr_gamma: null\n"
        "caption_column: [text, tags]\ntrain_batch_size: 8\nvalidation_prompts: [a face, 'two: words']\n",
    )
    config = parse_args(["--config", file, "--train_batch_size", "4", "--styles", "flat", "noto"])
    assert config == TrainingConfig(
        preset="emoji_base_64",
        learning_rate=1e-4,
        p_mean=-0.8,
        use_ema=False,
        caption_column=["text", "tags"],
        train_batch_size=4,
        validation_prompts=["a face", "two: words"],
        styles=["flat", "noto"],
    )
    assert parse_args(["--caption_column", "tags", f"--config={file}"]).caption_column == ["tags"]


def test_the_flags_of_the_shipped_recipe_are_understood():
    flags = "--styles 3d flat --mixed_precision bf16 --ema_decay 0.998 --preset emoji_base_32 --resolution 16 --p_mean -0.8"
    config = parse_args(flags.split())
    assert (config.mixed_precision, config.ema_decay, config.p_mean) == ("bf16", 0.998, -0.8)
    assert parse_args("--pretrained_model_name_or_path a --grow True".split()).grow is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: a\nlearning_speed: 1\nfoo: 2\n", r"has \['foo', 'learning_speed'\], which are not options"),
        ("- preset\n", "should have a line `name: value`"),
        ("a: [\n", "which cannot be read"),
        ("seed: 1\nseed: 2\n", "which cannot be read: it has the key 'seed' twice"),
        ("preset: a\nmax_train_steps: abc\n", "argument --max_train_steps.*: invalid int value: 'abc'"),
        ("preset: a\nseed: true\n", "`seed` is True, but should be an integer"),
        ("preset: a\nseed: [1, 2]\n", r"`seed` is \[1, 2\], but should be an integer"),
        ("preset: a\nseed: {a: 1}\n", "`seed` is {'a': 1}, but should be an integer"),
        ("preset: a\nlearning_rate: .nan\n", "`learning_rate` is nan, but should be at least 0"),
        ("preset: a\nema_stds: [5e-2, wide]\n", r"`ema_stds` is \['5e-2', 'wide'\], but should be a list"),
        ("preset: a\nvalidation_prompts: [a, 5]\n", r"`validation_prompts` is \['a', 5\], but should be a list"),
        ("preset: a\nvalidation_prompts: [a, null]\n", r"`validation_prompts` is \['a', None\], but"),
        ("preset: 5\n", "`preset` is 5, but should be a string"),
        ("preset: a\nloss: l3\n", "`loss` is 'l3', but should be one of"),
        ("preset: a\nmixed_precision: no\n", "`mixed_precision` is False, but should be one of 'no'"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--config", write(tmp_path / "run.yaml", text)])
    with pytest.raises(ValueError, match="cannot be read"):
        parse_args(["--config", str(tmp_path / "nowhere.yaml")])


def test_entries_of_a_file_are_no_flags(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "preset: a\nvalidation_prompts: ['--push_to_hub', '-1']\nema_stds: [5e-2, 0.1]\ncaption_column: label\n",
    )
    config = parse_args(["--config", file])
    assert (config.validation_prompts, config.push_to_hub) == (["--push_to_hub", "-1"], False)
    assert (config.ema_stds, config.caption_column) == ([0.05, 0.1], ["label"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config", "argument --config: expected one argument"),
        ("--max_train_steps abc", "argument --max_train_steps.*: invalid int value: 'abc'"),
        ("--lr_scheduler piecewise_constant", "argument --lr_scheduler.*: invalid choice: 'piecewise_constant'"),
        ("--max_train_step 5", "unrecognized arguments: --max_train_step 5"),
        ("--preset a --learning_rate nan", "`learning_rate` is nan, but should be at least 0 and at most 1"),
        ("--use_ema maybe", "argument --use_ema"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_args(flags.split())
    assert "\n" not in str(caught.value)


def needed_flags(config_class: type) -> list[str]:
    subject = "--pretrained_model_name_or_path a --instance_data_dir b --instance_prompt c"
    return (subject if issubclass(config_class, DreamBoothTrainingConfig) else "--preset emoji_base_64").split()


@pytest.mark.parametrize("config_class", [TrainingConfig, DreamBoothTrainingConfig])
def test_flags_without_effect_are_refused_with_their_default_value_too(config_class, tmp_path):
    plain = parse_args(needed_flags(config_class), config_class=config_class)
    values = {name: getattr(plain, name) for name in plain.unused() if getattr(plain, name) is not None}
    assert {"validation_batch_size", "beta_schedule", "prediction_type"} <= values.keys()
    of_prior = {"num_class_images", "prior_loss_weight", "sample_batch_size", "lora_target_modules"}
    assert of_prior <= values.keys() or config_class is TrainingConfig
    for name, value in values.items():
        entries = list(map(str, value)) if isinstance(value, list) else [str(value)]
        argv = [*needed_flags(config_class), "--" + name.replace("_", "-"), *entries]
        with pytest.raises(ValueError, match=rf"`{name}` is .*, but (is only used with|is not used with) `"):
            parse_args(argv, config_class=config_class)
    (tmp_path / "run.yaml").write_text(json.dumps(values))  # a file may list every setting
    in_file = [*needed_flags(config_class), "--config", str(tmp_path / "run.yaml")]
    assert parse_args(in_file, config_class=config_class) == plain


def test_settings_with_effect_are_accepted_with_their_default_value():
    flags = (
        "--preset emoji_base_64 --preconditioning edm --p_mean -1.2 --validation_metrics fid --validation_split test"
    )
    config = parse_args(f"{flags} --validation_features inception --validation_batch_size 16".split())
    assert (config.p_mean, config.validation_features) == (-1.2, "inception")
    flags = "--with_prior_preservation --class_data_dir d --class_prompt e --num_class_images=100 --rank 4".split()
    subject = needed_flags(DreamBoothTrainingConfig)
    assert parse_args([*subject, *flags], config_class=DreamBoothTrainingConfig).num_class_images == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"preconditioning": "ddpm"},
            "`preconditioning` is 'ddpm', but should be one of 'edm', 'variance_preserving'",
        ),
        (
            {"preconditioning": "variance_preserving", "snr_gamma": 5.0},
            "`snr_gamma` is 5.0, but is not used with `loss_weighting` 'uniform'",
        ),
        ({"loss_weighting": "min_snr"}, "`loss_weighting` is 'min_snr', but should be another with `preconditioning`"),
        ({"preconditioning": "vp"}, "`preconditioning` is 'vp', but should be one of 'edm', 'variance_preserving'"),
        (
            {"preconditioning": "variance_preserving", "beta_schedule": "sigmoid"},
            "`beta_schedule` is 'sigmoid', but should be one of 'squaredcos_cap_v2', 'linear' with `preconditioning`",
        ),
        (
            {"preconditioning": "discrete", "prediction_type": "v_prediction"},
            "`prediction_type` is 'v_prediction', but is not used with `preconditioning` 'discrete'",
        ),
        ({"loss": "l3"}, "`loss` is 'l3', but should be one of 'l2', 'l1', 'huber'"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` is 'fp8', but should be one of 'no', 'fp16', 'bf16'"),
        ({"snr_gamma": 5.0}, "`snr_gamma` is 5.0, but is not used with `preconditioning` 'edm'"),
        (
            {"preconditioning": "variance_preserving", "p_mean": 0.0},
            "`p_mean` is 0.0, but is not used with `preconditioning` 'variance_preserving'",
        ),
        ({"ema_stds": [0.05, 0.4]}, r"`ema_stds` is \[0.05, 0.4\], but should be fractions of the run"),
        ({"ema_snapshot_steps": 5}, "`ema_snapshot_steps` is 5, but only `ema_type` 'power' has snapshots"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` is -1.0, but should be at least 0"),
        ({"hub_model_id": "a"}, "`push_to_hub` is False"),
        (
            {"low_resolution": 16, "validation_prompts": ["a"]},
            "`validation_images` has 0 entries, but should have one for each of the 1 `validation_prompts`",
        ),
    ],
)
def test_a_wrong_setting_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(preset="emoji_base_64", **options)
