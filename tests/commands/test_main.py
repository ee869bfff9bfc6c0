import json

import numpy as np
import pytest
from networks import randomize
from PIL import Image

from diffusers_imagen import EDMHeunScheduler, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.commands import generate as generate_command
from diffusers_imagen.commands import main as cli


@pytest.fixture
def model(cascade, tmp_path) -> str:
    cascade.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def generate(*arguments) -> int:
    return cli.main(["generate", *map(str, arguments)])


def test_generate_writes_one_image(model, tmp_path, capsys):
    output = tmp_path / "new" / "apple.png"
    assert generate("a red apple", "--model", model, "--output", output, "--steps", 2, "--resolution", 16) == 0
    assert Image.open(output).size == (16, 16)
    assert capsys.readouterr().out.strip() == str(output)
    assert [path.name for path in output.parent.iterdir()] == ["apple.png"]


def test_generate_numbers_images_or_lays_them_in_a_grid(model, tmp_path):
    common = ("a red apple", "--model", model, "--steps", 2, 1, "--num-images", 4)
    assert generate(*common, "--output", tmp_path / "a.jpg") == 0
    assert [Image.open(tmp_path / f"a-{i}.jpg").size for i in range(4)] == [(32, 32)] * 4
    assert generate(*common, "--grid", "--output", tmp_path / "grid.png") == 0
    assert Image.open(tmp_path / "grid.png").size == (64, 64)


