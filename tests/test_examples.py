"""Recipes are valid, the tiny ones run, save, resume and reload through `accelerate launch`; scripts are small."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForPreTraining, BertTokenizer

from bestiary import get_paper, list_papers
from bestiary.configuration.configuration_core import BestiaryConfig
from bestiary.modeling.modeling_electra import ElectraJointForSequenceClassification
from bestiary.recipe import Recipe, load_recipe
from bestiary.registry import load_object
from bestiary.trainers.finetuning import FinetuneTrainer
from bestiary.trainers.optimization import layerwise_groups
from bestiary.trainers.seeds import SeededTaskArguments, task_training_arguments
from bestiary.trainers.seq2seq import seq2seq_data_arguments, seq2seq_training_arguments


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "examples" / "recipes").glob("*.yaml")}
TINY = sorted(name for name in RECIPES if name.endswith("_tiny"))
QUICK = "electra_tiny"
"""The one that is run among the fast tests."""

OVERRIDE = """
data:
  dataset: null
  train_file: text.txt
  validation_fraction: 0.2
  tokenizer: tokenizer
  max_length: 32
training:
  output_dir: run
  max_steps: 2
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 8
  warmup_steps: 1
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 2
  save_strategy: steps
  save_steps: 1
  disable_tqdm: true
