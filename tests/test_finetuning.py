"""Fine-tuning: rows as model inputs, scores by hand, losses and updates against stock models, the script."""

import importlib.util
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    BertTokenizer,
    ElectraConfig,
    Trainer,
    TrainerCallback,
)

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.modeling.modeling_electra import ElectraJointForPreTraining
from bestiary.trainers.finetuning import (
    FinetuneTrainer,
    FinetuneTrainingArguments,
    classification_metrics,
    regression_metrics,
    tagging_metrics,
)
from bestiary.trainers.squad import best_answers, qa_features, squad_scores
from bestiary.trainers.tasks import TASKS, Labels, TaskDataArguments, load_labelled


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat ##s sat on mat . who ? dog ran far red blue green a b c d e f".split()
VOCABULARY = {word: number for number, word in enumerate(WORDS)}
TINY = {
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab=VOCABULARY)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Files that `datasets` reads are cached in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_task(tokenizer, kind, rows, **options):
    return TASKS[kind](TaskDataArguments(task=kind, dataset="unused", **options), tokenizer, rows)


def read(ids):
    return " ".join(WORDS[number] for number in ids)


# Rows to model inputs


@pytest.mark.parametrize(
    ("values", "feature", "names", "numbers"),
    [
        (["no", "yes", "no"], Value("string"), ["no", "yes"], [0, 1, 0]),
        ([10, 9, 10], Value("int64"), ["9", "10"], [1, 0, 1]),  # by size, not by spelling
        ([1, 2, 3], Value("int64"), ["1", "2", "3"], [0, 1, 2]),  # values are not numbers of classes
        ([2.5, 1.0, 1.0], Value("float64"), ["1.0", "2.5"], [1, 0, 0]),
        ([True, False, True], Value("bool"), ["False", "True"], [1, 0, 1]),
        ([2, 0, 2], ClassLabel(names=["z", "y", "x"]), ["z", "y", "x"], [2, 0, 2]),  # as numbered, used or not
    ],
)
def test_classes(tokenizer, values, feature, names, numbers):
    rows = Dataset.from_dict(
        {"text": ["the cat"] * 3, "label": values}, features=Features({"text": Value("string"), "label": feature})
    )
    task = make_task(tokenizer, "classification", rows)
    assert task.features(rows, True)["labels"][:] == numbers
    fields = task.config_fields()
    assert list(fields["id2label"].values()) == names and fields["label2id"] == {n: i for i, n in enumerate(names)}
    assert fields["problem_type"] == "single_label_classification"


def test_pairs_and_truncation(tokenizer):
    rows = Dataset.from_dict({"one": ["the cats sat", "a"], "two": ["who ran ?", "b"], "label": ["x", "y"]})
    task = make_task(
        tokenizer, "classification", rows, text_column="one", pair_column="two", max_length=8, label_column="label"
    )
    found = task.features(rows, True)
    assert found.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    assert read(found[0]["input_ids"]) == "[CLS] the cat ##s [SEP] who ran [SEP]"
    assert found[0]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    batch = task.collator()([found[0], found[1]])
    assert batch["input_ids"].shape == (2, 8) and batch["attention_mask"][1].sum() == 5
    assert batch["labels"].tolist() == [0, 1]


