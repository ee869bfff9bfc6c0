"""Model cards of weights that are under a license, and what a pipeline says of where its weights are from."""

import re

import pytest
import yaml
from filter_parts import filter_parts
from huggingface_hub import ModelCard

from diffusers_imagen import EDMHeunScheduler, ImagenCascadePipeline, ImagenPipeline
from diffusers_imagen.pipelines import model_card, origin
from diffusers_imagen.pipelines.model_card import add_license
from diffusers_imagen.pipelines.origin import LICENSES, card_metadata, license_section, list_origins


NOTICE = "DeepFloyd is licensed under the DeepFloyd License, Copyright (c) Stability AI Ltd. All Rights Reserved."
LINK = "https://huggingface.co/spaces/DeepFloyd/deepfloyd-if-license"
FIELDS = {"license": "other", "license_name": "deepfloyd-if-license", "license_link": LINK}
IF_1 = {"base_model": "DeepFloyd/IF-I-M-v1.0", "license": "deepfloyd"}
IF_2 = {"base_model": "DeepFloyd/IF-II-M-v1.0", "license": "deepfloyd"}
KARLO = {"base_model": "kakaobrain/karlo-v1-alpha", "license": "karlo"}


def split(card: str) -> tuple[dict, str]:
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What the loggers of pipelines warn of."""
    found = []
    origin.warn_of_missing_filter.cache_clear()
    for module in (origin, model_card):
        monkeypatch.setattr(module.logger, "warning", found.append)
    return found


def test_a_saved_folder_has_a_card_with_the_license(base_unet, tmp_path):
    pipe = ImagenPipeline(base_unet, EDMHeunScheduler(), origin=IF_1)
    pipe.save_pretrained(tmp_path / "mine")
    header, body = split((tmp_path / "mine" / "README.md").read_text())
    assert header == {
        "base_model": "DeepFloyd/IF-I-M-v1.0",
        **FIELDS,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "diffusers-imagen"],
    }
    assert body.count(NOTICE) == 1 and body.startswith("\n# mine\n")
    assert f"- Made from `DeepFloyd/IF-I-M-v1.0`, under the [DeepFloyd IF License]({LINK})." in body
    for words in ("non-commercial research", "are under the same license", "must not be circumvented"):
        assert words in body
    # another copy of it says the same
    again = ImagenPipeline.from_pretrained(tmp_path / "mine")
    assert again.config.origin == IF_1
    again.save_pretrained(tmp_path / "copy")
    assert split((tmp_path / "copy" / "README.md").read_text())[0] == header


def test_an_upscaler_is_tagged_as_one(sr_pipeline, tmp_path):
    sr_pipeline.register_to_config(origin=IF_2)
    sr_pipeline.save_pretrained(tmp_path / "mine")
    header, _ = split((tmp_path / "mine" / "README.md").read_text())
    assert (header["pipeline_tag"], header["tags"]) == (
        "image-to-image",
        ["image-to-image", "diffusers", "diffusers-imagen"],
    )


@pytest.mark.parametrize("cleans, package", [(True, "'diffusers-imagen[deepfloyd]'"), (False, "diffusers-imagen")])
def test_the_card_installs_what_cleaning_texts_needs(base_unet, cleans, package):
    pipe = ImagenPipeline(base_unet, EDMHeunScheduler(), clean_caption=cleans)
    assert f"```bash\npip install {package}\n```" in pipe.describe("me/mine")


def test_a_card_that_is_there_stays_and_weights_of_our_own_get_none(base_unet, tmp_path):
    ImagenPipeline(base_unet, EDMHeunScheduler()).save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own" / "README.md").exists()
    (tmp_path / "README.md").write_text("mine")
    ImagenPipeline(base_unet, EDMHeunScheduler(), origin=IF_1).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_of_several_licenses_names_the_strictest_and_lists_all(base_unet, sr_unet, tmp_path):
    schedulers = EDMHeunScheduler(), EDMHeunScheduler()
    origins = {"base": IF_1, "sr256": KARLO, "sr1024": IF_1}
    pipe = ImagenCascadePipeline(
        base_unet, schedulers[0], sr256_unet=sr_unet, sr256_scheduler=schedulers[1], origin=origins
    )
    pipe.save_pretrained(tmp_path)
    header, body = split((tmp_path / "README.md").read_text())
    assert header["base_model"] == [IF_1["base_model"], KARLO["base_model"]]
    assert {name: header[name] for name in FIELDS} == FIELDS
    assert body.count("- Made from") == 2
    assert all(license.notice in body and license.meaning in body for license in LICENSES.values())
    assert card_metadata([KARLO, IF_2]) | {"base_model": None} == {**FIELDS, "base_model": None}
    assert card_metadata([KARLO])["license"] == "creativeml-openrail-m"


def test_models_that_are_on_no_hub_are_not_in_the_metadata():
    origins = [{"base_model": "if-1", "license": "deepfloyd"}]
    assert card_metadata(origins) == FIELDS
    assert "- Made from `if-1`, under" in license_section(origins)
    assert card_metadata([{"base_model": "a/b"}]) == {"base_model": "a/b"}
    assert license_section([]) == "" and card_metadata([]) == {}


def test_the_card_of_what_was_loaded_travels_with_its_notices(base_unet, tmp_path):
    ImagenPipeline(base_unet, EDMHeunScheduler()).save_pretrained(tmp_path / "first")
    (tmp_path / "secret.png").write_bytes(b"not of the card")
    files = {
        "README.md": "---\nlicense: mit\nwidget:\n- text: a\n  output:\n    url: pictures/a.png\n---\n"
        "![b](pictures/b.jpg) ![c](../secret.png) ![d](https://example.com/d.png)\n",
        "LICENSE": "do what you like",
        "LICENSES/NOTICE.txt": "made by many",
        "pictures/a.png": "a",
        "pictures/b.jpg": "b",
        "pictures/unseen.png": "c",
        "notes.txt": "mine",
    }
    for name, content in files.items():
        (tmp_path / "first" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "first" / name).write_text(content)
    ImagenPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    found = {
        path.relative_to(tmp_path / "second").as_posix() for path in (tmp_path / "second").rglob("*") if path.is_file()
    }
    weights = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert found - weights - {"unet/diffusion_pytorch_model.safetensors"} == set(files) - {
        "pictures/unseen.png",
        "notes.txt",
    }
    for name in found & set(files):
        assert (tmp_path / "second" / name).read_text() == files[name]
    # what the folder has stays
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "README.md").write_text("mine")
    ImagenPipeline.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    assert (tmp_path / "third" / "README.md").read_text() == "mine"
    assert (tmp_path / "third" / "LICENSES" / "NOTICE.txt").read_text() == "made by many"


CARD = """\
---
license: other
base_model: me/first
tags:
- cats
---

