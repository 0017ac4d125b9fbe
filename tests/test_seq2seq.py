"""Sequence-to-sequence training, generation and scores, on stock encoder-decoders of two layers."""

import importlib.util
import io
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertTokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from bestiary import generation
from bestiary.generation import METRICS, check_metrics, edit_distance, generate_texts, score_texts
from bestiary.recipe import load_recipe
from bestiary.trainers import seq2seq
from bestiary.trainers.seq2seq import (
    PreparedPairs,
    Seq2SeqBestiaryTrainer,
    Seq2SeqBestiaryTrainingArguments,
    Seq2SeqCollator,
    Seq2SeqDataArguments,
    character_tokenizer,
    load_pairs,
    pair_features,
    seq2seq_data_arguments,
    seq2seq_trainer,
    seq2seq_training_arguments,
)


ROOT = Path(__file__).parents[1]
PAD, START, END = 0, 2, 3
PAIRS = [(word, word[::-1]) for word in ("abc", "bd", "cabd", "dda", "ab", "bcda", "ca", "acbd")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Files that `datasets` reads are cached in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def t5(vocab_size=20, **options):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    special = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocab_size, **sizes | special | options)).eval()


def bart(vocab_size=20, **options):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    special = {"decoder_start_token_id": START, "eos_token_id": END, "bos_token_id": START, "pad_token_id": PAD}
    special |= {"forced_eos_token_id": None}
    return BartForConditionalGeneration(BartConfig(vocab_size=vocab_size, **sizes | special | options)).eval()


def bert2bert(vocab_size=20):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sides = [BertConfig(vocab_size=vocab_size, **sizes)] * 2
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*sides)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = START, PAD, END
    model = EncoderDecoderModel(config).eval()
    for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(config, name))
    return model


MODELS = {"t5": t5, "bart": bart, "bert2bert": bert2bert}


@pytest.fixture
def tokenizer():
    return character_tokenizer(word for pair in PAIRS for word in pair)


def encoded(tokenizer, number=8):
    columns = zip(*PAIRS[:number])
    rows = Dataset.from_dict(dict(zip(("source", "target"), map(list, columns))))
    return pair_features(rows, tokenizer, Seq2SeqDataArguments(), t5().config)


def make_trainer(tokenizer, folder, model, rows=8, **arguments):
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "generation_max_length": 7,
    }
    features = encoded(tokenizer, rows)
    return Seq2SeqBestiaryTrainer(
        model,
        Seq2SeqBestiaryTrainingArguments(**common | arguments),
        data_collator=Seq2SeqCollator(tokenizer, seq2seq.decoder_inputs(model)),
        train_dataset=features,
        eval_dataset=features,
        processing_class=tokenizer,
        compute_metrics=seq2seq.text_metrics(
            Seq2SeqDataArguments(), tokenizer, [target for _, target in PAIRS[:rows]]
        ),
    )


# Scores


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("ab", "ba", 2), ("abcd", "bcd", 1)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance
    assert edit_distance(list(first), list(second)) == distance


def test_edit_distance_is_that_of_the_table():
    def by_table(first, second):
        row = list(range(len(second) + 1))
        for number, ours in enumerate(first, 1):
            above, row = row, [number]
            for place, theirs in enumerate(second, 1):
                row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (ours != theirs)))
        return row[-1]

    draw = np.random.default_rng(0)
    for _ in range(200):
        first, second = ("".join(draw.choice(list("abcd"), size=draw.integers(0, 9))) for _ in range(2))
        assert edit_distance(first, second) == by_table(first, second)


def test_scores_by_hand():
    scores = score_texts(["exact_match", "edit_distance"], ["a cat ", "b", "xy"], ["a cat", "c", "xyz"])
    assert scores == pytest.approx({"exact_match": 1 / 3, "edit_distance": 2 / 3, "character_error_rate": 2 / 9})
    assert score_texts(["exact_match"], ["A"], ["a"], lowercase=True) == {"exact_match": 1.0}
    assert score_texts(["exact_match"], ["A"], ["a"]) == {"exact_match": 0.0}


