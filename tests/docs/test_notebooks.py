"""The notebooks run from top to bottom, with the shipped cascade, and are kept without outputs."""

import base64
import io
import os
import re
import sys

import numpy as np
import pytest
from doc_blocks import ROOT
from PIL import Image


nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# in tests a notebook draws with fewer steps
STEPS = {
    "num_inference_steps=[18, 4]": "num_inference_steps=[8, 1]",
    "num_inference_steps=[10, 2]": "num_inference_steps=[4, 1]",
    "num_inference_steps=10": "num_inference_steps=5",
}


def execute(path, folder, monkeypatch):
    """A notebook as it is after a run in a copy of its folder beside the checkpoints."""
    (folder / "notebooks").mkdir()
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT / "src"), *sys.path])))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.kernelspec.name = "python3"
    for cell in notebook.cells:
        for steps, fewer in STEPS.items():
            cell.source = cell.source.replace(steps, fewer)
    resources = {"metadata": {"path": str(folder / "notebooks")}}
    return nbclient.NotebookClient(notebook, timeout=1200, resources=resources).execute()


def shown_pictures(notebook) -> list[np.ndarray]:
    """The pictures that cells show, in [0, 1]."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    encoded = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) / 255 for png in encoded]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_no_outputs_and_links_to_files_that_exist(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    targets = [target for text in texts for target in re.findall(r"\]\(([^)#]+)", text)]
    assert targets and [target for target in targets if not (path.parent / target).exists()] == []


def test_a_prompt_becomes_a_picture(tmp_path, monkeypatch):
    pictures = shown_pictures(execute(ROOT / "notebooks" / "prompt_to_picture.ipynb", tmp_path, monkeypatch))
    assert [picture.shape[:2] for picture in pictures] == [(256, 1024), (192, 768), (256, 768)]
    apple = pictures[2][:, :256]
    colour = apple[apple.min(axis=-1) < 0.7].mean(axis=0)
    assert colour.argmax() == 0  # a red apple


def distance_from_ink(pixels: np.ndarray) -> float:
    """The mean distance of the drawn pixels from the colours of the data, which are mixtures of the ink and white."""
    away = 1 - pixels.reshape(-1, 3)  # from white
    away = away[np.linalg.norm(away, axis=1) > 0.4]
    ink = 1 - np.array([0x10, 0x2A, 0x83]) / 255
    ink /= np.linalg.norm(ink)
    return np.linalg.norm(away - (away @ ink)[:, None] * ink, axis=1).mean()


def test_a_style_is_learned(tmp_path, monkeypatch):
    """With the adapter the colours are near those of the data."""
    pictures = shown_pictures(execute(ROOT / "notebooks" / "finetune_a_style.ipynb", tmp_path, monkeypatch))
    assert [picture.shape[:2] for picture in pictures] == [(256, 512), (320, 640)]
    data = distance_from_ink(pictures[0])
    before, after = (distance_from_ink(rows) for rows in np.split(pictures[1], 2))
    print(f"distance of colours from the ink: data {data:.3f}, {before:.3f} without the adapter, {after:.3f} with it")
    assert data < 0.01 and before > 0.3 and after < before / 2
