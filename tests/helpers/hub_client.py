"""Processes that use the Hub of the tests, each with an empty cache of its own: huggingface_hub reads its settings once,
when it is imported."""

import os
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import hub_server
from groups import HUB, HUB_HOME, exit_codes, make_process, without_hub


TOKEN = {"HF_TOKEN": hub_server.TOKEN}


class Client:
    """Runs Python in a folder; what it prints is returned."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0

    def run(self, code: str, home: Path | None = None) -> str:
        """In a process that is forked after the imports, with a cache that is empty or in `home`."""
        HUB_HOME.symlink_to(home or self.new_home(), target_is_directory=True)
        log = self.folder / f"run-{self.runs}"
        try:
            codes = exit_codes([make_process(execute, code, self.folder, log)])
        finally:
            HUB_HOME.unlink()
        assert codes == [0], log.with_suffix(".err").read_text()
        return log.with_suffix(".out").read_text()

    def run_offline(self, code: str, home: Path | None = None) -> str:
        """In a new process, whose settings are that there is no Hub."""
        settings = {**HUB, **TOKEN, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        settings |= {"HF_HOME": str(home or self.new_home()), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment = without_hub(os.environ) | settings
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def new_home(self) -> Path:
        self.runs += 1
        home = self.folder / f"home-{self.runs}"
        home.mkdir()
        return home


def execute(code: str, folder: Path, log: Path) -> None:
    """Runs Python, for a process of its own, as a new one would."""
    os.chdir(folder)
    os.environ.update(TOKEN)
    sys.argv = ["-c"]
    out, error = (open(log.with_suffix(suffix), "w", buffering=1) for suffix in (".out", ".err"))
    with out, error, redirect_stdout(out), redirect_stderr(error):
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