def test_scores_of_packages():
    texts = ["the cat sat on the mat", "it rained all day long here"]
    assert score_texts(["bleu", "chrf", "rouge"], texts, texts) == pytest.approx(
        {"bleu": 100, "chrf": 100, "rouge1": 1, "rouge2": 1, "rougeL": 1, "rougeLsum": 1}
    )
    # one of four words wrong: unigram F1 3/4, bigram 2/3
    scores = score_texts(["rouge"], ["one two three four"], ["one two three five"])
    assert scores["rouge1"] == pytest.approx(3 / 4) and scores["rouge2"] == pytest.approx(2 / 3)
    # precisions 4/5 3/4 2/3 1/2, no brevity penalty
    bleu = score_texts(["bleu"], ["the cat sat down today"], ["the cat sat down now"])["bleu"]
    assert bleu == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_unknown_and_missing_scores(monkeypatch):
    with pytest.raises(ValueError, match=f"'blue' is no score; there are {', '.join(METRICS)}"):
        Seq2SeqDataArguments(metrics="exact_match,blue")
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        score_texts(["exact_match"], ["a", "b"], ["a"])
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    check_metrics("Some", ["exact_match"])
    for name, package in (("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge", "rouge-score")):
        with pytest.raises(ModuleNotFoundError, match=rf"package {package}, .*bestiary\[generation\]"):
            check_metrics("Some", [name])


# Data


def test_character_tokenizer(tmp_path):
    made = character_tokenizer(["run <PAST>", "été"])
    assert made.convert_ids_to_tokens(made("nu é <PAST>z")["input_ids"]) == [
        *("[CLS]", "n", "u", " ", "é", " ", "<PAST>", "[UNK]", "[SEP]")
    ]
    assert made.pad_token_id == 0 and made.decode(made(" rué ")["input_ids"], skip_special_tokens=True) == " rué "
    made.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("run é")["input_ids"] == made("run é")["input_ids"]
    assert again.decode(made(" rué")["input_ids"], skip_special_tokens=True) == " rué"


def test_features_of_pairs(tokenizer):
    rows = Dataset.from_dict({"source": ["abcd", "ab"], "target": ["dcba", "b"]})
    data = Seq2SeqDataArguments(max_source_length=4, max_target_length=4, source_prefix="d")
    cls, sep, a, b, c, d = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", *"abcd"])
    assert (cls, sep) == (START, END)
    made = pair_features(rows, tokenizer, data, t5().config)  # which starts from [CLS]
    assert made["input_ids"][:] == [[cls, d, a, sep], [cls, d, a, sep]]
    assert made["labels"][:] == [[d, c, b, sep], [b, sep]]
    other = pair_features(rows, tokenizer, data, t5(decoder_start_token_id=PAD).config)
    assert other["labels"][:] == [[cls, d, c, sep], [cls, b, sep]]
    plain = bert2bert().config
    plain.decoder_start_token_id = None
    plain.decoder.decoder_start_token_id = cls
    assert pair_features(rows, tokenizer, data, plain)["labels"][:] == [[d, c, b, sep], [b, sep]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator(tokenizer, side):
    tokenizer.padding_side = side
    model = bart()
    rows = [{"input_ids": [2, 7, 3], "labels": [8, 3]}, {"input_ids": [2, 3], "labels": [5, 6, 3]}]
    batch = Seq2SeqCollator(tokenizer, model.prepare_decoder_input_ids_from_labels)(rows)
    filled = [2, 3, 0] if side == "right" else [0, 2, 3]
    assert batch["input_ids"].tolist() == [[2, 7, 3], filled]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [int(number > 0) for number in filled]]
    assert batch["labels"].tolist() == [[8, 3, -100], [5, 6, 3]]
    assert batch["decoder_input_ids"].tolist() == [[START, 8, 3], [START, 5, 6]]
    wide = Seq2SeqCollator(tokenizer, pad_to_multiple_of=8)(rows)
    assert all(value.shape == (2, 8) for value in wide.values()) and "decoder_input_ids" not in wide
    with pytest.raises(ValueError, match="row 1 has no tokens in labels"):
        Seq2SeqCollator(tokenizer)([rows[0], {"input_ids": [2], "labels": []}])


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(dict(zip(("source", "target"), row))) for row in rows))
    return str(path)


