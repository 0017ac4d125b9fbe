"""examples/compress.py: distillation by recipe, resuming, the plain result in fine-tuning, and mistakes."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

from bestiary import list_papers
from bestiary.trainers.seeds import SeededTaskArguments


ROOT = Path(__file__).parents[1]
WORDS = "the cat sat on mat dog ran far from a red house and saw blue birds in old trees near water".split()
DISTIL = """
model:
  num_relation_heads: 6
  encoder_config: {hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 24}
data: {dataset: null, train_file: text.txt, validation_fraction: 0.2, max_length: 24}
training:
  output_dir: student
  max_steps: 4
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 8
  warmup_steps: 1
  logging_steps: 1
  eval_steps: 2
  save_strategy: steps
  save_steps: 2
  teacher_dtype: null
  disable_tqdm: true
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with a teacher, text, labelled texts and a small version of the recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(special + WORDS)})
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (24, 6, 7), generator=draw).tolist()
    text = "\n\n".join("\n".join(" ".join(WORDS[p] for p in line) + "." for line in lines) for lines in picks)
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "small.yaml").write_text(DISTIL)
    for split in ("train", "eval"):
        rows = [{"text": text, "label": label} for text, label in [("the red house", "in"), ("old trees", "out")] * 4]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def script(name: str, monkeypatch, options: str) -> None:
    """Run an example in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options.split()])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


def test_distil_resume_and_finetune(workplace, monkeypatch, capsys):
    run = "--config minilmv2_tiny small.yaml --model.teacher teacher"
    script("compress", monkeypatch, run)
    assert "Plain model, tokenizer, card and plot of the losses: student" in capsys.readouterr().out
    folder = workplace / "student"
    assert {"README.md", "loss.png", "tokenizer.json", "checkpoint-2", "checkpoint-4"} <= {
        path.name for path in folder.iterdir()
    }
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "qq_loss" in entry] == [1, 2, 3, 4]
    assert any({"eval_loss", "eval_vv_loss"} <= entry.keys() for entry in history)
    card = (folder / "README.md").read_text()
    assert "compress.py --config minilmv2_tiny" in card and "MiniLMv2" in card and "AutoModel" in card
    trained, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(trained) is BertModel and not any(report.values())

    first = (folder / "checkpoint-2/model.safetensors").stat().st_mtime_ns
    (folder / "checkpoint-4").rename(workplace / "aside")
    (folder / "model.safetensors").unlink()
    script("compress", monkeypatch, f"{run} --resume_from_checkpoint last")
    assert (folder / "checkpoint-2/model.safetensors").stat().st_mtime_ns == first, "it started anew"
    assert_close(AutoModel.from_pretrained(folder).state_dict(), trained.state_dict(), atol=0, rtol=0)

    options = "--dataset null --train_file train.jsonl --eval_file eval.jsonl --max_length 16 --output_dir tuned"
    quick = "--max_steps 2 --eval_strategy no --disable_tqdm true"
    script("finetune", monkeypatch, f"--config finetune_classification --name_or_path student {options} {quick}")
    assert "eval_accuracy" in capsys.readouterr().out
    assert json.loads((workplace / "tuned/config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    assert AutoTokenizer.from_pretrained("tuned").get_vocab() == AutoTokenizer.from_pretrained("teacher").get_vocab()


def test_a_task_by_its_own_fine_tuned_model(workplace, monkeypatch, capsys):
    """finetune.py and then compress.py on the same data, with two seeds."""
    files = "--dataset null --train_file train.jsonl --eval_file eval.jsonl --max_length 16 --disable_tqdm true"
    tuning = "--config finetune_classification --name_or_path teacher --output_dir tuned --max_steps 2"
    script("finetune", monkeypatch, f"{tuning} --eval_strategy no {files}")
    method = "--config theseus_tiny --name_or_path tuned --output_dir small --successor_num_hidden_layers 1"
    script("compress", monkeypatch, f"{method} --max_steps 4 --seeds 0,1 {files}")
    assert "Plain model, tokenizer, card and plot of the losses: small" in capsys.readouterr().out
    for seed in (0, 1):
        folder = workplace / f"small/seed_{seed}"
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert type(model) is BertForSequenceClassification and not any(report.values())
        assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 1
        assert model.config.id2label == {0: "in", 1: "out"}
    teacher = AutoModelForSequenceClassification.from_pretrained("tuned")
    assert_close(model.classifier.state_dict(), teacher.classifier.state_dict(), atol=0, rtol=0)

    (workplace / "small").rename(workplace / "aside")
    with pytest.raises(ValueError, match="the predecessor 'teacher' lacks .*classifier.weight.*fine-tune it first"):
        script("compress", monkeypatch, f"{method.replace('tuned', 'teacher')} --max_steps 4 {files}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--config minilmv2_tiny small.yaml", "MiniLMv2 needs a teacher: --model.teacher"),
        ("--config minilmv2_tiny small.yaml --model.teacher nowhere", "no tokenizer at 'nowhere'"),
        ("--config minilmv2_tiny small.yaml --model.techer teacher", "has no field 'techer'; did you mean"),
        ("--config electra_tiny", "'electra' is no method of compression but .*; use examples/pretrain.py"),
        ("--output_dir x", "compress.py needs the paper"),
    ],
)
def test_mistakes(options, message, workplace, monkeypatch):
    with pytest.raises(ValueError, match=message):
        script("compress", monkeypatch, options)
    assert not (workplace / "student/model.safetensors").exists()


def test_help_and_the_data_of_both_kinds(workplace, monkeypatch, capsys):
    seen = {}
    for slug in {"theseus", "minilmv2"} & set(list_papers()):
        with pytest.raises(SystemExit) as stopped:
            script("compress", monkeypatch, f"--slug {slug} --help")
        seen[slug] = capsys.readouterr().out
        assert stopped.value.code == 0
    assert "--model.teacher" in seen["minilmv2"] and "--data.train_file" in seen["minilmv2"]
    assert "--training.teacher_dtype" in seen["minilmv2"]
    assert "theseus" not in seen or f"data: {SeededTaskArguments.__name__}" in seen["theseus"]
