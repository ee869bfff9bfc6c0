"""`diffusers-imagen evaluate`: the whole chain on a tiny model, and what is refused before anything is drawn."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from groups import run_command
from PIL import Image
from tiny_evaluation import CAPTIONS, save_clip, save_encoder, save_pictures

from diffusers_imagen import ImagenCascadePipeline
from diffusers_imagen.commands.main import make_parser
from diffusers_imagen.evaluation import METRICS, frechet_distance, kernel_distance
from diffusers_imagen.evaluation.feature_networks import NAMED, load_clip, load_features
from diffusers_imagen.training import TrainingConfig


@pytest.fixture
def encoder(tmp_path) -> str:
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def data(tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n\n")
    return {
        "file": str(tmp_path / "captions.txt"),
        "pairs": save_pictures(tmp_path / "pairs"),
        "reference": save_pictures(tmp_path / "reference", 20, 1, captions=False),
    }


@pytest.fixture
def options(model, encoder, data, tmp_path) -> list[str]:
    """Of a short evaluation at 16 px."""
    reference = ["--reference", data["reference"], "--features", encoder, "--resamples", "2"]
    return [model, *reference, "--steps", "1", "--output-dir", str(tmp_path / "out")]


def figures(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    """All figures of a report, by name and resolution."""
    rows = json.loads((folder / "results.json").read_text())["figures"]
    return {(row["name"], row["resolution"]): {k: v["value"] for k, v in row["figures"].items()} for row in rows}


def test_everything_is_measured_and_reported(run, options, data, tmp_path, encoder):
    clip = save_clip(tmp_path / "clip")
    metrics = ["--metrics", "fid", "kid", "clip", "nearest", "super-resolution", "--clip-model", clip]
    sweep = ["--guidance-scale", "1", "3,1", "--steps", "1", "2,1", "--num-images", "6", "--batch-size", "4"]
    code, out, lines = run("evaluate", *options, "--captions", data["pairs"], *metrics, *sweep)
    assert code == 0, lines
    folder = tmp_path / "out"
    assert out.splitlines()[-1] == str(folder / "report.html")

    found, results = figures(folder), json.loads((folder / "results.json").read_text())
    names = [f"model_steps-{steps}_guidance-{guidance}" for steps in ("1-1", "2-1") for guidance in ("1-1", "3-1")]
    real = ["real images of the captions", "reference, split in two: 6 against 14"]
    assert found.keys() == {(name, resolution) for name in names + real for resolution in (16, 32)}
    assert {row["name"]: row["evaluations"] for row in results["figures"]} == {
        **{name: 2 if "1-1_" in name else 4 for name in names},
        **dict.fromkeys(real),
    }

    # the same pictures, measured outside of the command
    network, scorer = load_features(encoder), load_clip(clip)
    indices = [int(line.split()[0]) for line in (folder / "captions.txt").read_text().splitlines()]
    drawn = [Image.open(folder / "images" / names[3] / "32" / f"{i:08d}.png") for i in indices]
    reference = [Image.open(Path(data["reference"]) / f"{i}.png") for i in sorted(range(20), key=str)]
    features, others = (network(pictures, [])["features"] for pictures in (drawn, reference))
    alone = found[names[3], 32]
    assert alone["FD-encoder"] == pytest.approx(frechet_distance(features, others).value, abs=1e-4)
    assert alone["KD-encoder"] == pytest.approx(kernel_distance(features, others).value, abs=1e-4)
    captions = [CAPTIONS[i] for i in indices]
    cosines = scorer(drawn, captions)["features"]
    assert alone["CLIP score"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert len({round(value, 6) for value in cosines[:, 0].tolist()}) > 1

    upscaling = {row["name"]: row["figures"] for row in results["super-resolution"]}
    of_upscaler = "model_steps-1_guidance-1"  # which is the same for all settings
    methods = {f"{of_upscaler}, super-resolution", f"{of_upscaler}, bicubic"}
    assert upscaling.keys() == methods | {f"{name}, drawn" for name in names}
    assert set(upscaling[f"{of_upscaler}, bicubic"]) == {"PSNR (dB)", "SSIM", "consistency (dB)"}
    assert upscaling[f"{of_upscaler}, bicubic"]["consistency (dB)"]["value"] > 30
    page = (folder / "report.html").read_text()
    for name in [path.name for path in folder.glob("*.png")]:
        assert f'src="{name}"' in page
    assert {"plot_FD-encoder_clip_32.png", "plot_KD-encoder_evaluations_16.png"} <= {p.name for p in folder.iterdir()}


def test_what_is_there_is_neither_drawn_nor_measured_again(run, options, data, tmp_path, monkeypatch):
    arguments = ["evaluate", *options, "--captions", data["file"], "--resolution", "16"]
    assert run(*arguments, "--num-images", "4")[0] == 0
    first = figures(tmp_path / "out")
    calls = []
    call = ImagenCascadePipeline.__call__
    monkeypatch.setattr(ImagenCascadePipeline, "__call__", lambda *a, **k: calls.append(a[1]) or call(*a, **k))
    assert run(*arguments, "--num-images", "4")[0] == 0
    assert calls == [] and figures(tmp_path / "out") == first
    assert run(*arguments, "--num-images", "6", "--batch-size", "1")[0] == 0
    assert len(calls) == 2  # of the two more


def test_schedulers_are_compared(run, options, data, tmp_path, monkeypatch):
    arguments = ["evaluate", *options, "--captions", data["file"], "--resolution", "16", "--num-images", "4"]
    arguments[arguments.index("--steps") + 1] = "4"
    assert run(*arguments, "--scheduler", "model", "heun", "adams")[0] == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    calls = {row["name"].split("_")[0]: row["evaluations"] for row in rows if row["setting"]}
    assert calls == {"model": 7, "heun": 7, "adams": 4}  # the saved one is Heun
    folders = [tmp_path / "out" / "images" / f"{name}_steps-4_guidance-4" / "16" for name in calls]
    own, heun, adams = ([path.read_bytes() for path in sorted(folder.iterdir())] for folder in folders)
    assert own == heun and own != adams
    # each is still what it was drawn with, however many are asked for
    monkeypatch.setattr(ImagenCascadePipeline, "__call__", lambda *a, **k: pytest.fail("it draws"))
    assert run(*arguments, "--scheduler", "adams")[0] == 0
    assert run(*arguments)[0] == 0


def test_the_page_names_options_that_there_are():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    known = {option for action in evaluate_parser()._actions for option in action.option_strings}
    of_accelerate = {"--num_processes", "--cpu"}
    of_training = {f"--{field.name}" for field in fields(TrainingConfig)}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page)) - of_accelerate - of_training <= known
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.MULTILINE)) >= set(METRICS) | set(NAMED)


def evaluate_parser():
    actions = make_parser()._subparsers._group_actions
    return actions[0].choices["evaluate"]


def test_two_processes_are_one(run, options, data, tmp_path):
    arguments = [*options, "--captions", data["pairs"], "--batch-size", "2", "--num-images", "9", "--device", "cpu"]
    assert run("evaluate", *arguments)[0] == 0
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "two")
    codes, printed = run_command(tmp_path, 2, "evaluate", *arguments)
    assert codes == [0, 0]
    assert printed[0].splitlines()[-1] == str(tmp_path / "two" / "report.html") and "report.html" not in printed[1]
    for path in (tmp_path / "out" / "images").rglob("*.png"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "out")
        assert np.array_equal(np.array(Image.open(path)), np.array(Image.open(other)))
    one, two = figures(tmp_path / "out"), figures(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, values in one.items():
        assert two[key] == pytest.approx(values, rel=1e-6, abs=1e-10)  # KD is a small difference of large sums


def test_a_reference_of_another_resolution_is_resized_and_said(run, options, data, tmp_path):
    options[options.index("--reference") + 1] = save_pictures(tmp_path / "large", 8, 2, side=48, captions=False)
    assert run("evaluate", *options, "--captions", data["file"], "--num-images", "4")[0] == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert any("48x48 px; they are resized" in warning for warning in results["warnings"])


def no_network(url, **options):
    raise OSError(f"{url} cannot be reached")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--metrics", "super-resolution"],
            "`metrics` has 'super-resolution', which needs the images of the captions",
        ),
        (["--num-images", "13"], "`num-images` is 13, but should be at most 12"),
        (["--num-reference", "21"], "`num-reference` is 21, but should be at most 20"),
        (["--features", "resnet"], "`features` is 'resnet', but should be one of 'inception'"),
        (["--features", "inception"], "`features` is 'inception', which "),
        (["--features", "dinov2"], "`features` is 'dinov2', which cannot be loaded"),
        (["--features", "."], "`features` is '.', which cannot be loaded"),
        (["--metrics", "clip"], "`clip-model` is 'openai/clip-vit-large-patch14', which cannot be loaded"),
        (["--metrics", "is"], "`metrics` has 'is', which uses Inception's classes"),
        (["--captions", "nothing"], "`captions` is 'nothing', which cannot be used"),
        (["--captions-split", "test", "--captions", "pairs"], "There is no split 'test'"),
        (["--steps", "1,2,3"], "`steps` is 1,2,3, but should have one value, or 2"),
        (["--steps", "0"], "`steps` is '0', but should be from 1"),
        (["--guidance-scale", "much"], "`guidance-scale` is 'much', but should be numbers"),
        (["--resolution", "64"], "`output_resolution` is 64"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_anything_is_drawn(
    run, options, data, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr(ImagenCascadePipeline, "__call__", lambda *a, **k: pytest.fail("it draws"))
    given = [data.get(argument, argument) for argument in arguments]
    captions = [] if "--captions" in given else ["--captions", data["file"]]
    code, _, lines = run("evaluate", *options, *captions, *given)
    assert code == 2
    assert message in lines[-1] and lines[-1].startswith("diffusers-imagen")
    assert not (tmp_path / "out" / "images").exists()


def test_distances_need_real_pictures(run, model, data, tmp_path):
    code, _, lines = run("evaluate", model, "--captions", data["file"], "--output-dir", tmp_path / "out")
    assert code == 2 and "`metrics` has 'fid', which needs real images: set --reference." in lines[-1]


def test_features_are_finite_or_refused(run, options, data, encoder, monkeypatch):
    network = load_features(encoder)
    broken = torch.full((4, 8), torch.nan)
    monkeypatch.setattr(type(network), "__call__", lambda self, pictures, captions: {"features": broken})
    code, _, lines = run("evaluate", *options, "--captions", data["file"], "--num-images", "4", "--resolution", "16")
    assert code == 2 and "are not finite" in lines[-1]
