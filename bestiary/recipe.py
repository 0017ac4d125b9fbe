"""Recipes: one YAML file per paper and setting, overridden by the command line, unknown keys refused.

    slug: electra                 # paper: chooses the training arguments and the configuration
    description: one line
    model:                        # fields of the paper's configuration, or of the one that `model_type` names;
      discriminator_config:       # with `name_or_path` of a checkpoint: what is changed in its configuration, or, for
        hidden_size: 64           # a method that wraps any encoder, the method's fields, and `encoder_config`
    data:                         # fields of the script's data arguments
      dataset: demo
    training:                     # fields of the paper's training arguments
      learning_rate: 5e-4

On the command line, `--config electra_tiny` names a packaged recipe and `--config a.yaml b.yaml` files, of which the
later one wins. Overrides are `--learning_rate 1e-4`, if one section has the field, or `--training.learning_rate 1e-4`,
`--model.discriminator_config.hidden_size 32`. YAML is read by its 1.2 rules: `5e-4` is a number and `no` is a string.
"""

import difflib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

import yaml
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, TrainingArguments

from .configuration.configuration_core import WrapperConfig
from .registry import get_paper, load_object


SECTIONS = ("model", "data", "training")
METADATA = ("slug", "description")

Section: TypeAlias = type | Callable[[Mapping[str, Any]], type | None]
"""Dataclass of a section, or a function that finds it from the recipe as written (a dict of sections)."""

_MODEL_KEYS = ("model_type", "name_or_path")
_CONFIG_KEYS = ("num_labels", "attn_implementation")  # taken by every configuration, declared by none
_Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe with its overrides.

    Args:
        slug: paper, or None.
        description: one line on the setting, or None.
        model: the section `model`.
        data: instance of the script's data arguments.
        training: instance of the training arguments.
        values: all that was set but tokens of accounts, by section: what to write beside a result.
        sources: files and packaged names that were read, in order.
    """

    slug: str | None
    description: str | None
    model: dict[str, Any]
    data: Any
    training: TrainingArguments
    values: dict[str, Any]
    sources: tuple[str, ...]

    def build_config(self, **defaults: Any) -> PreTrainedConfig:
        """Configuration of the section `model`; `defaults` (`vocab_size` of a tokenizer) count where it is silent.

        Raises:
            ValueError: the recipe names no model, or changes a field that the configuration of its checkpoint lacks.
        """
        settings = defaults | self.model
        name, model_type = settings.pop("name_or_path", None), settings.pop("model_type", None)
        wrapper = wrapper_config(self.slug)
        if name is not None and wrapper is not None:
            found = AutoConfig.from_pretrained(name)
            known = {k: v for k, v in settings.items() if k in _Schema("model", wrapper).keys}
            if type(found) is wrapper:  # a checkpoint of this method: what the recipe does not say is as it was
                own = {field.name for field in fields(wrapper)} - {field.name for field in fields(PreTrainedConfig)}
                known = {key: getattr(found, key) for key in own - {"encoder_config"}} | known
                found = found.encoder_config
            if known.get("encoder_config"):
                schema = _Schema("model.encoder_config", type(found))
                path = ("model", "encoder_config")
                known["encoder_config"] = schema.convert(known["encoder_config"], path, {(): f"recipe for {name}"})
            return wrapper.from_encoder(found, **known)
        if name is not None:
            schema = _Schema("model", type(AutoConfig.from_pretrained(name)))
            schema.convert(self.model, ("model",), {(): f"recipe for {name}"})
            return AutoConfig.from_pretrained(name, **{k: v for k, v in settings.items() if k in schema.keys})
        config_class = _paper_config({"slug": self.slug, "model": {"model_type": model_type} if model_type else {}})
        if config_class is None:
            raise ValueError("The recipe names no model: give slug, model.model_type or model.name_or_path.")
        return config_class(**settings)


def load_recipe(argv: Sequence[str] | None = None, *, data: Section, training: Section | None = None) -> Recipe:
    """Read the recipe that a command line names, apply the overrides, check every key and convert every value.

    The section `model` holds fields of the configuration that `model.model_type` or else the paper names. With
    `model.name_or_path` they are checked by `Recipe.build_config`, which reads the checkpoint's configuration.

    Args:
        argv: command line without the program's name; by default that of the process. `--help` lists all fields and
            exits.
        data: dataclass of the section `data`.
        training: dataclass of the section `training`; by default the `arguments` of the paper.

    Raises:
        ValueError: an unknown, ambiguous or repeated key, a value of another type than the field's, a missing value, a
            file that does not exist or is no recipe. The message names the file or option.
    """
    configs, options = _split(sys.argv[1:] if argv is None else argv)
    values: dict[str, Any] = {}
    origins: dict[_Path, str] = {}
    for name in configs:
        _merge(values, _read(name), name, origins)
    plain = []
    for option, value in options:
        path = tuple(option.replace("-", "_").split("."))
        path = ("model", *path) if path[0] in _MODEL_KEYS else path
        if path[-1] in (*_MODEL_KEYS, *METADATA) and value == "null":
            value = None
        if path[0] in SECTIONS or option in METADATA:
            _merge(values, _nest(path, value), f"option --{option}", origins)
        elif option != "help":
            plain.append((option, path, value))

    resolvers = {"model": _paper_config, "data": data, "training": training or _paper_arguments}
    schemas = {}
    for name, found in resolvers.items():
        schemas[name] = _Schema(name, found if isinstance(found, type) else found(values))
    if any(option == "help" for option, _ in options):
        sys.stdout.write("\n".join([str(__doc__), *(schema.describe() for schema in schemas.values())]))
        raise SystemExit(0)
    for option, path, value in plain:
        path = (_owner(option, path[0], schemas), *path)
        _merge(values, _nest(path, value), f"option --{option}", origins)

    _settle_replaced(values, origins, configs, schemas)
    sections = {name: schemas[name].convert(values.get(name) or {}, (name,), origins) for name in SECTIONS}
    metadata = {key: str(values[key]) for key in METADATA if values.get(key) is not None}
    public = {
        name: {k: v for k, v in section.items() if not str(k).endswith("_token")} for name, section in sections.items()
    }
    return Recipe(
        slug=metadata.get("slug"),
        description=metadata.get("description"),
        model=sections["model"],
        data=schemas["data"].build(sections["data"]),
        training=schemas["training"].build(sections["training"]),
        values=metadata | {name: section for name, section in public.items() if section},
        sources=tuple(configs),
    )


def recipe_names(slug: str | None = None) -> list[str]:
    """Names of the packaged recipes; those of one paper if a slug is given."""
    names = sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))
    return [name for name in names if slug is None or _read(name).get("slug") == slug]


# The classes of a paper


def _paper_config(values: Mapping[str, Any]) -> type[PreTrainedConfig] | None:
    settings = values.get("model") or {}
    if settings.get("name_or_path") is not None:
        return wrapper_config(values.get("slug"))
    model_type = settings.get("model_type")
    if model_type is not None:
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"model.model_type: {_unknown('model type', str(model_type), CONFIG_MAPPING.keys())}")
        return CONFIG_MAPPING[model_type]
    return get_paper(values["slug"]).config if values.get("slug") else None


def wrapper_config(slug: str | None) -> type[WrapperConfig] | None:
    """Configuration of a paper that is a method on any encoder; None of another paper, or without one."""
    config = get_paper(slug).config if slug else None
    return config if config is not None and issubclass(config, WrapperConfig) else None


def _paper_arguments(values: Mapping[str, Any]) -> type:
    arguments = get_paper(values["slug"]).arguments if values.get("slug") else None
    return load_object(arguments or "bestiary.trainers.arguments:BestiaryTrainingArguments")


# Keys and their types


class _Schema:
    """The keys that a section, or a sub-configuration in it, may hold. Without a class it may hold any."""

    def __init__(self, name: str, cls: type | None):
        self.name = name
        self.cls = cls
        self.is_config = cls is not None and issubclass(cls, PreTrainedConfig)
        self.fields: dict[str, Field] = {field.name: field for field in fields(cls) if field.init} if cls else {}
        self.hints: dict[str, Any] = _hints(cls) if cls else {}
        extra: Iterable[str] = ()
        if self.is_config:
            extra = (*_MODEL_KEYS, *_CONFIG_KEYS, *self.cls.attribute_map)  # type: ignore[union-attr]
        self.keys = {*self.fields, *extra}

    def require(self, key: str, origin: str) -> None:
        """Raise `ValueError` if there is a class and it has no such key."""
        if self.cls is not None and key not in self.keys:
            owner = f"section {self.name} ({self.cls.__name__}) has no"
            raise ValueError(f"{origin}: {owner} {_unknown('field', key, self.keys)}")

    def convert(self, values: Mapping[str, Any], path: _Path, origins: Mapping[_Path, str]) -> dict[str, Any]:
        """`values` with every value converted to the type of its field."""
        converted = {}
        for key, value in values.items():
            origin = _origin((*path, key), origins)
            self.require(str(key), origin)
            nested = None if self.is_of_checkpoint(key, values) else self.nested(key, value)
            if nested is not None:
                converted[key] = nested.convert(value, (*path, key), origins)
                continue
            hint = self.hints.get(key, Any)
            try:
                converted[key] = _convert(value, hint)
            except TypeError as error:
                raise ValueError(f"{origin}: {'.'.join(path)}.{key} must be {_show(hint)}, got {value!r}.") from error
        return converted

    def is_of_checkpoint(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether `key` holds changes to the configuration of a checkpoint, whose type is not known here."""
        wraps = self.cls is not None and issubclass(self.cls, WrapperConfig)
        return wraps and key == "encoder_config" and values.get("name_or_path") is not None

    def nested(self, key: str, value: Any) -> "_Schema | None":
        """Keys of the sub-configuration that a configuration holds under `key`; None if `value` is no such."""
        if not self.is_config or not isinstance(value, Mapping):
            return None
        spec = self.cls.sub_configs_defaults.get(key)  # type: ignore[union-attr]
        if spec is None:
            return None
        if issubclass(spec.config_class, PreTrainedConfig):
            return _Schema(f"{self.name}.{key}", spec.config_class)
        return _Schema(
            f"{self.name}.{key}", _paper_config({"model": {"model_type": value.get("model_type", spec.model_type)}})
        )

    def build(self, values: dict[str, Any]) -> Any:
        """Instance of the class; `ValueError` if a field without a default has no value."""
        missing = [
            name
            for name, field in self.fields.items()
            if field.default is MISSING and field.default_factory is MISSING and name not in values
        ]
        if missing:
            raise ValueError(
                f"The recipe gives no {', '.join(f'{self.name}.{name}' for name in missing)}; "
                "write it in the file or on the command line."
            )
        return self.cls(**values)  # type: ignore[misc]

    def describe(self) -> str:
        """Text for `--help`."""
        lines = [f"{self.name}: {self.cls.__name__ if self.cls else 'any configuration'}"]
        inherited = {field.name for field in fields(PreTrainedConfig)} if self.is_config else set()
        for name, field in self.fields.items():
            if name in inherited:
                continue
            default = "" if field.default is MISSING else f" = {field.default!r}"
            lines.append(f"  --{self.name}.{name}: {_show(self.hints.get(name, Any))}{default}")
            if text := field.metadata.get("help"):
                lines.append(f"      {' '.join(text.split())}".replace("%%", "%"))
        return "\n".join(lines) + "\n"


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # names that the module imports for type checkers only, as transformers' configurations do
        return {field.name: Any if isinstance(field.type, str) else field.type for field in fields(cls)}


def _owner(option: str, field: str, schemas: Mapping[str, _Schema]) -> str:
    owners = [name for name, schema in schemas.items() if field in schema.keys]
    if len(owners) > 1:
        dotted = " or ".join(f"--{name}.{option}" for name in owners)
        raise ValueError(f"option --{option}: the sections {' and '.join(owners)} both have it; write {dotted}.")
    if not owners:
        keys = {key for schema in schemas.values() for key in schema.keys}
        hint = "" if schemas["model"].cls else " A field of the model is written --model.<field> here."
        raise ValueError(
            f"option --{option}: no section has {_unknown('field', field, {*keys, *SECTIONS, 'config'})}{hint}"
        )
    return owners[0]


def _unknown(kind: str, key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    return f"{kind} {key!r}" + (f"; did you mean {' or '.join(close)}?" if close else ".")


def _show(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


# Values


class _Text(str):
    """A value of the command line, whose type is not known yet."""


_NO = object()
_NUMBERS = (
    (re.compile(r"[-+]?[0-9]+(_[0-9]+)*"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


def _scalar(text: str) -> Any:
    """Value of a plain YAML 1.2 scalar. (PyYAML's own rules, 1.1, make `5e-4` a string and `no` false.)"""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for pattern, number in _NUMBERS:
        if pattern.fullmatch(text):
            return number(text)
    return text


def _typed(text: str) -> Any:
    """Value of a text of the command line: a scalar, `[a, b]` or `{key: value}`."""
    if text[:1] in ("[", "{"):
        try:
            return yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError):
            return str(text)
    return _scalar(str(text))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _typed(value) if isinstance(value, _Text) else value


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: text as the type wants it, numbers if exact. `TypeError` if it is none."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if Any in members:
        return _plain(value)
    typed = _typed(value) if isinstance(value, str) else value
    text = str(value) if isinstance(value, str) or type(value) in (int, float) else value
    for match, reading in ((_exactly, typed), (_as_number, typed), (_exactly, text), (_as_list, value)):
        for member in members:
            found = match(reading, member)
            if found is not _NO:
                return found
    raise TypeError


def _exactly(value: Any, member: Any) -> Any:
    origin, arguments = get_origin(member) or member, get_args(member)
    if origin is Literal:
        return value if any(value == choice and type(value) is type(choice) for choice in arguments) else _NO
    if origin is list and isinstance(value, list):
        return [_convert(item, (*arguments, Any)[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(item, (*arguments, Any, Any)[1]) for key, item in value.items()}
    if origin in (bool, int, float, str, types.NoneType):
        return value if type(value) is origin else _NO
    return value if isinstance(origin, type) and isinstance(value, origin) else _NO


def _as_number(value: Any, member: Any) -> Any:
    if type(value) not in (int, float):
        return _NO
    if member is float:
        return float(value)
    return int(value) if member is int and float(value).is_integer() else _NO


def _as_list(value: Any, member: Any) -> Any:
    if (get_origin(member) or member) is not list or value is None or isinstance(value, (Mapping, list)):
        return _NO
    return [_convert(value, (*get_args(member), Any)[0])]


# Files and the command line


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2, which refuses repeated keys, and aliases, which can be endless."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(f"the key {key.value!r} is repeated in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _string(loader: Any, node: Any) -> Any:
    return _scalar(node.value) if node.style is None else node.value  # quoted text stays text


_Loader.add_constructor("tag:yaml.org,2002:str", _string)


def _folder() -> Any:
    return files("bestiary.recipes")


def _read(name: str) -> dict[str, Any]:
    """Contents of a file, or of a packaged recipe if `name` is a bare name."""
    is_file = name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name
    source = Path(name) if is_file else _folder() / f"{name}.yaml"
    if not source.is_file():
        known = "" if is_file else _unknown("packaged recipe", name, recipe_names())
        raise ValueError(f"--config: there is no {known or f'file {name!r}.'} Packaged: {', '.join(recipe_names())}.")
    try:
        values = yaml.load(source.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name} is no valid YAML: {error}.") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold a mapping with the keys {', '.join((*METADATA, *SECTIONS))}.")
    for key, section in values.items():
        if key not in (*METADATA, *SECTIONS):
            raise ValueError(f"{name} has an unknown {_unknown('section', str(key), (*METADATA, *SECTIONS))}")
        if key in SECTIONS and not (section is None or isinstance(section, dict)):
            raise ValueError(f"{name}: the section {key} must be a mapping, got {section!r}.")
    return values


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Files after `--config`, and (name, value) of the other options: True without a value, a list with several."""
    configs: list[str] = []
    options: list[tuple[str, Any]] = []
    for option, texts in _options(argv):
        if option == "config":
            if not texts:
                raise ValueError("option --config: name at least one recipe.")
            configs += texts
        else:
            values = [_Text(text) for text in texts]
            options.append((option, True if not values else values[0] if len(values) == 1 else values))
    return configs, options


def _options(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    option, texts = None, []
    for token in ["--help" if token == "-h" else token for token in argv]:
        if not token.startswith("--"):
            if option is None:
                raise ValueError(f"Unexpected argument {token!r}; options start with --, recipes follow --config.")
            texts.append(token)
            continue
        if option is not None:
            yield option, texts
        option, equals, text = token[2:].partition("=")
        texts = [text] if equals else []
    if option is not None:
        yield option, texts


def _nest(path: _Path, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for the path `("a", "b")`."""
    return {path[0]: _nest(path[1:], value) if len(path) > 1 else value}


def _merge(
    values: dict[str, Any], newer: Mapping[str, Any], origin: str, origins: dict[_Path, str], path: _Path = ()
) -> None:
    """Write `newer` over `values`, mapping by mapping, and remember where each key came from."""
    for key, value in newer.items():
        here = (*path, key)
        origins[here] = origin
        if key in SECTIONS and not path and not isinstance(value, Mapping):
            if value is None:
                continue
            raise ValueError(f"{origin} names a section; write --{key}.<field>.")
        if isinstance(value, Mapping):
            if not isinstance(values.get(key), dict):
                values[key] = {}
            _merge(values[key], value, origin, origins, here)
        else:
            values[key] = value


def _settle_replaced(
    values: dict[str, Any], origins: Mapping[_Path, str], configs: Sequence[str], schemas: Mapping[str, _Schema]
) -> None:
    """Drop what a later source replaced by another field: `--train_file` takes the place of a recipe's `dataset`.

    A field names those whose place it takes in its metadata, `replaces`. If one source gives both, both stay, and the
    script refuses them.
    """

    def age(path: _Path) -> int:  # of the source: the first file is 0, the command line the last
        origin = _origin(path, origins)
        return len(configs) if origin.startswith("option --") else max(i for i, c in enumerate(configs) if c == origin)

    for name, schema in schemas.items():
        section = values.get(name) or {}
        given = [key for key, value in section.items() if key in schema.fields and _plain(value) is not None]
        for key in given:
            for other in schema.fields[key].metadata.get("replaces", ()):
                if other in given and age((name, key)) > age((name, other)):
                    section[other] = None


def _origin(path: _Path, origins: Mapping[_Path, str]) -> str:
    """Where the value at `path`, or the nearest mapping around it, was written."""
    while path not in origins:
        path = path[:-1]
    return origins[path]
