"""Official research checkpoints into bestiary folders: what the converters of all papers share.

The converter of a paper is a module, by convention `bestiary.conversion.<slug>`, with

* `LAYOUT`: a pattern found in some parameter name of its official checkpoints and in none of another paper's;
* `MODEL_TYPES`: values of `model_type` that a configuration beside such a checkpoint may have;
* `PARTS`: names of sub-folders if a checkpoint may come as several folders that belong together, else `()`;
* `convert(state, config)`: the ready model, from tensors by official names and the configuration beside them;
* perhaps `SPECIAL_TOKENS`: those of a tokenizer that is made of a lone `vocab.txt`, where they are not BERT's
  (`{"cls_token": "[SOS]"}`).

Weights are read from safetensors, from npz without pickled objects, and from torch files by `weights_only=True`, so
that no checkpoint can run code.
"""

import json
import os
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..registry import get_paper, list_papers, load_object


logger = logging.get_logger(__name__)

State = Mapping[str, torch.Tensor]
Settings = PreTrainedConfig | Mapping[str, Any] | None

PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
READABLE = (".safetensors", ".npz", ".bin", ".pt", ".pth")
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")
"""Torch files that a trainer writes beside the weights."""
TENSORFLOW_FILE = re.compile(r"\.(index|meta|data-\d+-of-\d+)$")
TRAINING_STATE = re.compile(
    r"(^|/)(global_step|adam_[mv]|lamb_[mv]|Adam(_1)?|beta[12]_power)$"  # TensorFlow's optimizers
    r"|(^|\.)position_ids$"  # a buffer of old transformers
)
"""What checkpoints hold beside the parameters and no model needs."""
LISTED_ALONE = 40
"""Up to this many names are listed one by one; more are named as `layer_{3,4,5}/...`."""
FOREIGN = {
    r"^(bert/encoder/transformer/|albert\.)": "ALBERT",
    r"^roberta\.|^(encoder|decoder)\.sentence_encoder\.": "RoBERTa",
    r"^distilbert\.": "DistilBERT",
    r"^deberta\.": "DeBERTa",
    r"^(transformer\.)?(encoder|decoder)[./]block[._]\d+": "T5",
    r"^(model\.)?(encoder|decoder)\.layers\.\d+\.": "an encoder-decoder of fairseq or BART",
    r"^(transformer\.)?h\.\d+\.": "GPT-2",
}
"""Layouts that have no converter, to say what a checkpoint looks like."""


