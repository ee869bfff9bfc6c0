"""What is wrong on the command line is one line and exit code 2, before a model loads or anything is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_imagen.commands import common, demo, generate
from diffusers_imagen.utils import errors


GENERATE = ("generate", "a red apple")
FILE = ("generate", "--prompts-file", "prompts.txt")
UPSCALE = ("upscale", "picture.png")
INPAINT = ("inpaint", "picture.png", "mask.png", "a red apple")
NUMBERS = {
    "--seed": (GENERATE, ["-1", 2**63]),
    "--steps": (GENERATE, ["0", "-1", 10**9]),
    "--guidance-scale": (GENERATE, ["-1", "nan", "inf", "1e308"]),
    "--guidance-rescale": (GENERATE, ["-0.1", "1.1", "nan"]),
    "--num-images": (GENERATE, ["0", "-1", 100_000_000]),
    "--resolution": (GENERATE, ["0", "-64", 10**9]),
    "--height": (GENERATE, ["0", "-64", 10**9]),
    "--width": (GENERATE, ["0", "-64", 10**9]),
    "--batch-size": (FILE, ["0", "-1", 10**9]),
    "--noise-level": (UPSCALE, ["0", "-1", "nan", "inf", "1e308"]),
    "--tile-size": (UPSCALE, ["0", "-1", 10**9]),
    "--tile-overlap": ((*UPSCALE, "--tile-size", "32"), ["-1", 10**9, "32"]),
    "--resample-times": (INPAINT, ["0", "-1", 10**9]),
    "--strength": (INPAINT, ["0", "-1", "1.1", "nan"]),
}
CASES = [(command, flag, value) for flag, (command, values) in NUMBERS.items() for value in values]


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Loading one would be a fault."""
    for module in (common, generate, demo):
        monkeypatch.setattr(module, "load_pipeline", None)


def assert_refused(run, folder, arguments, *messages):
    before = sorted(os.listdir(folder))
    code, out, error = run(*arguments)
    assert code == 2 and out == "" and len(error) == 1, error
    assert error[0].startswith("diffusers-imagen") and all(message in error[0] for message in messages), error
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(("command", "flag", "value"), CASES)
def test_a_number_out_of_its_range_is_refused_by_name(run, folder, command, flag, value):
    assert_refused(run, folder, [*command, flag, value], flag.lstrip("-"), f" is {float(value):g}"[:4], "should be")


@pytest.mark.parametrize("flag", NUMBERS)
def test_what_is_no_number_is_refused_by_name(run, folder, flag):
    for value in ("x", "", "9" * 5000):
        assert_refused(run, folder, [*NUMBERS[flag][0], flag, value], flag.lstrip("-"))


def test_an_interval_has_its_lower_end_first(run, folder):
    for low, high in (("2", "1"), ("nan", "1"), ("0", "nan"), ("-1", "1")):
        assert_refused(run, folder, [*GENERATE, "--guidance-interval", low, high], "`guidance-interval` is ")