def test_scores(tokenizer):
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [3, 1]})
    task = make_task(tokenizer, "regression", rows)
    batch = task.collator()([*task.features(rows, True)])
    assert_close(batch["labels"], torch.tensor([3.0, 1.0]))
    assert task.config_fields() == {
        "id2label": {0: "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
    }


def test_first_piece_of_a_word_carries_its_tag(tokenizer):
    words = [["the", "cats", "sat"], ["dogs", "dogs"], ["a"], []]
    rows = Dataset.from_dict({"tokens": words, "label": [["O", "B-x", "O"], ["B-x", "I-x"], ["O"], []]})
    task = make_task(tokenizer, "tagging", rows, max_length=6)
    assert task.labels.names == ["B-x", "I-x", "O"]
    found = task.features(rows, True)
    assert read(found[0]["input_ids"]) == "[CLS] the cat ##s sat [SEP]"
    assert found[0]["labels"] == [-100, 2, 0, -100, 2, -100]
    assert read(found[1]["input_ids"]) == "[CLS] dog ##s dog ##s [SEP]"
    assert found[1]["labels"] == [-100, 0, -100, 1, -100, -100]  # two equal words are two words
    assert found[3]["labels"] == [-100, -100]
    batch = task.collator()([found[0], found[2]])
    assert batch["labels"][1].tolist() == [-100, 2, -100, -100, -100, -100]
    short = make_task(tokenizer, "tagging", rows, max_length=4).features(rows, True)
    assert read(short[0]["input_ids"]) == "[CLS] the cat [SEP]" and short[0]["labels"] == [-100, 2, 0, -100]


def test_numbered_tags_keep_their_numbers(tokenizer):
    features = Features({"tokens": List(Value("string")), "label": List(ClassLabel(names=["O", "B-x", "I-x"]))})
    rows = Dataset.from_dict({"tokens": [["a", "b"]], "label": [[1, 2]]}, features=features)
    task = make_task(tokenizer, "tagging", rows)
    assert task.labels.names == ["O", "B-x", "I-x"]
    assert task.features(rows, True)[0]["labels"] == [-100, 1, 2, -100]


def test_fewer_training_rows_keep_all_classes(tokenizer):
    rows = Dataset.from_dict({"text": ["a"] * 50, "label": [*range(50)]})
    task = make_task(tokenizer, "classification", rows, max_train_examples=5)
    first, again = task.features(rows, True)["labels"][:], task.features(rows, True)["labels"][:]
    other = make_task(tokenizer, "classification", rows, max_train_examples=5, data_seed=1)
    assert len(first) == 5 and first == again != other.features(rows, True)["labels"][:]
    assert len(task.labels.names) == 50 and len(task.features(rows, False)) == 50


# Question answering

CONTEXT = "the red cats sat on the mat . the dog ran far ."
QUESTION = "who ran ?"


def qa_rows(*answers, question=QUESTION, context=CONTEXT):
    given = [{"text": [text], "answer_start": [start]} for text, start in answers]
    return {"question": [question] * len(given), "context": [context] * len(given), "answers": given}


def spans_of(tokenizer, rows, max_length=64, doc_stride=4):
    found = qa_features(rows, [*range(len(rows["question"]))], tokenizer, max_length, doc_stride, with_offsets=True)
    return found, [
        read(ids[start : end + 1]) if start >= 0 else None
        for ids, start, end in zip(found["input_ids"], found["start_positions"], found["end_positions"])
    ]


def test_answer_tokens_and_offsets(tokenizer):
    rows = qa_rows(
        ("dog", CONTEXT.index("dog")),
        ("red cats", 4),
        ("cats", 0),  # wrong place: found by search
        ("cats", -1),
        (" dog ran ", CONTEXT.index(" dog")),  # blanks belong to no token
        ("the", CONTEXT.index("the dog")),  # the place counts, not the first match
        ("zebra", 3),
    )
    found, answers = spans_of(tokenizer, rows)
    assert answers == ["dog", "red cat ##s", "cat ##s", "cat ##s", "dog ran", "the", None]
    assert found["start_positions"][5] == found["input_ids"][5].index(VOCABULARY["dog"]) - 1
    assert found["start_positions"][6] == found["end_positions"][6] == -1
    assert found["row"] == [*range(7)]
    ids, offsets = found["input_ids"][0], found["offsets"][0]
    assert read(ids[:5]) == "[CLS] who ran ? [SEP]" and offsets[:5] == [[-1, -1]] * 5 and offsets[-1] == [-1, -1]
    assert [CONTEXT[low:high] for low, high in offsets[5:-1]] == CONTEXT.replace("cats", "cat s").split()
    assert "offsets" not in qa_features(rows, [*range(7)], tokenizer, 64, 4, with_offsets=False)


def test_pieces_overlap_and_those_without_the_answer_point_at_cls(tokenizer):
    found, answers = spans_of(tokenizer, qa_rows(("dog ran", CONTEXT.index("dog"))), max_length=13, doc_stride=3)
    pieces = [read(ids).split("[SEP]")[1].strip() for ids in found["input_ids"]]
    assert pieces == ["the red cat ##s sat on the", "sat on the mat . the dog", ". the dog ran far ."]
    assert answers == ["[CLS]", "[CLS]", "dog ran"] and found["row"] == [0, 0, 0]  # the second holds half of it
    assert found["start_positions"][:2] == found["end_positions"][:2] == [0, 0]


def test_long_questions_are_cut(tokenizer):
    found, answers = spans_of(tokenizer, qa_rows(("mat", 24), question="who " * 500), max_length=128, doc_stride=32)
    assert read(found["input_ids"][0]).count("who") == 64 and answers == ["mat"]
    found, _ = spans_of(tokenizer, qa_rows(("mat", 24), question="who " * 500), max_length=12, doc_stride=4)
    assert {read(ids).count("who") for ids in found["input_ids"]} == {4}  # 12 - 4 - 3 special ones - 1
    with pytest.raises(ValueError, match="max_length=12 leaves no room .* doc_stride=8"):
        spans_of(tokenizer, qa_rows(("mat", 24)), max_length=12, doc_stride=8)


TEXT = "ab cd ef"
PLACES = [[-1, -1], [0, 2], [3, 5], [6, 8], [-1, -1]]  # [CLS] ab cd ef [SEP]


@pytest.mark.parametrize(
    ("starts", "ends", "options", "best"),
    [
        ([9, 2, 3, 0, 9], [9, 5, 0, 3, 9], {}, "ab"),  # 2 + 5; special tokens are no answer
        ([0, 2, 3, 0, 0], [0, 0, 0, 3, 0], {}, "cd ef"),
        ([0, 2, 3, 0, 0], [0, 0, 0, 3, 0], {"max_answer_length": 1}, "cd"),  # 3 + 0, as ef, which is later
        ([0, 0, 0, 9, 0], [0, 9.5, 0, 0, 0], {}, "ab"),  # "ef to ab" is no span
        ([0, 0, 0, 9, 0], [0, 9.5, 0, 0, 0], {"candidates": 1}, ""),
    ],
)
def test_best_answer_of_a_piece_by_hand(starts, ends, options, best):
    logits = [np.array([starts], dtype=float), np.array([ends], dtype=float)]
    assert best_answers(logits, [PLACES], [0], [TEXT], **options) == [best]
    assert best_answers(logits, [[[-1, -1]] * 5], [0], [TEXT], **options) == [""]
    wider = [np.pad(part, ((0, 0), (0, 3)), constant_values=99) for part in logits]  # padding
    assert best_answers(wider, [PLACES], [0], [TEXT], **options) == [best]


def test_best_piece_of_a_row_wins():
    starts, ends = np.array([[0.0, 1, 0, 0, 0], [0.0, 0, 2, 0, 0], [0.0, 0, 0, 1, 0]]), np.zeros((3, 5))
    for order in ([0, 1, 2], [2, 1, 0]):
        found = best_answers([starts[order], ends[order]], [PLACES] * 3, [1, 1, 1], ["none", TEXT])
        assert found == ["", "cd"]


@pytest.mark.parametrize(
    ("guess", "told", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 100, 100),  # case, articles, punctuation
        ("an a the", ["..."], 100, 100),  # nothing on either side
        ("", ["cat"], 0, 0),
        ("red cat", ["cat"], 0, 200 / 3),  # precision 1/2, recall 1
        ("cat cat", ["cat dog"], 0, 50),  # a word counts as often as it stands there
        ("red cat", ["dog", "red cats", "cat red far"], 0, 80),  # the best of all answers; order is no matter for F1
        ("dog", ["cat", "a dog"], 100, 100),
    ],
)
def test_squad_scores_by_hand(guess, told, exact, f1):
    assert squad_scores([guess], [told]) == pytest.approx({"exact_match": exact, "f1": f1})
    assert squad_scores([guess, "x"], [told, ["y"]]) == pytest.approx({"exact_match": exact / 2, "f1": f1 / 2})