# Mine
"""


def test_what_a_card_says_stays(messages):
    card = ModelCard(CARD)
    add_license(card, [IF_1])
    header, body = split(str(card))
    assert header == {**FIELDS, "base_model": ["me/first", IF_1["base_model"]], "tags": ["cats"]}
    assert body.startswith("\n# Mine\n\n## License\n\n- Made from") and NOTICE in body
    completed = str(card)
    add_license(card, [IF_1])  # which lacks nothing then
    assert str(card) == completed and messages == []


@pytest.mark.parametrize("named", ["mit", "deepfloyd-if-license"])
def test_another_license_of_a_card_stays_and_is_told_of(messages, named):
    card = ModelCard(CARD.replace("other", named))
    add_license(card, [IF_1])
    header, body = split(str(card))
    assert header["license"] == named and "license_name" not in header and NOTICE in body
    assert len(messages) == (named == "mit")
    assert all(re.match("The model card names the license 'mit', but the weights are under", x) for x in messages)


def test_weights_of_if_without_their_checker_are_told_of_once(base_unet, messages, tmp_path):
    parts = (base_unet, EDMHeunScheduler())
    ImagenPipeline(*parts)
    ImagenPipeline(*parts, origin=KARLO)
    ImagenPipeline(*parts, origin=IF_1, **filter_parts(watermarker=None)).save_pretrained(tmp_path)
    ImagenPipeline.from_pretrained(tmp_path)
    assert messages == []
    ImagenPipeline.from_pretrained(tmp_path, safety_checker=None)
    ImagenPipeline(*parts, origin=IF_2)
    ImagenCascadePipeline(*parts, origin={"base": {"license": "deepfloyd"}})
    assert [LINK in message and "no `safety_checker`" in message for message in messages] == [True, True]


BAD = {
    "no dict": ("DeepFloyd/IF-I-M-v1.0", "`origin` is 'DeepFloyd/IF-I-M-v1.0', but should be a dict of strings"),
    "another key": ({"licence": "karlo"}, "`key of origin` is 'licence', but should be one of 'base_model', 'license'"),
    "another license": ({"license": "mit"}, "`license of origin` is 'mit', but should be one of 'deepfloyd', 'karlo'"),
    "no license": ({"license": None}, "`license of origin` is None"),
    "no string": ({"base_model": 3}, "`base_model of origin` is 3, but should be a Hub id"),
    "a path": ({"base_model": "/data/if"}, "`base_model of origin` is '/data/if', but should be a Hub id"),
    "lines": ({"base_model": "a/b\nlicense: mit"}, "`base_model of origin` is"),
    "a cascade's": ({"base": IF_1}, "`key of origin` is 'base'"),
}  # fmt: skip


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_bad_origins(base_unet, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ImagenPipeline(base_unet, EDMHeunScheduler(), origin=given)


def test_bad_origins_of_a_cascade(base_unet):
    for given, message in (
        (
            IF_1,
            "`origin` has ['base_model', 'license'], but should have stage names among ['base', 'sr256', 'sr1024']",
        ),
        ({"base": {"license": "gpl"}}, "`license of origin of base` is 'gpl'"),
        ({"base": None}, "`origin of base` is None, but should be a dict"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ImagenCascadePipeline(base_unet, EDMHeunScheduler(), origin=given)


def test_origins_are_listed_by_stage_or_alone():
    assert list_origins(None) == list_origins({}) == list_origins({"base": {}}) == []
    assert list_origins(IF_1) == list_origins({"sr256": IF_1}) == [IF_1]
