import pytest
from PIL import Image

from diffusers_imagen import cli


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
    "no pipeline": (["--model", "{tmp}"], "without a model_index.json"),
    "unreachable resolution": (["--resolution", "1024"], "`output_resolution` is 1024, but the stages"),
    "no steps": (["--steps", "0"], "`num_inference_steps` is 0"),
    "steps of three stages": (["--steps", "1", "2", "3"], "`num_inference_steps` has 3 entries"),
    "no images": (["--num-images", "0"], "`num_images_per_prompt` is 0"),
    "unknown format": (["--output", "a.tiff"], "`output` is 'a.tiff', but should end in"),
}


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_code_2(model, tmp_path, capfd, arguments, message):
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert generate("a red apple", "--model", model, "--output", tmp_path / "x.png", *arguments) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("diffusers-imagen: error: ") and message in error
    assert not (tmp_path / "x.png").exists()


def test_a_missing_prompt_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit:
        generate()
    assert exit.value.code == 2
