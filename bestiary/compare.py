"""Train several recipes at equal compute, several seeds each, and compare what comes out.

The budget is one number for all: tokens, seconds or floating-point operations. What one update of a recipe costs is
measured on its own model and batches before anything is trained (operations: forward and backward pass as performed,
see `bestiary.flops`; seconds: updates of all recipes in turn, so that a slow minute of the machine hits them alike).
The learning-rate schedule then spans exactly the updates that the budget allows, and a warm-up keeps its share.

The recipes must train on the same text. Every run evaluates its own objective and one score common to all (accuracy
on minimal pairs if they are given, else pseudo-perplexity) at several points, outside the measured time, and all
scores at its end; see `bestiary.scores`. Runs are kept in `output_dir/runs`; a command that is given again trains only
what is missing, also with more seeds or more recipes.
"""

import argparse
import gc
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForPreTraining, AutoTokenizer, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ._version import __version__
from .cards import hardware_summary
from .compare_report import replace_text, write_report
from .demo import demo_tokenizer
from .flops import count_flops
from .recipe import Recipe, load_recipe
from .registry import get_paper, load_object
from .scores import (
    MinimalPair,
    detector_scores,
    finetune_recipe,
    finetuned_scores,
    held_out_texts,
    load_detector,
    load_masked_lm,
    load_minimal_pairs,
    masked_lm_scores,
    minimal_pair_accuracy,
    silence,
)
from .text_data import load_text_documents
from .trainers.pretraining import PretrainingTrainer


UNITS = ("tokens", "seconds", "flops")
"""What can be made equal."""
COUNTED_BATCHES = 20
"""Batches, evenly spaced over a run, whose tokens and operations are counted."""
TIMED_ROUNDS, TIMED_UPDATES, UNTIMED_UPDATES = 3, 10, 2
"""Rounds over all recipes, updates timed in each, and updates before them that are not."""
SCORE_SEED = 0
"""Chooses held-out sentences and minimal pairs, the same for every run."""
_SOURCE = ("dataset", "train_file", "validation_file", "text_column", "validation_fraction", "data_seed")


@dataclass(frozen=True)
class Settings:
    """A comparison.

    Args:
        recipes: packaged recipes or YAML files of pre-training.
        seeds: of initialisation, order of the data, masks and dropout; one run each.
        output_dir: where everything is written.
        equal: tokens, seconds or flops.
        budget: updates of the first recipe ("1200"), or an amount of what is equal ("2e6 tokens"); None takes the
            updates that the first recipe names.
        checkpoints: points of a run at which it is evaluated, the end included.
        held_out_sequences: sequences of held-out text for the pseudo-perplexity.
        minimal_pairs: file of minimal pairs, see `bestiary.scores.load_minimal_pairs`.
        pairs_per_paradigm: so many of each kind.
        finetune: recipe by which every final checkpoint is fine-tuned and scored.
        overrides, finetune_overrides: options for all recipes, and for the one of fine-tuning.
    """

    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    output_dir: Path
    equal: str = "flops"
    budget: str | None = None
    checkpoints: int = 5
    held_out_sequences: int = 64
    minimal_pairs: str | None = None
    pairs_per_paradigm: int = 10
    finetune: str | None = None
    overrides: tuple[str, ...] = ()
    finetune_overrides: tuple[str, ...] = ()

    def __post_init__(self):
        if self.equal not in UNITS:
            raise ValueError(f"compare: equal must be one of {', '.join(UNITS)}; got {self.equal!r}.")
        for name in ("checkpoints", "held_out_sequences", "pairs_per_paradigm"):
            if getattr(self, name) < 1:
                raise ValueError(f"compare: {name} must be at least 1, got {getattr(self, name)}.")
        for name, values in (("recipes", self.names), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"compare: {name} must be different from each other, at least one; got {values}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the recipes without folder and suffix, as the results show them."""
        return tuple(Path(recipe).name.removesuffix(".yaml").removesuffix(".yml") for recipe in self.recipes)


@dataclass(frozen=True)
class Cost:
    """What one update costs: real tokens, floating-point operations, and seconds if they were measured."""

    tokens: float
    flops: float
    seconds: float | None = None


def parse_budget(text: str, equal: str) -> tuple[float, str]:
    """`"1200"` or `"2e6 tokens"` -> (number, unit), where the unit is `steps` or what is equal.

    Raises:
        ValueError: no positive number, or another unit.
    """
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?) *([A-Za-z]*)", text.strip())
    unit = (found[2].lower() or "steps") if found else ""
    if found is None or float(found[1]) <= 0 or unit not in ("steps", equal):
        raise ValueError(
            f"compare: budget must be a positive number of steps of the first recipe ('1200') or of what is equal "
            f"('1e6 {equal}'); got {text!r}."
        )
    return float(found[1]), unit