# Scores of the other tasks


def test_classification_and_regression_scores_by_hand():
    logits = np.eye(3)[[0, 1, 1, 2]]
    found = classification_metrics(logits, np.array([0, 1, 2, 2]))
    assert found == pytest.approx({"accuracy": 0.75, "macro_f1": (1 + 2 / 3 + 2 / 3) / 3, "matthews": 0.7})
    found = regression_metrics(np.array([[1.0], [2.0], [4.0]]), np.array([2.0, 3.0, 9.0]))
    assert found == pytest.approx({"pearson": 102 / 10836**0.5, "spearman": 1.0, "mse": 9.0}, abs=1e-6)


def test_tagging_scores_by_hand():
    names = ["O", "B-x", "I-x"]
    labels = np.array([[-100, 1, 2, 0, -100], [-100, 0, 1, -100, -100]])
    guesses = np.array([[1, 1, 0, 0, 1], [0, 0, 1, 2, 1]])  # the first entity is cut short, the second is right
    found = tagging_metrics(np.eye(3)[guesses], labels, names)
    assert found == pytest.approx({"accuracy": 0.8, "precision": 0.5, "recall": 0.5, "f1": 0.5})
    # parts of speech have no entities
    assert tagging_metrics(np.eye(3)[guesses], labels, ["NOUN", "VERB", "X"]) == pytest.approx({"accuracy": 0.8})


