"""Pictures of a setting: whole or absent, of one model, and the same whoever draws them and however often it is begun."""

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from tiny_evaluation import CAPTIONS

from diffusers_imagen import EDMAdamsScheduler
from diffusers_imagen.evaluation import CaptionList, Drawing, Setting, choose, draw
from diffusers_imagen.evaluation.drawing import digest_networks, network_calls
from diffusers_imagen.evaluation.picture_sets import reduced


INDICES = [0, 2, 3, 5, 8]


@pytest.fixture
def state():
    return PartialState(cpu=True)


@pytest.fixture
def drawing(tmp_path) -> Drawing:
    captions = CaptionList(CAPTIONS)
    return Drawing(captions, INDICES, tmp_path / "set", Setting("model", (2, 1), (2.0, 1.0)), 0, "digest", 32, 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_stage_of_every_caption_is_kept(cascade, drawing, state):
    draw(cascade, drawing, state)
    names = {f"{resolution}/{index:08d}.png" for resolution in (16, 32) for index in INDICES}
    assert contents(drawing.folder).keys() == names | {"settings.json"}
    assert drawing.files(16).picture(3).size == (16, 16)


def test_a_picture_depends_on_its_caption_alone(cascade, drawing, state, tmp_path):
    draw(cascade, drawing, state)
    fewer = drawing._replace(indices=[2, 8], folder=tmp_path / "fewer")
    draw(cascade, fewer, state)
    all_of_them, some = contents(drawing.folder), contents(fewer.folder)
    assert some.items() <= all_of_them.items()
    other = drawing._replace(indices=[2], seed=1, folder=tmp_path / "other")
    draw(cascade, other, state)
    assert contents(other.folder)["16/00000002.png"] != some["16/00000002.png"]


def test_a_run_that_was_ended_goes_on(cascade, drawing, state, tmp_path, monkeypatch):
    whole = drawing._replace(folder=tmp_path / "whole")
    draw(cascade, whole, state)
    calls = []

    class Counted:
        def __init__(self, at):
            self.at = at

        def __call__(self, captions, **options):
            calls.append(captions)
            if len(calls) == self.at:
                raise KeyboardInterrupt
            return cascade(captions, **options)

    with pytest.raises(KeyboardInterrupt):
        draw(Counted(2), drawing, state)
    leftover = drawing.folder / "32" / ".00000005.png.1.partial"
    leftover.write_bytes(b"half")
    draw(Counted(0), drawing, state)
    assert calls == [[CAPTIONS[i] for i in batch] for batch in ([0, 2], [3, 5], [3, 5], [8])]
    assert contents(drawing.folder) == contents(whole.folder)
    draw(Counted(0), drawing, state)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other"}, "model is 'digest', not 'other'"),
        ({"seed": 3}, "seed is 0, not 3"),
        ({"captions": CaptionList(["x"] * 12)}, "captions is"),
        ({"setting": Setting("model", (3, 1), (2.0, 1.0))}, r"steps is \[2, 1\], not \[3, 1\]"),
    ],
)
def test_pictures_of_another_kind_are_not_taken_for_these(cascade, drawing, state, change, named):
    draw(cascade, drawing, state)
    with pytest.raises(ValueError, match=f"`output-dir` has images in .*whose {named}"):
        draw(cascade, drawing._replace(**change), state)


def test_pictures_of_unknown_origin_are_refused(cascade, drawing, state):
    drawing.folder.mkdir()
    (drawing.folder / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="which has no record of its settings"):
        draw(cascade, drawing, state)


def test_upscalers_enlarge_what_was_reduced(cascade, drawing, state, tmp_path):
    draw(cascade, drawing, state)
    real = drawing.files(32)
    setting = Setting("model", (1,), (1.0,))
    enlarged = drawing._replace(captions=real, folder=tmp_path / "enlarged", setting=setting, enlarged=16)
    draw(cascade, enlarged, state)
    assert {path.name for path in enlarged.folder.iterdir()} == {"32", "settings.json"}
    seed = torch.Generator().manual_seed(draw_seed(5))
    alone = cascade(
        CAPTIONS[5], image=reduced(real.picture(5), 32, 16), num_inference_steps=1, guidance_scale=1, generator=[seed]
    ).images[0]
    assert alone.tobytes() == enlarged.files(32).picture(5).tobytes()


def draw_seed(index: int) -> int:
    from diffusers_imagen.evaluation.drawing import seed_of

    return seed_of(0, index)


@pytest.mark.parametrize("scheduler", [None, EDMAdamsScheduler])
def test_evaluations_are_those_that_the_pipeline_makes(cascade, scheduler):
    if scheduler is not None:
        cascade.base_scheduler = scheduler.from_config(cascade.base_scheduler.config)
    calls = []
    cascade(
        "a face",
        num_inference_steps=[5, 3],
        guidance_scale=[2.0, 1.0],
        callback_on_step_end=lambda pipe, step, timestep, tensors: calls.append(step) or {},
    )
    assert network_calls(cascade.stages, Setting("model", (5, 3), (2.0, 1.0))) == len(calls)


def test_another_weight_or_schedule_is_another_model(cascade):
    digest = digest_networks(cascade)
    assert digest_networks(cascade) == digest
    with torch.no_grad():
        next(cascade.sr256_unet.parameters()).add_(1e-3)
    other = digest_networks(cascade)
    assert other != digest
    cascade.base_scheduler = type(cascade.base_scheduler).from_config(cascade.base_scheduler.config, sigma_max=70.0)
    assert digest_networks(cascade) not in (digest, other)


def test_more_captions_have_all_of_fewer():
    some = [choose("num-images", 100, count, 0) for count in (10, 30)]
    assert some[0] == sorted(set(some[0])) and len(some[0]) == 10
    assert set(some[0]) < set(some[1])
    assert choose("num-images", 5, None, 0) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="`num-images` is 101, but should be at most 100"):
        choose("num-images", 100, 101, 0)
