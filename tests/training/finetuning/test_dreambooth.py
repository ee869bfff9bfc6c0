"""A subject and its class, by what the batches, the loss and the weights are."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from accelerate import Accelerator
from networks import save_index
from PIL import Image
from tiny_runs import are_equal, encode, exported, losses, weights_of

from diffusers_imagen import EDMHeunScheduler, EfficientUNetModel, ImagenCascadePipeline, ImagenPipeline
from diffusers_imagen.training import DreamBoothLoraTrainer, DreamBoothTrainer, DreamBoothTrainingConfig, export
from diffusers_imagen.training.data import Batch, PairedBatches, make_train_batches
from diffusers_imagen.training.data.pairs import interleave
from diffusers_imagen.training.finetuning import class_images
from diffusers_imagen.training.finetuning.class_images import draw_by_pipeline, missing_images
from diffusers_imagen.training.finetuning.dreambooth import make_trainer
from diffusers_imagen.utils.files import FolderHold


SUBJECT, CLASS = "text 1", "text 5"
PRIOR = {"with_prior_preservation": True, "class_prompt": CLASS, "num_class_images": 3}


def paint(folder: Path, count: int, red: int) -> str:
    """Images of one colour each, told by their red and green."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (red, 10 * i, 0)).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture
def stage(tmp_path) -> str:
    tiny_runs.make_unet().save_pretrained(tmp_path / "trained" / "unet")
    EDMHeunScheduler().save_pretrained(tmp_path / "trained" / "scheduler")
    return str(tmp_path / "trained")