def test_the_seed_decides(model, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate("a", "--model", model, "--steps", 1, "--seed", seed, "--output", tmp_path / f"{name}.png") == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


BAD_ARGUMENTS = {
    "no folder": (["--model", "/nowhere/at all"], "`model` is '/nowhere/at all', which is neither"),
    "no pipeline": (["--model", "{tmp}"], "`model` is '{tmp}', a folder with neither a model_index.json"),
    "unreachable resolution": (
        ["--resolution", "1024"],
        "`output_resolution` is 1024, but should be that of a stage, one of [16, 32]",
    ),
    "no steps": (["--steps", "0"], "`num_inference_steps` is 0"),
    "steps of three stages": (["--steps", "1", "2", "3"], "`num_inference_steps` has 3 entries"),
    "no images": (["--num-images", "0"], "`num_images_per_prompt` is 0"),
    "unknown format": (["--output", "a.tiff"], "`output` is 'a.tiff', but should end in"),
}


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_code_2(model, tmp_path, capfd, arguments, message):
    message, *arguments = (text.replace("{tmp}", str(tmp_path)) for text in (message, *arguments))
    assert generate("a red apple", "--model", model, "--output", tmp_path / "x.png", *arguments) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("diffusers-imagen: error: ") and message in error
    assert not (tmp_path / "x.png").exists()


def test_a_missing_prompt_is_exit_code_2(model, tmp_path, capsys):
    output = ("--output", tmp_path / "x.png")
    assert generate(*output) == 2
    assert "`prompt` is missing, but the default model, the shipped cascade, is" in capsys.readouterr().err
    assert generate("--model", model, *output) == 2
    assert "`prompt` is missing, but the stage `base` of this model is conditioned on text" in capsys.readouterr().err
    assert generate(" ", "--model", model, *output) == 2
    assert "`prompt` is ' ', but should not be empty" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\n  a blue face, 'quoted'!\na red apple\n", encoding="utf-8")
    return path


NAMES = ["00001-a-red-apple.png", "00003-a-blue-face-quoted.png", "00004-a-red-apple.png"]


def test_prompts_file_writes_one_image_a_line(model, prompts_file, tmp_path, capsys):
    common = ("--prompts-file", prompts_file, "--model", model, "--steps", 1, "--resolution", 16)
    assert generate(*common, "--output-dir", tmp_path / "a") == 0
    images = {path.name: path.read_bytes() for path in sorted((tmp_path / "a").iterdir())}
    assert list(images) == NAMES
    assert Image.open(tmp_path / "a" / NAMES[1]).size == (16, 16)
    assert images[NAMES[0]] != images[NAMES[2]]  # the same prompt on another line is another image
    assert "3 images, 3 of them new" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_the_same_images(model, prompts_file, tmp_path, capsys, monkeypatch):
    common = ("--prompts-file", prompts_file, "--model", model, "--steps", 1, "--resolution", 16, "--batch-size", 1)
    assert generate(*common, "--output-dir", tmp_path / "whole") == 0

    folder, save_image, saved = tmp_path / "parts", generate_command.save_image, []

    def interrupted(image, path, settings):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        save_image(image, path, settings)

    monkeypatch.setattr(generate_command, "save_image", interrupted)
    assert generate(*common, "--output-dir", folder) == 130
    assert [path.name for path in folder.iterdir()] == NAMES[:1]
    (folder / NAMES[0]).write_bytes(b"mine")

    monkeypatch.setattr(generate_command, "save_image", save_image)
    assert generate(*common, "--output-dir", folder) == 0
    assert "3 images, 2 of them new" in capsys.readouterr().out
    assert (folder / NAMES[0]).read_bytes() == b"mine"
    for name in NAMES[1:]:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    monkeypatch.setattr(generate_command, "load_pipeline", None)  # nothing to do needs no model
    assert generate(*common, "--output-dir", folder) == 0
    assert "all 3 images exist" in capsys.readouterr().out


def test_images_of_a_prompts_file_do_not_depend_on_batches_and_numbers(model, prompts_file, tmp_path):
    common = ("--prompts-file", prompts_file, "--model", model, "--steps", 1, "--resolution", 16)
    assert generate(*common, "--output-dir", tmp_path / "one", "--batch-size", 1) == 0
    assert generate(*common, "--output-dir", tmp_path / "many", "--batch-size", 4, "--num-images", 2) == 0
    assert generate(*common, "--output-dir", tmp_path / "seed", "--seed", 1) == 0
    assert len(list((tmp_path / "many").iterdir())) == 6
    for name in NAMES:
        one = np.asarray(Image.open(tmp_path / "one" / name)).astype(int)
        first, second = (
            np.asarray(Image.open(tmp_path / "many" / name.replace(".png", f"-{i}.png"))).astype(int) for i in (0, 1)
        )
        assert np.abs(one - first).max() <= 1  # kernels sum a batch in another order
        assert np.abs(one - second).max() > 1
        assert np.abs(one - np.asarray(Image.open(tmp_path / "seed" / name)).astype(int)).max() > 1


BAD_PROMPTS_FILES = {
    "no file": (["--prompts-file", "{tmp}/none.txt"], "none.txt', which cannot be read"),
    "no prompt": (["--prompts-file", "{tmp}/empty.txt"], "empty.txt', which has no prompts"),
    "not text": (["--prompts-file", "{tmp}/binary.txt"], "binary.txt', which cannot be read"),
    "one output": (["--prompts-file", "{tmp}/prompts.txt", "--output", "a.png"], "`output` is 'a.png', but does not"),
    "a grid": (["--prompts-file", "{tmp}/prompts.txt", "--grid"], "`grid` is 'True', but does not"),
    "no folder": (["--prompts-file", "{tmp}/prompts.txt", "--output-dir", "{tmp}/empty.txt"], "but that is a file"),
    "no batch": (["--prompts-file", "{tmp}/prompts.txt", "--batch-size", "0"], "`batch-size` is 0"),
    "a folder for a prompt": (["a red apple", "--output-dir", "{tmp}/a"], "/a', but does not apply to a prompt"),
}


@pytest.mark.parametrize("arguments, message", BAD_PROMPTS_FILES.values(), ids=BAD_PROMPTS_FILES)
def test_bad_prompts_files_are_refused_before_a_model_loads(arguments, message, prompts_file, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert generate(*arguments, "--model", "/nowhere/at all") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("diffusers-imagen: error: ") and message in error


# Pictures from pictures


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_upscale_makes_a_picture_larger(model, picture, tmp_path):
    output = tmp_path / "large.png"
    arguments = ["upscale", picture, "--prompt", "a red apple", "--model", model, "--steps", 1, "--output", output]
    assert cli.main([*map(str, arguments)]) == 0
    assert Image.open(output).size == (32, 32)
    wide = tmp_path / "wide.png"
    arguments = [*arguments[:-1], wide, "--width", 64, "--tile-size", 32, "--tile-overlap", 8]
    assert cli.main([*map(str, arguments)]) == 0
    assert Image.open(wide).size == (64, 32)


def test_a_stage_without_text_upscales(sr_unet, picture, tmp_path, capfd):
    unet = type(sr_unet).from_config({**sr_unet.config, "encoder_hid_dim": None, "attention_types": (None, None)})
    stage = ImagenSuperResolutionPipeline(randomize(unet), EDMHeunScheduler(), scale_factor=2)
    stage.save_pretrained(tmp_path / "stage")
    output = tmp_path / "large.png"
    command = ["upscale", str(picture), "--sr256", str(tmp_path / "stage"), "--steps", "1", "--output", str(output)]
    assert cli.main([*command, "--prompt", "a face"]) == 2
    assert "`prompt` is given, but no stage of this model is conditioned on text" in capfd.readouterr().err
    assert cli.main(command) == 0
    assert Image.open(output).size == (32, 32)


def test_a_stage_without_text_has_no_prompt(base_unet, picture, tmp_path, capfd):
    unet = randomize(type(base_unet).from_config({**base_unet.config, "encoder_hid_dim": None}))
    ImagenPipeline(unet, EDMHeunScheduler()).save_pretrained(tmp_path / "stage")
    output = tmp_path / "drawn.png"
    common = ["--model", str(tmp_path / "stage"), "--steps", "2", "--output", str(output)]
    for command in (["generate"], ["generate", "--image", str(picture)], ["inpaint", str(picture), str(picture)]):
        prompt = [] if "--image" in command else ["a face"]
        if prompt:
            assert cli.main([*command, *prompt, *common]) == 2
            said = capfd.readouterr().err.strip().splitlines()[-1]
            assert "`prompt` is given, but no stage of this model is conditioned on text: leave it out" in said
            assert not output.exists()
        assert cli.main([*command, *common]) == 0
        with Image.open(output) as image:
            assert image.size == (16, 16)
            assert json.loads(image.text["diffusers-imagen"])["prompt"] == ""
        output.unlink()


def test_inpaint_keeps_what_the_mask_leaves_black(model, picture, tmp_path):
    mask, output = tmp_path / "mask.png", tmp_path / "painted.png"
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[:16] = 255
    Image.fromarray(pixels).save(mask)
    arguments = ["inpaint", picture, mask, "a red apple", "--model", model, "--steps", 2, 1, "--output", output]
    assert cli.main([*map(str, arguments)]) == 0
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (picture, output))
    assert np.abs(after - before)[16:].max() <= 1
    assert np.abs(after - before)[:16].max() > 10


def test_generate_changes_a_picture(model, picture, tmp_path):
    common = ("a red apple", "--model", model, "--steps", 4, "--resolution", 16, "--image", picture)
    small = np.asarray(Image.open(picture).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    distances = []
    for strength in (0.25, 1.0):
        output = tmp_path / f"{strength}.png"
        assert generate(*common, "--strength", strength, "--output", output) == 0
        distances.append(np.abs(np.asarray(Image.open(output)).astype(int) - small).mean())
    assert distances[0] < distances[1]


BAD_PICTURES = {
    "no file": (["upscale", "/nowhere.png"], "`image` is '/nowhere.png', which cannot be read"),
    "overlap of no tiles": (["upscale", "{picture}", "--tile-overlap", "8"], "there is no `tile-size`"),
    "strength of nothing": (["generate", "a", "--strength", "0.5"], "there is no `image` to change"),
    "mask of another size": (["inpaint", "{picture}", "{mask}", "a"], "`mask_image` is 8x8"),
}


@pytest.mark.parametrize("arguments, message", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_bad_pictures_give_one_line_and_exit_code_2(model, picture, tmp_path, capfd, arguments, message):
    mask = tmp_path / "mask.png"
    Image.new("L", (8, 8), 255).save(mask)
    arguments = [argument.format(picture=picture, mask=mask) for argument in arguments]
    assert cli.main([*arguments, "--model", model, "--output", str(tmp_path / "x.png")]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("diffusers-imagen: error: ") and message in error
    assert not (tmp_path / "x.png").exists()


def test_an_untrained_model_is_refused(cascade, tmp_path, capfd):
    cascade.base_unet = type(cascade.base_unet).from_config(cascade.base_unet.config)
    cascade.save_pretrained(tmp_path / "model")
    assert generate("a", "--model", tmp_path / "model", "--output", tmp_path / "x.png") == 2
    assert "stage `base`, loaded from" in capfd.readouterr().err
