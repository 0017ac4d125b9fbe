"""Recipes: YAML and command line together, types, unknown keys, packaged names; and the launch files beside them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import BertConfig, ElectraConfig

from bestiary import recipe as recipes
from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.recipe import load_recipe, recipe_names
from bestiary.trainers.arguments import BestiaryTrainingArguments


LAUNCH_FILES = Path(__file__).parents[1] / "examples" / "accelerate"


@dataclass
class DataArguments:
    """Stands for a script's data arguments."""

    dataset: str = field(default="demo", metadata={"help": "Name of the data; 10 %% are held out."})
    max_length: int | None = None
    seed: int = 0
    columns: list[str] | None = None
    split: Literal["train", "all"] = "train"
    rate: float | str = 0.5


@pytest.fixture
def write(tmp_path):
    """Write a recipe file and give its path; training output goes to the temporary folder."""

    def write(text, name="a.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def load(tmp_path):
    """`load_recipe` on a command line given as one string, with a stand-in for the paper's training arguments."""

    def load(line="", training=BestiaryTrainingArguments, **kwargs):
        argv = line.split() + ["--training.output_dir", str(tmp_path / "run")]
        return load_recipe(argv, data=DataArguments, training=training, **kwargs)

    return load


BERT = """
slug: bert
description: a test
model: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
data:
  dataset: wikitext
  max_length: 64
training:
  learning_rate: 5e-4
  warmup_steps: 10
  max_steps: 1e3
  eval_strategy: no
  schedule: one_cycle
  schedule_kwargs: {base: 1e-1}
"""


def test_file_alone(write, load):
    recipe = load(f"--config {write(BERT)}")
    assert (recipe.slug, recipe.description) == ("bert", "a test")
    assert recipe.data == DataArguments(dataset="wikitext", max_length=64)
    training = recipe.training
    assert type(training) is BestiaryTrainingArguments
    assert (training.learning_rate, training.max_steps, training.eval_strategy) == (5e-4, 1000, "no")
    assert type(training.learning_rate) is float and type(training.max_steps) is int
    assert training.schedule_kwargs == {"base": 0.1}
    config = recipe.build_config(vocab_size=77, hidden_size=8)
    assert type(config) is BertPretrainingConfig
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, 77)


def test_command_line_wins_and_later_files_win_over_earlier(write, load):
    first, second = write(BERT), write("model: {hidden_size: 32}\ntraining:\ndata: {max_length: 16}\n", "b.yaml")
    recipe = load(f"--config {first} {second} --data.max_length 8 --learning-rate=1e-4 --model.num_hidden_layers 3")
    assert recipe.model["hidden_size"] == 32 and recipe.model["num_hidden_layers"] == 3
    assert recipe.model["num_attention_heads"] == 2
    assert (recipe.data.dataset, recipe.data.max_length, recipe.training.learning_rate) == ("wikitext", 8, 1e-4)
    assert recipe.sources == (first, second)


def test_values_hold_what_was_set_and_read_back(write, load):
    recipe = load(f"--config {write(BERT)} --max_length 8 --hub_token secret --schedule_kwargs.fall 0.5")
    assert recipe.values["data"] == {"dataset": "wikitext", "max_length": 8}
    assert recipe.values["training"]["schedule_kwargs"] == {"base": 0.1, "fall": 0.5}
    assert recipe.training.hub_token == "secret" and "hub_token" not in recipe.values["training"]
    again = load(f"--config {write(yaml.safe_dump(recipe.values), 'again.yaml')}")
    assert again.values == recipe.values and again.data == recipe.data


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("--max_steps 1e2", "training.max_steps", 100),
        ("--warmup_steps 0", "training.warmup_steps", 0.0),
        ("--use_cpu", "training.use_cpu", True),
        ("--average_tokens_across_devices False", "training.average_tokens_across_devices", False),
        ("--run_name 1e3", "training.run_name", "1e3"),
        ("--run_name null", "training.run_name", None),
        ("--save_total_limit null", "training.save_total_limit", None),
        ("--report_to none", "training.report_to", []),
        ("--label_names a b", "training.label_names", ["a", "b"]),
        ("--label_names a", "training.label_names", ["a"]),
        ("--label_names=[a,b]", "training.label_names", ["a", "b"]),
        ("--columns 1 2", "data.columns", ["1", "2"]),
        ("--schedule one_cycle --schedule_kwargs={\"base\":0.5}", "training.schedule_kwargs", {"base": 0.5}),
        ("--schedule one_cycle --schedule_kwargs.base 5e-1", "training.schedule_kwargs", {"base": 0.5}),
        ("--split all", "data.split", "all"),
        ("--rate 1", "data.rate", 1.0),
        ("--rate auto", "data.rate", "auto"),
        ("--max_length -3", "data.max_length", -3),
    ],
)  # fmt: skip
def test_types_of_the_command_line(load, option, name, value):
    section, key = name.split(".")
    found = getattr(getattr(load(option), section), key)
    assert found == value and type(found) is type(value)


