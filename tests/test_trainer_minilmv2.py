"""MiniLMv2's trainer: the common suite, what it saves, teacher and tokenizer, data, arguments."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import StrictDataclassError
from suites.trainer_suite import ObjectiveSuite, TrainerSuite
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DataCollatorWithPadding,
)

from bestiary.configuration.configuration_minilmv2 import MiniLMv2Config
from bestiary.modeling.modeling_minilmv2 import MiniLMv2ForPreTraining
from bestiary.recipe import load_recipe
from bestiary.trainers.pretraining import PretrainingDataArguments, train_on_text
from bestiary.trainers.trainer_minilmv2 import MiniLMv2Trainer, MiniLMv2TrainingArguments


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
SIZES = {"num_attention_heads": 2, "intermediate_size": 24, "vocab_size": len(WORDS), "max_position_embeddings": 16}


def tokenizer(words: list[str] = WORDS) -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})


def teacher(layers: int = 3) -> BertModel:
    """With weights large enough for relations that differ from the uniform ones."""
    with torch.random.fork_rng([]):
        torch.manual_seed(11)
        model = BertModel(BertConfig(hidden_size=48, num_hidden_layers=layers, initializer_range=0.2, **SIZES))
    return model


def student(dropout: float = 0.0, attach: bool = True, **settings) -> MiniLMv2ForPreTraining:
    encoder = BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        **SIZES,
    )
    model = MiniLMv2ForPreTraining(MiniLMv2Config.from_encoder(encoder, num_relation_heads=6, **settings))
    if attach:
        model.attach_teacher(teacher())
    return model


class MiniLMv2:
    slug = "minilmv2"
    parts = ("qq", "kk", "vv")
    settings: dict = {}

    def make_model(self, dropout):
        return student(dropout, **self.settings)

    def make_rows(self, number):
        draw = torch.Generator().manual_seed(5)
        lengths = torch.randint(6, 17, (number,), generator=draw).tolist()
        return [{"input_ids": [2, *torch.randint(5, 31, (n - 2,), generator=draw).tolist(), 3]} for n in lengths]

    def make_collator(self):
        return DataCollatorWithPadding(tokenizer())


class TestMiniLMv2Trainer(MiniLMv2, TrainerSuite):
    def test_layerwise_rates(self, tmp_path):
        """There is no head, and what would share its rate is frozen."""
        trainer = self.make_trainer(tmp_path, layerwise_lr_decay=0.5, learning_rate=1.0, weight_decay=0.01)
        groups = trainer.create_optimizer().param_groups
        assert {group["lr"] for group in groups} == {0.5, 0.25, 0.125}
        trained = [value for value in trainer.model.parameters() if value.requires_grad]
        assert sum(len(group["params"]) for group in groups) == len(trained)


class TestOtherRelations(MiniLMv2, ObjectiveSuite):
    parts = ("vv", "qk")
    settings = {"relation_weights": {"qk": 0.5, "vv": 2.0}, "student_layer": 1, "teacher_layer": 2}


@pytest.fixture
def arguments(tmp_path):
    return MiniLMv2TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, warmup_steps=0, report_to="none", disable_tqdm=True
    )


# ---- result


def test_unreached_parameters_stay_as_they_were_and_the_result_is_plain(arguments, tmp_path):
    """Also after a checkpoint was loaded, which makes every parameter trainable."""
    student().save_pretrained(tmp_path / "start")
    model = MiniLMv2ForPreTraining.from_pretrained(tmp_path / "start")
    before = {name: value.clone() for name, value in model.to_base().named_parameters()}
    arguments.weight_decay = 0.5
    trainer = MiniLMv2Trainer(
        model,
        arguments,
        teacher=teacher(),
        data_collator=DataCollatorWithPadding(tokenizer()),
        train_dataset=MiniLMv2().make_rows(16),
        processing_class=tokenizer(),
    )
    trainer.train()
    frozen = {name for name, value in model.wrapped.named_parameters() if not value.requires_grad}
    assert len(frozen) == 12 and "pooler.dense.weight" in frozen
    trained = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert trained == len(before) - len(frozen)
    for name, value in model.wrapped.named_parameters():
        assert torch.equal(value, before[name]) == (name in frozen), name
    trainer.save_result()
    run = tmp_path / "run"
    assert json.loads((run / "config.json").read_text())["model_type"] == "bert"
    loaded, report = BertModel.from_pretrained(run, output_loading_info=True)
    assert not any(report.values())
    assert_close(loaded.state_dict(), model.wrapped.state_dict(), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(run).get_vocab() == tokenizer().get_vocab()
    assert "MiniLMv2" in (run / "README.md").read_text() and "AutoModel" in (run / "README.md").read_text()


# ---- teacher


def save(folder, model=None, words=None):
    if model is not None:
        model.save_pretrained(folder)
    if words is not None:
        tokenizer(words).save_pretrained(folder)
    return str(folder)


def test_where_the_teacher_comes_from(arguments, tmp_path):
    path = save(tmp_path / "teacher", teacher(), WORDS)
    common = {"data_collator": DataCollatorWithPadding(tokenizer())}
    named = MiniLMv2Trainer(student(attach=False, teacher=path), arguments, **common)
    given = MiniLMv2Trainer(student(attach=False), arguments, teacher=path, **common)
    attached = MiniLMv2Trainer(student(), arguments, **common)
    weights = [dict(trainer.model.teacher.named_parameters()) for trainer in (named, given, attached)]
    assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert_close(weights[0], weights[2], rtol=0, atol=0)
    arguments.teacher_dtype = "bfloat16"
    low = MiniLMv2Trainer(student(), arguments, **common).model
    assert low.teacher.encoder.dtype == torch.bfloat16 and low.dtype == torch.float32
    with pytest.raises(ValueError, match="MiniLMv2Trainer needs a teacher: pass teacher=.*MiniLMv2Config.teacher"):
        MiniLMv2Trainer(student(attach=False), arguments, **common)
    with pytest.raises(ValueError, match="teacher_dtype must be float32.*'int8'"):
        MiniLMv2TrainingArguments(output_dir="x", teacher_dtype="int8")


def test_tokenizer_must_be_the_teachers(arguments, tmp_path):
    path = save(tmp_path / "teacher", teacher(), WORDS)
    other = [*WORDS[:-2], "z", "y"]
    with pytest.raises(ValueError, match="not that of the teacher .*: 2 of its 31 entries"):
        MiniLMv2Trainer(student(attach=False), arguments, teacher=path, processing_class=tokenizer(other))
    for given in (tmp_path / "teacher", BertModel.from_pretrained(path)):
        with pytest.raises(ValueError, match="not that of the teacher"):
            MiniLMv2Trainer(student(attach=False), arguments, teacher=given, processing_class=tokenizer(other))
    attached = student(attach=False)
    attached.attach_teacher(path)
    with pytest.raises(ValueError, match="not that of the teacher"):
        MiniLMv2Trainer(attached, arguments, processing_class=tokenizer(other))
    with pytest.raises(ValueError, match="vocab_size=31, the student 30"):
        config = MiniLMv2Config(encoder_config=SIZES | {"vocab_size": 30, "hidden_size": 24}, num_relation_heads=6)
        MiniLMv2Trainer(MiniLMv2ForPreTraining(config), arguments, teacher=teacher())


def test_the_teacher_given_goes_before_the_attached_before_the_named(arguments, tmp_path):
    """And it is its tokenizer that counts."""
    other = [*WORDS[:-2], "z", "y"]
    unused = save(tmp_path / "unused", teacher(), other)
    used = save(tmp_path / "used", teacher(layers=2), WORDS)
    common = {"data_collator": DataCollatorWithPadding(tokenizer()), "processing_class": tokenizer()}
    model = student(attach=False, teacher=unused)
    model.attach_teacher(unused)
    trainer = MiniLMv2Trainer(model, arguments, teacher=used, **common)
    assert trainer.model.teacher.layer == 2 and trainer.model.teacher.encoder.device == arguments.device
    model.attach_teacher(used)
    assert MiniLMv2Trainer(model, arguments, **common).model.teacher.layer == 2
    with pytest.raises(ValueError, match="not that of the teacher"):
        MiniLMv2Trainer(student(attach=False, teacher=unused), arguments, **common)
    nameless = student(attach=False, teacher=unused)  # of a model without a checkpoint nothing is known
    nameless.attach_teacher(teacher())
    MiniLMv2Trainer(nameless, arguments, **common)


def test_defaults_of_the_reproductions(tmp_path):
    found = MiniLMv2TrainingArguments(output_dir=str(tmp_path))
    assert (found.learning_rate, found.warmup_steps, found.weight_decay) == (6e-4, 4000, 0.01)
    assert (found.adam_epsilon, found.adam_beta2, found.lr_scheduler_type) == (1e-6, 0.999, "linear")


# ---- data and recipe


def test_text_is_packed_unmasked_and_in_one_segment(arguments):
    sentences = [["a b c d e f", "g h i", "j a b c d e f g"] * 4 for _ in range(3)]
    documents = DatasetDict({"train": Dataset.from_dict({"sentences": sentences})})
    data = PretrainingDataArguments(max_length=12, pad_to_multiple_of=16)
    model = student()
    rows = MiniLMv2Trainer.build_datasets(documents, tokenizer(), model.config, data, arguments)["train"]
    assert rows.column_names == ["input_ids"]
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths) == 12 and sum(length == 12 for length in lengths) >= len(lengths) - 3
    ends = [(row["input_ids"][0], row["input_ids"][-1], row["input_ids"][1:-1].count(3)) for row in rows]
    assert set(ends) == {(2, 3, 0)} and not any(4 in row["input_ids"] for row in rows)
    batch = MiniLMv2Trainer.build_collator(tokenizer(), model.config, data, arguments)(list(rows))
    assert batch["input_ids"].shape[1] == 16 and batch["attention_mask"].sum().item() == sum(lengths)
    with pytest.raises(ValueError, match="max_length is 17, but the model has max_position_embeddings=16"):
        MiniLMv2Trainer.check_sizes(tokenizer(), model.config, 17)
    roberta = AutoConfig.for_model("roberta", hidden_size=24, **SIZES | {"pad_token_id": 0})
    with pytest.raises(ValueError, match="max_length is 16, but the student's position table serves 15 tokens"):
        MiniLMv2Trainer.check_sizes(tokenizer(), MiniLMv2Config(encoder_config=roberta, num_relation_heads=6), 16)


@pytest.fixture
def workplace(tmp_path):
    """A teacher with its tokenizer, text, and the options of a run by recipe on them."""
    save(tmp_path / "teacher", teacher(), WORDS)
    save(tmp_path / "other", teacher(), [*WORDS[:-2], "z", "y"])
    (tmp_path / "text.txt").write_text("\n\n".join("a b c d e f g.\nh i j k l m." for _ in range(20)))
    options = [
        "--slug minilmv2 --model.num_relation_heads 6 --model.encoder_config.hidden_size 24",
        "--model.encoder_config.num_hidden_layers 2 --model.encoder_config.num_attention_heads 2 --max_length 12",
        f"--train_file {tmp_path}/text.txt --output_dir {tmp_path}/run --max_steps 2 --report_to none",
        "--disable_tqdm true --save_strategy no",
    ]
    return tmp_path, " ".join(options).split()


def run(options):
    recipe = load_recipe(options, data=PretrainingDataArguments)
    return train_on_text(recipe, "command")


def test_run_by_recipe_and_going_on_from_its_result(workplace):
    folder, options = workplace
    trainer = run([*options, "--model.teacher", str(folder / "teacher")])
    assert trainer.model.config.encoder_config.vocab_size == len(WORDS)
    assert {"eval_qq_loss", "eval_kk_loss", "eval_vv_loss"} <= trainer.state.log_history[-1].keys()
    first = AutoModel.from_pretrained(folder / "run")
    pairs = list(zip(options[::2], options[1::2]))
    options = [word for pair in pairs if "encoder_config" not in pair[0] for word in pair]
    again = run([*options, "--model.teacher", str(folder / "teacher"), "--name_or_path", str(folder / "run")])
    second = again.model.wrapped
    assert type(second) is type(first) is BertModel
    assert_close(second.pooler.state_dict(), first.pooler.state_dict(), rtol=0, atol=0)  # frozen: of the first run


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("", "MiniLMv2 needs a teacher: --model.teacher"),
        ("--model.teacher {}/nowhere", "no tokenizer at .*nowhere"),
        ("--model.teacher {}/teacher --tokenizer {}/other", "not that of the teacher"),
        ("--model.teacher {}/teacher --name_or_path {}/other", "not that of the teacher"),
        ("--model.teacher {}/teacher --model.num_relation_heads 5", "num_relation_heads must be a divisor"),
        ("--model.teacher {}/teacher --model.teacher_layer 4", r"teacher_layer must be in 1..3"),
    ],
)
def test_mistakes_in_a_recipe(workplace, extra, message):
    folder, options = workplace
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        run([*options, *extra.replace("{}", str(folder)).split()])