def test_rows_of_files(tmp_path):
    files = {
        "train_file": write_rows(tmp_path / "a.jsonl", PAIRS),
        "eval_file": write_rows(tmp_path / "b.jsonl", PAIRS[:3]),
    }
    train, held_out = load_pairs(Seq2SeqDataArguments(**files, max_train_examples=4, max_eval_examples=2))
    assert len(train) == 4 and held_out["target"][:] == [target for _, target in PAIRS[:2]]
    assert set(train["source"]) < {source for source, _ in PAIRS}
    again, _ = load_pairs(Seq2SeqDataArguments(**files, max_train_examples=4, data_seed=1))
    assert again["source"][:] != train["source"][:]
    with pytest.raises(ValueError, match="no column 'article', .* source_column and target_column of Seq2SeqDataArg"):
        load_pairs(Seq2SeqDataArguments(**files, source_column="article"))
    empty = write_rows(tmp_path / "c.jsonl", [("a", "b"), ("c", " ")])
    with pytest.raises(ValueError, match="'target' must hold text in every row, but row 1 has ' '"):
        load_pairs(Seq2SeqDataArguments(train_file=empty, eval_file=empty))
    with pytest.raises(ValueError, match="no pairs of texts"):
        load_pairs(Seq2SeqDataArguments(dataset="demo"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": "a"}, "seeds must be numbers"),
        ({"max_target_length": 1}, "max_target_length must be at least 2, got 1"),
        ({"max_train_examples": 0}, "max_train_examples must be at least 1 or None, got 0"),
        ({"generation": "beam"}, "generation must be a dict"),
        ({"peft": "lora"}, "peft must be a dict"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"Seq2SeqDataArguments.{message}"):
        Seq2SeqDataArguments(**options)


# Training


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")  # in their trainer
@pytest.mark.parametrize("name", MODELS)
def test_loss_is_that_of_transformers_on_one_batch(name, tokenizer, tmp_path):
    """On one full batch their means are right, and evaluation metrics and generated ids are those of their trainer."""
    ours = make_trainer(tokenizer, tmp_path, MODELS[name](), per_device_eval_batch_size=8)
    theirs = Seq2SeqTrainer(
        MODELS[name](),
        Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, generation_max_length=7, use_cpu=True),
        data_collator=ours.data_collator,
        compute_metrics=ours.compute_metrics,
        processing_class=tokenizer,
    )
    found, known = (trainer.evaluate(ours.eval_dataset) for trainer in (ours, theirs))
    assert found["eval_loss"] == pytest.approx(known["eval_loss"], rel=1e-5)
    assert found["eval_exact_match"] == known["eval_exact_match"]
    tokens = [trainer.predict(ours.eval_dataset).predictions for trainer in (ours, theirs)]
    width = min(part.shape[1] for part in tokens)
    assert (tokens[0][:, :width] == tokens[1][:, :width]).all()


@pytest.mark.parametrize("name", MODELS)
def test_split_of_a_batch_does_not_change_the_update(name, tokenizer, tmp_path):
    runs = []
    for split in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        trainer = make_trainer(tokenizer, tmp_path, MODELS[name](), optim="sgd", lr_scheduler_type="constant", **split)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, trainer.model.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6) and len(runs[0][0]) == 2
    assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-7)


def test_evaluation_loss_is_a_mean_over_tokens(tokenizer, tmp_path):
    model = t5()
    trainer = make_trainer(tokenizer, tmp_path, model)  # batches of 3, 3 and 2 rows with other numbers of tokens
    batch = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    figures = trainer.evaluate()
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == len(PAIRS)


def test_rows_are_evaluated_in_their_order(tokenizer, tmp_path):
    """Grouped by length, generated texts would be compared with the references of other rows."""
    plain, grouped = (
        make_trainer(tokenizer, tmp_path, bart(), train_sampling_strategy=strategy)
        for strategy in ("random", "group_by_length")
    )
    first, second = (trainer.predict(trainer.eval_dataset).label_ids for trainer in (plain, grouped))
    assert (first == second).all()


def test_without_generation_there_are_logits(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, t5(), rows=2, predict_with_generate=False, max_steps=1)
    trainer.compute_metrics = None
    output = trainer.predict(trainer.eval_dataset)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    assert logits.shape[0] == 2 and logits.shape[-1] == 20 and output.label_ids.shape == logits.shape[:2]