@pytest.fixture
def make_subject_config(tmp_path, monkeypatch, stage, fresh_accelerator):
    """A run of four steps on three red images, with the class that is asked for."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    subject = paint(tmp_path / "subject", 3, red=255)

    def make_subject_config(**kwargs) -> DreamBoothTrainingConfig:
        given = {
            "instance_data_dir": subject,
            "instance_prompt": SUBJECT,
            "pretrained_model_name_or_path": stage,
            "preset": None,
            "train_data_dir": None,
            **kwargs,
        }
        if given.get("with_prior_preservation"):
            given.setdefault("class_data_dir", str(tmp_path / "class"))
        return DreamBoothTrainingConfig(
            **tiny_runs.settings(subject, given.pop("output_dir", tmp_path / "dog"), **given)
        )

    return make_subject_config


def load(stage: str):
    return tiny_runs.ImagenUNetModel.from_pretrained(stage, subfolder="unet")


def drawn(folder: Path | str) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("[!.]*"))}


def paired(config: DreamBoothTrainingConfig, *place: int) -> PairedBatches:
    return PairedBatches(
        make_train_batches(config, encode, *place), make_train_batches(config.class_data(), encode, *place)
    )


def test_subject_and_class_take_turns(make_subject_config, tmp_path):
    paint(tmp_path / "class", 3, red=0)
    config = make_subject_config(**PRIOR)
    subject, of_class = make_train_batches(config, encode), make_train_batches(config.class_data(), encode)
    batches = paired(config)
    assert (batches.stride, batches.first_slot) == (8, 0)
    for _ in range(3):
        batch, a, b = next(batches), next(subject), next(of_class)
        assert torch.equal(batch.images[0::2], a.images) and torch.equal(batch.images[1::2], b.images)
        assert torch.equal(batch.images[:, 0, 0, 0], torch.tensor([1.0, -1.0] * 4))
        assert torch.equal(batch.text[0::2], encode([SUBJECT] * 4)[0].half().float())
        assert torch.equal(batch.text[1::2], encode([CLASS] * 4)[0].half().float())
    assert batches.first_slot == batches.images_seen == 24


@pytest.mark.parametrize("workers", [0, 1], ids=["in-memory", "loader"])
def test_processes_share_the_pairs_and_a_place_is_returned_to(make_subject_config, tmp_path, workers):
    paint(tmp_path / "class", 5, red=0)
    options = {**PRIOR, "num_class_images": 5, "in_memory": not workers, "dataloader_num_workers": workers}
    one = paired(make_subject_config(**options, train_batch_size=4))
    two = [paired(make_subject_config(**options, train_batch_size=2), i, 2) for i in range(2)]
    assert [stream.first_slot for stream in two] == [0, 4] and two[0].stride == one.stride == 8
    for step in range(3):
        whole, parts = next(one), [next(stream) for stream in two]
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        if step == 1:
            state = one.state_dict()
    again = paired(make_subject_config(**options, train_batch_size=4))
    again.load_state_dict(state)
    assert torch.equal(next(again).images, whole.images)
    for stream in (one, again, *two):
        stream.close()


def test_the_shorter_texts_are_padded():
    first = Batch(torch.zeros(1, 3, 2, 2), None, torch.full((1, 2, 1), 5.0), torch.ones(1, 2, dtype=torch.bool))
    second = Batch(torch.ones(1, 3, 2, 2), None, torch.full((1, 3, 1), 7.0), torch.ones(1, 3, dtype=torch.bool))
    both = interleave(first, second)
    assert both.text[..., 0].tolist() == [[5, 5, 0], [7, 7, 7]]
    assert both.text_mask.tolist() == [[True, True, False], [True, True, True]]


def test_the_loss_is_that_of_the_subject_plus_the_weighed_one_of_its_class(make_subject_config, stage):
    losses, sigma = torch.tensor([1.0, 10.0, 3.0, 30.0]), torch.ones(4)
    config = make_subject_config(**PRIOR, prior_loss_weight=0.5)
    trainer = DreamBoothTrainer(config, load(stage), encode)
    assert trainer.weigh(losses, sigma).mean().item() == (1 + 3) / 2 + 0.5 * (10 + 30) / 2
    alone = DreamBoothTrainer(make_subject_config(), load(stage), encode)
    assert torch.equal(alone.weigh(losses, sigma), losses)


def test_class_images_are_those_of_the_pipeline_whatever_is_drawn_at_a_time(make_subject_config, stage, tmp_path):
    folders = {}
    for size in (1, 3):
        config = make_subject_config(**PRIOR, class_data_dir=str(tmp_path / f"class {size}"), sample_batch_size=size)
        unet = load(stage)
        before = weights_of(unet)
        DreamBoothTrainer(config, unet, encode).prepare()
        assert are_equal(weights_of(unet), before) and unet.training
        folders[size] = drawn(config.class_data_dir)
    assert list(folders[1]) == list(folders[3]) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    for name, image in folders[1].items():
        assert np.abs(image - folders[3][name]).max() <= 1
    assert not np.array_equal(folders[1]["class-00000.png"], folders[1]["class-00001.png"])
    text, mask = encode([CLASS])
    pipe = ImagenPipeline(load(stage), EDMHeunScheduler())
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence(0, spawn_key=(32, 1)).generate_state(1, np.uint64)[0])
    )
    image = pipe(prompt_embeds=text, prompt_attention_mask=mask, generator=generator).images[0]
    assert np.abs(np.array(image) - folders[1]["class-00001.png"]).max() <= 1


def test_a_trainer_is_made_without_work(make_subject_config, stage, tmp_path, monkeypatch):
    """No class image is drawn, no repository made, no folder opened, no data read before `train`."""
    made = []
    monkeypatch.setattr(export, "create_repo", lambda *args, **kwargs: made.append(args))
    hub = {"push_to_hub": True, "hub_model_id": "me/dog", "hub_token": "hf_a"}
    before = sorted(tmp_path.rglob("*"))
    DreamBoothLoraTrainer(make_subject_config(**PRIOR, **hub, rank=2), load(stage), encode)
    assert not made and sorted(tmp_path.rglob("*")) == before


def test_class_images_that_are_there_stay(make_subject_config, stage, tmp_path):
    folder = tmp_path / "class"
    config = make_subject_config(**PRIOR)
    DreamBoothTrainer(config, load(stage), encode).prepare()
    first = drawn(folder)
    (folder / "class-00001.png").unlink()
    DreamBoothTrainer(config, load(stage), encode).prepare()
    again = drawn(folder)
    assert list(again) == list(first) and all(np.array_equal(again[name], first[name]) for name in first)
    assert missing_images(folder, 3) == [] and missing_images(folder, 4) == [folder / "class-00003.png"]
    (folder / "class-00000.png").rename(folder / "mine.jpg")
    assert missing_images(folder, 3) == []


def test_another_pipeline_draws_the_class_of_a_super_resolution_stage(
    make_subject_config, stage, tmp_path, tokenizer, text_encoder
):
    sr = tiny_runs.make_sr_unet()
    sr.save_pretrained(tmp_path / "sr" / "unet")
    unet = tiny_runs.ImagenUNetModel(
        sample_size=16, encoder_hid_dim=text_encoder.config.hidden_size, attention_resolutions=(8,), **tiny_runs.TINY
    )
    ImagenCascadePipeline(unet, EDMHeunScheduler(), tokenizer, text_encoder).save_pretrained(tmp_path / "cascade")
    of_sr = {"pretrained_model_name_or_path": str(tmp_path / "sr"), "resolution": 32, "low_resolution": 16}
    with pytest.raises(ValueError, match="`class_data_dir` has fewer than 3 images, and a super-resolution stage"):
        DreamBoothTrainer(
            make_subject_config(**PRIOR, **of_sr), EfficientUNetModel.from_config(sr.config), encode
        ).prepare()
    assert not (tmp_path / "class").exists()
    config = make_subject_config(**PRIOR, **of_sr, class_model=str(tmp_path / "cascade"), max_train_steps=2)
    before = weights_of(sr)
    DreamBoothTrainer(config, sr, encode).train()
    assert len(drawn(tmp_path / "class")) == 3
    assert not are_equal(weights_of(sr), before)
    assert are_equal(exported(config.output_dir, EfficientUNetModel), weights_of(sr))
    with pytest.raises(ValueError, match="`class_model` is 'nowhere', which cannot be loaded"):
        config = replace(config, class_model="nowhere", num_class_images=4, output_dir=str(tmp_path / "other"))
        DreamBoothTrainer(config, EfficientUNetModel.from_config(sr.config), encode).prepare()


def test_flagged_class_images_are_drawn_again_or_left_out(tmp_path, monkeypatch):
    """They are black, and would be learned."""
    said: list[str] = []
    monkeypatch.setattr(class_images.logger, "warning", said.append)
    paths = [tmp_path / f"class-{number:05d}.png" for number in range(3)]
    tries = [(number, attempt) for number in range(3) for attempt in range(4)]
    seeds = {(i, attempt): class_images.make_generator(0, paths[i], attempt).initial_seed() for i, attempt in tries}
    assert len(set(seeds.values())) == 12
    flagged = {seeds[1, 0], seeds[1, 1], *(seeds[2, attempt] for attempt in range(4))}

    def draw(generators):
        seeds = [generator.initial_seed() for generator in generators]
        return [None if seed in flagged else seed for seed in seeds]

    found = dict(class_images.draw_unflagged(draw, 0, paths))
    assert found == {paths[0]: seeds[0, 0], paths[1]: seeds[1, 2]}
    assert said == ["The safety checker flagged class-00002.png in 4 attempts: these class images are left out."]


def test_the_subject_is_learned_and_the_class_is_kept(make_subject_config, stage, tmp_path):
    """Denoising of class images from the middle of the noise levels, after a run with and one without them."""
    paint(tmp_path / "class", 3, red=0)
    options = {"max_train_steps": 40, "checkpointing_steps": 40, "learning_rate": 5e-3, "p_mean": 1.0}

    def error(unet, red: float, caption: str) -> float:
        clean = torch.full((4, 3, 16, 16), -1.0)
        clean[:, 0] = red
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        sigma = torch.full((4,), 3.0)
        scheduler = EDMHeunScheduler()
        noisy = clean + 3.0 * noise
        with torch.no_grad():
            model_input = scheduler.precondition_inputs(noisy, sigma)
            output = unet.eval()(
                model_input, scheduler.precondition_noise(sigma), *encode([caption] * 4), return_dict=False
            )
            denoised = scheduler.precondition_outputs(noisy, output[0], sigma)
        return (denoised - clean)[:, 0].square().mean().item()

    runs = {}
    for name, prior in {"with": PRIOR, "without": {}}.items():
        runs[name] = load(stage)
        DreamBoothTrainer(
            make_subject_config(**prior, **options, output_dir=tmp_path / name), runs[name], encode
        ).train()
    before = error(load(stage), 1.0, SUBJECT)
    assert all(error(unet, 1.0, SUBJECT) < before / 2 for unet in runs.values())
    assert error(runs["with"], -1.0, CLASS) < error(runs["without"], -1.0, CLASS) / 2


def test_a_resumed_run_is_the_run_that_was_not_stopped(make_subject_config, stage, tmp_path, monkeypatch):
    whole, unet = make_subject_config(**PRIOR, output_dir=tmp_path / "whole"), load(stage)
    make_trainer(whole, unet, encode).train()
    config = make_subject_config(**PRIOR, resume_from_checkpoint="latest")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        tiny_runs.interrupt_at(patch, step=3)
        make_trainer(config, load(stage), encode).train()
    resumed = load(stage)
    make_trainer(config, resumed, encode).train()
    assert losses(config.output_dir) == losses(whole.output_dir)
    assert are_equal(weights_of(resumed), weights_of(unet))
    with pytest.raises(ValueError, match="trained with with_prior_preservation True, but this run has False"):
        make_trainer(make_subject_config(resume_from_checkpoint="latest"), load(stage), encode).prepare()


def test_what_is_written(make_subject_config, stage, tmp_path):
    config, unet = make_subject_config(**PRIOR, max_train_steps=2), load(stage)
    assert config.learning_rate == 3e-3
    make_trainer(config, unet, encode).train()
    assert are_equal(exported(config.output_dir), weights_of(unet))
    card = (Path(config.output_dir) / "README.md").read_text()
    assert "- dreambooth\n" in card and "- lora" not in card and "subject_data" not in card
    assert f'all captioned "{SUBJECT}"' in card and "2 steps, 16 images seen" in card

    config = make_subject_config(rank=2, learning_rate=None, max_train_steps=2, output_dir=tmp_path / "adapter")
    assert config.learning_rate == 5e-4 and make_subject_config(learning_rate=None).learning_rate == 5e-6
    trainer = make_trainer(config, load(stage), encode)
    assert isinstance(trainer, DreamBoothLoraTrainer) and all(".lora_" in name for name in trainer.names)
    trainer.train()
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "- dreambooth\n- lora\n" in card
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["config"]["instance_prompt"] == SUBJECT


@pytest.mark.parametrize(
    "options, message",
    [
        ({"instance_data_dir": None}, "Exactly one of `instance_data_dir`, `dataset_name`"),
        ({"dataset_name": "dogs"}, "Exactly one of `instance_data_dir`, `dataset_name`"),
        ({"train_data_dir": "dogs"}, "`train_data_dir` is 'dogs', but should be given as `instance_data_dir`"),
        ({"instance_prompt": ""}, "`instance_prompt` is '', but should name the subject"),
        ({"caption": "a dog"}, "`caption` is 'a dog', but should be given as `instance_prompt`"),
        ({"sample_batch_size": 2}, "`sample_batch_size` is 2, but is only used with `with_prior_preservation`"),
        ({"class_prompt": "a dog"}, "`class_prompt` is 'a dog', but is only used with `with_prior_preservation`"),
        ({"with_prior_preservation": True}, "`class_prompt` is None, but is required by `with_prior_preservation`"),
        ({**PRIOR, "prior_loss_weight": 0}, "`prior_loss_weight` is 0, but should be above 0"),
        ({**PRIOR, "num_class_images": 0}, "`num_class_images` is 0, but should be at least 1"),
        ({**PRIOR, "aspect_ratio_buckets": "auto"}, "share batches of square images"),
        ({"lora_alpha": 4}, "`lora_alpha` is 4, but is only used with `rank`, which trains an adapter"),
        ({"lora_target_modules": ["to_q"]}, "`lora_target_modules` is .*, but is only used with `rank`"),
        ({"pretrained_model_name_or_path": None, "preset": "emoji_base_64"}, "requires a trained stage"),
    ],
)
def test_settings_that_are_refused(make_subject_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_subject_config(**options)


def test_stages_that_are_refused(make_subject_config, stage):
    unet = tiny_runs.ImagenUNetModel(
        sample_size=16, attention_resolutions=(8,), encoder_hid_dim=None, **tiny_runs.TINY
    )
    with pytest.raises(ValueError, match="This network is not conditioned on text"):
        DreamBoothTrainer(make_subject_config(), unet)
    with pytest.raises(ValueError, match="`sigma_data` is 0.25, but .* was trained with 0.5"):
        DreamBoothTrainer(make_subject_config(sigma_data=0.25), load(stage), encode)


def test_folders_that_are_none_or_empty_are_refused_by_the_name_that_they_were_given(
    make_subject_config, stage, tmp_path
):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({"instance_data_dir": str(tmp_path / "file")}, "`instance_data_dir` is '.*file', which is not a folder"),
        (
            {"instance_data_dir": str(tmp_path / "nowhere")},
            "`instance_data_dir` is '.*nowhere', which is not a folder",
        ),
        ({"instance_data_dir": str(tmp_path / "empty")}, "`instance_data_dir` is '.*empty', which"),
        ({**PRIOR, "class_data_dir": str(tmp_path / "file")}, "`class_data_dir` is '.*file', which is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            DreamBoothTrainer(make_subject_config(**options), load(stage), encode).prepare()
        tiny_runs.reset_accelerate()


def test_two_runs_do_not_draw_into_one_folder(make_subject_config, stage, tmp_path):
    with FolderHold(tmp_path / "class", "class_data_dir"):
        with pytest.raises(
            ValueError, match=f"`class_data_dir` is '.*class', which process {os.getpid()} on .* is using"
        ):
            DreamBoothTrainer(make_subject_config(**PRIOR), load(stage), encode).prepare()
        assert drawn(tmp_path / "class") == {}
        paint(tmp_path / "whole", 3, red=0)  # what is there can be read by many
        config = make_subject_config(**PRIOR, class_data_dir=str(tmp_path / "whole"))
        with FolderHold(tmp_path / "whole", "class_data_dir"):
            DreamBoothTrainer(config, load(stage), encode).prepare()
    DreamBoothTrainer(make_subject_config(**PRIOR), load(stage), encode).prepare()
    assert len(drawn(tmp_path / "class")) == 3


def test_a_class_image_is_whole_or_absent(make_subject_config, stage, tmp_path, monkeypatch):
    save, count = Image.Image.save, []

    def full(image, path, *args):
        count.append(path)
        if len(count) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, path, *args)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Image.Image, "save", full)
        DreamBoothTrainer(make_subject_config(**PRIOR), load(stage), encode).prepare()
    assert list(drawn(tmp_path / "class")) == ["class-00000.png"]
    (tmp_path / "class" / "._class-00001.png").write_bytes(b"hidden")
    assert [path.name for path in missing_images(tmp_path / "class", 3)] == ["class-00001.png", "class-00002.png"]


@pytest.mark.parametrize("index", ["[]", "7", "{}", '{"_class_name": 5}', '{"_class_name": ["evil", "Evil"]}', "{"])
def test_a_class_model_that_cannot_be_loaded_is_refused(make_subject_config, stage, tmp_path, index):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(index)
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('executed')")
    config = make_subject_config(**PRIOR, class_model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="`class_model` is '.*model', which cannot be loaded: ") as caught:
        draw_by_pipeline(config, Accelerator(cpu=True))
    assert "\n" not in str(caught.value) and not (tmp_path / "class").exists()


def test_a_class_model_that_draws_nothing_from_words_is_refused(make_subject_config, stage):
    config = make_subject_config(**PRIOR, class_model=stage)
    save_index(stage)
    with pytest.raises(ValueError, match="`class_model` is '.*', which cannot draw `class_prompt`: "):
        draw_by_pipeline(config, Accelerator(cpu=True))([torch.Generator()])
