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


def background(grid: np.ndarray, tile: int) -> np.ndarray:
    """The mean colour of the corners of a grid's images, which are `tile` pixels wide."""
    height, width = grid.shape[0] // tile, grid.shape[1] // tile
    images = grid.reshape(height, tile, width, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    edge = np.r_[: tile // 10, tile - tile // 10 : tile]
    return images[:, edge][:, :, edge].mean(axis=(0, 1, 2))


def test_a_style_is_learned(tmp_path, monkeypatch):
    """With the adapter the background, white before, is near the blue of the data."""
    pictures = shown_pictures(execute(ROOT / "notebooks" / "finetune_a_style.ipynb", tmp_path, monkeypatch))
    assert [picture.shape[:2] for picture in pictures] == [(256, 512), (320, 640)]
    blue = background(pictures[0], 128)
    before, after = (np.linalg.norm(background(rows, 160) - blue) for rows in np.split(pictures[1], 2))
    print(f"distance of the background from the style's: {before:.3f} without the adapter, {after:.3f} with it")
    assert before > 0.8 and after < before / 3