# ------------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: str | os.PathLike, parts: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by name, on the CPU.

    Args:
        path: a `.safetensors`, `.npz`, `.pt`, `.pth` or `.bin` file, the index of a sharded checkpoint, or a folder
            that holds one of these.
        parts: if the folder has all these sub-folders, each is read and its names begin with `"<part>/"`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file cannot be read without running code from it, is damaged or holds no tensors; the folder
            holds no such file, or several; or the checkpoint is in TensorFlow's own format (the message says how to
            turn it into npz).
    """
    path = Path(path)
    if _has_parts(path, parts):
        states = {part: read_checkpoint(path / part) for part in parts}
        return {f"{part}/{name}": tensor for part, state in states.items() for name, tensor in state.items()}
    file = _weights_file(path)
    if not file.name.endswith(".index.json"):
        return _read_file(file)
    shards = _read_json(file).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{file} is no index of a sharded checkpoint: it has no weight_map.")
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not (file.parent / shard).is_file():
            raise ValueError(f"{file} names the file {shard!r}, which is not beside it; download it again.")
        state |= _read_file(file.parent / shard)
    return state


def read_config(path: str | os.PathLike, parts: Sequence[str] = ()) -> dict[str, Any] | None:
    """The configuration at a path: a JSON file itself, or `bert_config.json` or `config.json` in the folder of a
    checkpoint; None if there is none. With `parts`, as in `read_checkpoint`, one configuration for each part."""
    path = Path(path)
    if _has_parts(path, parts):
        return {part: read_config(path / part) or {} for part in parts}
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        return _read_json(path)
    folder = path if path.is_dir() else path.parent
    for name in ("bert_config.json", "config.json"):
        if (folder / name).is_file():
            return _read_json(folder / name)
    return None


def _has_parts(path: Path, parts: Sequence[str]) -> bool:
    return bool(parts) and all((path / part).is_dir() for part in parts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _weights_file(path: Path) -> Path:
    """The file to read for a path that a user gave."""
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        found = [name for name in PREFERRED if name in names][:1]
        found = found or [name for name in names if name.endswith(READABLE) and not NO_WEIGHTS.fullmatch(name)]
        if len(found) > 1:
            raise ValueError(f"{path} holds several files with weights, {', '.join(found)}; give the right one.")
        if found:
            return path / found[0]
        for name in names:
            if name.endswith(".index"):
                raise _tensorflow_error(path / name)
        raise ValueError(f"{path} holds no weights; a checkpoint is a file that ends in {', '.join(READABLE)}.")
    if path.with_name(f"{path.name}.index").is_file() or TENSORFLOW_FILE.search(path.name):
        raise _tensorflow_error(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    return path


def _tensorflow_error(path: Path) -> ValueError:
    prefix = TENSORFLOW_FILE.sub("", path.name)
    return ValueError(
        f"{path} is a checkpoint in TensorFlow's own format, which only TensorFlow reads. Where it is installed, turn "
        'the checkpoint into npz, in its folder: python -c "import numpy, tensorflow as tf; '
        f"reader = tf.train.load_checkpoint('{prefix}'); numpy.savez('{prefix}.npz', "
        '**{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})" '
        f"and convert {prefix}.npz."
    )


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix not in READABLE:
        raise ValueError(f"{file} cannot be read; a checkpoint is a file that ends in {', '.join(READABLE)}.")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    state = readers.get(file.suffix, _read_torch)(file)
    if not state:
        raise ValueError(f"{file} holds no tensors.")
    return state


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or is damaged: {error}.") from error


def _read_npz(file: Path) -> dict[str, torch.Tensor]:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is no npz file, or is damaged.")
    state: dict[str, torch.Tensor] = {}
    name = "the list of arrays"
    try:
        with np.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                state[name] = torch.from_numpy(archive[name])
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{file}: {name} cannot be read ({error}); write arrays of plain numbers by numpy.savez."
        ) from error
    return state


def _read_torch(file: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that is no checkpoint makes torch's reader fail in many ways
        raise ValueError(
            f"{file} is damaged, or holds pickled objects other than tensors: these can run code when they are loaded "
            "and are refused. Save the tensors alone, by torch.save(model.state_dict(), ...) or as safetensors."
        ) from error
    state = _tensors(loaded)
    if all(name.startswith("module.") for name in state):  # written through DataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _tensors(loaded: Any) -> dict[str, torch.Tensor]:
    """The tensors in what a torch file held: a dictionary of them, or one under a usual name in a dictionary."""
    if not isinstance(loaded, dict):
        return {}
    tensors = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    for key in () if tensors else ("model", "state_dict", "model_state_dict"):
        tensors = tensors or _tensors(loaded.get(key))
    return tensors


# ------------------------------------------------------------------------------------------------------------- loading


def load_strictly(
    model: PreTrainedModel,
    state: State,
    name_of: Callable[[str], str] = str,
    hints: Iterable[str] = (),
) -> None:
    """Load a checkpoint into a model if every parameter is there in its shape and nothing else is; else load nothing.

    Of parameters that the model ties the checkpoint may hold any one, or several with equal values. Optimizer slots,
    step counters and position buffers are passed over. Numbers are converted to the model's type.

    Args:
        model: receives the weights in place.
        state: the checkpoint.
        name_of: the checkpoint's name of a parameter of the model. A name that ends in `/kernel` is that of a
            TensorFlow matrix, [in, out], and its tensor is transposed.
        hints: sentences for the message, if the checkpoint does not fit.

    Raises:
        ValueError: names every missing, extra, mis-shaped and contradictory tensor as the checkpoint does.
    """
    aliases = model.all_tied_weights_keys  # name -> the name that it is tied to
    missing, misshaped, contradictory = [], [], []
    used: set[str] = set()
    loaded = {}
    for key, own in model.state_dict().items():
        if key in aliases:
            continue
        names = [name_of(key), *(name_of(alias) for alias, source in aliases.items() if source == key)]
        given = [name for name in dict.fromkeys(names) if name in state]
        if not given:
            missing.append(names[0])
            continue
        used.update(given)
        name, *others = given
        tensor, wanted = state[name], tuple(own.shape)
        if name.endswith("/kernel"):
            wanted = wanted[::-1]
        if tuple(tensor.shape) != wanted:
            misshaped.append(f"{name} is {_shape(tensor.shape)}, must be {_shape(wanted)}")
            continue
        contradictory += [f"{other} != {name}" for other in others if not torch.equal(state[other], tensor)]
        loaded[key] = tensor.T if name.endswith("/kernel") else tensor
    extra = [name for name in state if name not in used and not TRAINING_STATE.search(name)]
    problems = {
        "missing": missing,
        "extra": extra,
        "of another shape": misshaped,
        "contradictory (the configuration ties them)": contradictory,
    }
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {_listed(names)}." for what, names in problems.items() if names]
        start = f"The checkpoint does not fit {type(model).__name__}; nothing was loaded."
        raise ValueError("\n".join([start, *lines, *hints]))
    model.load_state_dict(loaded | {alias: loaded[source] for alias, source in aliases.items()})


def _shape(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _listed(names: Sequence[str]) -> str:
    """All names; if they are many, those that differ in the number of the layer as one."""
    if len(names) <= LISTED_ALONE:
        return ", ".join(names)
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(.*?\blayer[._](?=\d)|.*)(\d*)(.*)", name, flags=re.DOTALL).groups()  # type: ignore[union-attr]
        groups.setdefault((head, tail), []).append(number)
    return ", ".join(
        f"{head}{{{','.join(numbers)}}}{tail}" if len(numbers) > 1 else f"{head}{numbers[0]}{tail}"
        for (head, tail), numbers in groups.items()
    )


def tensorflow_name(key: str) -> str:
    """Official name of a parameter of a BERT-like encoder: `bert.encoder.layer.0.output.dense.weight` ->
    `bert/encoder/layer_0/output/dense/kernel`."""
    name = re.sub(r"\blayer\.(\d+)", r"layer_\1", key).replace(".", "/")
    for ours, theirs in (
        ("LayerNorm/weight", "LayerNorm/gamma"),
        ("LayerNorm/bias", "LayerNorm/beta"),
        ("_embeddings/weight", "_embeddings"),
    ):
        name = name.replace(ours, theirs)
    return name.replace("/weight", "/kernel")


def encoder_sizes(state: State, encoder: str, embeddings: str) -> dict[str, int]:
    """Sizes of a BERT-like encoder as its tensors have them, by their names in the configuration.

    Works for TensorFlow's and transformers' names; `encoder` and `embeddings` are what stands before `encoder` and
    `embeddings` in them (`"bert/"`, `"bert."`, `""`). A size whose tensors are missing is left out, and so is the
    number of heads, which tensors do not show.
    """
    layer = re.escape(encoder) + r"encoder[./]layer[._](\d+)[./]"
    block = re.escape(embeddings) + "embeddings[./]"
    norm = r"LayerNorm[./](gamma|beta|weight|bias)"
    rules = {
        "vocab_size": (block + r"word_embeddings(\.weight)?", 0),
        "max_position_embeddings": (block + r"position_embeddings(\.weight)?", 0),
        "type_vocab_size": (block + r"token_type_embeddings(\.weight)?", 0),
        "embedding_size": (block + rf"(\w+_embeddings(\.weight)?|{norm})", -1),
        "hidden_size": (layer + rf"(attention[./])?output[./]{norm}", -1),
        "intermediate_size": (layer + r"intermediate[./]dense[./]bias", -1),
    }
    sizes = {}
    for field, (pattern, axis) in rules.items():
        seen = [tensor.shape[axis] for name, tensor in state.items() if re.fullmatch(pattern, name) and tensor.dim()]
        if seen:  # one mis-shaped tensor is outvoted here, and named when loading
            sizes[field] = Counter(seen).most_common(1)[0][0]
    layers = [int(found[1]) for name in state if (found := re.match(layer, name))]
    return sizes | ({"num_hidden_layers": max(layers) + 1} if layers else {})


def size_hints(what: str, given: Mapping[str, Any], found: Mapping[str, int]) -> list[str]:
    """A sentence on every size that the configuration of `what` and its tensors give differently."""
    return [
        f"{what}: {field} is {given[field]} in the configuration and {size} in the tensors."
        for field, size in found.items()
        if field in given and given[field] != size
    ]


# ---------------------------------------------------------------------------------------------------------- converting


def expect_layout(slug: str, state: State, config: Settings = None) -> None:
    """`ValueError` that says what the checkpoint looks like, unless names and configuration are of this paper's."""
    paper, converter = get_paper(slug), _converter(slug)
    settings = {} if isinstance(config, paper.config) else as_dict(config)
    inner = [value for value in settings.values() if isinstance(value, Mapping)]
    for each in (settings, *inner):
        model_type = each.get("model_type")
        if model_type is not None and model_type not in converter.MODEL_TYPES:
            raise ValueError(
                f"This is no official checkpoint of the paper {slug!r}: its configuration has the model_type "
                f"{model_type!r}{_known_type(model_type)}."
            )
    if not any(re.search(converter.LAYOUT, name) for name in state):
        raise ValueError(
            f"This is no official checkpoint of the paper {slug!r}; it looks like {_looks_like(state)}. Its names "
            f"begin with {', '.join(list(state)[:3])}."
        )


