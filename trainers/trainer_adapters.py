"""Fine-tuning with bottleneck adapters (Houlsby et al., 2019, arXiv 1902.00751).

Trained are adapters, LayerNorms and the head, by the official optimizer: decoupled decay on the matrices of adapters
and head and on nothing else, no bias correction, gradients clipped by their norm over what is trained. What a run
leaves is a folder of PEFT's that holds the trained tensors alone.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.modeling_adapters import AdaptersPreTrainedModel
from ..peft_methods import HALF, save_adapter
from .finetuning import FinetuneTrainer, FinetuneTrainingArguments


logger = logging.get_logger(__name__)


@dataclass
class AdaptersTrainingArguments(FinetuneTrainingArguments):
    """Training arguments of fine-tuning with adapters.

    Changed defaults (official code; paper, sections 3.1 and 3.2):
        optimizer: bert_adam; schedule: bert (warm-up over a share of 0.1, then linear to 0); learning_rate: 3e-4, the
        middle of the paper's {3e-5, 3e-4, 3e-3}. Batch 32, weight_decay 0.01 and max_grad_norm 1.0 are as before.
    """

    optimizer: str | None = field(default="bert_adam", metadata={"help": "Adam without bias correction."})
    schedule: str | None = field(default="bert", metadata={"help": "Linear warm-up, then linear to 0."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})


class AdaptersTrainer(FinetuneTrainer):
    """Trains a model of `AdaptersConfig`, or a PeftModel of any method, so that methods can be compared.

    Raises:
        ValueError: a model that would be trained whole, or parameters to be trained in half precision.
    """

    def __init__(
        self, model: nn.Module | None = None, args: AdaptersTrainingArguments | None = None, *rest: Any, **kwargs: Any
    ):
        args = AdaptersTrainingArguments(output_dir="runs") if args is None else args
        super().__init__(model, args, *rest, **kwargs)
        given = self.accelerator.unwrap_model(self.model)
        if not isinstance(given, AdaptersPreTrainedModel | PeftModel):
            raise ValueError(
                f"{type(self).__name__} trains adapters, but a {type(given).__name__} has none; make one by "
                "AdaptersForSequenceClassification.from_encoder(...), or by get_peft_model(model, "
                "bestiary.BottleneckAdapterConfig(task_type='SEQ_CLS'))."
            )
        for name, parameter in given.named_parameters():
            if parameter.requires_grad and parameter.dtype in HALF:
                raise ValueError(
                    f"{type(self).__name__}: {name} would be trained in {parameter.dtype}, where small updates are "
                    "rounded away; load the encoder with dtype=torch.float32 and set bf16=True, or use "
                    "get_peft_model, which trains float32 weights over an encoder in half precision."
                )

    def result_model(self) -> PreTrainedModel:
        """The model with its adapters."""
        return self.accelerator.unwrap_model(self.model)

    def save_result(self) -> None:
        """Write a folder of PEFT's with what was trained, the tokenizer, the card and the plot to `args.output_dir`.

        A model that was not made from a checkpoint is saved whole instead, and so is one of our classes whose
        parameters are sharded (FSDP, DeepSpeed).
        """
        model: Any = self.result_model()
        folder = str(self.args.output_dir)
        if not self._saves_adapter():
            logger.warning(f"{type(model).__name__} is saved whole: it was not made from a checkpoint, or is sharded.")
        if isinstance(model, PeftModel) or not self._saves_adapter():
            self.save_model()
        elif self.args.should_save:
            save_adapter(model, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        self.create_model_card()

    def _saves_adapter(self) -> bool:
        model: Any = self.result_model()
        if isinstance(model, PeftModel):
            return True
        return bool(model.wrapped.name_or_path) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        with _card_left_alone(Path(output_dir or str(self.args.output_dir)) / "README.md"):
            super()._save(output_dir, state_dict)

    def card_info(self) -> dict[str, Any]:
        """Also how to load an adapter's folder."""
        info = super().card_info()
        model: Any = self.result_model()
        if isinstance(model, PeftModel):
            info["slug"] = "adapters" if model.peft_type == "BOTTLENECK" else None
        return info | ({"loading": _loading(model)} if self._saves_adapter() else {})


def _loading(model: Any) -> str:
    """Text of a card on how to load an adapter's folder."""
    config, inner = model.config, model.get_base_model() if isinstance(model, PeftModel) else model.wrapped
    name = f"AutoModel{type(inner).__name__[type(inner).__name__.find('For') :]}"
    labels = {} if config.num_labels == 2 and "LABEL_0" in config.label2id else {"id2label": config.id2label}
    options = "".join(f", {key}={value!r}" for key, value in labels.items())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in inner.parameters())
    return (
        f"The file holds what was trained, {trained:,} numbers ({100 * trained / whole:.2f} % of the model); the rest "
        "comes from the checkpoint that training started from, as `adapter_config.json` names it.\n\n"
        f"```python\nimport bestiary  # registers the method with PEFT\nfrom transformers import {name}\n\n"
        f'model = {name}.from_pretrained("path/to/this/folder"{options})\n```\n\n'
        "`peft.PeftModel.from_pretrained(model, folder)` puts it onto a model of your own, and "
        f"`bestiary.load_adapter` makes one of the classes of bestiary from it."
    )


@contextlib.contextmanager
def _card_left_alone(path: Path) -> Iterator[None]:
    """PEFT writes a card of its own with every save, also over one that is there."""
    before = path.read_bytes() if path.exists() else None
    try:
        yield
    finally:
        if before is not None:
            path.write_bytes(before)
        else:
            path.unlink(missing_ok=True)