# Mistakes


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        (
            "classification",
            {"text": ["a"], "label": ["z"]},
            "label_column='label': a row has the label 'z', .* 'x', 'y'",
        ),
        ("classification", {"text": ["a"], "label": [None]}, "has the label None, .* choose another eval_split"),
        ("classification", {"text": [None], "label": ["x"]}, "column 'text' must hold text in every row, got None"),
        ("regression", {"text": ["a"], "label": ["much"]}, "label_column='label' must hold numbers, got 'much'"),
        ("regression", {"text": ["a"], "label": [None]}, "must hold numbers, got None"),
        (
            "tagging",
            {"tokens": [["a", "b"]], "label": [["x"]]},
            "Row 0 has 2 words in 'tokens', but 1 tags in 'label'",
        ),
        ("tagging", {"tokens": [["a"]], "label": [["z"]]}, "a row has the label 'z'"),
        ("qa", {"question": ["a"], "context": ["b"], "answers": [{"text": [], "answer_start": []}]}, "SQuAD 2.0"),
        ("qa", {"question": ["a"], "context": ["b"], "answers": ["b"]}, "answers of row 0 are 'b'"),
        ("qa", {"question": [None], "context": ["b"], "answers": ["b"]}, "column 'question' must hold text"),
    ],
)
def test_rows_that_do_not_fit(tokenizer, kind, columns, message):
    train = {
        "text": ["a", "b"],
        "tokens": [["a"], ["b"]],
        "label": [["x"], ["y"]] if kind == "tagging" else ["x", "y"],
    }
    task = make_task(tokenizer, kind, Dataset.from_dict(train))
    with pytest.raises(ValueError, match=message):
        task.features(Dataset.from_dict(columns), False)


def test_secret_labels_of_a_test_split_are_refused():
    labels = Labels("label", ClassLabel(names=["x", "y"]), [])
    with pytest.raises(ValueError, match="a row has the label -1, the training rows have 0, 1"):
        labels.number(-1)
    with pytest.raises(ValueError, match=r"label_column='label' must hold at least two classes, got \['x'\]"):
        Labels("label", Value("string"), ["x", "x", None])


