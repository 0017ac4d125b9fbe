"""Our methods inside PEFT: `get_peft_model(model, BottleneckAdapterConfig(...))` on any encoder.

PEFT's list of methods is an enumeration that nobody else can extend. What it looks methods up by are dictionaries,
though, and a string that also has the enumeration's `value` and `name` is as good a key: see `register_peft_method`.
After `import bestiary` (see `peft_hook`) the rest is PEFT's own: `get_peft_model`, `save_pretrained`,
`PeftModel.from_pretrained`, `AutoPeftModel...`, `model.add_adapter`, `set_adapter`, `disable_adapter`, and
`AutoModelForSequenceClassification.from_pretrained(folder of an adapter)`. Mixed batches (`adapter_names=`) are not
supported, nor is merging: an adapter is not linear in its input.
"""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .configuration.configuration_adapters import LOCATIONS, AdaptersConfig, check_adapter_settings
from .modeling.layers.bottleneck import (
    Bottleneck,
    Switchable,
    adapter_sites,
    apply_bottleneck,
    build_activation,
    fresh_modules,
    init_bottleneck,
    is_layer_norm,
)
from .modeling.layers.wrapping import layer_list
from .modeling.modeling_adapters import AdaptersPreTrainedModel


HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""PEFT's tasks whose models have a new head."""
HALF = (torch.float16, torch.bfloat16)


class MethodName(str):
    """Name of a PEFT method, with what PEFT and transformers read of a member of `PeftType`."""

    @property
    def value(self) -> str:
        """The plain name."""
        return str(self)

    @property
    def name(self) -> str:
        """The plain name."""
        return str(self)


