"""A task that needs more than 2,000 tokens: linear-time attention against truncated softmax at equal processor time.

    python -m benchmarks.long_documents --start FOLDER [--seconds 200] [--seeds 0,1,2] [--output FILE]

The task: which of four topics has most posts in a digest of ten. A digest is ten posts of 20 Newsgroups (the demo's
labelled part) in random order, each cut to its first 1,100 characters: four of one topic, the label, and two of each
of the others, about 2,400 tokens. Whoever reads the first 512 sees two posts. Digests to train on are made of training
posts only, those of the test of test posts only.

FOLDER holds a small BERT with a classifier of the four topics, trained on single posts by examples/finetune.py with
the demo's tokenizer. All models start from its weights, the table of positions repeated to the new length, and train
for the same seconds of processor time on one thread (give OMP_NUM_THREADS=1).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from bestiary.demo import load_demo
from bestiary.recipe import load_recipe
from bestiary.trainers.seeds import SeededTaskArguments, task_training_arguments
from bestiary.trainers.tasks import PreparedTask


POSTS, MAJORITY, CHARACTERS, TOPICS = 10, 4, 1_100, 4
SIZES = {"train": 4_000, "test": 500}
POSITIONS = 3_072
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "softmax, first 512 tokens": ("bestiary-bert", 512, {}),
    "linear attention, elu + 1": ("bestiary-linear-attention", POSITIONS, {"attention_kernel": "elu"}),
    "Performer, 128 features": ("bestiary-performer", POSITIONS, {"num_random_features": 128}),
    "softmax, all tokens": ("bestiary-bert", POSITIONS, {}),
}
KEPT = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "hidden_act"]
KEPT += ["layer_norm_eps", "initializer_range", "pad_token_id", "id2label", "label2id"]


class StopAfter(TrainerCallback):
    """Ends training after so many seconds of processor time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.process_time() - self.start >= self.seconds


def make_digests(texts: list[str], labels: list[int], count: int, seed: int) -> Dataset:
    """`count` digests of posts that have at least half of the characters that are kept."""
    rng = np.random.default_rng(seed)
    of_topic: list[list[str]] = [[] for _ in range(TOPICS)]
    for text, label in zip(texts, labels, strict=True):
        if len(text) >= CHARACTERS // 2:
            of_topic[label].append(text[:CHARACTERS])
    others = (POSTS - MAJORITY) // (TOPICS - 1)
    rows: dict[str, list] = {"text": [], "label": []}
    for _ in range(count):
        topic = int(rng.integers(TOPICS))
        posts = [
            of_topic[other][index]
            for other in range(TOPICS)
            for index in rng.choice(len(of_topic[other]), MAJORITY if other == topic else others, replace=False)
        ]
        rows["text"].append(" ".join(posts[place] for place in rng.permutation(POSTS)))
        rows["label"].append(topic)
    return Dataset.from_dict(rows)


def lengthened(start: PreTrainedModel, model_type: str, **settings: Any) -> PreTrainedModel:
    """A model of `model_type` with the weights of `start`, its table of positions repeated to POSITIONS."""
    fields = {name: getattr(start.config, name) for name in KEPT} | {"hidden_dropout_prob": 0.0}
    config = AutoConfig.for_model(model_type, max_position_embeddings=POSITIONS, **fields, **settings)
    model = AutoModelForSequenceClassification.from_config(config)
    weights = {
        name: value.repeat(POSITIONS // len(value), 1) if "position_embeddings" in name else value
        for name, value in start.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any("projection_matrix" not in name for name in missing):
        raise ValueError(f"{model_type} does not take the weights of the start: {missing=}, {unexpected=}.")
    return model


def train(folder: Path, data: Path, length: int, seconds: float, seed: int) -> dict[str, Any]:
    """One run; returns its accuracy, updates and the processor seconds of training."""
    options = {
        "--config": "finetune_classification",
        "--name_or_path": folder,
        "--train_file": data / "train.parquet",
        "--eval_file": data / "test.parquet",
        "--dataset": "null",
        "--max_length": length,
        "--per_device_train_batch_size": 8,
        "--per_device_eval_batch_size": 8,
        "--learning_rate": 3e-4,
        "--lr_scheduler_type": "constant_with_warmup",
        "--warmup_steps": 10,
        "--eval_strategy": "no",
        "--disable_tqdm": "true",
        "--num_train_epochs": 100,
        "--seed": seed,
        "--training.data_seed": seed,
        "--output_dir": folder / "run",
    }
    argv = [str(part) for pair in options.items() for part in pair]
    recipe = load_recipe(argv, data=SeededTaskArguments, training=task_training_arguments)
    set_seed(seed)
    trainer = PreparedTask.load(recipe).build_trainer(recipe)
    stop = StopAfter(seconds)
    trainer.add_callback(stop)
    trainer.train()
    spent = time.process_time() - stop.start
    accuracy = trainer.evaluate()["eval_accuracy"]
    return {"seed": seed, "accuracy": accuracy, "updates": trainer.state.global_step, "seconds": round(spent, 1)}


def main() -> None:
    """Train every model with every seed; the file is written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True, help="folder of the BERT that knows the topics")
    parser.add_argument("--seconds", type=float, default=200.0, help="processor time of a run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("runs/long_documents.json"))
    options = parser.parse_args()
    start = AutoModelForSequenceClassification.from_pretrained(options.start)
    tokenizer = AutoTokenizer.from_pretrained(options.start, model_max_length=POSITIONS)
    found: dict[str, Any] = {
        "description": "Accuracy on 500 digests of ten posts (chance 0.25) after equal processor time of training",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.long_documents --start <BERT fine-tuned on single posts> "
        f"--seconds {options.seconds:g} --seeds {options.seeds}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "runs": {name: [] for name in options.models},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        data.mkdir()
        for number, (split, part) in enumerate(load_demo("labelled").items()):
            digests = make_digests(list(part["text"]), list(part["label"]), SIZES[split], number)
            digests.to_parquet(str(data / f"{split}.parquet"))
        for seed in map(int, options.seeds.split(",")):
            for name in options.models:
                model_type, length, settings = MODELS[name]
                folder = Path(temporary) / f"{model_type}_{length}_{seed}"
                set_seed(seed)
                lengthened(start, model_type, **settings).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                found["runs"][name].append(train(folder, data, length, options.seconds, seed))
                options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
