"""A process that uses the Hub of the tests: huggingface_hub reads the Hub's address once, when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import hub_server


class Client:
    """Runs Python with an empty cache of its own, in a folder of its own."""

    def __init__(self, url: str, folder: Path):
        self.url, self.folder, self.runs = url, folder, 0

    def run(self, code: str, **variables: str) -> str:
        self.runs += 1
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.folder / f"home-{self.runs}"),
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **variables,
        }
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout
