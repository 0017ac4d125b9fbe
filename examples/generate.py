r"""Write texts by a trained sequence-to-sequence model, and score them where there are references.

    python examples/generate.py --config seq2seq --name_or_path runs/seq2seq --input_file a.jsonl \
        --output_file predictions.jsonl
    echo "the cat sat on the mat" | python examples/generate.py --name_or_path runs/seq2seq --input_file -
    python examples/generate.py --config seq2seq --name_or_path runs/seq2seq --dataset user/pairs --num_beams 5 \
        --generation '{"length_penalty": 0.6, "no_repeat_ngram_size": 3}' --metrics rouge

Sources come from `--input_file` (.parquet, .jsonl or .csv with the recipe's source column; .txt, one a line; `-`
for lines of the standard input), or are what the recipe evaluates. How texts are generated is what the checkpoint's
generation_config.json says, unless `--generation` or `--num_beams` say otherwise. With a target column there are
scores, by `--metrics`. Predictions go to `--output_file` (.jsonl, with sources and references; else one a line), or
are printed.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

import bestiary  # noqa: F401  registers the auto classes
from bestiary.generation import generate_texts, score_texts
from bestiary.recipe import Recipe, load_recipe
from bestiary.trainers.seq2seq import (
    Seq2SeqDataArguments,
    check_texts,
    load_pairs,
    seq2seq_data_arguments,
    seq2seq_training_arguments,
)
from bestiary.trainers.tasks import read_file


@dataclass
class GenerationArguments(Seq2SeqDataArguments):
    """Sources, and how texts are generated; the fields of training recipes are known too."""

    input_file: str | None = field(default=None, metadata={"help": "Sources: a file, or - for the standard input."})
    output_file: str | None = field(default=None, metadata={"help": "Where predictions go; default: printed."})
    batch_size: int = field(default=16, metadata={"help": "Sources at a time."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams; default: what the checkpoint says."})


def generation_arguments(values: Mapping[str, Any]) -> type[GenerationArguments]:
    """Dataclass of a recipe's section `data`: with the fields that the paper's training has besides."""
    return make_dataclass("GenerationArguments", (), bases=(GenerationArguments, seq2seq_data_arguments(values)))


def read(data: GenerationArguments) -> tuple[list[str], list[str] | None]:
    """Sources and, where there are any, references."""
    if data.input_file is None:
        rows = load_pairs(data)[1]
    elif data.input_file == "-" or data.input_file.endswith(".txt"):
        text = sys.stdin.read() if data.input_file == "-" else Path(data.input_file).read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.strip()], None
    else:
        rows = read_file(type(data).__name__, "input_file", data.input_file)
        if data.source_column not in rows.column_names:
            raise ValueError(f"{data.input_file} has no column {data.source_column!r}; choose one by source_column.")
        check_texts(rows, [name for name in (data.source_column, data.target_column) if name in rows.column_names])
    references = list(rows[data.target_column]) if data.target_column in rows.column_names else None
    return list(rows[data.source_column]), references


def generate(recipe: Recipe, sources: list[str]) -> list[str]:
    """Predictions in the order of the sources."""
    data, name = recipe.data, recipe.model.get("name_or_path")
    if name is None:
        raise ValueError("generate.py needs a trained model: give --name_or_path, a folder or a name on the Hub.")
    options = dict(data.generation or {}) | ({} if data.num_beams is None else {"num_beams": data.num_beams})
    return generate_texts(
        AutoModelForSeq2SeqLM.from_pretrained(name).to(recipe.training.device).eval(),
        AutoTokenizer.from_pretrained(name),
        [f"{data.source_prefix}{source}" for source in sources],
        data.batch_size,
        data.max_source_length,
        progress=not recipe.training.disable_tqdm,
        **options,
    )


def write(path: str, columns: dict[str, list[str]]) -> None:
    """Predictions as JSON lines with what they belong to, or as plain lines."""
    if path.endswith(".jsonl"):
        rows = (dict(zip(columns, values)) for values in zip(*columns.values()))
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        lines = [" ".join(text.split()) for text in columns["prediction"]]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Generate, write and score; returns the scores."""
    recipe = load_recipe(argv, data=generation_arguments, training=seq2seq_training_arguments)
    set_seed(recipe.training.seed)
    sources, references = read(recipe.data)
    if recipe.data.output_file is not None:
        Path(recipe.data.output_file).parent.mkdir(parents=True, exist_ok=True)
    predictions = generate(recipe, sources)
    columns = {"source": sources, "prediction": predictions} | ({"reference": references} if references else {})
    if recipe.data.output_file is None:
        for text in predictions:
            print(text)
    else:
        write(recipe.data.output_file, columns)
    data = recipe.data
    scores = score_texts(data.metric_names, predictions, references, data.lowercase) if references else {}
    for name, value in scores.items():
        print(f"{name}: {value:.4f}", file=sys.stderr)
    return scores


if __name__ == "__main__":
    main()
