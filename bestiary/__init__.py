"""bestiary: published Transformer papers as HuggingFace models, trainers and recipes.

`import bestiary` registers every paper with transformers' auto classes. Trainers, data and adapters are loaded on
first use.
"""

import importlib
from typing import Any

from . import papers as _papers  # noqa: F401  registers
from ._version import __version__
from .modeling.layers.pretrained import BestiaryPreTrainedModel
from .peft_hook import register_methods, when_imported
from .registry import Paper, get_paper, list_papers, register


_LAZY = {
    "BestiaryTrainer": ".trainers.base",
    "BestiaryTrainingArguments": ".trainers.arguments",
    "export_checkpoint": ".export",
    "convert_checkpoint": ".conversion",
    "BottleneckAdapterConfig": ".peft_methods",
    "save_adapter": ".peft_methods",
    "load_adapter": ".peft_methods",
    "adapters_off": ".modeling.layers.bottleneck",
}

__all__ = ["Paper", "__version__", "get_paper", "list_papers", "register", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _write_code_and_card(model: Any, folder: Any) -> None:
    from .export import write_code_and_card

    write_code_and_card(model, folder)


BestiaryPreTrainedModel.save_hook = staticmethod(_write_code_and_card)
when_imported("peft", register_methods)
