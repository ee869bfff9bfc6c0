"""Runs that are killed before one of their changes of the file system, as by SIGKILL: no handler and no cleanup runs."""

import os
import sys
from pathlib import Path

import tiny_runs
from safetensors.torch import load_file


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
EXIT = 77
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killer:
    """Ends the process before the `number`-th change below a folder, counted from 1; counts them.

    With `after`, the changes are counted once that name exists in the folder.
    """

    def __init__(self, folder: str, number: int, after: str = ""):
        self.folder, self.number, self.count = os.path.abspath(folder), number, 0
        self.after = os.path.join(self.folder, after) if after else None
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.after is not None and not os.path.exists(self.after):
            return
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & WRITES or not isinstance(path, (str, bytes, os.PathLike)):
                return
        elif event not in CHANGES:
            return
        if isinstance(args[0], int):  # a descriptor: of a lock that filelock truncates, in some of its versions
            return
        path = os.fsdecode(args[0])
        # names without a folder are those of shutil.rmtree, which goes by descriptors
        if not os.path.isabs(path) or path == self.folder or path.startswith(self.folder + os.sep):
            self.count += 1
            if self.count == self.number:
                os._exit(EXIT)


def run_until(settings: dict, number: int, after: str) -> None:
    """A whole run that ends before a change, for a process of its own; leaves the number of changes in `changes`."""
    killer = Killer(settings["output_dir"], number, after)
    tiny_runs.run(settings)
    killer.number = 0
    Path(settings["output_dir"], "changes").write_text(str(killer.count))


def results(folder: Path) -> dict[str, bytes | list]:
    """All that a run leaves for others, by name; of tensors their values: the metadata beside them has no order."""
    left = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(
            ("checkpoint-", ".lock", "run.json", "changes", "weights.pt", "logs/")
        ):
            tensors = path.suffix == ".safetensors"
            left[name] = [(n, t.tolist()) for n, t in load_file(path).items()] if tensors else path.read_bytes()
    return left
