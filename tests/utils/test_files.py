import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from diffusers_imagen.utils import files
from diffusers_imagen.utils.files import (
    FolderHold,
    check_folder,
    check_writable,
    partial_of,
    read_json_object,
    sha256,
    whole_file,
    whole_folder,
    write_json,
)


# a module of files alone, as the whole package takes seconds to import
HOLD = f"""
import os, runpy, sys, time
hold = runpy.run_path({files.__file__!r})["FolderHold"](sys.argv[1], "output_dir")
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


def hold_elsewhere(folder, kind="alone"):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError("full")
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="full"), whole_folder(tmp_path / "stage") as partial:
        (partial / "a").write_text("half")
        raise OSError("full")
    assert os.listdir(tmp_path) == []
    with whole_folder(tmp_path / "stage") as partial:
        (partial / "a").write_text("whole")
    assert os.listdir(tmp_path) == ["stage"] and (tmp_path / "stage" / "a").read_text() == "whole"


WRITE = f"""
import runpy, sys, time
from pathlib import Path
with runpy.run_path({files.__file__!r})["whole_folder"](sys.argv[1]) as partial:
    Path(partial, "a").write_text("half")
    print(partial.name, flush=True)
    time.sleep(60)
"""


@contextmanager
def write_elsewhere(folder):
    """A process that is writing a folder, and is killed at the end; its name of what is half-written."""
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def write(folder) -> None:
    with whole_folder(folder) as partial:
        (partial / "a").write_text("whole")


def test_what_a_killed_process_left_of_a_folder_goes_and_what_a_living_one_writes_stays(tmp_path):
    with write_elsewhere(tmp_path / "stage") as half:
        assert sorted(os.listdir(tmp_path)) == sorted([half, ".stage.partial.lock"])
        with pytest.raises(ValueError, match="^'.*/stage' is being written by another process: wait for its end"):
            write(tmp_path / "stage")
        assert (tmp_path / half / "a").read_text() == "half"  # it goes on
        write(tmp_path / "stage.1")  # others are no concern of it
        assert sorted(os.listdir(tmp_path)) == sorted([half, ".stage.partial.lock", "stage.1"])
    assert (tmp_path / half).is_dir()  # nobody removed it
    write(tmp_path / "stage")
    assert sorted(os.listdir(tmp_path)) == ["stage", "stage.1"]
    assert (tmp_path / "stage" / "a").read_text() == "whole"


def test_only_what_is_left_of_the_same_folder_goes(tmp_path):
    """A number says nothing of whether its process lives: it may be another machine's, or this one's by chance."""
    gone = [partial_of(tmp_path / "stage").name, ".stage.1.partial", f".stage.{os.getppid()}.partial"]
    stays = [".stage.a.partial", ".stage.2.7.partial", ".other.7.partial", "stage.7.partial", ".stage.7.partial2"]
    for name in (*gone, *stays):
        (tmp_path / name / "unet").mkdir(parents=True)
    (tmp_path / ".stage.8.partial").write_text("a file, which others write")
    write(tmp_path / "stage")
    assert sorted(os.listdir(tmp_path)) == sorted([*stays, ".stage.8.partial", "stage"])
    assert os.listdir(tmp_path / "stage") == ["a"]


def test_a_folder_is_written_once_at_a_time_in_a_process_too(tmp_path):
    with whole_folder(tmp_path / "stage") as partial:
        with pytest.raises(ValueError, match="being written"):
            write(tmp_path / "stage")
        assert partial.is_dir()
    write(tmp_path / ("n" * 255))  # the longest name that there is
    assert sorted(os.listdir(tmp_path)) == ["n" * 255, "stage"]


def test_who_holds_a_folder_leaves_what_others_are_writing_into_it(tmp_path):
    with write_elsewhere(tmp_path / "stage") as half:
        FolderHold(tmp_path, "output_dir").release()
        assert (tmp_path / half / "a").read_text() == "half"
    FolderHold(tmp_path, "output_dir").release()
    assert os.listdir(tmp_path) == []


def test_who_holds_a_folder_is_told_without_the_arguments_of_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/train_imagen.py", "--hub_token", "hf_secret"])
    with FolderHold(tmp_path, "output_dir"):
        with pytest.raises(ValueError, match=r"\(train_imagen.py\) is using: ") as refused:
            FolderHold(tmp_path, "output_dir")
        left = [path.read_text() for path in tmp_path.iterdir()]
    assert "hf_secret" not in str(refused.value) + "".join(left)


def test_the_checksum_is_that_of_the_content(tmp_path):
    content = os.urandom(3 * 2**20 + 1)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("text", ["[]", "1", "null", "{", "", "[" * 100_000])
def test_what_is_no_json_object_is_refused_by_name(tmp_path, text):
    path = tmp_path / "checkpoint.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="checkpoint.json"):
        read_json_object(path)


def test_a_folder_is_held_by_one_process(tmp_path):
    holder = hold_elsewhere(tmp_path / "run")
    try:
        with pytest.raises(ValueError, match=f"`output_dir` is '.*run', which process {holder.pid} on .* is using"):
            FolderHold(tmp_path / "run", "output_dir")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with FolderHold(tmp_path / "run", "output_dir"):  # the lock of a dead process gives way
        pass


def test_a_lock_goes_with_its_process_though_processes_that_it_forked_live_on(tmp_path):
    holder = hold_elsewhere(tmp_path, "fork")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for remaining in reversed(range(500)):  # the forked process drops the lock when it first runs
        try:
            FolderHold(tmp_path, "output_dir").release()
            break
        except ValueError:
            assert remaining
            time.sleep(0.01)
    subprocess.run(["pkill", "-f", str(tmp_path)], check=False)


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    (tmp_path / ".a.png.17.partial").write_text("half")
    (tmp_path / ".unet.17.partial").mkdir()
    (tmp_path / "a.partial.png").write_text("the user's own")
    FolderHold(tmp_path, "output_dir").release()
    assert os.listdir(tmp_path) == ["a.partial.png"]


def test_a_folder_that_was_created_for_a_lock_remains_only_if_something_was_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in ("new", "new/folders/a", "empty", "empty/b"):
        with FolderHold(tmp_path / place, "output_dir"):
            assert sorted(os.listdir(tmp_path / place)) == [".lock", ".lock-owner.json"]
    with pytest.raises(ValueError, match="damaged"), FolderHold(tmp_path / "new/a", "output_dir"):
        raise ValueError("damaged")
    assert os.listdir(tmp_path) == ["empty"] and os.listdir(tmp_path / "empty") == []
    with FolderHold(tmp_path / "new/folders/a", "output_dir"):
        (tmp_path / "new" / "b").touch()
    assert sorted(os.listdir(tmp_path / "new")) == ["b"]
    with FolderHold(tmp_path / "new/c", "output_dir"):
        (tmp_path / "new" / "c" / "d").touch()
    assert os.listdir(tmp_path / "new" / "c") == ["d"]


def test_a_folder_is_held_once_in_a_process_too(tmp_path):
    with FolderHold(tmp_path, "output_dir"):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            FolderHold(tmp_path, "output_dir")
    FolderHold(tmp_path, "output_dir").release()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "is a folder"),
        ("fifo", "is a FIFO"),
        ("file/a/b", "needs the folder"),
        ("я" * 128, "File name too long"),
        ("new/" + "x" * 256 + "/a", "File name too long"),
        ("a/" * 3000 + "a", "File name too long"),
        ("..", "not a valid file name"),
        ("a\0b/c", "not a valid file name"),
        ("\ud800", "not a valid file name"),
        ("/proc/a", "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_found_before_and_nothing_is_left(tmp_path, path, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match=f"`output` is .*{message}"):
        check_writable(tmp_path / path, "output")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "folder"]


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in ("file", "new", "new/folders/file", "dangling", "я" * 127):
        check_writable(tmp_path / path, "output")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"] and (tmp_path / "file").read_text() == "mine"


def test_the_longest_name_can_be_written_whole(tmp_path):
    for name in ("x" * 255, "я" * 127):
        write_json(tmp_path / name, 1)
        assert json.loads((tmp_path / name).read_text()) == 1


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("", "which is not a valid folder name"),
        ("\0", "which is not a valid folder name"),
        ("\udcff", "which is not UTF-8"),
        ("file", "which is a file, but should be a folder"),
        ("file/sub", "which needs the folder '.*file', which is a file, but should be a folder"),
        ("fifo", "which is a file, but should be a folder"),
        ("nowhere", "which is a link to nothing, but should be a folder"),
        ("nowhere/sub", "which is a link to nothing, but should be a folder"),
        ("circle", "which is a link to nothing, but should be a folder"),
        ("a" * 300, "which cannot be written: File name too long"),
        ("b/" * 3000, "which cannot be written: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_made(tmp_path, monkeypatch, place, what):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    for check in (check_folder, FolderHold):
        with pytest.raises(ValueError, match=f"(?s)^`output_dir` is .*{what}"):
            check(place, "output_dir")
    assert sorted(os.listdir()) == before


def test_a_folder_without_rights_or_with_something_for_a_lock_is_refused(tmp_path, monkeypatch):
    check_folder(tmp_path / "a" / "b", "output_dir")
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match="`output_dir` is '.*', which cannot be locked: Is a directory"):
        FolderHold(tmp_path, "output_dir")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root has all rights
    with pytest.raises(ValueError, match="`output_dir` is '.*b', which cannot be written: Permission denied"):
        check_folder(tmp_path / "a" / "b", "output_dir")