def updates_within(budget: float, cost: float, name: str) -> int:
    """Number of updates whose cost comes closest to the budget.

    Raises:
        ValueError: not even one update.
    """
    updates = round(budget / cost)
    if updates < 1:
        raise ValueError(
            f"compare: the budget of {budget:.4g} is less than one update of {name}, which costs {cost:.4g}; "
            "raise --budget or lower the batch size."
        )
    return updates


# Trainers


def pretraining_data(values: Mapping[str, Any]) -> type:
    """Dataclass of a recipe's section `data`, by its paper; `ValueError` if the paper does not pre-train on text."""
    slug = values.get("slug")
    name = get_paper(slug).trainer if slug else None
    trainer: Any = load_object(name) if name else object
    if not issubclass(trainer, PretrainingTrainer):
        raise ValueError(f"compare: a recipe that pre-trains on text is needed, but its slug is {slug!r}.")
    return trainer.data_arguments


def read_recipe(recipe: str, overrides: Sequence[str]) -> Recipe:
    """A pre-training recipe with its overrides; a new instance every time, since training arguments are changed."""
    return load_recipe(["--config", recipe, *overrides], data=pretraining_data)


def build_trainer(
    recipe: Recipe, documents: Any, updates: int | None, seed: int, folder: str | Path
) -> PretrainingTrainer:
    """The recipe's trainer on `documents` for `updates` optimizer steps (None: as many as the recipe says), quiet,
    without evaluations and checkpoints of its own.
    """
    data, training = recipe.data, recipe.training
    if training.world_size > 1:
        raise ValueError(f"compare: runs in one process, but there are {training.world_size}.")
    if updates is not None:
        if training.warmup_steps >= 1 and training.max_steps > 0:
            training.warmup_steps = round(training.warmup_steps * updates / training.max_steps)
        training.max_steps = updates
        training.logging_steps = max(1, updates // 50)
    training.seed = training.data_seed = seed
    training.output_dir = str(folder)
    training.logging_strategy, training.logging_first_step = IntervalStrategy.STEPS, True
    training.eval_strategy, training.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    training.load_best_model_at_end = False
    training.report_to, training.disable_tqdm = [], True
    training.include_num_input_tokens_seen = "non_padding"
    trainer_class = load_object(str(get_paper(str(recipe.slug)).trainer))
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer) if data.tokenizer else demo_tokenizer()
    config = recipe.build_config(vocab_size=len(tokenizer))
    examples = trainer_class.build_datasets(documents, tokenizer, config, data, training)
    held_out = examples["validation"]
    if data.max_validation_examples is not None:
        held_out = held_out.select(range(min(data.max_validation_examples, len(held_out))))
    name = recipe.model.get("name_or_path")
    set_seed(seed)  # building the data may have drawn numbers
    trainer = trainer_class(
        AutoModelForPreTraining.from_pretrained(name, config=config)
        if name
        else AutoModelForPreTraining.from_config(config),
        training,
        data_collator=trainer_class.build_collator(tokenizer, config, data, training),
        train_dataset=examples["train"],
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    silence(trainer)
    return trainer


class Recorder(TrainerCallback):
    """Clock, log and progress bar of a run. `measure(step, tokens, seconds)` is called at `points`, while the clock
    stands still.
    """

    def __init__(
        self,
        points: Collection[int] = (),
        measure: Callable[[int, int, float], None] | None = None,
        bar: tqdm | None = None,
    ):
        self.points, self.measure, self.bar = points, measure, bar
        self.history: list[dict[str, Any]] = []
        self.marks: list[float] = []
        """Seconds after each update."""
        self._before = self._since = 0.0

    @property
    def seconds(self) -> float:
        """Training time until now."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return self._before + time.perf_counter() - self._since

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the time, and measure if it is a point to do so."""
        self.marks.append(self.seconds)
        if self.bar is not None:
            self.bar.update()
        if self.measure is not None and state.global_step in self.points:
            self._before = self.marks[-1]
            line_is_due = control.should_log
            self.measure(state.global_step, state.num_input_tokens_seen, self._before)
            control.should_log = line_is_due  # evaluating writes a line of its own and takes this one back
            self._since = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the losses of a training line."""
        logs = kwargs["logs"]
        if "loss" in logs:
            losses = {name: value for name, value in logs.items() if re.fullmatch(r"(\w+_)?loss", name)}
            place = {"step": state.global_step, "tokens": state.num_input_tokens_seen, "seconds": self.seconds}
            self.history.append(place | {"losses": losses})


# Costs


def count_update(trainer: PretrainingTrainer) -> Cost:
    """Mean tokens and operations of one update, over batches evenly spaced in an epoch of the trainer."""
    loader: Any = trainer.get_train_dataloader()
    batches = list(loader.batch_sampler)
    tokens, flops = [], []
    for place in np.unique(((np.arange(COUNTED_BATCHES) + 0.5) * len(batches) / COUNTED_BATCHES).astype(int)):
        batch = loader.collate_fn([loader.dataset[index] for index in batches[place]])
        tokens.append(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()))
        flops.append(count_flops(partial(trainer.training_step, trainer.model, batch)))
        trainer.model.zero_grad()
    micro_steps = trainer.args.gradient_accumulation_steps
    return Cost(micro_steps * mean(tokens), micro_steps * mean(flops))


def time_updates(builders: Mapping[str, Callable[[int], PretrainingTrainer]]) -> dict[str, float]:
    """Seconds of one update of each trainer, taken in turns: the median over rounds of the mean in a round.

    Args:
        builders: name -> function that gives a new trainer for a number of updates.
    """
    rounds: dict[str, list[float]] = {name: [] for name in builders}
    for _ in range(TIMED_ROUNDS):
        for name, build in builders.items():
            trainer, recorder = build(UNTIMED_UPDATES + TIMED_UPDATES), Recorder()
            trainer.add_callback(recorder)
            trainer.train()
            rounds[name].append((recorder.marks[-1] - recorder.marks[UNTIMED_UPDATES - 1]) / TIMED_UPDATES)
            del trainer
            gc.collect()
    return {name: median(values) for name, values in rounds.items()}


# Scores


class Scorer:
    """Scores of a checkpoint folder on data that are the same for all runs."""

    def __init__(self, settings: Settings, texts: list[str], pairs: list[MinimalPair], max_length: int):
        self.settings, self.texts, self.pairs, self.max_length = settings, texts, pairs, max_length
        self.networks: dict[str, str] = {}
        """What was scored last: network, or why there is none."""

    def __call__(self, checkpoint: Path, device: torch.device, seed: int, final: bool) -> dict[str, float]:
        """The common score of all recipes or, for the final checkpoint, all scores."""
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        sentences = [pair.good for pair in self.pairs] + [pair.bad for pair in self.pairs]
        kinds = (("masked_lm", load_masked_lm, masked_lm_scores), ("detector", load_detector, detector_scores))
        found: dict[str, float] = {}
        model: Any
        for kind, load, score in kinds:
            if kind == "detector" and not self.pairs:
                continue
            model, self.networks[kind] = load(checkpoint)
            if model is None:
                continue
            model.to(device)
            if self.pairs:
                good, bad = np.split(score(model, tokenizer, sentences, self.max_length).sums, 2)
                found[f"minimal_pairs_{kind}"] = minimal_pair_accuracy(self.pairs, good, bad)
            if kind == "masked_lm" and (final or not self.pairs):
                scores = masked_lm_scores(model, tokenizer, self.texts, self.max_length)
                found["pseudo_perplexity"] = scores.perplexity
        if final and self.settings.finetune:
            metrics = finetuned_scores(checkpoint, self.settings.finetune, self.settings.finetune_overrides, seed)
            found |= {f"finetuned_{name}": value for name, value in metrics.items()}
        return found


# Runs


def train_once(trainer: PretrainingTrainer, cost: Cost, score: Scorer, checkpoints: int, label: str) -> dict[str, Any]:
    """Train to the end, evaluating on the way, and keep the final checkpoint in `<output_dir>/checkpoint`."""
    args, held_out = trainer.args, []
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    folder = Path(str(args.output_dir)) / "checkpoint"
    points = {round(args.max_steps * (place + 1) / checkpoints) for place in range(checkpoints)} - {0}

    def measure(step: int, tokens: int, seconds: float) -> None:
        with torch.random.fork_rng():  # the run goes on as if it had not been evaluated
            losses = {
                name.removeprefix("eval_"): value
                for name, value in trainer.evaluate().items()
                if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
            }
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            scores = score(folder, args.device, args.seed, step == args.max_steps)
        place = {"step": step, "tokens": tokens, "flops": cost.flops * step, "seconds": seconds}
        held_out.append(place | {"held_out": losses, "scores": scores})

    with tqdm(total=args.max_steps, desc=label, unit="update", disable=False) as bar:
        recorder = Recorder(points, measure, bar)
        trainer.add_callback(recorder)
        trainer.train()
    return {
        **{key: held_out[-1][key] for key in ("step", "tokens", "flops", "seconds")},
        "parameters": model.num_parameters(),
        "scores": held_out[-1]["scores"],
        "networks": dict(score.networks),
        "held_out": held_out,
        "training": recorder.history,
    }


def circumstances() -> dict[str, Any]:
    """When and on what something was run."""
    packages = {"bestiary": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware_summary(),
        "threads": torch.get_num_threads(),
        "versions": packages | {"python": platform.python_version()},
    }


def compare(settings: Settings, command: str = "") -> dict[str, Any]:
    """Plan, train what is missing, and write `results.json`, `results.csv`, `table.md` and `comparison.png`.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: bad settings or recipes, recipes on different text, or results of another comparison in the folder.
    """
    recipes = {name: read_recipe(path, settings.overrides) for name, path in zip(settings.names, settings.recipes)}
    data = _common_source(recipes)
    documents = load_text_documents(**data)
    if "validation" not in documents:
        raise ValueError("compare: there is no held-out text; set data.validation_fraction or data.validation_file.")
    texts = held_out_texts(documents["validation"]["sentences"], settings.held_out_sequences, SCORE_SEED)
    pairs = []
    if settings.minimal_pairs is not None:
        pairs = load_minimal_pairs(settings.minimal_pairs, settings.pairs_per_paradigm, SCORE_SEED)
    score = Scorer(settings, texts, pairs, min(recipe.data.max_length for recipe in recipes.values()))

    def build(name: str, updates: int | None, seed: int, folder: str | Path) -> PretrainingTrainer:
        recipe = read_recipe(dict(zip(settings.names, settings.recipes))[name], settings.overrides)
        return build_trainer(recipe, documents, updates, seed, folder)

    plan = make_plan(settings, recipes, data | {"max_length": score.max_length}, build)
    wanted = [(seed, name) for seed in settings.seeds for name in recipes]
    runs = []
    for number, (seed, name) in enumerate(wanted, 1):
        folder = settings.output_dir / "runs" / name / f"seed_{seed}"
        file = folder / "result.json"
        label = f"run {number}/{len(wanted)}: {name}, seed {seed}"
        if file.exists():
            tqdm.write(f"{label}: done before")
        else:
            entry = plan["recipes"][name]
            trainer = build(name, entry["updates"], seed, folder)
            run = train_once(trainer, Cost(**entry["cost"]), score, settings.checkpoints, label)
            replace_text(file, json.dumps({"recipe": name, "seed": seed} | run | circumstances(), indent=1))
            shown = ", ".join(f"{key} {value:.4g}" for key, value in run["scores"].items())
            tqdm.write(f"{label}: {run['step']} updates in {run['seconds']:.0f} s; {shown}")
            del trainer
            gc.collect()
        runs.append(json.loads(file.read_text(encoding="utf-8")))
    results = {"command": command, **circumstances(), "plan": plan, "runs": runs}
    return write_report(results, settings.output_dir)


def make_plan(
    settings: Settings,
    recipes: dict[str, Recipe],
    data: dict[str, Any],
    build: Callable[..., PretrainingTrainer],
) -> dict[str, Any]:
    """The plan in `output_dir/plan.json`, with the recipes that it lacked measured and added.

    Raises:
        ValueError: the plan there was made with other settings, or the budget is too small.
    """
    file = settings.output_dir / "plan.json"
    first = settings.names[0]
    budget_text = settings.budget or str(recipes[first].training.max_steps)
    number, unit = parse_budget(budget_text, settings.equal)
    shared = {
        key: value
        for key, value in asdict(settings).items()
        if key not in ("recipes", "seeds", "output_dir", "budget", "overrides", "finetune_overrides")
    }
    if settings.finetune:
        shared["finetune"] = finetune_recipe(settings.finetune, settings.finetune_overrides).values
    shared = _as_json(shared | {"budget": [number, unit], "data": data})
    if unit == "steps":
        shared["first_recipe"] = first
    plan = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"settings": shared, "recipes": {}}
    for name, recipe in recipes.items():
        values = _as_json(recipe.values)
        _refuse_difference(plan["recipes"].get(name, {"values": values})["values"], values, name, settings.output_dir)
    _refuse_difference(plan["settings"], shared, "settings", settings.output_dir)

    missing = [name for name in recipes if name not in plan["recipes"]]
    with TemporaryDirectory() as folder:
        costs = {name: count_update(build(name, None, 0, folder)) for name in missing}
        if settings.equal == "seconds":
            tqdm.write("timing updates of all recipes in turns")
            builders = {name: partial(build, name, seed=0, folder=folder) for name in missing}
            costs = {name: replace(costs[name], seconds=taken) for name, taken in time_updates(builders).items()}
    for name, cost in costs.items():
        plan["recipes"][name] = {"values": _as_json(recipes[name].values), "cost": asdict(cost)}
    scale = plan["recipes"][first]["cost"][settings.equal] if unit == "steps" else 1.0
    plan["budget"] = {"unit": settings.equal, "amount": number * scale}
    for name in missing:
        entry = plan["recipes"][name]
        entry["updates"] = updates_within(plan["budget"]["amount"], entry["cost"][settings.equal], name)
        tqdm.write(f"{name}: {entry['updates']} updates of {costs[name].flops:.4g} operations each")
    replace_text(file, json.dumps(plan, indent=1))
    return plan


def _common_source(recipes: dict[str, Recipe]) -> dict[str, Any]:
    """Arguments of `load_text_documents`, which must be the same in all recipes."""
    sources = {name: {key: getattr(recipe.data, key) for key in _SOURCE} for name, recipe in recipes.items()}
    first, *others = sources
    for other in others:
        for key in _SOURCE:
            if sources[other][key] != sources[first][key]:
                raise ValueError(
                    f"compare: the recipes must train on the same text, but data.{key} is {sources[first][key]!r} in "
                    f"{first} and {sources[other][key]!r} in {other}; set it for all by --data.{key}."
                )
    source = sources[first]
    return {("seed" if key == "data_seed" else key): value for key, value in source.items()}


def _refuse_difference(before: dict[str, Any], now: dict[str, Any], owner: str, folder: Path) -> None:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"compare: {folder} holds results with another {key} ({owner}): {before.get(key)!r}, now "
                f"{now.get(key)!r}. Choose another --output_dir, or delete that one."
            )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


# Command line


def main(argv: Sequence[str] | None = None) -> int:
    """`bestiary compare`; see `--help`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="bestiary compare",
        description=__doc__,
        epilog="Other options are overrides for every recipe (--training.learning_rate 1e-3, --data.dataset demo) or, "
        "after `finetune.`, for the one of fine-tuning (--finetune.max_train_examples 500).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipes", nargs="+", required=True, help="packaged recipes or YAML files")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--equal", choices=UNITS, default="flops", help="what is the same for all (default: flops)")
    parser.add_argument(
        "--budget", help="updates of the first recipe (1200) or an amount (1e13flops); default: the first recipe's"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    parser.add_argument("--checkpoints", type=int, default=5, help="evaluations in a run (default: %(default)s)")
    parser.add_argument(
        "--held_out_sequences", type=int, default=64, help="for the pseudo-perplexity (default: %(default)s)"
    )
    parser.add_argument("--minimal_pairs", help=".parquet or .jsonl with sentence_good, sentence_bad and perhaps uid")
    parser.add_argument("--pairs_per_paradigm", type=int, default=10, help="default: %(default)s")
    parser.add_argument(
        "--finetune",
        nargs="?",
        const="finetune_classification",
        help="also fine-tune every final checkpoint, by this recipe (default: %(const)s)",
    )
    options, others = parser.parse_known_args(argv)
    overrides: dict[bool, list[str]] = {True: [], False: []}
    for_finetuning = False
    for text in others:
        if text.startswith("--"):
            for_finetuning = text.startswith("--finetune.")
            text = text.replace("--finetune.", "--", 1)
        overrides[for_finetuning].append(text)
    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(","))
    except ValueError as error:
        raise ValueError(f"compare: seeds must be numbers with commas between, got {options.seeds!r}.") from error
    values = vars(options) | {"recipes": tuple(options.recipes), "seeds": seeds}
    settings = Settings(**values, overrides=tuple(overrides[False]), finetune_overrides=tuple(overrides[True]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    results = compare(settings, f"bestiary compare {shlex.join(argv)}")
    tqdm.write(f"\n{results['table']}\n\nResults, table and plot: {settings.output_dir}")
    return 0
