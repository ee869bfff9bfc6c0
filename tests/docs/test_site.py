"""The documentation site is built without a warning, with the API of the docstrings and with links to other files."""

import os
import subprocess
import sys

import pytest
from doc_blocks import ROOT


pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytest.importorskip("material")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, with an address of the repository."""
    folder = tmp_path_factory.mktemp("site")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("docs_dir: docs", f"docs_dir: {ROOT}/docs")
    config = config.replace("scripts/", f"{ROOT}/scripts/").replace("paths: [src]", f"paths: [{ROOT}/src]")
    (folder / "mkdocs.yml").write_text(f"repo_url: https://example.org/repository\n{config}")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", folder / "mkdocs.yml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder / "site"


def test_the_reference_has_docstrings(site):
    page = (site / "api" / "pipelines.html").read_text()
    assert 'id="diffusers_imagen.pipelines.pipeline_imagen_cascade.ImagenCascadePipeline.__call__"' in page
    assert "num_resample_times" in page and "*optional*" not in page


def test_links_to_files_outside_of_the_pages_lead_to_the_repository(site):
    page = (site / "training.html").read_text()
    assert "https://example.org/repository/blob/main/src/diffusers_imagen/models/growing.py" in page
    assert 'href="../src' not in page


def test_the_changelog_is_a_page(site):
    assert "Keep a Changelog" in (site / "changelog.html").read_text()
    assert (site / "index.html").is_file() and (site / "demo.png").is_file()
