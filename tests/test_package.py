"""The package as users get it: what an import loads, what a wheel holds, which imports are refused."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools


ROOT = Path(__file__).parents[1]
MAPPED = {"configuration", "modeling", "trainers"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def in_new_process(code: str, folder: Path) -> str:
    """Run code away from the checkout, so that only the installed package can be imported; what it printed."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_registers_papers_and_loads_nothing_heavy(tmp_path):
    code = "import sys, json, bestiary; print(json.dumps([sorted(sys.modules), bestiary.list_papers()]))"
    loaded, papers = json.loads(in_new_process(code, tmp_path))
    assert {"bert", "electra"} <= set(papers)
    top_level = {name for name in loaded if "." not in name}
    assert not top_level & (MAPPED | {"datasets", "peft", "timm", "torchvision", "matplotlib", "evaluate", "sklearn"})
    assert not {"transformers.trainer", "bestiary.cards", "bestiary.trainers.base"} & set(loaded)


def test_packages_in_pyproject_are_the_folders_on_disk():
    places = {
        name: PYPROJECT["tool"]["setuptools"]["package-dir"].get(name, name.replace(".", "/")) for name in _packages()
    }
    on_disk = {
        path.parent.relative_to(ROOT).as_posix() for path in _sources("bestiary", *MAPPED, pattern="__init__.py")
    }
    on_disk |= {"examples/recipes", "model_cards"}  # data only
    assert set(places.values()) == on_disk
    for name, folder in places.items():  # the links serve editors, type checkers and data lookups in a checkout
        assert (ROOT / name.replace(".", "/")).resolve() == (ROOT / folder).resolve()


def test_wheel_holds_code_recipes_and_cards(tmp_path):
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77 to build")
    for name in ("bestiary", *MAPPED, "examples", "model_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    in_new_process("from setuptools import build_meta; build_meta.build_wheel('dist')", tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in _sources("bestiary")}
    expected |= {f"bestiary/{path.relative_to(ROOT).as_posix()}" for path in _sources(*MAPPED)}
    expected |= {f"bestiary/recipes/{path.name}" for path in (ROOT / "examples/recipes").glob("*.yaml")}
    expected |= {f"bestiary/model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.md")}
    assert held - {"bestiary/py.typed"} == expected and "bestiary/py.typed" in held


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("import modeling", True),
        ("import modeling.layers.encoder", True),
        ("from configuration import configuration_bert", True),
        ("from configuration.configuration_bert import BertPretrainingConfig", True),
        ("from trainers.base import BestiaryTrainer", True),
        ("from bestiary.modeling import modeling_bert", False),
        ("from bestiary.trainers.base import BestiaryTrainer", False),
        ("from .configuration.configuration_bert import BertPretrainingConfig", False),
    ],
)
def test_lint_refuses_the_bare_folder_names(line, refused):
    pytest.importorskip("ruff")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "TID251",
        "--stdin-filename",
        "examples/probe.py",
        "-",
    ]
    run = subprocess.run(command, input=f"{line}\n", capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, "TID251" in run.stdout) == ((1, True) if refused else (0, False)), run.stdout + run.stderr


def test_no_file_imports_the_bare_folder_names():
    """What the lint rule checks, also where ruff is not installed."""
    for path in _sources("bestiary", *MAPPED, "examples", "benchmarks", "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            bare = MAPPED & {name.split(".")[0] for name in names}
            assert not bare, f"{path.relative_to(ROOT)} line {node.lineno}: import bestiary.{min(bare)} instead"


def _packages() -> list[str]:
    return PYPROJECT["tool"]["setuptools"]["packages"]


def _sources(*folders: str, pattern: str = "*.py") -> list[Path]:
    """Files below top-level folders; links (the mapped folders inside bestiary/) are not followed."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob(pattern))]
