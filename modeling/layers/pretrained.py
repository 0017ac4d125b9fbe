"""Base class of every bestiary model: saving that never leaves a half-written checkpoint behind."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from huggingface_hub import HfApi, ModelCard
from transformers import PreTrainedModel


class BestiaryPreTrainedModel(PreTrainedModel):
    """`PreTrainedModel` whose `save_pretrained` writes beside the target and moves the finished files into place.

    A full disk or a kill in the middle of a save leaves the checkpoint that was there before as it was.

    `save_hook(model, folder)`, if set, adds files to every saved folder before the move. The package sets it to write
    the flat code and the model card; in exported code it stays None and transformers' own copying of remote code
    applies.
    """

    save_hook: ClassVar[Callable[[PreTrainedModel, Path], None] | None] = None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save weights, configuration, code and card to a folder; arguments as in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: `save_directory` is a file.
            OSError: the folder cannot be written; what it held before is untouched.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{type(self).__name__}.save_pretrained needs a folder, but {target} is a file.")
        hub_arguments = {
            name: kwargs.pop(name)
            for name in ("repo_id", "commit_message", "private", "create_pr", "revision")
            if name in kwargs
        }
        stage = target.parent / f".{target.name}.partial"
        writes = self.should_save_on_this_rank(is_main_process)
        if writes:
            shutil.rmtree(stage, ignore_errors=True)  # left behind by a save that was killed
        try:
            super().save_pretrained(stage, is_main_process=is_main_process, **kwargs)
            if writes:
                if type(self).save_hook is not None:
                    type(self).save_hook(self, stage)
                _move_into_place(stage, target)
        finally:
            if writes:
                shutil.rmtree(stage, ignore_errors=True)
        if push_to_hub and writes:
            self.push_to_hub(hub_arguments.pop("repo_id", target.name), token=kwargs.get("token"), **hub_arguments)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Upload weights, configuration, code and card; keywords as in `PreTrainedModel.push_to_hub`.

        transformers would put its empty template in the place of our card. A card that the repository has is kept.
        """
        if type(self).save_hook is None:
            return super().push_to_hub(repo_id, **kwargs)
        api = HfApi(token=kwargs.pop("token", None), library_name="transformers")
        repo_id = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
        tags = kwargs.pop("tags", None) or []
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=kwargs.pop("max_shard_size", "50GB"))
            path = Path(folder) / "README.md"
            if api.file_exists(repo_id, path.name, revision=kwargs.get("revision")):
                path.unlink()
            elif tags:
                card = ModelCard.load(path)
                card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
                card.save(path)
            kwargs = {"commit_message": "Upload model"} | {
                key: value for key, value in kwargs.items() if value is not None
            }
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


def _move_into_place(stage: Path, target: Path) -> None:
    """Move every file of `stage` to `target`, weights last, and drop weight shards of an earlier save."""
    target.mkdir(parents=True, exist_ok=True)
    written = sorted(
        (path for path in stage.rglob("*") if path.is_file()), key=lambda path: path.suffix == ".safetensors"
    )
    for path in written:
        destination = target / path.relative_to(stage)
        if path.name == "README.md" and destination.exists():
            continue  # a card that is there stays: it may have been edited
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, destination)
    names = {path.name for path in written}
    if any(name.endswith(".safetensors") for name in names):
        for stale in target.glob("model*.safetensors*"):
            if stale.name not in names:
                stale.unlink()
