"""UniLM's trainers: the common suite, what the collators draw, starting from BERT, and writing by recipe."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from suites.trainer_suite import ObjectiveSuite, TrainerSuite, logged
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer

from bestiary.configuration.configuration_unilm import UniLMConfig
from bestiary.modeling.modeling_unilm import SEQ2SEQ, TASKS, UniLMForConditionalGeneration, UniLMForPreTraining
from bestiary.recipe import load_recipe
from bestiary.trainers import trainer_unilm
from bestiary.trainers.masking import SpecialTokens
from bestiary.trainers.randomness import EVALUATION_EPOCH
from bestiary.trainers.seeds import train_with_seeds
from bestiary.trainers.seq2seq import (
    PreparedPairs,
    character_tokenizer,
    seq2seq_data_arguments,
    seq2seq_trainer,
    seq2seq_training_arguments,
)
from bestiary.trainers.trainer_unilm import (
    WEIGHT_ORDER,
    UniLMCollator,
    UniLMDataArguments,
    UniLMSeq2SeqCollator,
    UniLMSeq2SeqTrainer,
    UniLMSeq2SeqTrainingArguments,
    UniLMTrainer,
    UniLMTrainingArguments,
)


VOCABULARY = 40
SPECIAL = SpecialTokens(
    cls_id=2, sep_id=3, pad_id=0, mask_id=4, vocab_size=VOCABULARY, continuation=None, has_token_types=True
)
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "mask_token_id": 4,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}


def config(dropout: float = 0.0, **fields) -> UniLMConfig:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return UniLMConfig(vocab_size=VOCABULARY, **TINY | rates | fields)


def rows(number: int) -> list[dict]:
    """Pairs of 8 to 16 tokens, each with another row beside it."""
    rng = np.random.default_rng(5)
    made = []
    for _ in range(number):
        length = int(rng.integers(8, 17))
        split = length // 2
        ids = rng.integers(5, 10, length)
        ids[0], ids[split], ids[-1] = 2, 3, 3
        types = [0] * (split + 1) + [1] * (length - split - 1)
        made.append({"input_ids": ids.tolist(), "token_type_ids": types})
    for row, other in zip(made, made[1:] + made[:1]):
        row["other_input_ids"] = [token + 10 if token > 4 else token for token in other["input_ids"]]
        row["other_token_type_ids"] = other["token_type_ids"]
    return made


class UniLM:
    slug = "unilm"
    parts = ("mlm", "sentence")
    metrics = ("sentence_accuracy",)
    optional = tuple(f"{task}_cloze_loss" for task in TASKS)

    def make_model(self, dropout):
        return UniLMForPreTraining(config(dropout))

    def make_rows(self, number):
        return rows(number)

    def make_collator(self):
        return UniLMCollator(SPECIAL, mlm_probability=0.3, max_length=16, seed=1)

    def test_parts_and_metrics_are_logged(self, tmp_path):
        """A task that did not occur since the last line has no loss in it."""
        trainer = self.make_trainer(tmp_path, logging_steps=2)
        trainer.train()
        trainer.evaluate()
        lines = [("", entry) for entry in logged(trainer) if "loss" in entry]
        lines += [("eval_", entry) for entry in logged(trainer) if "eval_loss" in entry]
        assert [prefix for prefix, _ in lines] == ["", "", "eval_"]
        weights, seen = trainer.loss_weights(), set()
        for prefix, entry in lines:
            names = [f"{prefix}{part}_loss" for part in self.parts] + [f"{prefix}{name}" for name in self.metrics]
            optional = {f"{prefix}{name}" for name in self.optional}
            others = {f"{prefix}loss", "grad_norm", "learning_rate", "epoch", "step"}
            assert set(entry) <= set(names) | others | optional
            assert all(math.isfinite(entry[name]) for name in (*names, *(optional & set(entry))))
            seen |= {name.removeprefix(prefix) for name in optional & set(entry)}
            total = sum(weights[part] * entry[f"{prefix}{part}_loss"] for part in self.parts)
            assert entry[f"{prefix}loss"] == pytest.approx(total, rel=1e-6)
        assert len(seen) >= 3


class TestUniLMTrainer(UniLM, TrainerSuite):
    def test_cloze_losses_of_tasks(self, tmp_path):
        """Their mean, weighted by tokens, is the loss of the part."""
        trainer = self.make_trainer(tmp_path)
        figures = trainer.evaluate(self.make_rows(12))
        collator = self.make_collator()
        collator.set_epoch(EVALUATION_EPOCH)
        batch = collator([row | {"example_key": key} for key, row in enumerate(self.make_rows(12))])
        counts = [(batch["labels"][batch["task_ids"] == task] != -100).sum().item() for task in range(4)]
        total = sum(figures[f"eval_{name}_cloze_loss"] * count for name, count in zip(TASKS, counts) if count)
        assert figures["eval_mlm_loss"] == pytest.approx(total / sum(counts), rel=1e-5)


class TestFineTuning(ObjectiveSuite):
    """Of the model that writes; its trainer is not the paper's entry."""

    slug = "unilm"
    parts = ()

    def make_trainer(self, output_dir, dropout=0.0, rows=20, eval_rows=6, **arguments):
        torch.manual_seed(0)
        common = {
            "output_dir": str(output_dir),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "predict_with_generate": False,
            "seed": 3,
            "report_to": "none",
            "disable_tqdm": True,
        }
        return UniLMSeq2SeqTrainer(
            UniLMForConditionalGeneration(config(dropout)),
            UniLMSeq2SeqTrainingArguments(**common | arguments),
            data_collator=self.make_collator(),
            train_dataset=self.make_rows(rows),
            eval_dataset=self.make_rows(eval_rows),
        )

    def make_rows(self, number):
        rng = np.random.default_rng(5)
        made = []
        for _ in range(number):
            source = rng.integers(5, 12, int(rng.integers(2, 7))).tolist()
            made.append({"input_ids": [2, *source, 3], "labels": [*source[::-1], 3]})
        return made

    def make_collator(self):
        return UniLMSeq2SeqCollator(character_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHI"), seed=1)

    def rows_of(self, batch):
        real = batch["attention_mask"].sum(1).tolist()
        written = batch["decoder_attention_mask"].sum(1).tolist()
        names = ("cloze_input_ids", "labels")
        return [
            (
                tuple(batch["input_ids"][row, : real[row]].tolist()),
                *(tuple(batch[name][row, : written[row]].tolist()) for name in names),
            )
            for row in range(len(real))
        ]

    def test_parts_and_metrics_are_logged(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        trainer.train()
        figures = trainer.evaluate()
        assert figures["eval_perplexity"] == pytest.approx(math.exp(figures["eval_loss"]), rel=1e-5)
        assert not any("perplexity" in entry for entry in logged(trainer) if "loss" in entry)

    def test_evaluation_has_the_loss_of_whole_targets(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        trainer.model.eval()
        sums = counts = 0.0
        for row in self.make_rows(6):
            inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
            with torch.no_grad():
                sums += trainer.model(**inputs, num_items_in_batch=1).loss.item()
            counts += len(row["labels"])
        assert trainer.evaluate()["eval_loss"] == pytest.approx(sums / counts, rel=1e-5)


# What the collator of pre-training draws


def collated(number=4000, **options):
    collator = UniLMCollator(SPECIAL, max_length=16, seed=2, **options)
    made = rows(40)
    return [collator([made[key % 40] | {"example_key": key}]) for key in range(number)], made


def test_shares_of_tasks_and_pairs():
    batches, _ = collated(3000)
    tasks = np.array([batch["task_ids"].item() for batch in batches])
    shares = [float((tasks == task).mean()) for task in WEIGHT_ORDER]
    assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6], abs=0.03)
    labels = np.array([batch["next_sentence_label"].item() for batch in batches])
    assert (labels[tasks != 0] == -100).all() and set(labels[tasks == 0]) == {0, 1}
    assert labels[tasks == 0].mean() == pytest.approx(0.5, abs=0.06)
    only = UniLMCollator(SPECIAL, objective_weights=[0, 1, 0, 0])
    assert set(only(rows(20))["task_ids"].tolist()) == {SEQ2SEQ}


def test_one_task_for_a_batch():
    collator = UniLMCollator(SPECIAL, seed=1, task_per="batch")
    tasks = [collator(rows(4))["task_ids"].unique().tolist() for _ in range(12)]
    assert all(len(task) == 1 for task in tasks) and len({task[0] for task in tasks}) > 1


def test_b_of_another_row():
    """Its tokens are 15 to 19; it is cut to the longest row, and ends in [SEP]."""
    batches, made = collated(300, objective_weights=[1, 0, 0, 0], mlm_probability=1e-9)
    for key, batch in enumerate(batches):
        row, label = made[key % 40], batch["next_sentence_label"].item()
        labels = batch["labels"][0]
        ids = torch.where(labels == -100, batch["input_ids"][0], labels).tolist()
        first = batch["num_tokens_a"].item()
        assert ids[:first] == row["input_ids"][:first] and ids[-1] == 3 and len(ids) <= 16
        if label:
            own, types = row["other_input_ids"], row["other_token_type_ids"]
            other = [token for token, kind in zip(own, types) if kind][:-1]
            assert ids[first:-1] == other[: 16 - first - 1]
        else:
            assert ids == row["input_ids"]


def test_number_of_predictions_and_their_replacement():
    batches, _ = collated(2000, objective_weights=[0, 1, 0, 0], mlm_probability=0.4)
    kept = masked = total = 0
    for batch in batches:
        labels, ids = batch["labels"][0], batch["input_ids"][0]
        chosen = labels != -100
        assert chosen.sum() == min(len(ids) - 3, max(1, round(0.4 * len(ids))))
        assert not torch.isin(labels[chosen], torch.tensor([0, 2, 3])).any()
        masked += (ids[chosen] == 4).sum().item()
        kept += (ids[chosen] == labels[chosen]).sum().item()
        total += chosen.sum().item()
    assert masked / total == pytest.approx(0.8, abs=0.02)
    assert kept / total == pytest.approx(0.1, abs=0.02)
    few = UniLMCollator(SPECIAL, mlm_probability=0.9, max_predictions=2)(rows(8))["labels"]
    assert (few != -100).sum(1).tolist() == [2] * 8


def test_ngrams():
    """Without them a draw masks one token; with them alone every run has two or three, but where it was cut."""
    ids = np.array([2, *range(5, 38), 3])
    rng = np.random.default_rng(0)

    def runs(collator):
        sizes = []
        for _ in range(300):
            places = np.flatnonzero(collator.choose(ids, rng))
            sizes += [len(run) for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)]
        return np.bincount(sizes, minlength=4)[1:4]

    single = runs(UniLMCollator(SPECIAL, mlm_probability=0.06, ngram_mask_prob=0.0))
    several = runs(UniLMCollator(SPECIAL, mlm_probability=0.09, ngram_mask_prob=1.0))
    assert single[0] > 10 * single[1] > 0
    assert several[1] + several[2] > several[0]
    mixed = UniLMCollator(SPECIAL, mlm_probability=0.09)
    assert runs(mixed)[1] > 0 and mixed.choose(ids, rng).sum() == 3