def test_label_smoothing_by_hand(tokenizer, tmp_path):
    logits = torch.tensor([[[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]])
    labels = torch.tensor([[0, -100]])
    p = logits[0, 0].log_softmax(-1)
    expected = -(0.9 * p[0] + 0.1 * p.mean())
    assert_close(seq2seq.smoothed_cross_entropy_sum(logits, labels, 0.1), expected)
    losses = []
    for factor in (0.0, 0.3):
        trainer = make_trainer(tokenizer, tmp_path, t5(), label_smoothing_factor=factor, max_steps=1)
        trainer.train()
        losses.append(
            [trainer.state.log_history[0]["loss"], make_trainer(tokenizer, tmp_path, t5()).evaluate()["eval_loss"]]
        )
    assert losses[0][0] != losses[1][0] and losses[0][1] == losses[1][1]


def test_training_learns_and_metrics_see_it(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, t5(), max_steps=150, learning_rate=2e-2, logging_steps=50)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_exact_match"] < 0.5 < after["eval_exact_match"]
    assert after["eval_loss"] < 0.3 * before["eval_loss"]
    assert generate_texts(trainer.model, tokenizer, ["abc"], max_length=7) == ["cba"]


def test_labels_out_of_range(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, bart(), max_steps=1)
    trainer.data_collator = lambda rows: {
        **Seq2SeqCollator(tokenizer)(rows), "decoder_input_ids": torch.ones(8, 1, dtype=torch.long),
        "labels": torch.full((8, 1), 77),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration: labels must be in \[0, 20\)"):
        trainer.train()


# Generation


def test_texts_come_in_the_order_of_their_sources(tokenizer):
    """Batches are made by length; padding must not change what is generated."""
    model = bart()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    sources = [source for source, _ in PAIRS]
    options = {"max_length": 8, "suppress_tokens": list(range(5))}
    one_by_one = [generate_texts(model, tokenizer, [source], **options)[0] for source in sources]
    assert len(set(one_by_one)) > 1
    assert generate_texts(model, tokenizer, sources, batch_size=3, **options) == one_by_one
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        generate_texts(model, tokenizer, sources, batch_size=0)
    with pytest.raises(ValueError, match="num_return_sequences must be 1, for one text for each source; got 2"):
        generate_texts(model, tokenizer, sources, num_beams=2, num_return_sequences=2)


# Recipes and scripts


def read(*argv):
    return load_recipe(
        ["--config", "seq2seq", *map(str, argv)], data=seq2seq_data_arguments, training=seq2seq_training_arguments
    )


@pytest.fixture
def files(tmp_path):
    return (
        *("--train_file", write_rows(tmp_path / "a.jsonl", PAIRS)),
        *("--eval_file", write_rows(tmp_path / "b.jsonl", PAIRS[:4])),
        *("--output_dir", tmp_path / "run"),
    )


NEW = (
    *("--model_type", "t5", "--model.d_model", "16", "--model.d_kv", "8", "--model.d_ff", "24"),
    *("--model.num_layers", "2", "--model.num_heads", "2", "--tokenizer", "characters"),
)


def test_a_new_model_by_recipe(files):
    prepared = PreparedPairs.load(read(*files, *NEW, "--max_target_length", "9"))
    assert len(prepared.tokenizer) == prepared.config.vocab_size == 9
    config = prepared.config
    assert (config.pad_token_id, config.decoder_start_token_id, config.eos_token_id) == (PAD, START, END)
    model = prepared.build_trainer(read(*files, *NEW, "--max_target_length", "9")).model
    assert (model.generation_config.max_length, model.generation_config.num_beams) == (10, 4)
    assert model.generation_config.decoder_start_token_id == START


def test_options_of_the_recipe_win_over_a_file(files, tmp_path):
    bart(num_beams=2).generation_config.save_pretrained(tmp_path / "other")
    recipe = read(*files, *NEW, "--max_target_length", "9", "--generation_config", tmp_path / "other")
    model = PreparedPairs.load(recipe).build_trainer(recipe).model
    assert (model.generation_config.max_length, model.generation_config.num_beams) == (10, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "model that starts from nothing needs a tokenizer"),
        ((*NEW, "--data.generation", '{"num_beans": 2}'), "generation has options that generate.. lacks: num_beans"),
        ((*NEW, "--data.generation", '{"num_beams": 1, "num_return_sequences": 2}'), "does not fit together"),
        (
            (*NEW, "--data.generation", '{"num_beams": 2, "num_return_sequences": 2}'),
            "num_return_sequences must be 1, ",
        ),
        ((*NEW, "--data.generation", '{"return_dict_in_generate": true}'), "return_dict_in_generate must be False"),
        ((*NEW, "--peft", '{"peft_type": "LORA"}'), "peft: an adapter is saved without the model"),
        ((*NEW, "--slug", "bert"), "The paper 'bert' has no sequence-to-sequence model"),
    ],
)
def test_recipes_that_cannot_be_trained(options, message, files):
    with pytest.raises(ValueError, match=message):
        recipe = read(*files, *(options or NEW[:-2]))
        PreparedPairs.load(recipe).build_trainer(recipe, recipe.data.peft)


def test_sizes_that_do_not_fit(files, tokenizer, tmp_path):
    bart(vocab_size=5).save_pretrained(tmp_path / "small")
    bert2bert().save_pretrained(tmp_path / "short")
    for name, options, message in (
        ("small", ("--max_source_length", "8", "--max_target_length", "8"), "tokenizer has 9 entries, .* is 5"),
        ("short", (), "max_source_length is 128, .* max_position_embeddings=32"),
        ("short", ("--max_source_length", "8"), "max_target_length is 64, .* max_position_embeddings=32"),
    ):
        with pytest.raises(ValueError, match=message):
            PreparedPairs.load(read(*files, "--name_or_path", tmp_path / name, "--tokenizer", "characters", *options))


