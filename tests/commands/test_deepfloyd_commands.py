"""Commands on repositories of DeepFloyd IF: drawing with them, and converting them there and back."""

import numpy as np
import pytest
import torch
from deepfloyd_repository import stage_1, stage_2, write_repository
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_imagen import (
    EDMAdamsScheduler,
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
)
from diffusers_imagen.training.network import load_unet


STEPS = ("--steps", 2, "--output", "x.png")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, str]:
    """Folders like IF's repositories, with files of licenses."""
    parent = tmp_path_factory.mktemp("if")
    for name, make in (("base", stage_1), ("sr", stage_2)):
        folder = write_repository(make(), parent / name)
        (folder / "LICENSE.md").write_text("the license")
        (folder / "NOTICE").write_text(f"of {name}")
    return {name: str(parent / name) for name in ("base", "sr")}


@pytest.fixture
def cascade_options(repositories) -> tuple[str, ...]:
    return "--model", repositories["base"], "--sr256", repositories["sr"]


def pixels(path="x.png") -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def draw(pipe, **arguments) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), **arguments}
    return np.asarray(pipe("a red apple", **arguments).images[0]).astype(int)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/diffusion_pytorch_model.safetensors")


def test_repositories_draw_as_in_python(run, folder, repositories, cascade_options):
    assert run("generate", "a red apple", *cascade_options, *STEPS)[0] == 0
    pipe = ImagenCascadePipeline.from_stages(*repositories.values())
    drawn = draw(pipe)
    np.testing.assert_array_equal(pixels(), drawn)
    assert drawn.shape == (32, 32, 3) and drawn.std() > 10
    assert run("generate", "a red apple", *cascade_options, *STEPS, "--scheduler", "adams")[0] == 0
    for name in ("base_scheduler", "sr256_scheduler"):
        setattr(pipe, name, EDMAdamsScheduler.from_config(getattr(pipe, name).config))
    np.testing.assert_array_equal(pixels(), draw(pipe))


def test_stage_2_alone_enlarges_a_picture(run, folder, repositories):
    options = ("--prompt", "a red apple", "--sr256", repositories["sr"], *STEPS)
    assert run("upscale", "picture.png", *options)[0] == 0
    pipe = ImagenSuperResolutionPipeline.from_stage(repositories["sr"])
    expected = draw(pipe, image=Image.open("picture.png"), height=32, width=32)
    np.testing.assert_array_equal(pixels(), expected)


def test_a_converted_cascade_is_the_same(run, folder, repositories, cascade_options):
    code, out, _ = run("convert-if", *cascade_options, "--output", "new/if")
    assert code == 0
    assert (
        "new/if: ImagenCascadePipeline, " in out and "base_unet" in out and "LICENSE.md, NOTICE, NOTICE-sr256" in out
    )
    assert [path.name for path in (folder / "new").iterdir()] == ["if"]
    pipe = ImagenCascadePipeline.from_pretrained("new/if")
    assert [stage.defaults.num_inference_steps for stage in pipe.stages] == [100, 50]
    assert pipe.safety_checker is not None and pipe.watermarker is not None
    expected = draw(ImagenCascadePipeline.from_stages(*repositories.values()))
    np.testing.assert_array_equal(draw(pipe), expected)
    assert run("generate", "a red apple", "--model", "new/if", *STEPS)[0] == 0
    np.testing.assert_array_equal(pixels(), expected)
    card = (folder / "new/if/README.md").read_text()
    assert "# if\n" in card and 'from_pretrained("if")' in card and "license_name: deepfloyd-if-license" in card
    assert (folder / "new/if/NOTICE").read_text() == "of base" and (
        folder / "new/if/NOTICE-sr256"
    ).read_text() == "of sr"
    assert load_unet("new/if", "sr256_unet").takes_low_res  # as training does