def test_draws_belong_to_the_example():
    made = [row | {"example_key": key} for key, row in enumerate(rows(6))]
    collator = UniLMCollator(SPECIAL, seed=4)
    whole = collator(made)
    alone = [collator([row]) for row in reversed(made)][::-1]
    for row, batch in enumerate(alone):
        length = int(batch["attention_mask"].sum())
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name][0, :length], whole[name][row, :length])
        assert batch["task_ids"] == whole["task_ids"][row]
    collator.set_epoch(1)
    assert not torch.equal(collator(made)["labels"], whole["labels"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective_weights": [1, 0, 0]}, "objective_weights must be four shares, of bidirectional, seq2seq"),
        ({"objective_weights": [1, 1, 0, 0]}, "sum to 1"),
        ({"task_per": "token"}, "task_per must be example or batch, got 'token'"),
        ({"mlm_probability": 0}, r"mlm_probability must be in \(0, 1\], got 0"),
        ({"ngram_mask_prob": 2}, r"ngram_mask_prob must be in \[0, 1\], got 2"),
        ({"max_ngram": 1}, "max_ngram must be at least 2, got 1"),
        ({"max_predictions": 0}, "max_predictions must be at least 1 or None, got 0"),
    ],
)
def test_collator_refuses(options, message):
    with pytest.raises(ValueError, match=f"UniLMCollator.*{message}"):
        UniLMCollator(SPECIAL, **options)


