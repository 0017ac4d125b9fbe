r"""Train any sequence-to-sequence model on pairs of texts by a recipe, and score what it generates.

    accelerate launch examples/seq2seq.py --config seq2seq --name_or_path path --train_file a.jsonl --eval_file b.jsonl
    accelerate launch examples/seq2seq.py --config seq2seq --name_or_path path --dataset user/pairs \
        --source_column article --target_column title --metrics rouge,chrf --seeds 0,1,2
    accelerate launch examples/seq2seq.py --config seq2seq --model_type t5 --model.d_model 64 --model.num_layers 2 \
        --tokenizer characters --train_file a.jsonl --eval_file b.jsonl

The model may be one of bestiary's or any encoder-decoder of transformers; without `--name_or_path` it starts from
nothing. With several seeds the script trains once per seed, into `output_dir/seed_<seed>`. Model, options of
`generate()`, card, plot and metrics are written to `output_dir`, mean and standard deviation over the seeds to
`results.json` in it. `generate.py` writes texts by what this leaves.
"""

import shlex
import sys

import bestiary  # noqa: F401  registers the auto classes
from bestiary.recipe import load_recipe
from bestiary.trainers.seeds import print_summary, train_with_seeds
from bestiary.trainers.seq2seq import PreparedPairs, seq2seq_data_arguments, seq2seq_training_arguments


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Train with every seed; returns mean, standard deviation and values of every metric."""
    argv = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(argv, data=seq2seq_data_arguments, training=seq2seq_training_arguments)
    command = f"accelerate launch examples/seq2seq.py {shlex.join(argv)}"
    summary = train_with_seeds(recipe, command, PreparedPairs.load(recipe))
    if recipe.training.process_index == 0:
        print_summary(summary, recipe.data.seeds)
    return summary


if __name__ == "__main__":
    main()