def test_sources_that_cannot_be_used(tmp_path):
    def load(**options):
        return load_labelled(TaskDataArguments(**options))

    good, empty, other = tmp_path / "good.jsonl", tmp_path / "empty.jsonl", tmp_path / "other.csv"
    good.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    empty.write_text("")
    other.write_text("sentence,label\na,1\n")
    train, held_out = load(train_file=str(good), eval_file=str(good))
    assert len(train) == len(held_out) == 2
    files = {"train_file": str(good), "eval_file": str(good)}
    for options, message in [
        ({"task": "translation"}, "TaskDataArguments.task must be one of classification, .* got 'translation'"),
        ({}, "give either dataset, or train_file and eval_file"),
        ({"train_file": str(good)}, "train_file and eval_file; got .* eval_file=None"),
        ({"dataset": "demo", "eval_file": str(good)}, "give either dataset, or"),
        (files | {"eval_file": str(empty)}, "eval_file='.*empty.jsonl' cannot be loaded, or has no rows"),
        (files | {"eval_file": str(tmp_path / "none.csv")}, "eval_file='.*none.csv' cannot be loaded.*: FileNotFound"),
        (files | {"train_file": "rows.tsv"}, "train_file must end in .jsonl, .parquet, .csv; got 'rows.tsv'"),
        (files | {"eval_file": str(other)}, "split 'test' has no column 'text', .* it has sentence, label"),
        (files | {"label_column": "score"}, "split 'train' has no column 'score', .* it has text, label"),
        (files | {"pair_column": "second"}, "no column 'second'"),
        (files | {"task": "tagging"}, "no column 'tokens', which the task tagging needs"),
        (files | {"task": "qa"}, "no column 'question'"),
        (files | {"eval_split": "validation"}, "no rows in the split 'validation'; it has train, test"),
        ({"dataset": str(tmp_path / "nowhere")}, "dataset='.*nowhere' cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(**options)


def test_a_split_without_rows(tmp_path):
    file, nothing = tmp_path / "a.parquet", tmp_path / "b.parquet"
    Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(file)
    Dataset.from_dict({"text": [], "label": []}).to_parquet(nothing)
    with pytest.raises(ValueError, match="eval_file='.*b.parquet' cannot be loaded, or has no rows"):
        load_labelled(TaskDataArguments(train_file=str(file), eval_file=str(nothing)))


def test_inputs_longer_than_the_positions_are_refused(tokenizer):
    task = make_task(tokenizer, "regression", Dataset.from_dict({}), max_length=65)
    with pytest.raises(ValueError, match="max_length is 65, but the model has max_position_embeddings=64"):
        task.check_sizes(BertConfig(**TINY))
    make_task(tokenizer, "regression", Dataset.from_dict({}), max_length=64).check_sizes(BertConfig(**TINY))


# Losses and updates

AUTO = {
    "classes": AutoModelForSequenceClassification,
    "scores": AutoModelForSequenceClassification,
    "tags": AutoModelForTokenClassification,
    "spans": AutoModelForQuestionAnswering,
}
CONFIGS = {
    "stock_bert": lambda: BertConfig(**TINY, **DRY),
    "bert": lambda: BertPretrainingConfig(**TINY, **DRY),
    "electra": lambda: ElectraJointConfig(discriminator_config=TINY | DRY | {"embedding_size": 8}),
}


def make_model(kind, family):
    config = CONFIGS[family]()
    config.num_labels = {"classes": 3, "scores": 1, "tags": 4, "spans": 2}[kind]
    if kind in ("classes", "scores"):
        config.problem_type = "single_label_classification" if kind == "classes" else "regression"
    torch.manual_seed(1)
    model = AUTO[kind].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the initialisation, so that gradients are not tiny
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def make_rows(kind, lengths=(3, 9, 4, 6, 5, 8, 7, 3)):
    generator = torch.Generator().manual_seed(2)

    def draw(high, *size):
        return torch.randint(high, size, generator=generator).tolist()

    rows = []
    for number, length in enumerate(lengths):
        row = {"input_ids": [5 + token for token in draw(len(WORDS) - 5, length)], "attention_mask": [1] * length}
        if kind == "classes":
            row["labels"] = draw(3, 1)[0]
        elif kind == "scores":
            row["labels"] = -100.0 if number == 0 else float(draw(5, 1)[0])  # a score like others
        elif kind == "tags":
            row["labels"] = [-100, *draw(4, length - 1)]
        else:  # one row whose answer is missing
            row["start_positions"], row["end_positions"] = (-1, -1) if number == 1 else draw(length, 2)
        rows.append(row)
    return rows


def make_trainer(model, kind, rows, tokenizer, folder, trainer_class=FinetuneTrainer, **options):
    arguments = FinetuneTrainingArguments(
        output_dir=str(folder), max_steps=1, max_grad_norm=0, disable_tqdm=True, save_strategy="no", **options
    )
    task = "tagging" if kind == "tags" else "regression"
    collator = make_task(tokenizer, task, Dataset.from_dict({"label": [["x", "y"]]})).collator()
    rows = Dataset.from_list(rows)
    return trainer_class(model, arguments, data_collator=collator, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", AUTO)
def test_loss_is_the_models_own(kind, family, tokenizer, tmp_path):
    model = make_model(kind, family).eval()
    # stock question answering has its softmax run over padding, and takes an answer at -1 for one at [CLS]
    special = {} if kind != "spans" or family != "stock_bert" else {"lengths": (6, 6, 6, 6)}
    rows = make_rows(kind, **special)
    for row in rows if special else ():
        row["start_positions"] = max(0, row["start_positions"])
        row["end_positions"] = max(0, row["end_positions"])
    trainer = make_trainer(model, kind, rows, tokenizer, tmp_path)
    batch = next(iter(trainer.get_eval_dataloader()))
    sums, outputs = trainer.loss_sums(model, batch)
    count = trainer.count_items(batch)["loss"]
    assert count == {"classes": 8, "scores": 8, "tags": 45 - 8, "spans": 8 if special else 14}[kind]
    assert_close(sums["loss"] / count, model(**batch).loss)
    assert outputs.loss is None


class KeepGradients(TrainerCallback):
    """Copies of the gradients of the last update."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def gradients(kind, family, tokenizer, folder, micro_batch, trainer_class):
    callback = KeepGradients()
    trainer = make_trainer(
        make_model(kind, family),
        kind,
        make_rows(kind),
        tokenizer,
        folder,
        trainer_class,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch,
    )
    trainer.add_callback(callback)
    trainer.train()
    return callback.found, trainer.state.log_history[-1]["train_loss"]


@pytest.mark.parametrize("family", ["stock_bert", "electra"])
@pytest.mark.parametrize("kind", AUTO)
def test_a_batch_can_be_split(kind, family, tokenizer, tmp_path):
    whole, whole_loss = gradients(kind, family, tokenizer, tmp_path, 8, FinetuneTrainer)
    for micro_batch in (4, 1):
        parts, loss = gradients(kind, family, tokenizer, tmp_path, micro_batch, FinetuneTrainer)
        assert_close(parts, whole, atol=1e-6, rtol=1e-5)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert max(value.abs().max() for value in whole.values()) > 1e-3


def test_the_stock_trainer_would_double_the_step(tokenizer, tmp_path):
    """Why the loss is computed by the trainer: stock heads ignore the count that the stock trainer gives them."""
    ours, _ = gradients("classes", "stock_bert", tokenizer, tmp_path, 4, FinetuneTrainer)
    whole, _ = gradients("classes", "stock_bert", tokenizer, tmp_path, 8, Trainer)
    halves, _ = gradients("classes", "stock_bert", tokenizer, tmp_path, 4, Trainer)
    assert_close(ours, whole, atol=1e-6, rtol=1e-5)
    assert_close(halves, {name: 2 * value for name, value in whole.items()}, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", AUTO)
def test_evaluation_is_a_mean_over_items(kind, tokenizer, tmp_path):
    model = make_model(kind, "stock_bert")
    losses = []
    for batch in (8, 3):
        trainer = make_trainer(model, kind, make_rows(kind), tokenizer, tmp_path, per_device_eval_batch_size=batch)
        found = trainer.predict(trainer.eval_dataset)
        losses.append(found.metrics["test_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    shapes = {"classes": (8, 3), "scores": (8, 1), "tags": (8, 9, 4), "spans": (8, 9)}
    predictions = found.predictions[0] if kind == "spans" else found.predictions
    assert predictions.shape == shapes[kind]


def test_labels_out_of_range_are_named(tokenizer, tmp_path):
    for kind in ("classes", "tags"):
        rows = make_rows(kind)
        rows[0]["labels"] = 7 if kind == "classes" else [7] * len(rows[0]["input_ids"])
        trainer = make_trainer(make_model(kind, "stock_bert"), kind, rows, tokenizer, tmp_path)
        with pytest.raises(ValueError, match=r"labels must be in \[0, [34]\) or -100"):
            trainer.evaluate()


# The script


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "examples" / "finetune.py"
    spec = importlib.util.spec_from_file_location("bestiary_examples_finetune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Folders:
    """A pre-trained ELECTRA of ours and a stock BERT, with their tokenizer."""

    electra: str
    stock_bert: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    encoder = TINY | {"hidden_size": 16, "embedding_size": 16}
    models = {
        "electra": ElectraJointForPreTraining(ElectraJointConfig(discriminator_config=ElectraConfig(**encoder))),
        "stock_bert": BertModel(BertConfig(**TINY)),
    }
    found = {}
    for name, model in models.items():
        found[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return Folders(**found)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def colours(count):
    """Texts whose class is the colour in them; the classes are 3 and 7."""
    generator = np.random.default_rng(0)
    filler = ["the", "cat", "on", "mat", "a", "b", "c"]
    for number in range(count):
        words = list(generator.choice(filler, 4))
        words[generator.integers(4)] = "red" if number % 2 else "blue"
        yield {"text": " ".join(words), "label": 7 if number % 2 else 3}


@pytest.fixture
def run(script, tmp_path, capsys):
    """Fine-tune on the files train.jsonl and eval.jsonl of the test's folder."""

    def run(name, *options, rows=(), recipe="finetune_classification", output="out"):
        for split in ("train", "eval"):
            write_rows(tmp_path / f"{split}.jsonl", rows)
        fixed = {
            "config": recipe,
            "name_or_path": name,
            "dataset": "null",
            "train_file": tmp_path / "train.jsonl",
            "eval_file": tmp_path / "eval.jsonl",
            "max_length": 32,
            "output_dir": tmp_path / output,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "disable_tqdm": "true",
        }
        argv = [text for option, value in fixed.items() for text in (f"--{option}", str(value))]
        return script.main([*argv, *options])

    return run


def test_script_learns_and_saves_what_reloads(run, folders, tmp_path, tokenizer):
    steps = ("--max_steps", "60", "--learning_rate", "5e-3", "--layerwise_lr_decay", "0.9", "--logging_steps", "20")
    summary = run(folders.electra, *steps, rows=[*colours(32)], recipe="electra_finetune")
    assert summary["eval_accuracy"]["mean"] == 1.0 and summary["eval_accuracy"]["std"] is None
    folder = tmp_path / "out"
    written = json.loads((folder / "results.json").read_text())
    assert written["metrics"] == summary and written["seeds"] == [42]
    assert json.loads((folder / "eval_results.json").read_text())["eval_accuracy"] == 1.0
    card = (folder / "README.md").read_text()
    assert "ElectraJointForSequenceClassification" in card and "accuracy" in card and "electra_finetune" in card
    assert (folder / "loss.png").stat().st_size > 1000
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "3", 1: "7"}
    answer = model(**tokenizer("the cat on the red mat", return_tensors="pt")).logits.argmax(-1)
    assert model.config.id2label[answer.item()] == "7"


def test_script_with_seeds(run, folders, tmp_path):
    options = ("--max_steps", "2", "--learning_rate", "1e-2", "--logging_steps", "1")
    rows = [*colours(16)]
    summary = run(folders.stock_bert, *options, "--seeds", "3,4", rows=rows)
    losses = summary["eval_loss"]
    assert losses["values"][0] != losses["values"][1]
    assert losses["mean"] == pytest.approx(sum(losses["values"]) / 2)
    assert losses["std"] == pytest.approx(statistics.stdev(losses["values"]))  # n - 1
    assert all(name.startswith("eval_") and not name.endswith(("_runtime", "_second")) for name in summary), (
        "timings are no scores"
    )
    assert json.loads((tmp_path / "out/results.json").read_text())["seeds"] == [3, 4]
    for seed, loss in zip((3, 4), losses["values"]):
        saved = json.loads((tmp_path / f"out/seed_{seed}/eval_results.json").read_text())
        assert saved["eval_loss"] == loss and (tmp_path / f"out/seed_{seed}/model.safetensors").is_file()
    # a seed's result does not depend on the seeds before it
    alone = run(folders.stock_bert, *options, "--seeds", "4", rows=rows, output="alone")
    assert alone["eval_loss"]["values"] == losses["values"][1:]
    assert (tmp_path / "alone/model.safetensors").is_file()


def test_seeds_go_on_after_a_kill(run, folders, tmp_path):
    options = ("--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "steps", "--save_steps", "1")
    options += ("--seeds", "3,4")
    rows = [*colours(16)]
    whole = run(folders.stock_bert, *options, rows=rows)
    shutil.rmtree(tmp_path / "out/seed_4")  # as if the second seed had not begun,
    shutil.rmtree(tmp_path / "out/seed_3/checkpoint-2")  # and the first had stopped in the middle
    again = run(folders.stock_bert, *options, "--resume_from_checkpoint", "last", rows=rows)
    assert again["eval_loss"] == whole["eval_loss"]
    with pytest.raises(ValueError, match="is of one run, but the seeds are 3,4"):
        run(
            folders.stock_bert,
            *options,
            "--resume_from_checkpoint",
            str(tmp_path / "out/seed_3/checkpoint-1"),
            rows=rows,
        )


@pytest.mark.parametrize(
    ("recipe", "row", "options", "auto", "scores"),
    [
        (
            "finetune_regression",
            {"sentence1": "the cat", "sentence2": "a dog", "label": 2},
            (),
            AutoModelForSequenceClassification,
            {"eval_mse"},
        ),
        (
            "finetune_tagging",
            {"tokens": ["the", "cats"], "ner_tags": ["O", "B-x"]},
            (),
            AutoModelForTokenClassification,
            {"eval_f1", "eval_precision", "eval_recall", "eval_accuracy"},
        ),
        (
            "finetune_qa",
            {"question": QUESTION, "context": CONTEXT, "answers": {"text": ["dog"], "answer_start": [34]}},
            ("--doc_stride", "4", "--max_length", "14"),
            AutoModelForQuestionAnswering,
            {"eval_exact_match", "eval_f1"},
        ),
    ],
)
@pytest.mark.parametrize("family", ["electra", "stock_bert"])
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_script_runs_every_task(run, folders, tmp_path, family, recipe, row, options, auto, scores):
    summary = run(getattr(folders, family), "--max_steps", "1", *options, rows=[row] * 4, recipe=recipe)
    assert scores <= summary.keys() and np.isfinite(summary["eval_loss"]["mean"])
    _, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_script_resumes(run, folders, tmp_path):
    rows = [*colours(16)]
    options = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no")
    whole = run(folders.electra, *options, rows=rows)
    half = (tmp_path / "out/checkpoint-2/model.safetensors").stat().st_mtime_ns
    (tmp_path / "out/checkpoint-4").rename(tmp_path / "aside")
    again = run(folders.electra, *options, "--resume_from_checkpoint", "last", rows=rows)
    assert (tmp_path / "out/checkpoint-2/model.safetensors").stat().st_mtime_ns == half, "it started anew"
    assert again == whole
    first, second = (torch.load(tmp_path / f"{place}/optimizer.pt") for place in ("aside", "out/checkpoint-4"))
    assert_close(first["state"], second["state"], atol=0, rtol=0)


def test_script_goes_from_one_task_to_another(run, folders, tmp_path):
    """What the configuration of a checkpoint says of classes gives way to the new task's."""
    run(folders.stock_bert, "--max_steps", "1", rows=[*colours(4)], output="first")
    row = {"question": QUESTION, "context": CONTEXT, "answers": {"text": ["dog"], "answer_start": [34]}}
    run(str(tmp_path / "first"), "--max_steps", "1", "--doc_stride", "4", rows=[row] * 4, recipe="finetune_qa")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "start", 1: "end"} and config.problem_type is None


def test_script_refuses_what_it_cannot_run(script, tmp_path):
    command = ["--config", "finetune_classification", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="Fine-tuning needs a model: give --name_or_path"):
        script.main(command)
    with pytest.raises(ValueError, match="TaskArguments.seeds must be numbers joined by commas, .* got '1;2'"):
        script.main([*command, "--seeds", "1;2"])
