"""Model cards, uploaded to the Hub with a pipeline, and saved beside weights that are under a license."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import ModelCard, create_repo, file_exists
from torch import nn
from transformers import PreTrainedModel

from ..utils.files import check_folder, whole_file
from ..utils.modules import refuse_adapters, remove_earlier_weights, unwrapped
from .card_files import CARD_FILE, copy_card, find_card_folder
from .origin import card_metadata, license_section, licenses_of, list_origins
from .stages import Stage


logger = logging.get_logger(__name__)

UNKNOWN = "unknown"  # the Hub's value for an unknown license
TAGS = ["diffusers", "diffusers-imagen"]  # after the task
CARD = """\
# {name}

{title} for [diffusers-imagen]({package}), an extension of diffusers: Imagen
([arXiv 2205.11487](https://arxiv.org/abs/2205.11487)), diffusion in pixel space.

```bash
pip install {package_name}
```

```python
import torch
import diffusers_imagen  # lets diffusers find the classes
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}")
image = pipe({call}generator=torch.Generator().manual_seed(0)).images[0]
image.save("image.png")
```

| part | class | parameters |
|---|---|---|
{parts}
{license}"""
PACKAGE = "https://pypi.org/project/diffusers-imagen"


def new_card(text: str) -> ModelCard:
    """Create a card with this text."""
    return ModelCard(f"---\nlibrary_name: diffusers\n---\n\n{text}")


def add_license(card: ModelCard, origins: list[dict[str, str]]) -> None:
    """Add `base_model`, the license and the notices of weights with these origins to a card that lacks them.

    A license in the card is kept; a warning is logged if it differs from that of the weights.
    """
    data: Any = card.data
    found = card_metadata(origins)
    models = found.pop("base_model", [])
    known = [data.base_model] if isinstance(data.base_model, str) else list(data.base_model or [])
    known += [model for model in ([models] if isinstance(models, str) else models) if model not in known]
    data.base_model = known[0] if len(known) == 1 else known or None
    if data.license is None:
        data.license = found.get("license")
    if found and data.license not in (found["license"], found.get("license_name")):
        logger.warning(f"The model card names the license {data.license!r}, but the weights are under {found}.")
    elif found and data.license == found["license"]:
        data.license_name = data.license_name or found.get("license_name")
        data.license_link = data.license_link or found.get("license_link")
    if not all(license.notice in card.text for license in licenses_of(origins)):
        card.text = card.text.rstrip("\n") + "\n\n" + license_section(origins)


class ModelCardMixin:
    """Mixin that writes a model card of this package instead of diffusers' empty one, and keeps existing cards.

    List it before `DiffusionPipeline` among the base classes of a pipeline.
    """

    config: Any
    components: dict[str, Any]
    text_encoder: Any
    tokenizer: Any
    _upload_folder: Callable[..., str]
    model_card_prompt = "a red apple"

    @property
    def stages(self) -> list[Stage]:
        """The pipeline's stages, in the order in which they run."""
        raise NotImplementedError

    @property
    def origins(self) -> list[dict[str, str]]:
        """The origins of the stages' weights, as far as known."""
        return list_origins(self.config.get("origin"))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> str | None:
        r"""
        Save all components to a folder. See [`DiffusionPipeline.save_pretrained`].

        The model card of the loaded pipeline is copied, with its images, licenses and notices, unless the folder has a
        card. For a pipeline with an `origin`, a new card is written if there is none, so that copies include the
        license.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, created if it does not exist.
            safe_serialization (`bool`, defaults to `True`): Whether to write safetensors files.
            variant (`str`, *optional*): Added to the file names of the weights, as in `fp16`.
            max_shard_size (`int` or `str`, *optional*): Maximum size of a file; larger weights are split.
            push_to_hub (`bool`, defaults to `False`):
                Whether to upload the folder too, with the folder's model card, or else the repository's, or else a new
                one.
            kwargs: With `push_to_hub`: `repo_id` (by default the name of the folder), `private`, `token`,
                `commit_message`, `create_pr`.

        Returns:
            The commit with `push_to_hub`, else None.

        Raises:
            ValueError: If the folder or that of a component cannot be written, or a component has LoRA adapters.
        """
        check_folder(save_directory, "save_directory")
        for name, component in self.components.items():
            if component is not None:
                check_folder(os.path.join(save_directory, name), "save_directory")
        refuse_adapters(self.components)
        hub = {name: kwargs.pop(name, None) for name in ("repo_id", "private", "token", "commit_message", "create_pr")}
        if not push_to_hub:
            self._save_components(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
            self.copy_card(save_directory)
            path = Path(save_directory, CARD_FILE)
            if self.origins and not path.exists():
                name = Path(save_directory).resolve().name
                self.write_card(new_card(self.describe(name)), path)
            return None
        repo_id, private = hub.pop("repo_id") or Path(save_directory).resolve().name, hub.pop("private")
        repo_id = create_repo(repo_id, private=private, token=hub["token"], exist_ok=True).repo_id
        self._save_components(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        self.copy_card(save_directory, repo_id, hub["token"])
        self.save_model_card(save_directory, repo_id, hub["token"])
        return self._upload_folder(save_directory, repo_id, **{**hub, "create_pr": bool(hub["create_pr"])})

    def _save_components(
        self, folder: str | os.PathLike, safe_serialization: bool, variant: str | None, *args: Any, **kwargs: Any
    ) -> None:
        """Save like diffusers' `save_pretrained`, and delete the weights that this replaces."""
        super().save_pretrained(folder, safe_serialization, variant, *args, **kwargs)  # type: ignore[misc]  # of DiffusionPipeline
        for name, component in self.components.items():
            module = unwrapped(component)
            if isinstance(module, nn.Module):
                is_safe = safe_serialization or isinstance(module, PreTrainedModel)  # which has no other format
                remove_earlier_weights(module, Path(folder, name), variant, is_safe)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        r"""
        Upload all components, with the repository's model card, or else the card of the loaded pipeline, with its
        licenses and notices, or else a new one.

        Args:
            repo_id (`str`): Repository, `name` or `user/name`, created if it does not exist.
            commit_message (`str`, *optional*): `Upload` and the name of the class if None.
            private (`bool`, *optional*): Whether a new repository is private; the account's default if None.
            token (`str`, *optional*): Hub token; that of `hf auth login` if None.
            create_pr (`bool`, defaults to `False`): Whether to open a pull request instead.
            safe_serialization (`bool`, defaults to `True`): Whether to write safetensors files.
            variant (`str`, *optional*): Added to the file names of the weights, as in `fp16`.
            subfolder (`str`, *optional*):
                Folder of the repository to upload to; the repository's card is then not changed.

        Returns:
            The commit.

        Raises:
            ValueError: If a component has LoRA adapters.
        """
        refuse_adapters(self.components)
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            if subfolder is None:
                super().save_pretrained(folder, safe_serialization, variant)  # type: ignore[misc]  # of DiffusionPipeline
                self.copy_card(folder, repo_id, token)
                self.save_model_card(folder, repo_id, token)
            else:
                self.save_pretrained(folder, safe_serialization, variant)
            return self._upload_folder(
                folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr, subfolder=subfolder
            )

    def copy_card(self, folder: str | os.PathLike, repo_id: str | None = None, token: str | None = None) -> None:
        """Copy the loaded pipeline's card, with its images, licenses and notices, to a folder.

        Args:
            folder (`str` or `os.PathLike`): Folder, in which existing files are kept.
            repo_id (`str`, *optional*): Repository that the folder is uploaded to; its own card, if any, is kept.
            token (`str`, *optional*): Hub token.
        """
        source = find_card_folder(self.config.get("_name_or_path"), token)
        if source is None or source.resolve() == Path(folder).resolve():
            return
        has_card = repo_id is not None and file_exists(repo_id, CARD_FILE, token=token)
        copy_card(source, Path(folder), with_card=not has_card)

    def save_model_card(self, folder: str | os.PathLike, repo_id: str, token: str | None = None) -> None:
        """Complete the folder's card, or else the repository's, or else a new one, and write it to the folder.

        The content of a card is kept; a missing `library_name`, `pipeline_tag` and tags are added, and the entries
        that the licenses of the weights require.
        """
        path = Path(folder, CARD_FILE)
        card = load_or_create_model_card(
            str(path) if path.is_file() else repo_id,
            token=token,
            model_description=self.describe(repo_id),
            is_modular=True,  # the description is the whole card: other templates have placeholders
        )
        self.write_card(card, path)

    def write_card(self, card: ModelCard, path: Path) -> None:
        """Complete a card, and write it."""
        data: Any = card.data
        task = "image-to-image" if self.stages[0].unet.takes_low_res else "text-to-image"
        populate_model_card(card, tags=[tag for tag in (task, *TAGS) if tag not in (data.tags or [])])
        data.pipeline_tag = data.pipeline_tag or task
        if data.license == UNKNOWN:  # written by `data.license or UNKNOWN` below, before the license was known
            data.license = None
        add_license(card, self.origins)
        data.license = data.license or UNKNOWN
        with whole_file(path) as partial:
            card.save(partial)

    def describe(self, repo_id: str) -> str:
        """Return the text of a new card: a runnable example, and a table of the components."""
        modules: dict[str, Any] = {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}
        parts = (
            f"| `{name}` | {type(module).__name__} | {module.num_parameters() / 1e6:,.1f} M |"
            for name, module in modules.items()
        )
        return CARD.format(
            name=repo_id.split("/")[-1],
            title=type(self).__name__,
            package=PACKAGE,
            package_name="'diffusers-imagen[deepfloyd]'" if self.config.get("clean_caption") else "diffusers-imagen",
            repo_id=repo_id,
            call=self.model_card_call(),
            parts="\n".join(parts),
            license="\n" + section if (section := license_section(self.origins)) else "",
        )

    def model_card_call(self, prompt: str | None = None) -> str:
        """
        Return the arguments of the example: a prompt, or embeddings without a text encoder; and an image to upscale.

        Args:
            prompt (`str`, *optional*): As a Python literal. If None, and with a text encoder, a prompt that suits any
                model.
        """
        unet = self.stages[0].unet
        width = unet.text_width
        arguments = []
        if prompt is None and self.text_encoder is not None and self.tokenizer is not None:
            prompt = f'"{self.model_card_prompt}"'
        if width is not None and prompt is not None:
            arguments.append(prompt)
        elif width is not None:
            for name in ("prompt", "negative_prompt") if unet.attends_padding else ("prompt",):
                arguments += [f"{name}_embeds=torch.zeros(1, 1, {width})", f"{name}_attention_mask=torch.ones(1, 1)"]
        if unet.takes_low_res:
            low_resolution = unet.resolution // self.config.scale_factor
            arguments.append(f"image=torch.rand(3, {low_resolution}, {low_resolution})")
        return "".join(f"{argument}, " for argument in arguments)
