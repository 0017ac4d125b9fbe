"""Comparing recipes: counted operations, equal budgets, scores by hand, and a whole comparison at tiny size."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    ElectraConfig,
    ElectraForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.modeling_outputs import MaskedLMOutput

from bestiary import compare as comparing
from bestiary import scores
from bestiary.compare import Settings, compare, parse_budget, updates_within
from bestiary.flops import count_flops
from bestiary.modeling.layers.linear_cross_entropy import linear_cross_entropy_sum
from bestiary.scores import MinimalPair, load_detector, load_masked_lm, load_minimal_pairs, minimal_pair_accuracy


WORDS = "the a cat dog bird sees hears likes big small red house tree river stone runs sleeps under over near".split()
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def make_sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, 7))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate([*special, *WORDS, "."])})
    tokenizer.save_pretrained(tmp_path_factory.mktemp("tokenizer"))
    return tokenizer


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tokenizer):
    """Folder with 30 lines of text, minimal pairs, labelled rows and two recipes that use them."""
    folder = tmp_path_factory.mktemp("workshop")
    tokenizer.save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)
    documents = ["\n".join(make_sentence(rng) + "." for _ in range(5)) for _ in range(6)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    pairs = [{"sentence_good": make_sentence(rng), "sentence_bad": make_sentence(rng)} for _ in range(4)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    rows = [{"text": make_sentence(rng), "label": ["no", "yes"][number % 2]} for number in range(8)]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {
        "data": {
            "train_file": str(folder / "text.txt"),
            "validation_fraction": 0.3,
            "tokenizer": str(folder / "tokenizer"),
            "max_length": 16,
        },
        "training": {
            "output_dir": "unused",
            "max_steps": 40,
            "warmup_steps": 10,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
        },
    }
    models = {
        "plain": ("bert", ENCODER | {"next_sentence_prediction": False}),
        "joint": ("electra", {"discriminator_config": ENCODER, "generator_size_fraction": 0.5}),
    }
    for name, (slug, model) in models.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"slug": slug, "model": model} | shared))
    return folder


def settings_for(workshop: Path, output_dir: Path, **changes) -> Settings:
    fields = {
        "recipes": (str(workshop / "plain.yaml"), str(workshop / "joint.yaml")),
        "seeds": (0, 1),
        "budget": "8",
        "checkpoints": 2,
        "held_out_sequences": 3,
        "minimal_pairs": str(workshop / "pairs.jsonl"),
    }
    return Settings(output_dir=output_dir, **fields | changes)


@pytest.fixture(scope="module")
def comparison(workshop, tmp_path_factory):
    """Settings and results of a comparison of two recipes with two seeds."""
    labelled = str(workshop / "labelled.jsonl")
    options = f"--train_file {labelled} --eval_file {labelled} --dataset null --num_train_epochs 1"
    finetuning = {"finetune": "finetune_classification", "finetune_overrides": tuple(options.split())}
    settings = settings_for(workshop, tmp_path_factory.mktemp("results"), **finetuning)
    return settings, compare(settings, "the command")


# Operations


def test_operations_of_a_linear_layer_are_exact():
    layer = nn.Linear(5, 7)
    inputs = torch.randn(3, 2, 5, requires_grad=True)
    assert count_flops(lambda: layer(inputs)) == 2 * 6 * 5 * 7
    assert count_flops(lambda: layer(inputs).sum().backward()) == 3 * 2 * 6 * 5 * 7  # output, d input, d weight


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_operations_of_both_paths_of_the_vocabulary_loss_are_the_same(chunk_rows):
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.arange(10) % 7
    assert (
        count_flops(lambda: linear_cross_entropy_sum(hidden, weight, None, labels, chunk_rows=chunk_rows).backward())
        == 3 * 2 * 10 * 4 * 7
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_operations_of_fused_attention_are_counted(dropout):
    query, key, value = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    product = 2 * (2 * 3) * 5 * 5 * 4
    attend = lambda: F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)  # noqa: E731
    assert count_flops(attend) == 2 * product
    recomputed = product if dropout == 0 else 0  # the fused kernel makes the scores again, the plain path keeps them
    assert count_flops(lambda: attend().sum().backward()) == (2 + 4) * product + recomputed


# Budgets


def test_budget_is_in_steps_or_in_what_is_equal():
    assert parse_budget("1200", "flops") == (1200, "steps")
    assert parse_budget("1_000 steps", "seconds") == (1000, "steps")
    assert parse_budget("2.5e13FLOPs", "flops") == (2.5e13, "flops")
    for text in ("0", "-3", "many", "3 tokens", "3 flops 4"):
        with pytest.raises(ValueError, match="budget must be a positive number"):
            parse_budget(text, "flops")


def test_updates_come_closest_to_the_budget():
    assert [updates_within(budget, 10.0, "x") for budget in (6, 14, 16, 100)] == [1, 1, 2, 10]
    with pytest.raises(ValueError, match="less than one update of x"):
        updates_within(4, 10.0, "x")


def test_cost_of_an_update_covers_all_micro_batches(workshop, tmp_path):
    documents = comparing.load_text_documents(train_file=workshop / "text.txt", validation_fraction=0.3)

    def cost(*overrides):
        recipe = comparing.read_recipe(str(workshop / "plain.yaml"), overrides)
        return comparing.count_update(comparing.build_trainer(recipe, documents, None, 0, tmp_path))

    one, four = cost("--per_device_train_batch_size", "1"), cost("--gradient_accumulation_steps", "4")
    fewer = cost("--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "1")
    assert fewer.tokens == pytest.approx(4 * one.tokens) and fewer.flops == pytest.approx(4 * one.flops)
    assert four.tokens > 3 * fewer.tokens  # four batches of (at most) four sequences


def test_warm_up_keeps_its_share_of_the_run(workshop, tmp_path):
    documents = comparing.load_text_documents(train_file=workshop / "text.txt", validation_fraction=0.3)
    recipe = comparing.read_recipe(str(workshop / "plain.yaml"), ())
    trainer = comparing.build_trainer(recipe, documents, 8, 0, tmp_path)
    assert (trainer.args.max_steps, trainer.args.warmup_steps) == (8, 2)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0, 0.005, *(0.01 * (1 - step / 8) for step in range(2, 8))])


def test_clock_stands_still_while_a_run_is_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(comparing.time, "perf_counter", lambda: now[0])
    recorder = comparing.Recorder({1}, lambda *place: now.__setitem__(0, now[0] + 100))
    control = SimpleNamespace(should_log=True)
    recorder.on_train_begin()
    for step in (1, 2):
        now[0] += 2
        recorder.on_step_end(None, SimpleNamespace(global_step=step, num_input_tokens_seen=0), control)
    assert recorder.marks == [2, 4] and recorder.seconds == 4


# Scores


def test_pseudo_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary(tokenizer):
    model = BertForMaskedLM(BertConfig(vocab_size=26, **ENCODER)).eval()
    nn.init.zeros_(model.get_output_embeddings().weight)
    nn.init.zeros_(model.get_output_embeddings().bias)
    found = scores.masked_lm_scores(model, tokenizer, ["the cat sees the dog.", "a bird"], 16)
    assert found.perplexity == pytest.approx(26)
    assert found.counts.tolist() == [6, 2]
    assert found.sums == pytest.approx(-math.log(26) * np.array([6, 2]))


class AllPositions(nn.Module):
    """A masked language model whose logits cannot be cut down to the masked rows."""

    def __init__(self, model):
        super().__init__()
        self.model, self.device = model, model.device

    def get_output_embeddings(self):
        return None

    def forward(self, **inputs):
        return MaskedLMOutput(logits=self.model(**inputs).logits)


@pytest.mark.parametrize("wrap", [lambda model: model, AllPositions])
def test_pseudo_log_likelihood_masks_one_token_at_a_time(tokenizer, wrap, monkeypatch):
    monkeypatch.setattr(scores, "TOKENS_PER_BATCH", 40)  # several batches, with padding in some
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=26, initializer_range=0.5, **ENCODER)).eval()
    sentences = ["the cat sees the big red dog.", "a bird", "under the river a stone sleeps near"]
    expected = []
    for sentence in sentences:
        ids = tokenizer(sentence, truncation=True, max_length=8, return_tensors="pt").input_ids
        total = 0.0
        for place in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                total += model(masked).logits[0, place].log_softmax(-1)[ids[0, place]].item()
        expected.append(total)
    found = scores.masked_lm_scores(wrap(model), tokenizer, sentences, 8)
    assert found.sums == pytest.approx(expected, rel=1e-4)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_detector_adds_up_the_chance_that_each_token_is_original(tokenizer):
    table = torch.linspace(-3, 3, 26)  # the logit of "replaced", by token

    class Detector:
        device = "cpu"

        def __call__(self, input_ids, attention_mask):
            return SimpleNamespace(logits=table[input_ids])

    found = scores.detector_scores(Detector(), tokenizer, ["the dog", "a cat sees"], 16)
    chances = [1 / (1 + math.exp(table[tokenizer.vocab[word]])) for word in ("the", "dog", "a", "cat", "sees")]
    assert found.sums == pytest.approx([math.log(chances[0] * chances[1]), math.log(math.prod(chances[2:]))])
    assert found.counts.tolist() == [2, 3]


def test_accuracy_is_a_mean_over_paradigms_and_a_tie_is_half_right():
    pairs = [MinimalPair("", "", kind) for kind in ("a", "a", "a", "a", "b")]
    assert minimal_pair_accuracy(pairs, np.array([1, 0, 2, 2, 0]), np.array([0, 0, 1, 1, 1])) == (3.5 / 4 + 0) / 2


def test_minimal_pairs_are_drawn_from_every_paradigm(tmp_path):
    rows = [{"sentence_good": f"{k}{n}", "sentence_bad": "x", "UID": k} for k in "ab" for n in range(20)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    drawn = load_minimal_pairs(file, 3, seed=0)
    assert [pair.paradigm for pair in drawn] == ["a"] * 3 + ["b"] * 3
    assert drawn == load_minimal_pairs(file, 3, seed=0) != load_minimal_pairs(file, 3, seed=1)
    assert len(load_minimal_pairs(file)) == 40
    file.write_text(json.dumps({"good": "a"}))
    with pytest.raises(ValueError, match="sentence_good and sentence_bad; it has good"):
        load_minimal_pairs(file)
    with pytest.raises(ValueError, match="must be a .parquet or .jsonl file that exists"):
        load_minimal_pairs(tmp_path / "none.jsonl")


def test_held_out_texts_run_to_the_end_of_their_document():
    documents = [["a", "b", "c"], ["d"]]
    assert set(scores.held_out_texts(documents, 9, seed=0)) == {"a b c", "b c", "c", "d"}
    assert len(scores.held_out_texts(documents, 2, seed=0)) == 2


def test_what_a_checkpoint_can_do_is_read_from_its_weights_and_outputs(tmp_path):
    def can(model):
        model.save_pretrained(tmp_path / type(model).__name__)
        return [load(tmp_path / type(model).__name__)[0] is not None for load in (load_masked_lm, load_detector)]

    assert can(BertForMaskedLM(BertConfig(vocab_size=26, **ENCODER))) == [True, False]
    assert can(BertForSequenceClassification(BertConfig(vocab_size=26, **ENCODER))) == [False, False]
    assert can(RobertaForMaskedLM(RobertaConfig(vocab_size=26, **ENCODER))) == [
        True,
        False,
    ]  # its class of pre-training
    assert can(ElectraForPreTraining(ElectraConfig(vocab_size=26, **ENCODER))) == [False, True]


# Whole comparisons


def test_comparison_is_complete(comparison, workshop):
    settings, results = comparison
    plan = results["plan"]
    costs = {name: entry["cost"]["flops"] for name, entry in plan["recipes"].items()}
    assert plan["recipes"]["plain"]["updates"] == 8 and plan["budget"]["amount"] == 8 * costs["plain"]
    joint = plan["recipes"]["joint"]["updates"]
    assert abs(joint * costs["joint"] - plan["budget"]["amount"]) <= costs["joint"] / 2
    assert [(run["recipe"], run["seed"]) for run in results["runs"]] == [
        ("plain", 0), ("joint", 0), ("plain", 1), ("joint", 1),
    ]  # fmt: skip
    for run in results["runs"]:
        both = run["recipe"] == "joint"
        updates = joint if both else 8
        assert (run["step"], run["flops"]) == (updates, updates * costs[run["recipe"]])
        assert run["seconds"] > 0 and 0 < run["tokens"] <= updates * 4 * 16
        assert [point["step"] for point in run["held_out"]] == sorted({round(updates / 2), updates})
        assert [line["step"] for line in run["training"]] == list(range(1, updates + 1))
        parts = {"mlm_loss", "discriminator_loss"} if both else {"mlm_loss"}
        assert parts <= run["held_out"][0]["held_out"].keys() and parts <= run["training"][0]["losses"].keys()
        common = {"minimal_pairs_masked_lm", "minimal_pairs_detector"} if both else {"minimal_pairs_masked_lm"}
        assert run["held_out"][0]["scores"].keys() == common
        assert run["scores"].keys() == common | {
            "pseudo_perplexity", "finetuned_accuracy", "finetuned_macro_f1", "finetuned_matthews"
        }  # fmt: skip
        assert run["networks"]["masked_lm"].startswith("ElectraJointForMaskedLM" if both else "BertPretrainingForMask")
    first, second = (run["scores"]["pseudo_perplexity"] for run in results["runs"] if run["recipe"] == "plain")
    assert first != second
    figure = results["summary"]["plain"]["pseudo_perplexity"]
    assert figure["mean"] == pytest.approx((first + second) / 2)
    assert figure["std"] == pytest.approx(abs(first - second) / math.sqrt(2))

    folder = settings.output_dir
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["command"] == "the command" and results["hardware"] and results["versions"]["torch"]
    lines = (folder / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(run["held_out"]) for run in results["runs"])
    assert lines[0].startswith("recipe,seed,step,tokens,flops,seconds,held_out_loss")
    table = (folder / "table.md").read_text()
    assert f"| {figure['mean']:,.1f} ± {figure['std']:.1f} |" in table and "the command" in table
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated_and_missing_ones_are_added(comparison, monkeypatch):
    settings, results = comparison
    trained = []
    train_once = comparing.train_once
    monkeypatch.setattr(comparing, "train_once", lambda *given: trained.append(given[-1]) or train_once(*given))
    monkeypatch.setattr(comparing, "count_update", None)
    again = compare(settings)
    assert not trained and again["runs"] == results["runs"] and again["plan"] == results["plan"]
    (settings.output_dir / "runs" / "joint" / "seed_1" / "result.json").unlink()  # as if it had been interrupted
    more = compare(settings)
    assert trained == ["run 4/4: joint, seed 1"]
    for quantity in ("scores", "tokens", "flops"):
        assert [run[quantity] for run in more["runs"]] == [run[quantity] for run in results["runs"]]


def test_results_of_another_comparison_are_refused(comparison):
    settings, _ = comparison
    changed = {
        "budget": {"budget": "5"},
        "held_out_sequences": {"held_out_sequences": 4},
        "training": {"overrides": ("--learning_rate", "1")},
        "first_recipe": {"recipes": settings.recipes[::-1]},
        "finetune": {"finetune": None},
    }
    for key, change in changed.items():
        with pytest.raises(ValueError, match=f"holds results with another {key}"):
            compare(Settings(**vars(settings) | change))


def test_evaluating_does_not_change_the_run(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing.Scorer, "__call__", lambda self, *given: {"drawn": torch.rand(()).item()})
    few, many = (compare(settings_for(workshop, tmp_path / str(n), seeds=(0,), checkpoints=n))["runs"] for n in (1, 3))
    for one, other in zip(few, many):
        assert one["held_out"][-1]["held_out"] == other["held_out"][-1]["held_out"]
        assert [line["losses"] for line in one["training"]] == [line["losses"] for line in other["training"]]


def test_updates_are_timed_in_turns():
    order = []
    seconds = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 5.0, 5.0])}

    class Trainer:
        def __init__(self, name, updates):
            self.name, self.updates = name, updates

        def add_callback(self, recorder):
            self.recorder = recorder

        def train(self):
            order.append(self.name)
            one = next(seconds[self.name])
            times = [100.0] * comparing.UNTIMED_UPDATES + [one] * comparing.TIMED_UPDATES
            assert len(times) == self.updates
            self.recorder.marks = np.cumsum(times).tolist()

    found = comparing.time_updates({name: partial(Trainer, name) for name in "ab"})
    assert found == {"a": pytest.approx(2), "b": pytest.approx(5)} and order == list("ababab")


def test_equal_seconds_are_measured_first_and_equal_tokens_counted(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "time_updates", lambda builders: dict(zip(builders, [0.5, 1.3])))
    one = {"seeds": (0,), "minimal_pairs": None, "checkpoints": 1}
    timed = compare(settings_for(workshop, tmp_path / "a", equal="seconds", **one))
    assert timed["plan"]["budget"] == {"unit": "seconds", "amount": 8 * 0.5}
    assert [run["step"] for run in timed["runs"]] == [8, round(4 / 1.3)]
    counted = compare(settings_for(workshop, tmp_path / "b", equal="tokens", budget="150 tokens", **one))
    assert [run["step"] for run in counted["runs"]] == [3, 3]  # of four sequences of about 13 tokens


def test_recipes_must_share_their_text_and_pre_train(workshop, tmp_path):
    other = yaml.safe_load((workshop / "joint.yaml").read_text())
    other["data"]["validation_fraction"] = 0.4
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match="data.validation_fraction is 0.3 in plain and 0.4 in other"):
        compare(settings_for(workshop, tmp_path, recipes=(str(workshop / "plain.yaml"), str(tmp_path / "other.yaml"))))
    with pytest.raises(ValueError, match="a recipe that pre-trains on text is needed"):
        compare(settings_for(workshop, tmp_path, recipes=("finetune_qa",)))
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    "fields",
    [{"equal": "joy"}, {"checkpoints": 0}, {"seeds": (0, 0)}, {"recipes": ("a/x.yaml", "b/x.yaml")}, {"recipes": ()}],
)
def test_bad_settings_name_the_field(fields, tmp_path):
    with pytest.raises(ValueError, match=f"compare: {next(iter(fields))} must be"):
        Settings(**{"recipes": ("a",), "seeds": (0,), "output_dir": tmp_path} | fields)


def test_command_line(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(comparing, "compare", lambda *given: asked.append(given) or {"table": "| table |"})
    options = "--recipes a b --seeds 3,4 --budget 7 --training.max_steps 9 --finetune --finetune.task qa"
    assert comparing.main(options.split()) == 0
    settings, command = asked[0]
    assert settings.recipes == ("a", "b") and settings.seeds == (3, 4) and settings.budget == "7"
    assert settings.overrides == ("--training.max_steps", "9")
    assert settings.finetune == "finetune_classification" and settings.finetune_overrides == ("--task", "qa")
    assert command == f"bestiary compare {options}" and "| table |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seeds must be numbers"):
        comparing.main(["--recipes", "a", "--seeds", "one"])


def test_script_is_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--help"])
    script = Path(__file__).parents[1] / "examples" / "compare.py"
    with pytest.raises(SystemExit) as stopped:
        exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__"})
    assert stopped.value.code == 0
