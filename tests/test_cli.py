"""The command line: what it prints, and one line with exit code 2 for every mistake of a user."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bestiary import cli, conversion, export, get_paper, index, list_papers, registry


def test_list_shows_every_paper_with_its_title(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_papers()
    assert all(get_paper(line.split()[0]).title in line for line in lines)


def test_list_takes_a_pattern(capsys):
    assert cli.main(["list", "ELEC*"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["electra"]


@pytest.mark.parametrize("slug", list_papers())
def test_info_shows_everything_registered(slug, capsys):
    paper = get_paper(slug)
    assert cli.main(["info", slug]) == 0
    out = capsys.readouterr().out
    for piece in (
        paper.title,
        paper.authors,
        paper.url,
        paper.official_code,
        paper.trainer,
        paper.arguments,
        *([paper.converter] if paper.converter else []),
    ):
        assert piece in out
    assert f"{paper.config.__name__} (model_type {paper.config.model_type})" in out
    for auto_name, model in paper.models.items():
        assert f"{auto_name} " in out and f".{model.__name__}\n" in out
    assert all(name in out for name in index.recipes(slug)) and paper.citation in out


def test_recipe_belongs_to_the_longest_slug(monkeypatch, tmp_path):
    for name in ("bert.yaml", "bert_tiny.yaml", "bert_of_theseus_tiny.yaml", "bertology.yaml"):
        (tmp_path / "recipes" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "recipes" / name).touch()
    monkeypatch.setattr(index, "__file__", str(tmp_path / "index.py"))
    monkeypatch.setitem(registry._PAPERS, "bert_of_theseus", get_paper("bert"))
    assert index.recipes("bert") == ["bert.yaml", "bert_tiny.yaml"]
    assert index.recipes("bert_of_theseus") == ["bert_of_theseus_tiny.yaml"]


def test_convert_and_export_pass_their_arguments_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(conversion, "convert_checkpoint", lambda *given: calls.append(given), raising=False)
    monkeypatch.setattr(export, "export_checkpoint", lambda *given: calls.append(given) or "there", raising=False)
    assert cli.main(["convert", "bert", "in.npz", "out"]) == 0
    assert cli.main(["convert", "bert", "in.npz", "out", "--config", "sizes.json"]) == 0
    assert cli.main(["export", "folder"]) == 0
    assert cli.main(["export", "folder", "--output", "there"]) == 0
    assert calls == [
        ("bert", "in.npz", "out", None),
        ("bert", "in.npz", "out", "sizes.json"),
        ("folder", None),
        ("folder", "there"),
    ]
    assert capsys.readouterr().out == "wrote out\nwrote out\nwrote there\nwrote there\n"


def test_compare_gets_its_arguments_untouched(monkeypatch):
    module = ModuleType("bestiary.compare")
    module.main = lambda argv: 7 if argv == ["--seeds", "1", "2", "--help"] else 0
    monkeypatch.setitem(sys.modules, "bestiary.compare", module)
    assert cli.main(["compare", "--seeds", "1", "2", "--help"]) == 7


@pytest.mark.parametrize(
    "error", [ValueError("no layer\n  'x'; there are 'y'"), OSError("no layer\n  'x'; there are 'y'")]
)
def test_a_mistake_is_one_line_on_stderr(error, monkeypatch, capsys):
    def fail(*given):
        raise error

    monkeypatch.setattr(conversion, "convert_checkpoint", fail, raising=False)
    assert cli.main(["convert", "bert", "in.npz", "out"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "bestiary: error: no layer 'x'; there are 'y'\n" and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "no_such_paper"], "'no_such_paper' is registered; there are "),
        (["list", "no*such"], "no paper matches 'no*such'; `bestiary list` shows all."),
        (["export", "no/such/folder"], "no/such/folder"),
        (["convert", "bert", "no/such/file", "out"], "no/such/file"),
    ],
)
def test_mistakes_name_what_was_given(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_commands_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["frobnicate"])
    assert "invalid choice: 'frobnicate'" in capsys.readouterr().err


def test_installed_command(tmp_path):
    run = subprocess.run(
        [Path(sys.executable).with_name("bestiary"), "info", "no_such_paper"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 2 and run.stderr.startswith("bestiary: error: ") and len(run.stderr.splitlines()) == 1


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    def fail(*given):
        raise RuntimeError("defect")

    monkeypatch.setattr(conversion, "convert_checkpoint", fail, raising=False)
    with pytest.raises(RuntimeError):
        cli.main(["convert", "bert", "in.npz", "out"])