def test_types_of_the_file(write, load):
    text = """
    data: {dataset: 123, max_length: 64.0, columns: ["null", 2], rate: 1e-3}
    training: {run_name: no, logging_steps: 7, adam_beta2: .98, load_best_model_at_end: off}
    """
    with pytest.raises(ValueError, match="training.load_best_model_at_end must be bool, got 'off'"):
        load(f"--config {write(text)}")
    recipe = load(f"--config {write(text.replace(', load_best_model_at_end: off', ''))}")
    assert recipe.data == DataArguments(dataset="123", max_length=64, columns=["null", "2"], rate=1e-3)
    assert (recipe.training.run_name, recipe.training.adam_beta2) == ("no", 0.98)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("training: {lerning_rate: 1}", "", r"a.yaml: section training \(Best.*\) has no field 'lerning_rate'; did"),
        ("traning: {}", "", "a.yaml has an unknown section 'traning'; did you mean training?"),
        ("training: [1]", "", "a.yaml: the section training must be a mapping, got"),
        ("- 1", "", "a.yaml must hold a mapping with the keys slug, description, model, data, training"),
        ("data: {dataset: a, dataset: b}", "", "the key 'dataset' is repeated in line 1"),
        ("data: &a {dataset: b}\ntraining: *a", "", "aliases .* are not allowed"),
        ("data: {dataset: !!python/object:os.system a}", "", "a.yaml is no valid YAML"),
        ("data: [", "", "a.yaml is no valid YAML"),
        ("training: {learning_rate: fast}", "", "a.yaml: training.learning_rate must be float, got 'fast'"),
        ("data: {max_length: 1.5}", "", r"data.max_length must be int \| None, got 1.5"),
        ("data: {max_length: .inf}", "", r"data.max_length must be int \| None, got inf"),
        ("data: {max_length: true}", "", r"data.max_length must be int \| None, got True"),
        ("data: {split: test}", "", r"data.split must be Literal\['train', 'all'\], got 'test'"),
        ("data: {dataset: null}", "", "data.dataset must be str, got None"),
        ("{slug: berd}", "", "No paper 'berd'"),
        ("{model: {model_type: bestiary-berd}}", "", "model type 'bestiary-berd'; did you mean bestiary-bert"),
        ("{slug: bert, model: {hiden_size: 1}}", "",
         r"section model \(BertPretrainingConfig\) has no field 'hiden_size'; did you mean hidden_size"),
        ("{slug: electra, model: {discriminator_config: {hiden_size: 1}}}", "",
         r"section model.discriminator_config \(ElectraConfig\) has no field 'hiden_size'"),
        ("", "--lerning_rate 1", "--lerning_rate: no section has field 'lerning_rate'; did you mean .*learning_rate"),
        ("", "--training.lerning_rate 1", "option --training.lerning_rate: section training"),
        ("", "--seed 3", "sections data and training both have it; write --data.seed or --training.seed"),
        ("", "--training 3", "option --training names a section; write --training.<field>"),
        ("training: {learning_rate: 1}", "--learning_rate fast", "^option --learning_rate: .* got 'fast'"),
        ("", "--learning_rate.x 1", "option --learning_rate.x: training.learning_rate must be float"),
        ("", "--learning_rate", "option --learning_rate: training.learning_rate must be float, got True"),
        ("", "--schedule_kwargs.base 1", "schedule_kwargs is set but schedule is not"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(write, load, text, line, message):
    with pytest.raises(ValueError, match=message):
        load(f"--config {write(text)} {line}")


def test_mistakes_of_the_command_line_alone(load):
    for line, message in [
        ("electra_tiny", "Unexpected argument 'electra_tiny'; options start with --, recipes follow --config"),
        ("--config --use_cpu", "--config: name at least one recipe"),
        ("--config missing.yaml", "there is no file 'missing.yaml'"),
        ("--config no_such_recipe", "there is no packaged recipe 'no_such_recipe'"),
        ("--name_or_path x --hidden_size 3", "A field of the model is written --model.<field> here"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(line)


def test_a_field_without_value_or_default_is_asked_for():
    @dataclass
    class Needs:
        train_file: str

    with pytest.raises(ValueError, match="gives no data.train_file"):
        load_recipe([], data=Needs)
    assert load_recipe(["--train_file", "x"], data=Needs).data.train_file == "x"


def test_sub_configurations_are_merged_key_by_key_and_typed(write, load):
    text = """
    slug: electra
    model:
      generator_size_fraction: 0.5
      discriminator_config: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, layer_norm_eps: 1e-7}
    """
    line = f"--config {write(text)} --model.discriminator_config.num_hidden_layers 3"
    recipe = load(line + " --discriminator_config.intermediate_size 128")
    config = recipe.build_config()
    assert type(config) is ElectraJointConfig and type(config.discriminator_config) is ElectraConfig
    encoder = config.discriminator_config
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.intermediate_size) == (64, 3, 128)
    assert encoder.layer_norm_eps == 1e-7


def test_another_model_type_under_a_paper(write, load):
    recipe = load(f"--config {write(BERT)} --model_type bert --num_labels 3")
    config = recipe.build_config()
    assert type(config) is BertConfig and config.hidden_size == 64 and config.num_labels == 3
    assert type(load(f"--config {write(BERT)} --model_type null").build_config()) is BertPretrainingConfig
    with pytest.raises(ValueError, match="names no model: give slug, model.model_type or model.name_or_path"):
        load("").build_config()


def test_a_checkpoint_and_what_is_changed_in_its_configuration(tmp_path, load):
    BertConfig(hidden_size=24, num_attention_heads=3).save_pretrained(tmp_path / "checkpoint")
    line = f"--name_or_path {tmp_path / 'checkpoint'} --model.hidden_dropout_prob"
    config = load(f"{line} 0").build_config(num_labels=3, pooling="unknown to BERT")
    assert type(config) is BertConfig
    assert (config.hidden_size, config.hidden_dropout_prob, config.num_labels) == (24, 0.0, 3)
    assert "pooling" not in config.to_dict()
    with pytest.raises(ValueError, match="hidden_dropout_prob must be float.*got 'none'"):
        load(f"{line} none").build_config()
    with pytest.raises(ValueError, match=r"section model \(BertConfig\) has no field 'hidden_dropuot_prob'"):
        load(line.replace("dropout", "dropuot") + " 0").build_config()


def test_training_arguments_are_the_papers_unless_the_script_says_otherwise(write, load, monkeypatch):
    @dataclass
    class PaperArguments(BestiaryTrainingArguments):
        learning_rate: float = 0.25

    seen = []
    monkeypatch.setattr(recipes, "load_object", lambda name: seen.append(name) or PaperArguments)
    recipe = load(f"--config {write(BERT)}", training=None)
    assert type(recipe.training) is PaperArguments
    assert seen == [recipes.get_paper("bert").arguments]
    assert load("", training=None).training.learning_rate == 0.25 and seen[1].endswith(":BestiaryTrainingArguments")

    found = load("--slug electra", training=lambda values: {"electra": PaperArguments}[values["slug"]])
    assert type(found.training) is PaperArguments


def test_help_lists_sections_fields_and_defaults(load, capsys):
    for line in ("--slug bert --help", "-h"):
        with pytest.raises(SystemExit) as stopped:
            load_recipe(line.split(), data=DataArguments, training=BestiaryTrainingArguments)
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "--data.max_length: int | None = None" in text and "10 % are held out" in text
        assert "--training.layerwise_lr_decay: float = 1.0" in text
        assert ("--model.num_hidden_layers: int = 12" in text) == ("bert" in line)


def test_packaged_recipes_are_found_by_name_and_by_paper(tmp_path, monkeypatch, load):
    (tmp_path / "bert_tiny.yaml").write_text(BERT)
    (tmp_path / "bert_heads_tiny.yaml").write_text("slug: bert_heads")
    monkeypatch.setattr(recipes, "_folder", lambda: tmp_path)
    assert recipe_names() == ["bert_heads_tiny", "bert_tiny"] and recipe_names("bert") == ["bert_tiny"]
    assert load("--config bert_tiny").data.dataset == "wikitext"
    with pytest.raises(ValueError, match="packaged recipe 'bert_tny'; did you mean bert_tiny"):
        load("--config bert_tny")


def test_the_packaged_folder_is_examples_recipes():
    folder = Path(__file__).parents[1] / "examples" / "recipes"
    assert recipe_names() == sorted(path.stem for path in folder.glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("cpu", "NO", {"use_cpu": True, "num_processes": 1}),
        ("single_gpu", "NO", {"mixed_precision": "bf16", "num_processes": 1}),
        ("multi_gpu", "MULTI_GPU", {"mixed_precision": "bf16"}),
        ("fsdp2", "FSDP", {"fsdp_version": 2, "use_fsdp": True}),
        ("zero2", "DEEPSPEED", {"zero_stage": 2, "use_deepspeed": True}),
    ],
)
def test_launch_files_parse(name, kind, expected):
    path = str(LAUNCH_FILES / f"{name}.yaml")
    config = load_config_from_file(path)
    assert isinstance(config, ClusterConfig) and config.distributed_type.value == kind
    parser = launch_command_parser()
    known = vars(parser.parse_args(["script.py"]))
    assert config.fsdp_config.keys() | config.deepspeed_config.keys() <= known.keys()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", path, "script.py"]))
    assert {key: getattr(args, key) for key in expected} == expected