def test_trainer_of_a_paper():
    assert seq2seq_trainer(None) is Seq2SeqBestiaryTrainer


def script(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_scripts_train_and_generate(files, tmp_path, monkeypatch, capsys):
    options = [*files, *NEW, "--max_steps", "2", "--per_device_train_batch_size", "4", "--seeds", "0,1"]
    options += ["--metrics", "exact_match,edit_distance,chrf", "--disable_tqdm", "true", "--max_target_length", "8"]
    summary = script("seq2seq").main(["--config", "seq2seq", *map(str, options)])
    assert {"eval_loss", "eval_exact_match", "eval_edit_distance", "eval_chrf"} <= summary.keys()
    assert summary["eval_loss"]["mean"] == pytest.approx(statistics.fmean(summary["eval_loss"]["values"]))
    assert all(math.isfinite(value["std"]) for value in summary.values())
    folder = tmp_path / "run" / "seed_1"
    assert {"README.md", "generation_config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model.generation_config.num_beams == 4 and model.generation_config.max_length == 9

    capsys.readouterr()
    generate = script("generate").main
    common = ["--name_or_path", str(folder), "--disable_tqdm", "true", "--metrics", "edit_distance,exact_match"]
    target = tmp_path / "out.jsonl"
    scores = generate([*common, "--input_file", str(tmp_path / "b.jsonl"), "--output_file", str(target)])
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["source"], row["reference"]) for row in rows] == PAIRS[:4]
    predictions = [row["prediction"] for row in rows]
    assert scores == score_texts(["edit_distance", "exact_match"], predictions, [target for _, target in PAIRS[:4]])
    assert [summary[f"eval_{name}"]["values"][1] for name in scores] == pytest.approx(list(scores.values()))

    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{source}\n" for source, _ in PAIRS[:4])))
    capsys.readouterr()
    assert generate([*common, "--input_file", "-"]) == {}
    assert capsys.readouterr().out.splitlines() == predictions
    held_out = [word for word in map(str, files) if "run" not in word and "output_dir" not in word]
    assert generate([*common, *held_out, "--num_beams", "1", "--max_eval_examples", "2"]).keys() == scores.keys()
    with pytest.raises(ValueError, match="needs a trained model"):
        generate(["--config", "seq2seq", "--input_file", str(tmp_path / "b.jsonl")])
    with pytest.raises(ValueError, match="no column 'text'"):
        generate([*common, "--input_file", str(tmp_path / "b.jsonl"), "--source_column", "text"])

    paper = ["--config", "unilm_seq2seq_tiny", *common]  # whose recipe has data arguments of its own
    output = tmp_path / "not" / "there" / "out.jsonl"
    assert generate([*paper, "--input_file", str(tmp_path / "b.jsonl"), "--output_file", str(output)]) == scores
    assert output.read_text() == target.read_text()
    partly = tmp_path / "partly.jsonl"
    partly.write_text('{"source": "ab", "target": "ba"}\n{"source": "ca"}')
    with pytest.raises(ValueError, match="'target' must hold text in every row, but row 1 has None"):
        generate([*common, "--input_file", str(partly)])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_script_trains_an_adapter_of_peft(files, tmp_path):
    bart().save_pretrained(tmp_path / "bart")
    character_tokenizer(word for pair in PAIRS for word in pair).save_pretrained(tmp_path / "bart")
    options = ["--name_or_path", tmp_path / "bart", "--max_source_length", "8", "--max_target_length", "8"]
    options += ["--peft", '{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}', "--max_steps", "2"]
    script("seq2seq").main(["--config", "seq2seq", *map(str, [*files, *options]), "--disable_tqdm", "true"])
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    before = BartForConditionalGeneration.from_pretrained(tmp_path / "bart").state_dict()
    trained = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")  # resolves the folder of an adapter
    changed = {name for name, value in trained.state_dict().items() if "lora" in name and value.any()}
    assert changed and len(before) < len(trained.state_dict())


def test_an_uncased_tokenizer_is_scored_in_lower_case(tmp_path):
    vocabulary = {word: number for number, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] the cat".split())}
    made = BertTokenizer(vocab=vocabulary, do_lower_case=True)
    result = type("Result", (), {"predictions": np.array([[2, 5, 6, 3, -100]])})
    scores = [
        seq2seq.text_metrics(Seq2SeqDataArguments(lowercase=lowercase), made, ["The Cat"])(result)["exact_match"]
        for lowercase in (False, True)
    ]
    assert scores == [0.0, 1.0]