def test_a_row_without_a_second_text():
    with pytest.raises(ValueError, match="row 0 has no second text"):
        UniLMCollator(SPECIAL)([{"input_ids": [2, 5, 3], "token_type_ids": [0, 0, 0]}])


# What the collator of fine-tuning draws


def test_targets_of_fine_tuning():
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHI")
    collator = UniLMSeq2SeqCollator(tokenizer, seed=3)
    target = [*range(5, 15), 3]
    features = [{"input_ids": [2, 5, 3], "labels": target, "example_key": key} for key in range(600)]
    features[0] = features[0] | {"labels": [7, 3]}
    batch = collator(features)
    chosen = batch["labels"] != -100
    assert chosen.sum(1).tolist() == [1, *([7] * 599)]  # round(0.7 * 10), the end not counted
    assert chosen[1:, 10].float().mean() == pytest.approx(7 / 11, abs=0.06), "the end is predicted as often as others"
    assert torch.equal(batch["labels"][1:][chosen[1:]], torch.tensor(target).expand(599, -1)[chosen[1:]])
    assert batch["decoder_attention_mask"].sum(1).tolist() == [2, *([11] * 599)]
    masked = (batch["cloze_input_ids"][chosen] == tokenizer.mask_token_id).float().mean()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert torch.equal(batch["cloze_input_ids"][1:][~chosen[1:]], torch.tensor(target).expand(599, -1)[~chosen[1:]])
    few = UniLMSeq2SeqCollator(tokenizer, max_target_predictions=2)(features[1:4])
    assert (few["labels"] != -100).sum(1).tolist() == [2, 2, 2]
    collator.set_epoch(EVALUATION_EPOCH)
    held_out = collator(features[1:3])
    assert "cloze_input_ids" not in held_out and held_out["labels"].tolist() == [target, target]
    with pytest.raises(ValueError, match=r"target_mask_prob must be in \(0, 1\], got 0"):
        UniLMSeq2SeqCollator(tokenizer, target_mask_prob=0)
    with pytest.raises(ValueError, match="max_target_predictions must be at least 1 or None, got 0"):
        UniLMSeq2SeqCollator(tokenizer, max_target_predictions=0)