def test_one_stage_is_converted_alone(run, folder, repositories):
    for option, source, pipeline_class in (
        ("--model", repositories["base"], ImagenPipeline),
        ("--sr256", repositories["sr"], ImagenSuperResolutionPipeline),
    ):
        options = ("--text-encoder", "none", "--dtype", "bfloat16")
        code, out, _ = run("convert-if", option, source, "--output", option.strip("-"), *options)
        assert code == 0 and "bfloat16" in out
        pipe = pipeline_class.from_pretrained(option.strip("-"))
        assert pipe.text_encoder is None and pipe.tokenizer is None
        assert load_unet(option.strip("-"), "unet").num_parameters() == pipe.unet.num_parameters()
        assert {tensor.dtype for tensor in weights(f"{option.strip('-')}/unet").values()} == {torch.bfloat16}


@pytest.mark.parametrize("stage, theirs", [("base", IFPipeline), ("sr256", IFSuperResolutionPipeline)])
def test_the_way_back_gives_the_same_weights(run, folder, repositories, cascade_options, stage, theirs):
    source = repositories["base" if stage == "base" else "sr"]
    assert run("convert-if", *cascade_options, "--output", "if")[0] == 0
    code, out, _ = run("export-if", "if", "--stage", stage, "--output", "back")
    assert code == 0 and f"back: {theirs.__name__}, " in out and "LICENSE.md" in out
    assert type(theirs.from_pretrained("back")) is theirs
    card = (folder / "back/README.md").read_text()
    assert f"`{theirs.__name__}` of diffusers" in card and "license_name: deepfloyd-if-license" in card
    expected, found = weights(f"{source}/unet"), weights("back/unet")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


BAD = {
    "no stage": (["convert-if"], "`model` is not given: pass the base stage"),
    "files in the way": (
        ["convert-if", "--model", "{base}", "--output", "."],
        "`output` is '.', which is not empty: name a new folder",
    ),
    "a file in the way": (
        ["convert-if", "--model", "{base}", "--output", "file"],
        "`output` is 'file', which is a file",
    ),
    "another format": (
        ["convert-if", "--model", "{ours}"],
        "of class ImagenCascadePipeline, but should be of class IFPipeline",
    ),
    "stages in each other's place": (
        ["convert-if", "--model", "{sr}", "--sr256", "{base}"],
        "`model` is '{sr}', a super-resolution stage, but should be a base stage: pass it as --sr256 or --sr1024.",
    ),
    "two upscalers": (["convert-if", "--sr256", "{sr}", "--sr1024", "{sr}"], "needs the base stage"),
    "nothing to export": (["export-if", "{base}"], "of 'IFPipeline', but should be of ImagenCascadePipeline"),
    "no stage to export": (["export-if", "{ours}"], "`stage` is None, but should be one of base, sr256"),
    "a stage of another kind": (["export-if", "{ours}", "--stage", "base"], "is not one of DeepFloyd IF's: "),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_what_cannot_be_converted_is_refused_in_one_line(run, folder, repositories, model, arguments, message):
    before = sorted(path.name for path in folder.iterdir())
    message, *arguments = (text.format(**repositories, ours=model) for text in (message, *arguments))
    if "--output" not in arguments:
        arguments += ["--output", "new"]
    code, out, error = run(*arguments)
    assert code == 2 and message in error[-1] and error[-1].startswith("diffusers-imagen: error: "), error
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_fails_in_the_middle_leaves_nothing(run, folder, repositories, monkeypatch):
    def full(self, path, *args, **kwargs):
        path.joinpath("unet").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ImagenPipeline, "save_pretrained", full)
    before = sorted(path.name for path in folder.iterdir())
    code, _, error = run("convert-if", "--model", repositories["base"], "--output", "new")
    assert code == 2 and "no space left" in error[-1]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_doctor_knows_a_repository(run, folder, repositories):
    code, printed = run("doctor", repositories["base"])[:2]
    assert code == 0 and "ImagenUNetModel: 3,463,830 weights, finite" in printed, printed
