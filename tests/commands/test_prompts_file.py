"""`generate --prompts-file`: no prompt keeps the others from being drawn, and one process has the folder at a time."""

import os

import pytest
from groups import run_command
from kills import EXIT

from diffusers_imagen import ImagenCascadePipeline
from diffusers_imagen.commands import generate
from diffusers_imagen.commands.common import slug_of
from diffusers_imagen.commands.generate import list_items
from diffusers_imagen.utils.files import FolderHold


@pytest.fixture
def draw(run, model):
    def draw(*arguments):
        options = ("--model", model, "--steps", 1, "--resolution", 16, "--output-dir", "out")
        return run("generate", "--prompts-file", "prompts.txt", *options, *arguments)

    return draw


def test_names_are_cut_in_bytes(folder, draw):
    (folder / "prompts.txt").write_text("𐌰" * 80 + "\n" + "я" * 80 + "\na red apple\n", encoding="utf-8")
    assert draw()[0] == 0
    names = sorted(os.listdir(folder / "out"))
    assert names == [f"00001-{'𐌰' * 45}.png", f"00002-{'я' * 60}.png", "00003-a-red-apple.png"]
    assert max(len(slug_of(text * 100).encode()) for text in "a я 한 𐌰".split()) == 180


@pytest.mark.parametrize("error", [ValueError, FloatingPointError])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_prompt_that_fails_does_not_lose_the_others(folder, draw, monkeypatch, error, batch_size):
    (folder / "prompts.txt").write_text("a red apple\na bad face\na blue face\n" + "x" * 10_001 + "\na face\n")
    call = ImagenCascadePipeline.__call__

    def failing(pipe, prompts, **kwargs):
        if any("bad" in prompt for prompt in prompts):
            raise error("it is bad")
        return call(pipe, prompts, **kwargs)

    monkeypatch.setattr(ImagenCascadePipeline, "__call__", failing)
    code, _, lines = draw("--batch-size", batch_size)
    assert code == 2
    assert lines[-1].endswith(
        "out: 2 of 5 images failed: line 2: it is bad; "
        "line 4: `prompt` has 10,001 characters, but should have at most 10,000."
    )
    assert sorted(os.listdir(folder / "out")) == ["00001-a-red-apple.png", "00003-a-blue-face.png", "00005-a-face.png"]


def test_what_fails_for_every_prompt_ends_at_once_and_leaves_no_folder(folder, draw, monkeypatch):
    (folder / "prompts.txt").write_text("a face\n" * 100)
    calls = []

    def failing(pipe, prompts, **kwargs):
        calls.append(len(prompts))
        raise FloatingPointError("not finite")

    monkeypatch.setattr(ImagenCascadePipeline, "__call__", failing)
    code, _, lines = draw()
    assert code == 2 and lines[-1].endswith("line 1: not finite")
    assert calls == [4, 1, 1, 1, 1]
    assert not (folder / "out").exists()


def test_several_processes_draw_what_one_draws(folder, draw, model, tmp_path):
    """Also if one of them is killed, and the rest is drawn by another number of processes; a bad prompt is named once."""
    prompts = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("apple", "face", "tiger", "red face")]
    (folder / "prompts.txt").write_text("\n".join([*prompts, "x" * 10_001]))
    settings = ("--batch-size", 2, "--num-images", 2)
    assert draw(*settings)[0] == 2
    one = pictures(folder / "out")
    assert len(one) == 16

    given = ("generate", "--prompts-file", "prompts.txt", "--model", model, "--steps", 1, "--resolution", 16)
    given += ("--output-dir", "two", *settings)
    codes, _ = run_command(tmp_path, 2, *given, killed=("two", 6))
    assert codes[1] == EXIT and codes[0] not in (0, None)
    assert 0 < len(pictures(folder / "two")) < 16
    codes, printed = run_command(tmp_path, 3, *given)
    assert codes == [2, 2, 2] and pictures(folder / "two") == one
    reason = "two: 2 of 18 images failed: line 9: `prompt` has 10,001 characters"
    assert all(reason in text.splitlines()[-1] for text in printed)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    (folder / "two" / "00001-a-red-apple-1.png").unlink()
    codes, printed = run_command(tmp_path, 2, *given)
    assert codes == [0, 0] and pictures(folder / "two") == one
    assert "two: 16 images, 1 of them new" in printed[0] and "images" not in printed[1]


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_a_prompt_alone_is_not_drawn_by_several_processes(run, folder, model, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, lines = run("generate", "a red apple", "--model", model)
    assert code == 2 and lines[-1].endswith("One call of a model runs in one process, but 4 were started.")
    assert not (folder / "output.png").exists()


def test_a_folder_in_use_is_refused_and_what_a_killed_process_left_goes(folder, draw):
    with FolderHold("out", "output-dir"):
        code, _, lines = draw()
        assert code == 2 and f"`output-dir` is 'out', which process {os.getpid()} on" in lines[-1]
        assert not list((folder / "out").glob("*.png"))
    (folder / "out").mkdir()
    (folder / "out" / ".00001-a-red-apple.png.17.partial").write_text("half")
    assert draw()[0] == 0
    assert sorted(os.listdir(folder / "out")) == ["00001-a-red-apple.png", "00002-a-blue-face.png"]


def test_what_is_no_image_in_the_place_of_one_is_refused(folder, draw):
    (folder / "out" / "00002-a-blue-face.png").mkdir(parents=True)
    code, _, lines = draw()
    assert code == 2 and "00002-a-blue-face.png', which is" in lines[-1]
    assert os.listdir(folder / "out") == ["00002-a-blue-face.png"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(folder):
    (folder / "prompts.txt").write_text("\ufeffa red apple\r\n\r\na\n", encoding="utf-8")
    items = list_items(folder / "prompts.txt", folder, 0, 1)
    assert [(item.line, item.prompt) for item in items] == [(1, "a red apple"), (3, "a")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(range(256)), "cannot be read"),
        (b"", "has no prompts"),
        (b"a\n" * 1001, "has more than 1,000 images"),
        (b"x" * (2**25 + 1), "it has more than 33,554,432 bytes"),
    ],
)
def test_a_file_that_is_none_is_refused(folder, content, message, monkeypatch):
    monkeypatch.setattr(generate, "MAX_FILE_IMAGES", 1000)
    (folder / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"`prompts-file` is .*{message}"):
        list_items(folder / "prompts.txt", folder, 0, 1)


@pytest.mark.parametrize("path", ["/dev/zero", "fifo", "folder.png", "none", "x" * 300, "a\0b"])
def test_what_is_no_regular_file_is_refused(folder, path):
    os.mkfifo("fifo")
    with pytest.raises(ValueError, match="`prompts-file` is .* cannot be read"):
        list_items(type(folder)(path), folder, 0, 1)