def test_a_random_token_that_is_padding_stays_a_token(monkeypatch):
    """Replacements come from the whole vocabulary; the mask of the target says what is padding."""
    monkeypatch.setattr(trainer_unilm, "REPLACE", (0.0, 1.0, 0.0))
    tokenizer = character_tokenizer("ab")
    collator = UniLMSeq2SeqCollator(tokenizer, target_mask_prob=1.0)
    batch = collator([{"input_ids": [2, 5, 3], "labels": [5, 6, 5, 6, 3]}] * 40)
    assert (batch["cloze_input_ids"] == 0).any() and (batch["decoder_attention_mask"] == 1).all()


# Data and recipes


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def build_datasets(tokenizer, documents):
    parts = DatasetDict({split: Dataset.from_dict({"sentences": documents}) for split in ("train", "validation")})
    data = UniLMDataArguments(max_length=16)
    return UniLMTrainer.build_datasets(parts, tokenizer, config(), data, None)


def test_rows_of_documents(tokenizer):
    documents = [["a b c", "d e", "f g h i"], ["j"], ["b b", "c c c", "d"], ["a a a a", "i i i"]]
    built = build_datasets(tokenizer, documents)
    assert set(built["train"].column_names) == {
        *("input_ids", "token_type_ids", "other_input_ids", "other_token_type_ids")
    }
    assert all(types[-1] == 1 for types in built["train"]["token_type_ids"])
    ids, others = built["train"]["input_ids"][:], built["train"]["other_input_ids"][:]
    assert sorted(ids) == sorted(others)
    for rows in (2, 3, 5):  # none stands beside itself
        built = build_datasets(tokenizer, [[f"{letter} a", "b b b b", "c c c"] for letter in "abcdefgh"[:rows]])[
            "train"
        ]
        assert all(own != other for own, other in zip(built["input_ids"], built["other_input_ids"]))
    built = build_datasets(tokenizer, documents)
    collator = UniLMTrainer.build_collator(tokenizer, config(), UniLMDataArguments(max_length=16), training(8))
    assert collator([dict(row) for row in built["train"]])["input_ids"].shape[1] <= 16
    with pytest.raises(ValueError, match="no document of the split 'train' has two sentences"):
        build_datasets(tokenizer, [["a"], ["b"]])


def training(seed):
    return UniLMTrainingArguments(output_dir="unused", seed=seed, report_to="none")


def test_settings_of_the_paper():
    found = training(0)
    assert (found.learning_rate, found.warmup_steps, found.weight_decay) == (3e-5, 40_000, 0.01)
    assert (found.adam_beta1, found.adam_beta2, found.lr_scheduler_type) == (0.9, 0.999, "linear")
    tuning = UniLMSeq2SeqTrainingArguments(output_dir="unused", report_to="none")
    assert (tuning.optimizer, tuning.warmup_steps, tuning.max_grad_norm) == ("bert_adam", 0.1, 1)
    # the official schedule falls from the peak to 0 in a line, unlike that of the BERT code
    assert (tuning.schedule, tuning.lr_scheduler_type) == (None, "linear")


