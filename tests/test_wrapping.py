"""The base of methods on any encoder: configuration, wrapping and unwrapping, what a run leaves, recipes."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import hub_fixture  # noqa: F401  the fixture `hub`
from huggingface_hub import HfApi, constants
from huggingface_hub.dataclasses import strict
from suites.encoder_suite import at_real_tokens
from suites.wrapper_suite import ENCODERS, SIZES, WrapperSuite
from torch import nn
from torch.testing import assert_close
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from transformers.models.auto import modeling_auto

from bestiary import Paper, register, registry
from bestiary.configuration.configuration_core import WrapperConfig
from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.modeling.layers.wrapping import WrapperPreTrainedModel, layer_list
from bestiary.recipe import Recipe, load_recipe
from bestiary.trainers.finetuning import FinetuneTrainer, FinetuneTrainingArguments
from bestiary.trainers.pretraining import PretrainingDataArguments
from bestiary.trainers.seeds import SeededTaskArguments, task_training_arguments, train_with_seeds
from bestiary.trainers.tasks import PreparedTask


# ------------------------------------------------------------------------------------------------------ a small paper


@strict
class ProbeWrapperConfig(WrapperConfig):
    model_type = "tests-wrap-probe"

    strength: float | int = 0.5


class ProbePreTrainedModel(WrapperPreTrainedModel):
    config: ProbeWrapperConfig

    def add_method(self) -> None:
        self.probe = nn.Linear(self.config.hidden_size, 1)
        self.probe_norm = nn.LayerNorm(3)


class ProbeModel(ProbePreTrainedModel):
    pass


class ProbeForSequenceClassification(ProbePreTrainedModel):
    wrapped_auto_class = AutoModelForSequenceClassification


class ProbeForQuestionAnswering(ProbePreTrainedModel):
    wrapped_auto_class = AutoModelForQuestionAnswering


PROBE = Paper(
    slug="wrap_probe",
    title="A probe",
    authors="Nobody",
    year=2020,
    summary="A test.",
    config=ProbeWrapperConfig,
    models={
        "AutoModel": ProbeModel,
        "AutoModelForSequenceClassification": ProbeForSequenceClassification,
        "AutoModelForQuestionAnswering": ProbeForQuestionAnswering,
    },
    trainer="bestiary.trainers.finetuning:FinetuneTrainer",
    arguments="bestiary.trainers.finetuning:FinetuneTrainingArguments",
)


@contextmanager
def registered(paper: Paper) -> Iterator[None]:
    """In the tables while the context lasts: other tests walk them."""
    register(paper)
    try:
        yield
    finally:
        del registry._PAPERS[paper.slug]
        del CONFIG_MAPPING._extra_content[paper.config.model_type]
        for name in paper.models:
            del getattr(modeling_auto, name)._model_mapping._extra_content[paper.config]


@pytest.fixture(scope="module", autouse=True)
def probe():
    with registered(PROBE):
        yield


class TestProbe(WrapperSuite):
    slug = "wrap_probe"
    settings = {"strength": 0.25}
    neutral = True
    encoders = {name: ENCODERS[name] for name in ("bert", "distilbert", "deberta-v2", "bestiary-bert")}

    @classmethod
    def paper(cls) -> Paper:
        return PROBE  # when tests are collected it is not registered

    def test_in_a_process_without_bestiary(self, tmp_path):
        pytest.skip("a class defined in a test has no code to export")


def test_the_table_is_left_as_it_was():
    with pytest.raises(ValueError, match="taken"), registered(PROBE):
        pass
    assert registry.get_paper("wrap_probe") is PROBE


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"encoder_config": "bert"}, "encoder_config must be a configuration or its dictionary, got 'bert'"),
        ({"encoder_config": {"model_type": "nope"}}, "no encoder type 'nope' is registered"),
        ({"encoder_config": ProbeWrapperConfig()}, "wraps a plain encoder, but got a ProbeWrapperConfig"),
        ({"encoder_config": {"model_type": "tests-wrap-probe"}}, "wraps a plain encoder, but got a ProbeWrapper"),
        ({"encoder_config": {"model_type": "bart"}}, "BartConfig is of an encoder-decoder"),
        ({"encoder_config": BertConfig(), "vocab_size": 7}, "vocab_size is 7, but 30522 in encoder_config"),
        ({"encoder_config": {"vocab_size": 9}, "vocab_size": 7}, "vocab_size is 7, but 9 in encoder_config"),
        ({"hidden_size": 64, "encoder_config": {"model_type": "distilbert"}}, "no field 'hidden_size' of its own"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "requires `num_labels > 1`"),
    ],
)
def test_impossible_configurations(keywords, message):
    with pytest.raises(ValueError, match=message):
        ProbeWrapperConfig(**keywords)


def test_configuration_around_a_checkpoints():
    make = ProbeWrapperConfig.from_encoder
    tuned = BertConfig(**SIZES, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, problem_type="regression")
    kept = make(tuned, strength=2)
    assert kept.id2label == {0: "a", 1: "b"} and kept.problem_type == "regression" and kept.strength == 2
    new = make(tuned, id2label={0: "x", 1: "y", 2: "z"}, problem_type=None)
    assert new.encoder_config.label2id == {"x": 0, "y": 1, "z": 2} and new.encoder_config.problem_type is None
    assert tuned.num_labels == 2 and tuned.problem_type == "regression", "the given configuration was changed"
    small = make(DistilBertConfig(), encoder_config={"hidden_size": 24, "dropout": 0.5}).encoder_config
    assert (small.dim, small.dropout, small.n_layers) == (24, 0.5, 6)
    assert make(ProbeWrapperConfig(encoder_config=tuned).encoder_config).hidden_size == 16
    joint = ElectraJointConfig(discriminator_config=SIZES | {"embedding_size": 8})
    inner = make(joint, encoder_config={"discriminator_config": {"hidden_dropout_prob": 0.0}}).encoder_config
    assert (inner.discriminator_config.hidden_size, inner.discriminator_config.hidden_dropout_prob) == (16, 0.0)
    tuned._attn_implementation = "eager"
    assert make(tuned).encoder_config._attn_implementation == "eager"
    assert make(tuned, attn_implementation="sdpa").encoder_config._attn_implementation == "sdpa"
    for changes, message in [
        ({"hiden_size": 3}, "BertConfig has no field 'hiden_size'; did you mean 'hidden_size'"),
        ({"dropout": 0.5}, "encoder_config names 'dropout', but BertConfig has no such field"),
        ({"model_type": "roberta"}, "cannot make it a 'roberta'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(tuned, encoder_config=changes)
    with pytest.raises(ValueError, match="ProbeWrapperConfig.from_encoder wraps a plain encoder"):
        make(kept)


def test_sizes_are_those_of_the_encoder():
    config = ProbeWrapperConfig(vocab_size=77)
    assert config.vocab_size == config.encoder_config.vocab_size == 77 and "vocab_size" not in config.to_dict()
    config.vocab_size = 78
    assert config.encoder_config.vocab_size == 78
    config.use_cache = False  # as Trainer does
    assert config.encoder_config.use_cache is False and "use_cache" not in vars(config)
    config.encoder_config = BertConfig(**SIZES, num_labels=5)
    assert config.num_labels == 5 and config.vocab_size == 99
    assert ProbeWrapperConfig(encoder_config=ENCODERS["distilbert"]).num_hidden_layers == 2


# -------------------------------------------------------------------------------------------------------------- models


def test_layer_lists():
    for name, config in ENCODERS.items():
        for model in (AutoModel.from_config(config), ProbeModel(ProbeWrapperConfig(encoder_config=config))):
            layers = layer_list(model)
            assert len(layers) == 2 and "ayer" in type(layers[0]).__name__ or name == "distilbert"
    with pytest.raises(ValueError, match="AlbertModel has no lists of 2 layers"):
        layer_list(AlbertModel(AlbertConfig(**SIZES, embedding_size=8)))
    bart = BartConfig(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, vocab_size=9)
    with pytest.raises(ValueError, match="has 2 lists of 2 layers"):
        layer_list(AutoModel.from_config(bart))


def test_a_wrapped_encoder_of_another_paper_keeps_its_names(tmp_path):
    """ELECTRA's discriminator holds its encoder under that encoder's name, with head and without."""
    config = ProbeWrapperConfig(encoder_config=ElectraJointConfig(discriminator_config=SIZES | {"embedding_size": 8}))
    for kind, other in ((ProbeModel, ProbeForQuestionAnswering), (ProbeForQuestionAnswering, ProbeModel)):
        model = kind(copy.deepcopy(config))
        model.save_pretrained(tmp_path)
        loaded, report = other.from_pretrained(tmp_path, output_loading_info=True)
        assert not any("electra" in name for name in report["missing_keys"] | report["unexpected_keys"])
        name = "model.electra.encoder.layer.1.output.dense.weight"
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_what_the_method_adds_follows_the_wrapped_model():
    class Kept(ProbeForSequenceClassification):
        _keep_in_fp32_modules_strict = {"probe_norm"}

    plain = BertForSequenceClassification(BertConfig(**SIZES)).bfloat16()
    plain.bert.pooler.float()  # a mixture stays one
    model = Kept.from_encoder(plain, strength=1)
    assert model.probe.weight.dtype == torch.bfloat16 and model.probe_norm.weight.dtype == torch.float32
    assert plain.bert.pooler.dense.weight.dtype == torch.float32
    assert model.training and not Kept.from_encoder(plain.eval()).training
    assert model.to_base() is plain


def test_weights_that_are_given_are_kept_and_others_drawn(tmp_path):
    """A head that the checkpoint lacks, and what the method adds, come from the global generator."""
    AutoModel.from_config(BertConfig(**SIZES)).save_pretrained(tmp_path)
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(ProbeForSequenceClassification.from_encoder(tmp_path, num_labels=3).state_dict())
    assert_close(states[0], states[1], rtol=0, atol=0)
    differing = {name for name, value in states[0].items() if not torch.equal(value, states[2][name])}
    assert differing == {"model.classifier.weight", "probe.weight"}
    assert states[0]["model.classifier.weight"].shape == (3, 16)


def test_loading_keywords_are_for_checkpoints():
    plain = BertForSequenceClassification(BertConfig(**SIZES))
    for given in ({"dtype": torch.bfloat16}, {"encoder_config": {"hidden_dropout_prob": 0.0}}, {"id2label": {0: "a"}}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} cannot be given for a BertForSequenceClassific"):
            ProbeForSequenceClassification.from_encoder(plain, **given)


# -------------------------------------------------------------------------------------------------- what a run leaves

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat red blue who ran dog".split()
TOKENIZER = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


def make_trainer(model, folder, rows, **options):
    arguments = FinetuneTrainingArguments(
        output_dir=str(folder), max_steps=1, disable_tqdm=True, logging_steps=1, save_strategy="no"
    )
    return FinetuneTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, **options)


def test_the_result_of_a_run_is_the_plain_model(tmp_path):
    model = ProbeForSequenceClassification(ProbeWrapperConfig(encoder_config=BertConfig(**SIZES)))
    rows = [{"input_ids": [2, 5 + number, 3], "labels": number % 2} for number in range(4)]
    trainer = make_trainer(model, tmp_path, rows, processing_class=TOKENIZER)
    trainer.train()
    assert trainer.result_model() is model.wrapped
    trainer.save_result()
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not any(name.endswith((".py", ".bin")) for name in files)
    assert "tests-wrap-probe" not in (tmp_path / "config.json").read_text()
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is BertForSequenceClassification and not any(report.values())
    assert_close(loaded.state_dict(), model.wrapped.state_dict(), rtol=0, atol=0)
    card = (tmp_path / "README.md").read_text()
    assert "A probe" in card and "BertForSequenceClassification" in card and "wrap_probe" in card
    trainer.save_model(str(tmp_path / "pair"))
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "pair")) is type(model)


def test_answers_are_evaluated_as_for_the_plain_model(tmp_path):
    """A wrapper's forward names the labels of all tasks, which must not count as missing from a batch."""
    torch.manual_seed(0)
    plain = BertForQuestionAnswering(BertConfig(**SIZES)).eval()
    rows = [{"input_ids": [2, 5 + n, 6, 3], "start_positions": n % 3, "end_positions": 2} for n in range(4)]
    seen = []
    for model in (plain, ProbeForQuestionAnswering.from_encoder(plain)):
        trainer = make_trainer(
            model, tmp_path, rows, compute_metrics=lambda result: {"rows": len(result.label_ids[0])}
        )
        assert trainer.label_names == ["start_positions", "end_positions"]
        seen.append({name: trainer.evaluate()[name] for name in ("eval_loss", "eval_rows")})
    assert seen[0] == seen[1] and seen[0]["eval_rows"] == 4


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def workplace(tmp_path) -> Path:
    """Folder with a plain BERT and DistilBERT, a pair of the probe, rows, and a recipe of the probe."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(WORDS)}
    models = {
        "bert": BertForSequenceClassification(BertConfig(**sizes)),
        "distilbert": DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=len(WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=16)
        ),
        "pair": ProbeForSequenceClassification(
            ProbeWrapperConfig(encoder_config=BertConfig(**sizes, id2label={0: "blue", 1: "red"}), strength=4)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    rows = [{"text": f"the {word} cat", "label": word} for word in ("red", "blue")] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text("slug: wrap_probe\ndata: {dataset: demo, max_length: 16}\n")
    return tmp_path


def read(folder: Path, model: str, *options: str, recipe: str = "recipe.yaml") -> Recipe:
    files = ["--train_file", folder / "rows.jsonl", "--eval_file", folder / "rows.jsonl"]
    run = ["--output_dir", folder / "run", "--max_steps", "1", "--disable_tqdm"]
    argv = ["--config", folder / recipe, "--name_or_path", folder / model, *files, *run, *options]
    return load_recipe([str(word) for word in argv], data=SeededTaskArguments, training=task_training_arguments)


def test_a_recipe_trains_by_the_method_and_leaves_the_plain_model(workplace):
    recipe = read(workplace, "bert", "--strength", "2", "--encoder_config.hidden_dropout_prob", "0", "--seeds", "0,1")
    trainer = PreparedTask.load(recipe).build_trainer(recipe)
    assert type(trainer.model) is ProbeForSequenceClassification and trainer.model.config.strength == 2
    assert trainer.model.wrapped.config.hidden_dropout_prob == trainer.model.wrapped.bert.embeddings.dropout.p == 0
    assert trainer.model.config.id2label == {0: "blue", 1: "red"} == trainer.model.wrapped.config.id2label
    summary = train_with_seeds(recipe, "command")
    assert len(summary["eval_accuracy"]["values"]) == 2
    for seed in (0, 1):
        result = AutoModelForSequenceClassification.from_pretrained(workplace / f"run/seed_{seed}")
        assert type(result) is BertForSequenceClassification
        assert "A probe" in (workplace / f"run/seed_{seed}/README.md").read_text()
    assert json.loads((workplace / "run/results.json").read_text())["seeds"] == [0, 1]


def test_changes_to_the_encoder_are_checked_against_the_checkpoints_type(workplace):
    recipe = read(workplace, "distilbert", "--encoder_config.dropout", "5e-1", "--encoder_config.hidden_dim", "32")
    config = recipe.build_config()
    assert type(config.encoder_config) is DistilBertConfig
    assert (config.encoder_config.dropout, config.encoder_config.hidden_dim) == (0.5, 32)
    for options, message in [
        (
            ("--encoder_config.hidden_dropout_prob", "0"),
            r"encoder_config \(DistilBertConfig\) has no field 'hid",
        ),
        (("--encoder_config.dropout", "none"), "model.encoder_config.dropout must be float.*got 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(workplace, "distilbert", *options).build_config()
    with pytest.raises(ValueError, match=r"section model \(ProbeWrapperConfig\) has no field 'strenth'"):
        read(workplace, "bert", "--model.strenth", "1")
    typed = load_recipe(
        ["--slug", "wrap_probe", "--output_dir", str(workplace), "--encoder_config.num_hidden_layers", "3"],
        data=SeededTaskArguments,
    )
    assert typed.build_config(vocab_size=50).encoder_config.num_hidden_layers == 3


def test_a_checkpoint_of_the_method_is_trained_on(workplace):
    saved = ProbeForSequenceClassification.from_pretrained(workplace / "pair").state_dict()
    for options, strength in (((), 4), (("--strength", "8"), 8)):
        recipe = read(workplace, "pair", *options)
        model = PreparedTask.load(recipe).build_trainer(recipe).model
        assert type(model) is ProbeForSequenceClassification and model.config.strength == strength
        assert_close({name: value.cpu() for name, value in model.state_dict().items()}, saved, rtol=0, atol=0)
    (workplace / "no_method.yaml").write_text("data: {max_length: 16}")
    recipe = read(workplace, "pair", recipe="no_method.yaml")
    model = PreparedTask.load(recipe).build_trainer(recipe).model
    assert type(model) is BertForSequenceClassification, "a recipe without a method trains the plain model"
    assert torch.equal(model.classifier.weight.cpu(), saved["model.classifier.weight"])


@strict
class OtherWrapperConfig(WrapperConfig):
    model_type = "tests-other-wrap"


def test_recipes_that_cannot_be_run_say_why(workplace):
    for options, message in [
        (("--task", "tagging"), r"'wrap_probe' has no model for the task tagging \(AutoModelForTokenClassification\)"),
        (("--model.name_or_path", "null"), "Fine-tuning needs a model: give --name_or_path"),
    ]:
        with pytest.raises(ValueError, match=message):
            PreparedTask.load(read(workplace, "bert", *options))
    other = replace(PROBE, slug="other_wrap", config=OtherWrapperConfig, models={})
    with registered(other):
        recipe = read(workplace, "pair", "--slug", "other_wrap")
        with pytest.raises(ValueError, match="'other_wrap' has no model for the task classification"):
            PreparedTask.load(recipe)
        with pytest.raises(ValueError, match="OtherWrapperConfig.from_encoder wraps a plain encoder, but got a Probe"):
            recipe.build_config()
    for trainer in (None, "bestiary.trainers.base:BestiaryTrainer"):
        with registered(replace(other, trainer=trainer)):
            with pytest.raises(ValueError, match="'other_wrap' is no method of fine-tuning"):
                PreparedTask.load(read(workplace, "bert", "--slug", "other_wrap"))


def test_files_on_the_command_line_replace_a_recipes_data_set(workplace):
    recipe = read(workplace, "bert")
    assert recipe.data.dataset is None and recipe.data.train_file == str(workplace / "rows.jsonl")
    assert recipe.values["data"]["dataset"] is None
    assert read(workplace, "bert", "--dataset", "demo").data.dataset == "demo", "both are given: the script refuses"

    def data(*argv: str, kind: type = PretrainingDataArguments):
        return load_recipe([*argv, "--training.output_dir", str(workplace)], data=kind).data

    first, second = str(workplace / "first.yaml"), str(workplace / "second.yaml")
    Path(first).write_text("data: {dataset: demo}")
    Path(second).write_text("data: {train_file: a.txt, validation_file: b.txt}")
    for argv, expected in [
        ((first, "--train_file", "c.txt"), (None, "c.txt", None)),
        ((first, second), (None, "a.txt", "b.txt")),
        ((second, first), ("demo", None, None)),
        ((second, "--dataset", "demo"), ("demo", None, None)),
        ((second, "--dataset", "null"), (None, "a.txt", "b.txt")),
        ((first, "--train_file", "null"), ("demo", None, None)),
        ((first, "--train_file", "c.txt", "--dataset", "d"), ("d", "c.txt", None)),
    ]:
        found = data("--config", *argv)
        assert (found.dataset, found.train_file, found.validation_file) == expected, argv


# ----------------------------------------------------------------------------------------------------------------- Hub


def test_the_pair_goes_up_to_the_hub_and_comes_down(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/{", 1)[1]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{{template}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    model = ProbeForSequenceClassification(ProbeWrapperConfig(encoder_config=BertConfig(**SIZES))).eval()
    model.push_to_hub("user/pair", token=hub.token)
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("user/pair"))
    folder = HfApi(endpoint=hub.endpoint, token=hub.token).snapshot_download("user/pair", local_dir=tmp_path)
    assert type(AutoConfig.from_pretrained(folder)) is ProbeWrapperConfig
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = torch.arange(5, 13)[None]
    assert_close(at_real_tokens(loaded(ids)), at_real_tokens(model(ids)), rtol=1e-5, atol=1e-7)