def _converter(slug: str) -> ModuleType:
    paper = get_paper(slug)
    if paper.converter is None:
        raise ValueError(f"The paper {slug!r} has no converter: no layout of official checkpoints is known.")
    return load_object(paper.converter)


def _converters() -> dict[str, ModuleType]:
    return {slug: _converter(slug) for slug in list_papers() if get_paper(slug).converter is not None}


def _known_type(model_type: str) -> str:
    for slug in list_papers():
        if get_paper(slug).config.model_type == model_type:
            return f": it is a bestiary checkpoint of {slug!r} already, which from_pretrained loads as it is"
    for slug, converter in _converters().items():
        if model_type in converter.MODEL_TYPES:
            return f", for which there is `bestiary convert {slug}`"
    return ""


def _looks_like(state: State) -> str:
    known = {converter.LAYOUT: f"one of the paper {slug!r}" for slug, converter in _converters().items()}
    for pattern, what in (known | FOREIGN).items():
        if any(re.search(pattern, name) for name in state):
            return what
    return "none that is known"


def as_dict(config: Settings) -> Mapping[str, Any]:
    """A configuration in any form as a dictionary."""
    return config.to_dict() if isinstance(config, PreTrainedConfig) else config or {}


def convert_checkpoint(
    slug: str,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    config: PreTrainedConfig | Mapping[str, Any] | str | os.PathLike | None = None,
) -> Path:
    """Convert an official checkpoint to a folder that `from_pretrained` loads, with its tokenizer if that is at hand.

    Args:
        slug: the paper.
        checkpoint: file or folder, see `read_checkpoint`. A saved tokenizer or a `vocab.txt` beside it comes along.
        out: the folder to write; it must not exist, or be empty.
        config: the configuration, or the path of one; None looks for one beside the checkpoint, see `read_config`.

    Returns:
        `out`. On any error nothing is written.

    Raises:
        ValueError: a checkpoint or configuration that cannot be read, is not valid, does not fit or is another paper's
            (see `read_checkpoint`, `expect_layout`, `load_strictly`); a tokenizer with more tokens than the model; a
            folder `out` that is not empty.
        OSError: nothing at `checkpoint` or `config`, or `out` cannot be written.
    """
    converter = _converter(slug)
    checkpoint, out = Path(checkpoint), Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no empty folder; convert into a new one, so that nothing is lost.")
    state = read_checkpoint(checkpoint, converter.PARTS)
    if config is None:
        config = read_config(checkpoint, converter.PARTS)
    elif isinstance(config, str | os.PathLike):
        if not Path(config).exists():
            raise FileNotFoundError(f"There is no configuration {config}.")
        config = read_config(config, converter.PARTS)
    try:
        model = converter.convert(state, config)
    except StrictDataclassError as error:
        raise ValueError(f"The configuration of {checkpoint} is not valid. {error}") from error
    folder = checkpoint / converter.PARTS[0] if _has_parts(checkpoint, converter.PARTS) else checkpoint
    special_tokens = vars(converter).get("SPECIAL_TOKENS", {})
    tokenizer = _read_tokenizer(folder if folder.is_dir() else folder.parent, model.config, special_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as stage:
        finished = Path(stage) / out.name
        model.save_pretrained(finished)
        if tokenizer is not None:
            tokenizer.save_pretrained(finished)
        if out.exists():
            out.rmdir()
        finished.rename(out)
    return out


def _read_tokenizer(folder: Path, config: PreTrainedConfig, special_tokens: Mapping[str, str]) -> Any:
    """The tokenizer in a folder, or None; of a lone `vocab.txt` BERT's, lower-casing if no piece has a capital, with
    these special tokens.
    """
    tokenizer = None
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    elif (folder / "vocab.txt").is_file():
        pieces = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - set(pieces)
        if missing:
            logger.warning(f"{folder / 'vocab.txt'} has no {', '.join(sorted(missing))}; no tokenizer is written.")
        else:
            cased = any(piece != piece.lower() for piece in pieces if not re.fullmatch(r"\[[^\]]+\]", piece))
            options: dict[str, Any] = dict(special_tokens)
            tokenizer = BertTokenizer(
                {piece: index for index, piece in enumerate(pieces)},
                do_lower_case=not cased,
                model_max_length=config.max_position_embeddings,
                **options,
            )
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, but vocab_size of the model is "
            f"{config.vocab_size}; it belongs to another checkpoint."
        )
    return tokenizer
