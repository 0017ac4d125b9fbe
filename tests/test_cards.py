"""Model cards: what they say is true of the run, load snippets work, a hand-edited card survives."""

import logging
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForMaskedLM, BertModel, TrainingArguments

from bestiary import cards, registry
from bestiary.registry import Paper


class EchoConfig(BertConfig):
    model_type = "bestiary-echo"


class EchoForMaskedLM(BertForMaskedLM):
    config: EchoConfig


SIZE = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
HISTORY = [
    {"loss": 9.0, "mlm_loss": 4.0, "rtd_loss": 0.1, "learning_rate": 1e-4, "grad_norm": 2.0, "epoch": 0.1, "step": 10},
    {"eval_loss": 7.0, "eval_mlm_loss": 3.5, "eval_accuracy": 0.25, "eval_runtime": 3.0, "epoch": 0.2, "step": 20},
    {
        "loss": 6.0,
        "mlm_loss": 2.0,
        "rtd_loss": 0.08,
        "learning_rate": 5e-5,
        "grad_norm": 1.0,
        "epoch": 0.2,
        "step": 20,
    },
    {"eval_loss": 5.0, "eval_mlm_loss": 1.75, "eval_accuracy": 0.5, "eval_runtime": 3.0, "epoch": 0.4, "step": 40},
    {"train_runtime": 75.0, "train_loss": 7.7, "total_flos": 10.0, "train_steps_per_second": 2.0, "step": 40},
]


@pytest.fixture
def echo(monkeypatch, tmp_path) -> Paper:
    """A paper that exists in the table only, with prose of its own."""
    paper = Paper(
        slug="echo",
        title="Echoes Are All You Hear",
        authors="Ada Echo, Bob Reply",
        year=2021,
        summary="Every token is heard twice.",
        config=EchoConfig,
        models={"AutoModelForPreTraining": EchoForMaskedLM, "AutoModelForMaskedLM": EchoForMaskedLM},
        arxiv="2101.00001",
        tags=("deep acoustics",),
    )
    monkeypatch.setitem(registry._PAPERS, "echo", paper)
    prose = tmp_path / "prose.md"
    prose.write_text("# Echo\n\nIntro.\n\n## Method\n\nHear.\n\n## Results\n\nOur 99 points.\n\n## Limits\n\nLoud.\n")
    monkeypatch.setattr(cards, "prose_path", lambda slug: prose)
    return paper


@pytest.fixture
def model() -> EchoForMaskedLM:
    torch.manual_seed(0)
    return EchoForMaskedLM(EchoConfig(**SIZE))


