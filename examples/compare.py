"""Train several recipes at equal compute and compare them: table, CSV and a plot.

    python examples/compare.py --recipes bert_mlm_tiny electra_tiny --equal flops --seeds 0,1,2
    python examples/compare.py --recipes bert_mlm_tiny electra_tiny --equal seconds --budget 60seconds --seeds 0
    python examples/compare.py --recipes bert_mlm_tiny mine.yaml --equal tokens --budget 2e6tokens \\
        --minimal_pairs blimp.parquet --finetune --finetune.max_train_examples 500 --training.learning_rate 5e-4

`--budget 1200` means as much as 1,200 updates of the first recipe cost; without it, the number of updates that the
first recipe names. Every option `--<section>.<field>` is an override for all recipes, `--finetune.<field>` one for
the recipe of fine-tuning. Given again, the command trains only the runs that are missing.

Written to `output_dir` (runs/compare): `table.md`, `comparison.png`, `results.csv` (one line for each evaluation of
each run), `results.json` (all that is known) and `runs/<recipe>/seed_<seed>/checkpoint`. All options: `--help`. The
same command is `bestiary compare`.
"""

import sys

from bestiary.compare import main


if __name__ == "__main__":
    sys.exit(main())
