import errno
import subprocess
import sys

import pytest
from PIL.Image import DecompressionBombError

from diffusers_imagen.utils.errors import describe, run_to_exit_code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("`a` is 1,\nbut should be 2."), "`a` is 1, but should be 2."),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), "no space left on the device: 'x.png'"),
        (PermissionError(errno.EACCES, "Permission denied", "x.png"), "Permission denied: 'x.png'."),
        (OSError("truncated file"), "truncated file"),
        (DecompressionBombError("too large"), "too large"),
        (MemoryError(), "out of memory"),
    ],
)
def test_an_expected_error_is_one_line_and_exit_code_2(capsys, error, line):
    def run():
        raise error

    assert run_to_exit_code(run, "program") == 2
    out = capsys.readouterr()
    assert out.err.startswith(f"program: error: {line}") and out.err.count("\n") == 1 and out.out == ""


def test_an_error_that_nobody_expects_keeps_its_traceback():
    assert describe(KeyError("x")) is None
    with pytest.raises(KeyError):
        run_to_exit_code(lambda: {}["x"], "program")


def test_the_exit_code_of_a_command_is_its_own():
    assert run_to_exit_code(lambda: None, "program") == 0
    assert run_to_exit_code(lambda: 1, "program") == 1


def test_an_interruption_is_exit_code_130():
    def run():
        raise KeyboardInterrupt

    assert run_to_exit_code(run, "program") == 130


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_runs_without_standard_streams(closed, tmp_path):
    code = f"""if True:
        import sys
        from diffusers_imagen.utils.errors import run_to_exit_code
        def run():
            print("text", file=sys.stdout)
            print("text", file=sys.stderr)
            open({str(tmp_path / "result")!r}, "w").write("done")
        sys.exit(run_to_exit_code(run, "program"))
    """
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert (tmp_path / "result").read_text() == "done"