def register_peft_method(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> MethodName:
    """Make a method known to PEFT.

    Args:
        name: in capitals; `config` sets it as its `peft_type`. transformers deletes adapters by `<name>_` in small
            letters, so this must be the prefix of the tuner's parameters.
        config: dataclass of the settings, without prompt learning.
        tuner: class that puts the method's layers into a model.

    Raises:
        ValueError: the name or the prefix is taken, or they do not fit each other.
    """
    if name in PEFT_TYPE_TO_CONFIG_MAPPING or tuner.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise ValueError(
            f"register_peft_method: PEFT has a method {name!r} or a prefix {tuner.prefix!r} already; choose others."
        )
    if not name.isupper() or tuner.prefix != f"{name.lower()}_":
        raise ValueError(
            f"register_peft_method: the name must be in capitals and {tuner.__name__}.prefix the same in small "
            f"letters with an underscore; got {name!r} and {tuner.prefix!r}."
        )
    key: Any = MethodName(name)
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix
    return key


@dataclass
class BottleneckAdapterConfig(PeftConfig):
    """Bottleneck adapters (Houlsby et al., 2019) as a PEFT method; the settings are those of `AdaptersConfig`.

    With `task_type` SEQ_CLS, TOKEN_CLS or QUESTION_ANS the head, which is everything outside the encoder, is trained
    and saved too, and so is what the checkpoint of the encoder lacked (a pooler).

    Args:
        adapter_size: width of the bottleneck.
        adapter_act: its activation, by transformers' name.
        adapter_init_std: deviation of the initial matrices.
        adapter_locations: after which sub-layers, "attention" and "output".
        train_layer_norm: train a copy of every LayerNorm of the encoder.
        target_modules: names or regular expression of the modules behind which adapters go, in place of
            `adapter_locations`; by default found from the model, and filled in. Behind a linear map or an embedding
            an adapter is as wide as its output, behind other modules as wide as the encoder.
        exclude_modules: names or regular expression of modules that are passed over.
        modules_to_save: further modules that are trained and saved whole.

    Raises:
        ValueError: a value out of range.
    """

    adapter_size: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    adapter_act: str = field(default="gelu_new", metadata={"help": "Activation, by transformers' name."})
    adapter_init_std: float = field(default=1e-2, metadata={"help": "Deviation of the initial matrices."})
    adapter_locations: list[str] = field(
        default_factory=lambda: list(LOCATIONS), metadata={"help": "After which sub-layers: attention, output."}
    )
    train_layer_norm: bool = field(default=True, metadata={"help": "Train every LayerNorm of the encoder."})
    target_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Modules behind which adapters go; by default found from the model."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that are passed over."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = MethodName("BOTTLENECK")
        if isinstance(self.adapter_locations, tuple | set):
            self.adapter_locations = list(self.adapter_locations)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        check_adapter_settings(
            type(self).__name__, self.adapter_size, self.adapter_act, self.adapter_init_std, self.adapter_locations
        )
        if type(self.train_layer_norm) is not bool:
            raise ValueError(
                f"{type(self).__name__}.train_layer_norm must be true or false; got {self.train_layer_norm!r}."
            )


class BottleneckTunerLayer(Switchable, BaseTunerLayer):
    """What the two kinds of layers share: one set of parameters per adapter, at most one of them in use."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter = []

    def adapter_in_use(self) -> str | None:
        """Name of the adapter that the next call applies, if any.

        Raises:
            ValueError: several are active.
        """
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.known()]
        if len(names) > 1:
            raise ValueError(
                f"{type(self).__name__}: {', '.join(names)} are active, but bottleneck adapters are used one at a "
                "time; call set_adapter with one name."
            )
        return names[0] if names else None

    def known(self) -> nn.ModuleDict:
        """Modules of this layer by adapter."""
        return getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, config: BottleneckAdapterConfig, width: int, like: torch.Tensor) -> None:
        """Add the parameters of an adapter, on the device and of the type of a parameter beside it."""
        raise NotImplementedError


class BottleneckLayer(BottleneckTunerLayer):
    """A module and the adapters behind it: (..., D) -> (..., D).

    Args:
        base_layer: the module.
        place: its name in the model, for messages.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_act",)

    def __init__(self, base_layer: nn.Module, place: str):
        super().__init__(base_layer)
        self.place = place
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_act = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: BottleneckAdapterConfig, width: int, like: torch.Tensor) -> None:
        down = nn.Linear(width, config.adapter_size, device=like.device)
        up = nn.Linear(config.adapter_size, width, device=like.device)
        init_bottleneck(down, up, config.adapter_init_std)
        self.bottleneck_down[adapter_name] = down.to(like.dtype)
        self.bottleneck_up[adapter_name] = up.to(like.dtype)
        self.bottleneck_act[adapter_name] = build_activation(config.adapter_act)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        states = self.base_layer(*args, **kwargs)
        name = self.adapter_in_use()
        if name is None or self.bypassed:
            return states
        width = self.bottleneck_down[name].in_features
        if not isinstance(states, torch.Tensor) or states.shape[-1] != width:
            found = f"is {states.shape[-1]} wide" if isinstance(states, torch.Tensor) else "is no single tensor"
            raise ValueError(
                f"BottleneckAdapterConfig.target_modules: the adapter behind {self.place}, a "
                f"{type(self.base_layer).__name__}, is for states {width} wide, but what that returns {found}; name "
                "the module before or behind it."
            )
        return apply_bottleneck(
            states, self.bottleneck_down[name], self.bottleneck_act[name], self.bottleneck_up[name]
        )


class BottleneckNormLayer(BottleneckTunerLayer):
    """A LayerNorm and its trained copies: (..., D) -> (..., D)."""

    adapter_layer_names = ("bottleneck_norm",)

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.bottleneck_norm = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: BottleneckAdapterConfig, width: int, like: torch.Tensor) -> None:
        self.bottleneck_norm[adapter_name] = copy.deepcopy(self.base_layer).requires_grad_(True)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        name = self.adapter_in_use()
        if name is None:
            return self.base_layer(states)
        norm: Any = self.bottleneck_norm[name]
        if states.dtype == norm.weight.dtype or torch.is_autocast_enabled(states.device.type):
            return norm(states)
        return norm(states.to(norm.weight.dtype)).to(states.dtype)