"""
"""What makes any recipe of pre-training a run of two updates on a text of a few lines."""


def is_for_a_task(name: str) -> bool:
    """Whether a recipe is for a labelled task: without a paper, or with one whose trainer fine-tunes."""
    slug = RECIPES[name].get("slug")
    return slug is None or issubclass(load_object(get_paper(slug).trainer), FinetuneTrainer)


def is_for_pairs(name: str) -> bool:
    """Whether a recipe is for pairs of texts."""
    return "seq2seq" in name


def load(name: str, *options: str) -> Recipe:
    """A recipe as its script reads it: seq2seq.py, pretrain.py, or finetune.py and compress.py for a labelled task."""
    command = ["--config", name, *options]
    if is_for_pairs(name):
        return load_recipe(command, data=seq2seq_data_arguments, training=seq2seq_training_arguments)
    if is_for_a_task(name):
        return load_recipe(command, data=SeededTaskArguments, training=task_training_arguments)
    return load_recipe(command, data=load_object(get_paper(RECIPES[name]["slug"]).trainer).data_arguments)


PRETRAINED = [
    name
    for name in TINY
    if not is_for_pairs(name) and not is_for_a_task(name) and get_paper(RECIPES[name]["slug"]).kind != "compression"
]


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid(name, tmp_path):
    recipe = load(name, "--training.output_dir", str(tmp_path))
    assert recipe.description and len(recipe.description) < 100
    assert RECIPES[name]["training"]["output_dir"] == f"runs/{name}"
    if recipe.slug is None:
        assert not recipe.model, "the model of a fine-tuning recipe is the user's"
    else:
        config = recipe.build_config(vocab_size=100)
        assert isinstance(config, BestiaryConfig)
        if not is_for_pairs(name):
            assert recipe.data.max_length <= config.max_position_embeddings
    for section in ("model", "data", "training"):
        if section == "model" and recipe.slug is None:
            continue
        with pytest.raises(ValueError, match=f"section {section} .* has no field 'no_such_field'"):
            load(name, f"--{section}.no_such_field", "1")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_named_by_its_paper(name):
    slug = RECIPES[name].get("slug")
    owners = [paper for paper in list_papers() if name == paper or name.startswith(f"{paper}_")]
    if slug is not None:
        assert max(owners, key=len) == slug
    else:
        assert name == "seq2seq" or name.startswith("finetune_") or (owners and "finetune" in name)


def test_every_paper_has_a_tiny_recipe_and_published_ones():
    for slug in list_papers():
        names = [name for name, content in RECIPES.items() if content.get("slug") == slug]
        assert f"{slug}_tiny" in names and any(not name.endswith("_tiny") for name in names)


def test_electra_finetuning_has_the_papers_rates(tmp_path):
    training = load("electra_finetune", "--training.output_dir", str(tmp_path)).training
    encoder = dict(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=16,
        embedding_size=8,
    )
    config = get_paper("electra").config(discriminator_config=encoder)
    model = ElectraJointForSequenceClassification(config)

    def rates(**options):
        groups = layerwise_groups(model, training.learning_rate, training.layerwise_lr_decay, 0.01, **options)
        rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        names = (
            "classifier.weight",
            "electra.encoder.layer.11.output.dense.weight",
            "electra.embeddings.LayerNorm.bias",
        )
        return [rate[id(model.get_parameter(name))] for name in names]

    assert rates() == pytest.approx([1e-4, 0.8e-4, 1e-4 * 0.8**13])
    assert rates(off_by_one=True) == pytest.approx([1e-4, 6.4e-5, 4.3980e-6], rel=1e-4)  # the official numbers
    assert (training.optimizer, training.schedule, training.warmup_steps) == ("bert_adam", "electra", 0.1)


# Scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_is_short_and_knows_no_model(path):
    source = path.read_text()
    assert len(source.splitlines()) < 200
    tree = ast.parse(source)
    assert ast.get_docstring(tree) and path.name in ast.get_docstring(tree), "the docstring shows the command"
    papers = re.compile("|".join(re.escape(slug) for slug in list_papers()), re.IGNORECASE)
    branches = [
        part
        for node in ast.walk(tree)
        for part in (
            [node.test] if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert)
            else [node.pattern] if isinstance(node, ast.match_case)
            else [node] if isinstance(node, ast.Compare)
            else node.keys if isinstance(node, ast.Dict)
            else []
        )
        if part is not None
    ]  # fmt: skip
    for branch in branches:
        assert not papers.search(ast.unparse(branch)), f"{path.name}:{branch.lineno} decides by the name of a model"


# Runs


@pytest.fixture
def workplace(tmp_path):
    """Folder with text, tokenizer and the override."""
    words = "the cat sat on mat dog ran far from a red house and saw blue birds in old trees near water".split()
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(24):
        picks = torch.randint(len(words), (6, 7), generator=generator).tolist()
        documents.append("\n".join(" ".join(words[pick] for pick in line).capitalize() + "." for line in picks))
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    (tmp_path / "override.yaml").write_text(OVERRIDE)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
    BertTokenizer(vocab={word: number for number, word in enumerate(special + words)}).save_pretrained(
        tmp_path / "tokenizer"
    )
    return tmp_path


def launch(folder: Path, script: str, *options: str) -> str:
    """Run an example through `accelerate launch` on the CPU, with caches in the folder; returns what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "examples/accelerate/cpu.yaml"), str(ROOT / "examples" / script), *options]
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForPreTraining.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRETRAINED]
)
def test_tiny_recipe_runs_saves_resumes_and_reloads(name, workplace, monkeypatch):
    printed = launch(workplace, "pretrain.py", "--config", name, "override.yaml")
    assert "Checkpoint, card and plot of the losses: run" in printed
    run = workplace / "run"
    assert {"README.md", "loss.png", "checkpoint-1", "checkpoint-2"} <= {path.name for path in run.iterdir()}
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert any("eval_loss" in entry for entry in history)
    trained = weights(run)
    assert any((value != weights(run / "checkpoint-1")[name]).any() for name, value in trained.items())

    first_step = (run / "checkpoint-1/model.safetensors").stat().st_mtime_ns
    (run / "checkpoint-2").rename(workplace / "aside")
    (run / "model.safetensors").unlink()
    resume = ["--config", name, "override.yaml", "--resume_from_checkpoint", "last"]
    if name == QUICK:  # in this process, which has the libraries loaded
        monkeypatch.chdir(workplace)
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *resume])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        runpy.run_path(str(ROOT / "examples" / "pretrain.py"), run_name="__main__")
        torch.set_num_threads(threads)
    else:
        launch(workplace, "pretrain.py", *resume)
    assert (run / "checkpoint-1/model.safetensors").stat().st_mtime_ns == first_step, "it started anew"
    assert_close(weights(run), trained, atol=0, rtol=0)
    again = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (history, again)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_pretrained_model_is_finetuned(workplace):
    launch(workplace, "pretrain.py", "--config", "electra_tiny", "override.yaml")
    for split in ("train", "eval"):
        rows = [{"text": text, "label": label} for text, label in [("the red house", "in"), ("old trees", "out")] * 4]
        (workplace / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = "--name_or_path run --dataset null --train_file train.jsonl --eval_file eval.jsonl --max_length 16"
    printed = launch(
        workplace,
        "finetune.py",
        "--config",
        "electra_finetune",
        *options.split(),
        "--output_dir",
        "tuned",
        "--seeds",
        "0,1",
    )
    assert re.search(r"eval_accuracy: [\d.]+ ± [\d.]+ over seeds 0,1", printed)
    results = json.loads((workplace / "tuned/results.json").read_text())
    assert len(results["metrics"]["eval_accuracy"]["values"]) == 2
    model, report = ElectraJointForSequenceClassification.from_pretrained(
        workplace / "tuned/seed_1", output_loading_info=True
    )
    assert model.config.id2label == {0: "in", 1: "out"} and not report["missing_keys"]