@pytest.mark.parametrize("device", ["banana", "", "meta", "cpu:-1", "xla", "privateuseone", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(run, folder, device):
    for command in (GENERATE, FILE, UPSCALE, INPAINT, ("demo",)):
        assert_refused(run, folder, [*command, "--device", device], f"`device` is {device!r}, which cannot be used")


OUTPUTS = {
    "": "should end in",
    "x.bmp": "should end in",
    "folder.png": "is a folder",
    "file/x.png": "needs the folder",
    "file/a/b/x.png": "needs the folder",
    "ф" * 200 + ".png": "File name too long",
    "new/" + "x" * 300 + "/x.png": "File name too long",
    "/proc/x.png": "cannot be written",
    "a\0b.png": "not a valid file name",
    "\ud800.png": "not a valid file name",
    "picture.png": "which is the `image`: choose another file",
    "mask.png": "which is the `mask`: choose another file",
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused(run, folder, output):
    assert_refused(run, folder, [*INPAINT, "--output", output], "`output` is ", OUTPUTS[output])


def test_the_names_of_numbered_images_are_checked_too(run, folder):
    (folder / "x-1.png").mkdir()
    assert_refused(run, folder, [*GENERATE, "--output", "x.png", "--num-images", "2"], "x-1.png', which is a folder")
    name = "x" * 250 + ".png"
    assert_refused(run, folder, [*GENERATE, "--output", name, "--num-images", "2"], "File name too long")


def test_a_full_disk_is_found_before_a_model_loads(run, folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_imagen.utils.files.open", full, raising=False)
    assert_refused(run, folder, [*GENERATE, "--output", "x.png"], "x.png', which cannot be written: No space left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "hello"], "there is no option --prompt: pass the prompt without it"),
        (["inpaint", "picture.png", "mask.png", "--prompt", "a"], "there is no option --prompt"),
        (["generate", "a", "--step", "3"], "there is no option --step: did you mean --steps?"),
        (["generate", "a", "--out", "x.png"], "there is no option --out"),
        (["generate", "a", "red", "apple"], "unrecognized argument 'red': an argument of several words needs quotes"),
        (["upscale", "a.png", "a red apple"], "unrecognized argument 'a red apple' (see"),
        (["doctor", "--res", "64", "x"], "there is no option --res"),
        (["cache-embeddings", "x", "--text_enc", "x"], "there is no option --text_enc"),
        (["gen", "a"], "there is no command 'gen': the commands are generate, upscale"),
        (["--vers"], "COMMAND"),
        ([], "COMMAND"),
        (["generate", ""], "`prompt` is '', but should not be empty"),
        (["inpaint", "picture.png", "mask.png", " "], "`prompt` is ' ', but should not be empty"),
        (["generate", "\ud800"], "which is not valid UTF-8"),
        (["generate", "x" * 10_001], "`prompt` has 10,001 characters, but should have at most 10,000"),
        (["generate", "a", "--negative-prompt", "\ud800"], "`negative-prompt` is '\\ud800', which is not valid UTF-8"),
    ],
)
def test_arguments_that_are_none_are_refused(run, folder, arguments, message):
    assert_refused(run, folder, arguments, message)


@pytest.mark.parametrize(
    "error", [FloatingPointError("not finite"), MemoryError(), OSError(28, "full"), ValueError("a\nb")]
)
def test_an_error_of_a_pipeline_is_one_line_and_writes_nothing(run, folder, monkeypatch, error):
    class Pipe:
        stages = [type("Stage", (), {"resolution": 16, "reads_text": True})]

        def to(self, device):
            return self

        def __call__(self, **kwargs):
            raise error

    monkeypatch.setattr(common, "load_pipeline", lambda *args: Pipe())
    assert_refused(run, folder, [*GENERATE, "--output", "x.png"], "error: ")


def test_a_grid_too_large_for_its_format_is_found_before_anything_is_drawn(run, folder, monkeypatch):
    class Pipe:
        stages = [type("Stage", (), {"resolution": 1024, "reads_text": True})]

        def to(self, device):
            return self

    monkeypatch.setattr(common, "load_pipeline", lambda *args: Pipe())
    arguments = [*GENERATE, "--grid", "--num-images", "17", "--output", "x.webp"]
    assert_refused(run, folder, arguments, "WEBP supports at most 16383 pixels of height and width, not 17408x1024")


# without the package around it, which takes seconds to import
SCRIPT = f"import sys; sys.path.insert(0, '{Path(errors.__file__).parent}'); from errors import run_to_exit_code\n"


@pytest.mark.parametrize("redirect", ["> /dev/full", "| true"])
def test_an_output_that_nobody_reads_is_one_line(redirect):
    program = SCRIPT + "sys.exit(run_to_exit_code(lambda: print('x' * 10**6), 'program'))"
    command = f'set -o pipefail; "{sys.executable}" -c "{program}" {redirect}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("program: error: ")
