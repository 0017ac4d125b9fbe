"""Flat remote code: a saved checkpoint carries the source of its classes and loads where bestiary is not installed.

transformers copies only the file of a class and its same-folder imports, so it cannot save a package with folders.
Here the import closure of a paper's classes is collected from the sources, every file is written flat beside the
weights with its relative imports rewritten to `.basename`, and `auto_map` in `config.json` names the class of every
auto class that the paper registers. Then `AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)` needs
torch and transformers only.
"""

import ast
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .registry import Paper, list_papers, paper_of


logger = logging.getLogger(__name__)

PACKAGE = __name__.partition(".")[0]
EXPORTED_FOLDERS = ("configuration", "modeling")
ALLOWED_IMPORTS = (
    "allowed are `from .module import Name` and `from ..folder.module import Name` of modules in "
    f"{' or '.join(EXPORTED_FOLDERS)}, third-party packages and the standard library"
)
# Not copied when a trainer's checkpoint is exported to another folder: the state of the run, partly pickled.
RUN_STATE = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json")


# --------------------------------------------------------------------------------------------- sources to flat files


def flat_sources(modules: Iterable[str], package: str = PACKAGE) -> dict[str, str]:
    """Collect the import closure of some modules and rewrite it to live in one folder.

    Args:
        modules: full names, such as `"bestiary.modeling.modeling_bert"`.
        package: the package to which the closure is confined.

    Returns:
        Basename of each module, without suffix -> its rewritten source.

    Raises:
        ValueError: two modules have one basename, or a module imports in a way that cannot be made flat.
    """
    sources: dict[str, str] = {}
    names: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        basename = module.rpartition(".")[2]
        if names.setdefault(basename, module) != module:
            both = f"{names[basename]} and {module}"
            raise ValueError(f"Flat export: {both} would both become {basename}.py; rename one of the two files.")
        if basename not in sources:
            sources[basename], imported = _flatten(module, package)
            waiting += imported
    return dict(sorted(sources.items()))


def _flatten(module: str, package: str) -> tuple[str, list[str]]:
    """Source of a module with relative imports rewritten to `.basename`; full names of what it imports relatively."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
        raise ValueError(f"Flat export: {module} is no single module with a source file; {ALLOWED_IMPORTS}.")
    source = Path(spec.origin).read_bytes()
    lines = source.splitlines(keepends=True)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    pieces, imported, done = [], [], 0
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Import) or node.level == 0:
            _refuse_own_package(node, module, package)
            continue
        target = _resolve(node, module, package)
        start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset  # both count bytes
        statement = re.compile(rb"from\s+\.+[\w.]+\s+import\b").match(source, start)
        if statement is None:
            raise _import_error(node, module, "is broken over lines before `import`")
        pieces += [source[done:start], f"from .{target.rpartition('.')[2]} import".encode()]
        done = statement.end()
        imported.append(target)
    flat = b"".join([*pieces, source[done:]]).decode()
    # transformers finds the files that it must fetch by this pattern, which also matches inside docstrings.
    seen = set(re.findall(r"^\s*(?:from|import)\s+\.(\S+)", flat, flags=re.MULTILINE))
    if phantom := sorted(seen - {target.rpartition(".")[2] for target in imported}):
        raise ValueError(
            f"Flat export: a line of text in {module} reads like a relative import of {', '.join(phantom)}, and "
            "transformers would look for that file; begin the line with another word."
        )
    return flat, imported


def _import_error(node: ast.Import | ast.ImportFrom, module: str, problem: str) -> ValueError:
    statement = f"`{ast.unparse(node)}` in line {node.lineno} of {module}"
    return ValueError(f"Flat export: {statement} {problem}; {ALLOWED_IMPORTS}.")


def _refuse_own_package(node: ast.Import | ast.ImportFrom, module: str, package: str) -> None:
    named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    if {name.partition(".")[0] for name in named} & {package, "configuration", "modeling", "trainers"}:
        raise _import_error(node, module, f"imports {package} absolutely")


def _resolve(node: ast.ImportFrom, module: str, package: str) -> str:
    """Full name of the module that a relative import names."""
    if node.module is None:
        raise _import_error(node, module, "names no module")
    try:
        target = importlib.util.resolve_name("." * node.level + node.module, module.rpartition(".")[0])
    except ImportError as error:
        raise _import_error(node, module, f"leaves {package}") from error
    if not _is_exported(target, package):
        raise _import_error(node, module, f"imports {target}")
    return target


def _is_exported(module: str, package: str = PACKAGE) -> bool:
    return module.startswith(tuple(f"{package}.{folder}." for folder in EXPORTED_FOLDERS))


# --------------------------------------------------------------------------------------------- models to flat code


def write_flat_code(model_or_config: PreTrainedModel | PreTrainedConfig, folder: str | os.PathLike) -> list[Path]:
    """Write the source of a model's classes into a saved checkpoint and name them in its `config.json`.

    All auto classes that the paper registers are named, so a pre-training checkpoint also loads as a classifier. If a
    sub-configuration is of another bestiary paper, the files of that paper come along and are registered on import.
    Writing twice gives the same bytes.

    Args:
        model_or_config: a model or configuration of a registered paper.
        folder: a folder with the `config.json` of that model.

    Returns:
        The code files written.

    Raises:
        ValueError: no registered paper has this configuration, a class lives outside the package, or its file cannot
            be made flat.
    """
    folder = Path(folder)
    given = type(model_or_config)
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    _refuse_foreign(given)
    paper = _paper_of_type(config.model_type)
    if paper is None:
        raise ValueError(
            f"Flat export: {given.__name__} has the model_type {config.model_type!r}, which no registered paper has "
            f"(there are {', '.join(list_papers())}). Add one with bestiary.register."
        )
    inner = {name: found for name, found in _inner_papers(config.to_dict()).items() if found is not paper}
    classes = [given, *(cls for each in (paper, *inner.values()) for cls in (each.config, *each.models.values()))]
    for cls in classes:
        _refuse_foreign(cls)
    sources = flat_sources(dict.fromkeys(cls.__module__ for cls in classes))
    for _, each in sorted(inner.items()):
        for_config, for_models = _registration(each)
        sources[_basename(paper.config)] += for_config
        for main in {_basename(cls) for cls in paper.models.values()}:
            sources[main] += for_models

    written = []
    for basename, text in sources.items():
        written.append(folder / f"{basename}.py")
        written[-1].write_text(text, encoding="utf-8")
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _drop_inner_auto_maps(saved)
    auto_classes = {"AutoConfig": paper.config, **paper.models}
    saved["auto_map"] = {name: f"{_basename(cls)}.{cls.__name__}" for name, cls in auto_classes.items()}
    (folder / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return written


def write_code_and_card(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """What `save_pretrained` adds to weights and configuration: flat code, and a card if there is none.

    A model whose code cannot travel (a user's own class, or one wrapped in ours) is saved without it and with a
    warning: it must not be lost after its training.
    """
    try:
        write_flat_code(model, folder)
    except ValueError as error:
        logger.warning("%s is saved without its code. %s", type(model).__name__, error)
    _write_card_if_none(model, folder)


def _write_card_if_none(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    from .cards import write_model_card

    if not (Path(folder) / "README.md").exists():
        write_model_card(folder, model=model)


def _paper_of_type(model_type: str | None) -> Paper | None:
    return paper_of(SimpleNamespace(model_type=model_type))


def _refuse_foreign(cls: type) -> None:
    if not _is_exported(cls.__module__):
        raise ValueError(
            f"Flat export: the class {cls.__name__} is defined in the module {cls.__module__!r}, outside {PACKAGE}: "
            "its source cannot be collected. Publish that module as a package that users import before loading, or "
            f"move the class into {PACKAGE}.{f' or {PACKAGE}.'.join(EXPORTED_FOLDERS)} and register it."
        )


def _inner_papers(config: dict[str, Any]) -> dict[str, Paper]:
    """Papers of the sub-configurations at any depth, by `model_type`. Stock types are no papers and need no code."""
    found: dict[str, Paper] = {}
    for value in config.values():
        if isinstance(value, dict):
            if (paper := _paper_of_type(value.get("model_type"))) is not None:
                found[paper.config.model_type] = paper
            found |= _inner_papers(value)
    return found


def _basename(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


def _registration(inner: Paper) -> tuple[str, str]:
    """Code for the ends of the exported configuration and modeling files that makes a sub-configuration's type known.

    For a local folder transformers imports the configuration file twice, once by itself and once beside the modeling
    file, and so makes two classes of it. The one that was registered first, and that the configuration in hand is made
    of, stays; only a class of other source code (another checkpoint, of another version) takes its place.
    """
    name, model_type = inner.config.__name__, inner.config.model_type
    comment = f"\n\n# Added by the flat export: a sub-configuration has the type {model_type}.\n"
    import_config = f"from .{_basename(inner.config)} import {name}\n"
    for_config = f"""{comment}import inspect

import transformers

{import_config}

if "{model_type}" not in transformers.CONFIG_MAPPING or (
    inspect.getsource(transformers.CONFIG_MAPPING["{model_type}"]) != inspect.getsource({name})
):
    transformers.AutoConfig.register("{model_type}", {name}, exist_ok=True)
"""
    import_models = "".join(
        sorted({f"from .{_basename(cls)} import {cls.__name__}\n" for cls in inner.models.values()})
    )
    calls = "".join(
        f"    transformers.{auto_name}.register(_config, {cls.__name__}, exist_ok=True)\n"
        for auto_name, cls in sorted(inner.models.items())
    )
    for_models = f"""{comment}import transformers

{import_config}{import_models}

for _config in {{{name}, transformers.CONFIG_MAPPING["{model_type}"]}}:
{calls}"""
    return for_config, for_models


def _drop_inner_auto_maps(config: dict[str, Any]) -> None:
    """Forget where a wrapped encoder of ours was loaded from: its code is in this folder now."""
    for value in config.values():
        if isinstance(value, dict):
            if _paper_of_type(value.get("model_type")) is not None:
                value.pop("auto_map", None)
            _drop_inner_auto_maps(value)


# --------------------------------------------------------------------------------------------- exporting a checkpoint

_BLOCK_PACKAGE = f"""
import importlib.abc, sys

class _Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {PACKAGE!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, _Blocked())
try:
    import {PACKAGE}
except ModuleNotFoundError:
    pass
else:
    sys.exit("{PACKAGE} can still be imported: this process proves nothing")
"""

_LOAD = """
import json, pathlib, sys
import torch, transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, auto_name = sys.argv[1:]
for reference in json.loads((pathlib.Path(folder) / "config.json").read_text())["auto_map"].values():
    get_class_from_dynamic_module(reference, folder)
auto_class = getattr(transformers, auto_name)
if any(pathlib.Path(folder).glob("*.safetensors")):
    model, report = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    if wrong := {key: sorted(map(str, value)) for key, value in report.items() if value}:
        sys.exit(f"the weights do not fit {type(model).__name__}: {wrong}")
else:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=True)
if not type(model).__module__.startswith("transformers_modules."):
    sys.exit(f"{type(model).__name__} came from {type(model).__module__}, not from the exported code")
"""


def run_without_package(
    code: str, *arguments: str | os.PathLike, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process, in an empty folder and with fresh caches, where bestiary cannot be imported.

    Args:
        code: the program.
        arguments: its `sys.argv[1:]`.
        env: environment of the process; None takes this one's and forbids the Hub client to use the network.

    Returns:
        The finished process with its output as text. A failure does not raise: look at `returncode`.
    """
    with tempfile.TemporaryDirectory(prefix="clean-") as folder:
        if env is None:
            env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hf_home"}
        env = env | {"HF_MODULES_CACHE": f"{folder}/modules"}
        command = [sys.executable, "-P", "-c", _BLOCK_PACKAGE + code, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def export_checkpoint(checkpoint: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Add flat code and a card to a checkpoint and prove that it loads without bestiary.

    The work is done beside the target, and nothing is changed unless a process without bestiary could load the result.

    Args:
        checkpoint: folder with `config.json` and, usually, safetensors weights.
        output: folder for an exported copy, new or empty; None adds to `checkpoint` itself. A copy leaves out the
            state of the training run (optimizer, schedule, random states).

    Returns:
        The exported folder.

    Raises:
        ValueError: there is no checkpoint, its class is unknown or lives outside the package, the output is not empty,
            or the result does not load in a process without bestiary (missing or misfitting weights included).
    """
    source = Path(checkpoint).absolute()
    target = source if output is None else Path(output).absolute()
    if not (source / "config.json").is_file():
        raise ValueError(
            f"bestiary export: {checkpoint} has no config.json, so it is no checkpoint; name a folder that "
            "save_pretrained wrote."
        )
    if output is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"bestiary export: {output} is there and is no empty folder; name another output.")
    paper, auto_name, cls = _class_of_checkpoint(source)

    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _fill_stage(source, stage, copy=output is not None)
        with torch.device("meta"):  # the card wants to know the size, nobody wants the values
            model = cls(paper.config.from_pretrained(source))
        write_flat_code(model, stage)
        _write_card_if_none(model, stage)
        result = run_without_package(_LOAD, stage, auto_name)
        if result.returncode:
            reason = "\n".join(result.stderr.strip().splitlines()[-15:])
            raise ValueError(
                f"bestiary export: the exported {cls.__name__} does not load in a process without {PACKAGE}; nothing "
                f"was changed. What that process said:\n{reason}"
            )
        if output is not None:
            stage.chmod(source.stat().st_mode)  # a temporary folder is private
            os.replace(stage, target)
        else:
            new = [path for path in stage.iterdir() if not path.is_symlink()]
            for path in sorted(new, key=lambda path: path.name == "config.json"):  # last: it names the code
                os.replace(path, target / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return Path(checkpoint if output is None else output)


def _class_of_checkpoint(folder: Path) -> tuple[Paper, str, type[PreTrainedModel]]:
    """Paper, auto class and class of a checkpoint, from `model_type` and `architectures` in its `config.json`."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type, names = saved.get("model_type", ""), saved.get("architectures") or []
    paper = _paper_of_type(model_type)
    if paper is None:
        raise _unknown_type(folder, model_type, names)
    by_name = {cls.__name__: (auto_name, cls) for auto_name, cls in sorted(paper.models.items(), reverse=True)}
    if names and names[0] not in by_name:
        raise ValueError(
            f"bestiary export: {folder} was saved by the class {names[0]}, which lives outside {PACKAGE}: the paper "
            f"{paper.slug!r} registers {', '.join(sorted(by_name))}. Load the weights into one of these and save it."
        )
    auto_name, cls = by_name[names[0]] if names else min(paper.models.items())
    _refuse_foreign(cls)
    return paper, auto_name, cls


def _unknown_type(folder: Path, model_type: str, names: list[str]) -> ValueError:
    config = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None
    if config is not None and config.__module__.startswith("transformers."):
        return ValueError(
            f"bestiary export: {folder} is a stock checkpoint of transformers ({config.__name__}): it loads "
            "everywhere as it is and needs no export."
        )
    where = f"in the module {config.__module__!r}" if config is not None else "in a module that is not imported"
    return ValueError(
        f"bestiary export: {folder} holds {names[0] if names else 'a model'} of the model_type {model_type!r}, whose "
        f"class lives outside {PACKAGE}, {where}. Export it with the tools of that package, or move the classes into "
        f"{PACKAGE} and register them with bestiary.register."
    )


def _fill_stage(source: Path, stage: Path, copy: bool) -> None:
    """The checkpoint's files except code: copies, or links to those that the export leaves as they are."""
    for path in source.iterdir():
        if not path.is_file() or path.suffix == ".py" or any(fnmatchcase(path.name, each) for each in RUN_STATE):
            continue
        if copy or path.name in ("config.json", "README.md"):
            shutil.copy2(path, stage / path.name)
        else:
            (stage / path.name).symlink_to(path.resolve())