class BottleneckAdapterModel(BaseTuner):
    """Puts bottleneck adapters and trained LayerNorms into a model; `get_peft_model` makes it."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Fill in what depends on the model: places of adapters, names of LayerNorms, the whole head."""
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"BottleneckAdapterConfig: adapters go into models of transformers, not into a {type(model).__name__}."
            )
        self._norms = set(_layer_norms(model)) if peft_config.train_layer_norm else set()
        if peft_config.target_modules is None:
            layers = layer_list(model)
            name = next(name for name, module in model.named_modules() if module is layers)
            sites = "|".join(map(re.escape, adapter_sites(model, peft_config.adapter_locations)))
            peft_config.target_modules = rf"{re.escape(name)}\.\d+\.({sites})"
        if peft_config.task_type in HEAD_TASKS:
            saved = list(peft_config.modules_to_save or [])
            saved += [name for name in _head(model, fresh_modules(model)) if not name.endswith(tuple(saved))]
            peft_config.modules_to_save = saved

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        return key in self._norms or check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, BottleneckTunerLayer):
            inside = (f"{current_key}.{name}" for name, _ in target.named_modules() if name)
            if both := [name for name in inside if self._check_target_module_exists(peft_config, name)]:
                raise ValueError(
                    f"BottleneckAdapterConfig.target_modules names {current_key}, a {type(target).__name__}, in which "
                    f"{both[0]} gets an adapter or a trained LayerNorm too; name modules that hold no other such."
                )
            normed = current_key in self._norms
            layer = BottleneckNormLayer(target) if normed else BottleneckLayer(target, current_key)
            setattr(parent, target_name, layer)
        near = (*parent.parameters(), *self.model.parameters())
        like = next(part for part in near if part.is_floating_point())
        width = _output_width(layer.base_layer) or self.model.config.hidden_size
        layer.update_layer(adapter_name, peft_config, width, like)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # the base class wants weights, which a dropout has not

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, which only looks whether any module fits, and LayerNorms always do.

        Raises:
            ValueError: no module is named by `target_modules`.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = (part for part in model.modules() if isinstance(part, BottleneckLayer))
        if not any(adapter_name in layer.known() for layer in layers):
            settings: Any = self.peft_config[adapter_name]
            raise ValueError(
                f"BottleneckAdapterConfig.target_modules={settings.target_modules!r} names no module of a "
                f"{type(model).__name__} that can have an adapter (trained LayerNorms and the head cannot); leave it "
                "out to have them found."
            )

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            f"{type(self).__name__}: bottleneck adapters cannot be merged, since they are not linear; keep them, or "
            "get the model without them by unload()."
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Also the head to float32: in half precision the updates of its weights would be rounded away."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for wrapper in self.model.modules() if autocast_adapter_dtype else ():
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
                module = wrapper.modules_to_save[adapter_name]
                if any(parameter.dtype in HALF for parameter in module.parameters()):
                    module.float().register_forward_pre_hook(_in_float32)


def _output_width(module: nn.Module) -> int | None:
    """Size of the last dimension of a module's output, where the module tells it."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.embedding_dim if isinstance(module, nn.Embedding) else None


def _layer_norms(model: PreTrainedModel) -> Iterator[str]:
    """Names of the LayerNorms of a model's encoder, also of those that are wrapped already."""
    encoder = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    for name, module in encoder.named_modules(prefix=prefix):
        if isinstance(module, BottleneckNormLayer) or is_layer_norm(module):
            yield name


def _head(model: PreTrainedModel, fresh: Sequence[str]) -> list[str]:
    """Names of the parts of a model with parameters that stand outside its encoder, and of those in it, by their names
    there, that are `fresh`.
    """
    encoder, prefix = model.base_model, _place_of_encoder(model)
    outside = [
        name
        for name, part in model.named_children()
        if part is not encoder and next(part.parameters(), None) is not None
    ]
    return [*outside, *(prefix + name for name, part in encoder.named_children() if name in fresh)]


def _place_of_encoder(model: PreTrainedModel) -> str:
    """What names of parts of a model's encoder begin with."""
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is model.base_model)


def _in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)


register_peft_method("BOTTLENECK", BottleneckAdapterConfig, BottleneckAdapterModel)


# -------------------------------------------------------------------------------------------- files of adapters