def table_of(text: str, first_column: str) -> dict[str, list[str]]:
    """Rows of the Markdown table whose head begins with a column: first cell -> other cells."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def test_metadata_is_what_the_hub_expects(echo, model, tmp_path):
    info = {"datasets": ["user/corpus"], "language": "en", "base_model": "user/bert", "tags": ["tiny"]}
    path = cards.write_model_card(tmp_path, model=model, trainer_info=info)
    assert ModelCard.load(path).data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["bestiary", "echo", "deep-acoustics", "tiny"],
        "pipeline_tag": "fill-mask",
        "datasets": ["user/corpus"],
        "language": "en",
        "base_model": "user/bert",
    }


@pytest.mark.parametrize("relative", [False, True])
def test_local_base_model_is_no_metadata_and_hides_the_users_folders(relative, echo, model, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base_model = "runs/mine" if relative else str(tmp_path / "runs" / "mine")
    text = cards.make_model_card(tmp_path, model=model, trainer_info={"base_model": base_model})
    assert ModelCard(text).data.base_model is None
    assert re.search("Training started from `(.*?)`", text)[1] == ("runs/mine" if relative else "mine")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"licence": "mit"}, "trainer_info has no key 'licence'; did you mean 'license'"),
        ({"datasets": ["./data/x.jsonl"]}, r"trainer_info\['datasets'\] must hold Hub ids .* got './data/x.jsonl'"),
        ({"slug": "no_such_paper"}, "no_such_paper"),
    ],
)
def test_wrong_information_is_refused_and_nothing_written(model, tmp_path, info, message):
    with pytest.raises(ValueError, match=message):
        cards.write_model_card(tmp_path, model=model, trainer_info=info)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_config_or_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json; pass model="):
        cards.write_model_card(tmp_path)


def test_card_from_the_folder_alone_equals_card_from_the_model(echo, model, tmp_path):
    model.config.architectures = ["EchoForMaskedLM"]
    model.config.save_pretrained(tmp_path)
    from_folder = ModelCard(cards.make_model_card(tmp_path))
    assert from_folder.data.to_dict() == ModelCard(cards.make_model_card(tmp_path, model=model)).data.to_dict()
    assert "# EchoForMaskedLM" in from_folder.content


def test_results_are_the_last_logged_values_and_say_whose_they_are(echo, model, tmp_path):
    text = cards.make_model_card(tmp_path, model=model, trainer_info={"log_history": HISTORY, "seed": 3})
    results = text[text.index("## Results") :]
    assert results.startswith("## Results\n\nMeasured by this run")
    assert table_of(results, "quantity") == {
        "loss": ["6", "5"],
        "mlm_loss": ["2", "1.75"],
        "rtd_loss": ["0.08", "–"],
        "accuracy": ["–", "0.5"],
    }
    facts = table_of(text, "run")
    assert facts["optimizer steps"] == ["40"] and facts["wall time"] == ["1 min 15 s"] and facts["seed"] == ["3"]
    assert f"torch {torch.__version__}" in facts["versions"][0] and facts["hardware"] and facts["date"]


def test_results_of_the_project_stay_out_of_a_users_card(echo, model, tmp_path):
    text = cards.make_model_card(tmp_path, model=model)
    assert "## Method\n\nHear." in text and "## Limits\n\nLoud." in text
    assert "99 points" not in text and "Intro." not in text
    assert "No record of a training run" in text and "More Information" not in text.title()


def test_card_names_paper_and_citation(echo, model, tmp_path):
    text = cards.make_model_card(tmp_path, model=model)
    for piece in (
        echo.title,
        echo.authors,
        "[2101.00001](https://arxiv.org/abs/2101.00001)",
        echo.summary,
        echo.citation,
    ):
        assert piece in text
    assert f"It has {sum(weight.numel() for weight in model.parameters()):,} parameters." in text


@dataclass
class EchoTrainingArguments(TrainingArguments):
    adam_epsilon: float = 1e-6
    echo_weight: float = 50.0
    echo_file: str | None = None


def test_changed_arguments_show_the_run_but_no_token_and_no_path(tmp_path):
    arguments = EchoTrainingArguments(
        output_dir=str(tmp_path / "out"),
        learning_rate=2e-4,
        hub_token="hf_secret",
        echo_file=str(tmp_path / "notes.txt"),
        lr_scheduler_type="cosine",
        use_cpu=True,
    )
    assert cards.changed_arguments(arguments) == {
        "learning_rate": 2e-4,
        "adam_epsilon": 1e-6,
        "lr_scheduler_type": "cosine",
        "echo_weight": 50.0,
        "echo_file": "notes.txt",
    }


def test_hand_edited_card_is_kept_and_generated_one_is_replaced(echo, model, tmp_path, caplog):
    path = cards.write_model_card(tmp_path, model=model)
    first = path.read_text()
    cards.write_model_card(tmp_path, model=model, trainer_info={"data": "Ten echoes."})
    assert "Ten echoes." in path.read_text()

    for edited in (first.replace("heard", "HEARD"), first + "\nMy note.\n", "# my own card\n"):
        path.write_text(edited)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="bestiary.cards"):
            cards.write_model_card(tmp_path, model=model, trainer_info={"data": "Ten echoes."})
        assert path.read_text() == edited
        assert "edited by hand and is kept" in caplog.text


def test_a_card_checked_out_with_other_line_ends_is_still_generated(echo, model, tmp_path):
    assert cards.is_generated(cards.make_model_card(tmp_path, model=model).replace("\n", "\r\n"))


def test_load_snippets(echo, model, tmp_path, monkeypatch):
    ours = cards.make_model_card(tmp_path, model=model, trainer_info={"repo_id": "user/echo"})
    package = __name__.split(".")[0]  # EchoConfig lives here, outside bestiary: its code cannot be exported
    assert f"import {package}  #" in ours and "trust_remote_code" not in ours
    assert 'AutoModelForMaskedLM.from_pretrained("user/echo")' in ours
    monkeypatch.setattr(EchoConfig, "__module__", "bestiary.configuration.configuration_echo")
    ours = cards.make_model_card(tmp_path, model=model)
    assert "import bestiary  #" in ours and "trust_remote_code=True" in ours


def test_load_snippet_of_a_stock_model_runs(tmp_path):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZE))
    model.save_pretrained(tmp_path)
    text = cards.make_model_card(tmp_path, model=model)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "import bestiary" not in code
    scope = {}
    exec(code.replace("path/to/this/folder", str(tmp_path)), scope)
    assert torch.equal(scope["model"].embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


def test_plot_shows_training_and_evaluation_of_every_part(tmp_path, echo, model):
    image_module = pytest.importorskip("matplotlib.image")
    path = cards.plot_history(HISTORY, tmp_path / "loss.png")
    image = (image_module.imread(path)[..., :3] * 255).round().astype(int)
    assert image.shape[1] > 3.5 * image.shape[0]  # three panels in one row: the mean of the whole run is no fourth
    third = image.shape[1] // 3
    for panel, has_evaluation in enumerate((True, True, False)):  # loss, mlm_loss; rtd_loss was never evaluated
        pixels = image[:, panel * third : (panel + 1) * third]
        blue, orange = (
            (pixels == colour).all(-1).sum() for colour in (np.array([31, 119, 180]), np.array([255, 127, 14]))
        )
        assert blue > 50
        assert (orange > 50) == has_evaluation
    assert [child.name for child in tmp_path.glob("*loss*")] == ["loss.png"]
    assert "![Loss over optimizer steps](loss.png)" in cards.make_model_card(tmp_path, model=model)


def test_plot_without_a_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finite loss"):
        cards.plot_history(
            [{"loss": float("nan"), "step": 1}, {"train_runtime": 1.0, "step": 1}], tmp_path / "loss.png"
        )
    assert not list(tmp_path.iterdir())


def test_results_table_aligns_rows_of_different_columns():
    table = cards.results_table([{"model": "a|b", "score": 0.123456}, {"model": "c", "steps": 12}])
    assert table.splitlines() == [
        "| model | score | steps |",
        "|---|---|---|",
        "| a\\|b | 0.1235 | – |",
        "| c | – | 12 |",
    ]