def read(*argv):
    return load_recipe(
        ["--config", "unilm_seq2seq_tiny", *map(str, argv)],
        data=seq2seq_data_arguments,
        training=seq2seq_training_arguments,
    )


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = "abc bd cabd dda ab bcda ca acbd dcb bb adc cd".split()
    for name in ("a", "b"):
        lines = [json.dumps({"source": word, "target": word[::-1]}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return (
        *("--train_file", tmp_path / "a.jsonl", "--eval_file", tmp_path / "b.jsonl"),
        *("--output_dir", tmp_path / "run", "--disable_tqdm", "true"),
    )


SMALL = ("--model.hidden_size", 32, "--model.num_attention_heads", 2, "--model.intermediate_size", 48)


@pytest.mark.slow
def test_recipe_learns_to_write(files, tmp_path):
    options = (*files, *SMALL, "--max_steps", 250, "--learning_rate", "2e-3", "--per_device_train_batch_size", 12)
    recipe = read(*options, "--max_target_length", 8, "--max_source_length", 8)
    prepared = PreparedPairs.load(recipe)
    assert prepared.config.mask_token_id == prepared.tokenizer.mask_token_id
    summary = train_with_seeds(recipe, "command", prepared)
    assert summary["eval_exact_match"]["mean"] > 0.8 and summary["eval_perplexity"]["mean"] < 2
    model = UniLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.generation_config.num_beams == 4 and model.generation_config.max_length == 9


def test_checkpoints_bring_their_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    recipe = SimpleNamespace(data=UniLMDataArguments(), model={"name_or_path": str(tmp_path)})
    assert len(UniLMTrainer.build_tokenizer(recipe)) == len(tokenizer)


def test_source_and_target_share_positions(files):
    with pytest.raises(ValueError, match=r"max_source_length \+ max_target_length is 200, .* share"):
        PreparedPairs.load(read(*files, "--max_source_length", 100, "--max_target_length", 100))


def test_a_model_of_another_type(files):
    recipe = load_recipe(
        ["--slug", "unilm", "--model_type", "bert", "--tokenizer", "characters", *map(str, files)],
        data=seq2seq_data_arguments,
        training=seq2seq_training_arguments,
    )
    with pytest.raises(ValueError, match="UniLM starts from .*; this is a BertConfig"):
        PreparedPairs.load(recipe)


@pytest.mark.parametrize("stock_class", [BertForPreTraining, BertModel])
def test_starting_from_bert(stock_class, tokenizer, files, tmp_path):
    sizes = {name: value for name, value in TINY.items() if not name.endswith("_id")}
    stock = stock_class(BertConfig(vocab_size=len(tokenizer), **sizes))
    stock.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    recipe = load_recipe(
        [
            *("--slug", "unilm", "--name_or_path", str(tmp_path / "bert"), "--model.max_position_embeddings", "40"),
            *(str(word) for word in files),
            *("--max_source_length", "20", "--max_target_length", "10", "--max_steps", "1"),
        ],
        data=seq2seq_data_arguments,
        training=seq2seq_training_arguments,
    )
    assert seq2seq_trainer("unilm") is UniLMSeq2SeqTrainer
    model = PreparedPairs.load(recipe).build_trainer(recipe).model
    assert type(model) is UniLMForConditionalGeneration
    theirs, ours = stock.base_model.state_dict(), model.bert.state_dict()
    assert ours["embeddings.token_type_embeddings.weight"].shape[0] == 6
    segments = ours["embeddings.token_type_embeddings.weight"][[4, 5]]
    assert torch.equal(segments, theirs["embeddings.token_type_embeddings.weight"])
    positions = ours["embeddings.position_embeddings.weight"]
    assert torch.equal(positions[32:], theirs["embeddings.position_embeddings.weight"][:8])
    assert torch.equal(ours["encoder.layer.1.output.dense.weight"], theirs["encoder.layer.1.output.dense.weight"])
    if stock_class is BertForPreTraining:
        assert torch.equal(model.cls.predictions.bias, stock.cls.predictions.bias)
    assert model.config.mask_token_id == tokenizer.mask_token_id and model.config.layer_norm_eps == 1e-12
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    recipe.model["name_or_path"] = str(tmp_path / "again")
    again = PreparedPairs.load(recipe).build_trainer(recipe).model
    assert again.name_or_path == str(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