TASKS = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def save_adapter(model: AdaptersPreTrainedModel, folder: str | os.PathLike, base_model: str | None = None) -> None:
    """Write what was trained as a folder of PEFT's: `adapter_config.json` and `adapter_model.safetensors`.

    `PeftModel.from_pretrained(base, folder)` and, for heads that PEFT has a task for,
    `AutoModelForSequenceClassification.from_pretrained(folder)` load it, with `num_labels=...` if there are not two.

    Args:
        folder: is made if need be; files of these names are overwritten.
        base_model: name on the Hub or folder of the encoder that the adapters belong to; by default the one that the
            model was made from.

    Raises:
        ValueError: it is not known where the encoder came from.
    """
    base_model = base_model or model.wrapped.name_or_path
    if not base_model:
        raise ValueError(
            f"save_adapter: this {type(model).__name__} was not made from a checkpoint, so the adapters would have no "
            "encoder to be loaded onto; save that by to_base().save_pretrained(...) and give its place as base_model."
        )
    head = _head(model.wrapped, model.config.new_modules or ())
    settings = BottleneckAdapterConfig(
        task_type=TASKS.get(model.wrapped_auto_class.__name__),
        base_model_name_or_path=base_model,
        inference_mode=True,
        modules_to_save=head or None,
        **{name: getattr(model.config, name) for name in _SETTINGS},
    )
    state = {name: value.contiguous() for name, value in _trained(model).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    settings.save_pretrained(os.fspath(folder))


def load_adapter(
    model_class: type[AdaptersPreTrainedModel],
    folder: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    **settings: Any,
) -> AdaptersPreTrainedModel:
    """A model of our own classes from a folder of an adapter, in evaluation mode; the opposite of `save_adapter`.

    Args:
        model_class: `AdaptersForSequenceClassification`, ...
        folder: local, or a name on the Hub.
        base_model: name on the Hub or folder of the encoder to put the adapters into; by default the one that they
            were saved with. A part of it that the file of the adapter holds too (a pooler) becomes the file's.
        settings: labels (`num_labels`, `id2label`, ...).

    Raises:
        ValueError: adapters of another method, or tensors that do not fit the model, all of which are named; such as
            a pooler that neither the encoder's checkpoint nor the file has.
    """
    given = PeftConfig.from_pretrained(os.fspath(folder))
    if not isinstance(given, BottleneckAdapterConfig):
        raise ValueError(f"load_adapter: {folder} holds an adapter of the method {given.peft_type}, not BOTTLENECK.")
    method = {name: getattr(given, name) for name in _SETTINGS}
    base_model = os.fspath(base_model or given.base_model_name_or_path or "")
    if not base_model:
        raise ValueError(f"load_adapter: {folder} does not say which encoder it is for; give base_model.")
    config = AdaptersConfig.from_encoder(AutoConfig.from_pretrained(base_model), **method, **settings)
    model = model_class.from_encoder(base_model, config)
    state = load_peft_weights(os.fspath(folder), device="cpu")
    place = f"base_model.model.{_place_of_encoder(model.wrapped)}"
    for name, part in model.wrapped.base_model.named_children():
        keys = {f"{place}{name}.{key}" for key in part.state_dict()}
        if keys and keys <= state.keys():
            model.add_new_modules([name])
    wanted = _trained(model)
    wrong = sorted(state.keys() ^ wanted.keys())
    wrong += [name for name in state.keys() & wanted.keys() if state[name].shape != wanted[name].shape]
    if wrong:
        raise ValueError(
            f"load_adapter: {folder} does not fit {model_class.__name__} over {base_model}; missing, extra or of "
            f"another shape: {', '.join(wrong)}. If it is the classification layer, give num_labels."
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(state[name])
    return model.eval()


_SETTINGS = ("adapter_size", "adapter_act", "adapter_init_std", "adapter_locations", "train_layer_norm")


def _trained(model: AdaptersPreTrainedModel) -> dict[str, torch.Tensor]:
    """What the file of an adapter holds, by PEFT's names without the adapter's: adapters, LayerNorms, head."""
    wrapped, norms = model.wrapped, set(_layer_norms(model.wrapped)) if model.config.train_layer_norm else set()
    found: dict[str, torch.Tensor] = {}
    for name, part in wrapped.named_modules():
        if isinstance(part, Bottleneck):
            place = name.removesuffix("adapter") + BottleneckAdapterModel.prefix
            found |= {place + key: value for key, value in part.state_dict().items()}
        elif name in norms:
            place = f"{name}.{BottleneckAdapterModel.prefix}norm."
            found |= {place + key: value for key, value in part.state_dict().items()}
    for name in _head(wrapped, model.config.new_modules or ()):
        found |= {f"{name}.{key}": value for key, value in wrapped.get_submodule(name).state_dict().items()}
    return {f"base_model.model.{name}": value for name, value in found.items()}
