"""Flat remote code: what is collected, what is refused, and that a process without bestiary gets the same numbers."""

import dataclasses
import errno
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import bestiary
from bestiary import export, registry
from bestiary.cards import write_model_card
from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.export import export_checkpoint, flat_sources, run_without_package, write_flat_code
from bestiary.modeling.layers.pretrained import BestiaryPreTrainedModel
from bestiary.modeling.modeling_bert import BertPretrainingForMaskedLM, BertPretrainingForPreTraining
from bestiary.modeling.modeling_electra import ElectraJointForPreTraining


TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
BERT = BertPretrainingConfig(**TINY)


def electra_config(model_type: str) -> ElectraJointConfig:
    return ElectraJointConfig(
        discriminator_config=TINY | {"model_type": model_type},
        generator_config=TINY | {"model_type": model_type, "hidden_size": 8, "intermediate_size": 16},
    )


def build(model_class: type, config, seed: int = 0):
    torch.manual_seed(seed)
    return model_class(config).eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------- collecting sources


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A function that makes a package with our folders out of sources, and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**sources: str) -> str:
        files = {"modeling.modeling_a": "", "modeling.layers.encoder": "", "configuration.configuration_a": ""}
        for module, text in (files | {name.replace("__", "."): text for name, text in sources.items()}).items():
            path = tmp_path / "zoo" / (module.replace(".", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            for folder in (path.parent, *path.parent.parents):
                if folder == tmp_path:
                    break
                (folder / "__init__.py").touch()
        return "zoo"

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] in ("zoo", "flat")]:
        del sys.modules[name]


def test_closure_is_flat_and_runs_as_one_folder(zoo, tmp_path, monkeypatch):
    package = zoo(
        modeling__modeling_a=(
            '"""Ä relative import: see `from ..configuration`."""; from ..configuration.configuration_a import A\n'
            "from .layers.encoder import (\n    B,\n    double as twice,\n)\nimport math\n\n\n"
            "def answer():\n    from .layers.late import late  # when needed\n\n"
            "    return A, B, twice(late), math.e\n\n\n"
            "from .layers.encoder import last\n"
        ),
        modeling__layers__encoder=(
            "from ...configuration.configuration_a import A\n\nB = last = A + 1\n\n\n"
            "def double(x):\n    return 2 * x\n"
        ),
        modeling__layers__late="late = 21\n",
        modeling__layers__unused="raise RuntimeError\n",
        configuration__configuration_a="A = 3\n",
    )
    sources = flat_sources([f"{package}.modeling.modeling_a"], package)
    assert list(sources) == ["configuration_a", "encoder", "late", "modeling_a"]
    (tmp_path / "flat").mkdir()
    for basename, text in sources.items():
        (tmp_path / "flat" / f"{basename}.py").write_text(text, encoding="utf-8")
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "zoo", None)  # any import of the package now fails
        assert importlib.import_module("flat.modeling_a").answer()[:3] == (3, 4, 42)


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("from . import helper", "names no module"),
        ("from .layers import encoder", "zoo.modeling.layers is no single module"),
        ("from ..registry import Paper", "imports zoo.registry"),
        ("from ..trainers.base import Trainer", "imports zoo.trainers.base"),
        ("from ...other.module import Name", "leaves zoo"),
        ("from .missing import Name", "zoo.modeling.missing is no single module"),
        ("from zoo.configuration.configuration_a import A", "imports zoo absolutely"),
        ("import zoo.configuration.configuration_a", "imports zoo absolutely"),
        ("from configuration.configuration_a import A", "imports zoo absolutely"),
        ("def f():\n    import os, modeling.modeling_a", "imports zoo absolutely"),
        ("from \\\n    .layers.encoder import B", "is broken over lines"),
        ('"""Explains that\nfrom .ghost import x\nis no import."""', "relative import of ghost"),
        (
            "from .configuration_a import A\nfrom ..configuration.configuration_a import A",
            "both become configuration_a",
        ),
    ],
)
def test_imports_that_cannot_be_made_flat_are_named(zoo, statement, complaint):
    package = zoo(modeling__modeling_a=statement + "\n", modeling__configuration_a="A = 1\n", modeling__helper="")
    with pytest.raises(ValueError, match="^Flat export: ") as caught:
        flat_sources([f"{package}.modeling.modeling_a"], package)
    assert complaint in str(caught.value)
    assert "zoo.modeling.modeling_a" in str(caught.value) or complaint.startswith(("zoo.modeling", "both become"))


@pytest.mark.parametrize("slug", bestiary.list_papers())
def test_every_paper_can_be_made_flat(slug):
    paper = bestiary.get_paper(slug)
    classes = (paper.config, *paper.models.values())
    sources = flat_sources({cls.__module__ for cls in classes})
    assert {cls.__module__.rpartition(".")[2] for cls in classes} | {"configuration_core", "pretrained"} <= set(
        sources
    )
    for basename, text in sources.items():
        compile(text, basename, "exec")


# ---------------------------------------------------------------------------------------------- what a save writes


@pytest.mark.parametrize("slug", bestiary.list_papers())
def test_auto_map_names_every_auto_class_of_the_paper(slug, tmp_path):
    paper = bestiary.get_paper(slug)
    config = paper.config()
    config.save_pretrained(tmp_path)
    write_flat_code(config, tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", *paper.models}
    for auto_name, reference in auto_map.items():
        module, name = reference.split(".")
        assert name == (paper.config if auto_name == "AutoConfig" else paper.models[auto_name]).__name__
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_saving_twice_gives_the_same_bytes_and_keeps_the_card(tmp_path):
    model = build(ElectraJointForPreTraining, electra_config("bestiary-bert"))
    model.save_pretrained(tmp_path / "a")
    first = contents(tmp_path / "a")
    assert "README.md" in first
    assert write_flat_code(model, tmp_path / "a") == [tmp_path / "a" / name for name in first if name.endswith(".py")]
    assert contents(tmp_path / "a") == first
    (tmp_path / "a" / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path / "a")
    assert contents(tmp_path / "a") == first | {"README.md": b"# Mine\n"}


def test_inner_bestiary_type_forgets_where_it_came_from(tmp_path):
    config = electra_config("bestiary-bert")
    config.discriminator_config.auto_map = {"AutoConfig": "user/x--configuration_bert.BertPretrainingConfig"}
    config.save_pretrained(tmp_path)
    assert "user/x" in (tmp_path / "config.json").read_text()
    write_flat_code(config, tmp_path)
    assert "user/x" not in (tmp_path / "config.json").read_text()


LOAD_AND_COMPARE = """
import json, pathlib, sys
import torch, transformers
from safetensors.torch import load_file

folder, second = map(pathlib.Path, sys.argv[1:])
expected = load_file(folder / "expected.safetensors")
for name, auto_names in json.loads((folder / "plan.json").read_text()).items():
    for auto_name in auto_names:
        auto_class = getattr(transformers, auto_name)
        model = auto_class.from_pretrained(folder / name, trust_remote_code=True)
        again = second / name / auto_name
        model.save_pretrained(again)
        for each in (model, auto_class.from_pretrained(again, trust_remote_code=True)):
            assert type(each).__module__.startswith("transformers_modules."), type(each)
            with torch.no_grad():
                logits = next(iter(each(expected["input_ids"]).to_tuple()))
            assert torch.equal(logits, expected[f"{name}.{auto_name}"]), (name, auto_name)
            if name == "wrapper_of_a_later_version":
                assert type(each.config.discriminator_config).IS_LATER
        assert not list((second / name).glob(".*")), "the save left its staging folder behind"
assert not [name for name in sys.modules if name.partition(".")[0] == "bestiary"]
"""


def test_process_without_bestiary_gives_equal_logits_and_saves_again(tmp_path):
    """Stock and bestiary encoders, two auto classes of a checkpoint, two versions of the code, models saved again."""
    models = {
        "bert": (build(BertPretrainingForPreTraining, BERT), ["AutoModelForPreTraining", "AutoModelForMaskedLM"]),
        "electra": (build(ElectraJointForPreTraining, electra_config("electra"), 1), ["AutoModelForPreTraining"]),
        "wrapper": (
            build(ElectraJointForPreTraining, electra_config("bestiary-bert"), 2),
            ["AutoModelForPreTraining", "AutoModelForMaskedLM"],
        ),
    }
    input_ids = torch.randint(5, 61, (3, 12), generator=torch.Generator().manual_seed(0))
    expected = {"input_ids": input_ids}
    for name, (model, auto_names) in models.items():
        model.save_pretrained(tmp_path / name)
        for auto_name in auto_names:
            loaded = getattr(transformers, auto_name).from_pretrained(tmp_path / name)
            assert type(loaded).__module__.startswith("bestiary.")
            with torch.no_grad():
                logits = next(iter(loaded(input_ids).to_tuple()))
            assert logits.std() > 0
            expected[f"{name}.{auto_name}"] = logits.contiguous()
    later = shutil.copytree(tmp_path / "wrapper", tmp_path / "wrapper_of_a_later_version")
    code = later / "configuration_bert.py"
    code.write_text(code.read_text().replace("    model_type = ", "    IS_LATER = True\n    model_type = "))
    expected[f"{later.name}.AutoModelForPreTraining"] = expected["wrapper.AutoModelForPreTraining"].clone()
    save_file(expected, tmp_path / "expected.safetensors")
    plan = {name: auto_names for name, (_, auto_names) in models.items()} | {later.name: ["AutoModelForPreTraining"]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    result = run_without_package(LOAD_AND_COMPARE, tmp_path, tmp_path / "again")
    assert result.returncode == 0, result.stderr
    saved_again = tmp_path / "again" / "bert" / "AutoModelForMaskedLM"
    assert (saved_again / "encoder.py").read_bytes() == (tmp_path / "bert" / "encoder.py").read_bytes()


def test_run_without_package_blocks_bestiary_only():
    result = run_without_package("import yaml; import bestiary.modeling")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("No module named 'bestiary'")


# ---------------------------------------------------------------------------------------------- bestiary export


@pytest.fixture
def plain_checkpoint(tmp_path, monkeypatch):
    """A trainer's checkpoint that was saved without code, in a folder of its own."""
    monkeypatch.setattr(BestiaryPreTrainedModel, "save_hook", None)
    folder = tmp_path / "runs" / "checkpoint-7"
    build(BertPretrainingForMaskedLM, BERT).save_pretrained(folder)
    monkeypatch.undo()
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "tokenizer.json").write_text("{}")
    write_model_card(folder, trainer_info={"data": "Trained on fables."})
    assert "auto_map" not in (folder / "config.json").read_text()
    return folder


def test_export_copies_or_adds_in_place(plain_checkpoint, tmp_path, monkeypatch):
    before = contents(plain_checkpoint)
    output = tmp_path / "new" / "exported"
    assert export_checkpoint(plain_checkpoint, output) == output
    assert contents(plain_checkpoint) == before
    exported = contents(output)
    assert "optimizer.pt" not in exported and "training_args.bin" not in exported
    assert not [path for path in output.iterdir() if path.is_symlink()]
    for name in ("model.safetensors", "tokenizer.json", "README.md"):
        assert exported[name] == before[name]

    # In place: the copy was proven by a real process above, so this one is not started again.
    monkeypatch.setattr(export, "run_without_package", lambda *_: export.subprocess.CompletedProcess([], 0))
    assert export_checkpoint(plain_checkpoint) == plain_checkpoint
    after = contents(plain_checkpoint)
    assert before.keys() <= after.keys()
    assert {name: after[name] for name in exported} == exported
    assert after["optimizer.pt"] == b"state"
    assert [path.name for path in plain_checkpoint.parent.iterdir()] == ["checkpoint-7"]


def test_export_that_does_not_load_changes_nothing(plain_checkpoint, tmp_path, monkeypatch):
    before = contents(plain_checkpoint)
    broken = {**flat_sources(["bestiary.modeling.modeling_bert"])}
    broken["heads"] += "\nimport package_that_nobody_has\n"
    monkeypatch.setattr(export, "flat_sources", lambda _: broken)
    with pytest.raises(ValueError, match="BertPretrainingForMaskedLM does not load") as caught:
        export_checkpoint(plain_checkpoint)
    assert "package_that_nobody_has" in str(caught.value)
    assert contents(plain_checkpoint) == before
    assert [path.name for path in plain_checkpoint.parent.iterdir()] == ["checkpoint-7"]


def test_export_refuses_weights_of_another_shape(plain_checkpoint):
    config = json.loads((plain_checkpoint / "config.json").read_text())
    (plain_checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    before = contents(plain_checkpoint)
    with pytest.raises(ValueError, match=r"missing_keys.*encoder\.layer\.2\.output"):
        export_checkpoint(plain_checkpoint)
    assert contents(plain_checkpoint) == before


class OutsideConfig(transformers.PreTrainedConfig):
    model_type = "elsewhere-outside"


class OutsideModel(BertPretrainingForMaskedLM):
    """A user's own class on top of ours."""


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "bert"}, r"stock checkpoint of transformers \(BertConfig\).*needs no export"),
        (
            {"model_type": "elsewhere-beast", "architectures": ["BeastForMaskedLM"]},
            "BeastForMaskedLM of the model_type 'elsewhere-beast', whose class lives outside bestiary",
        ),
        ({"model_type": "elsewhere-outside"}, f"lives outside bestiary, in the module '{__name__}'"),
        (
            {"architectures": ["OutsideModel"]},
            "OutsideModel, which lives outside bestiary.*BertPretrainingForMaskedLM",
        ),
    ],
)
def test_export_refuses_classes_from_outside(plain_checkpoint, changes, complaint, monkeypatch):
    monkeypatch.setattr(transformers.CONFIG_MAPPING, "_extra_content", {"elsewhere-outside": OutsideConfig})
    if changes.get("architectures") == ["OutsideModel"]:
        monkeypatch.undo()
    config = json.loads((plain_checkpoint / "config.json").read_text())
    (plain_checkpoint / "config.json").write_text(json.dumps(config | changes))
    before = contents(plain_checkpoint)
    with pytest.raises(ValueError, match=complaint):
        export_checkpoint(plain_checkpoint)
    assert contents(plain_checkpoint) == before


def test_export_refuses_a_folder_that_is_no_checkpoint_and_an_output_in_use(plain_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"runs has no config\.json"):
        export_checkpoint(plain_checkpoint.parent)
    with pytest.raises(ValueError, match="no empty folder; name another output"):
        export_checkpoint(plain_checkpoint, tmp_path)


def test_class_from_outside_is_refused_by_name_but_its_weights_are_saved(tmp_path, caplog):
    model = build(OutsideModel, BERT)
    with pytest.raises(ValueError, match=f"the class OutsideModel is defined in the module '{__name__}', outside"):
        write_flat_code(model, tmp_path)
    with pytest.raises(ValueError, match=f"the class OutsideConfig is defined in the module '{__name__}', outside"):
        write_flat_code(OutsideConfig(), tmp_path)
    model.save_pretrained(tmp_path / "saved")
    assert "OutsideModel is saved without its code" in caplog.text
    assert not list((tmp_path / "saved").glob("*.py"))
    loaded = OutsideModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.cls.predictions.bias, model.cls.predictions.bias)


@pytest.mark.parametrize("config", [BERT, electra_config("bestiary-bert")], ids=["its own", "a sub-configuration"])
def test_registered_class_from_outside_is_refused_by_name(config, tmp_path, monkeypatch):
    foreign = dataclasses.replace(bestiary.get_paper("bert"), models={"AutoModelForMaskedLM": OutsideModel})
    monkeypatch.setitem(registry._PAPERS, "bert", foreign)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the class OutsideModel is defined in the module '{__name__}', outside"):
        write_flat_code(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# ---------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("stage", ["weights", "code"])
def test_full_disk_leaves_the_previous_checkpoint_whole(stage, tmp_path, monkeypatch):
    def full(path) -> None:
        Path(path).write_bytes(b"half of the by")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    target = tmp_path / "checkpoint"
    build(BertPretrainingForMaskedLM, BERT).save_pretrained(target)
    before = contents(tmp_path)
    other = build(BertPretrainingForMaskedLM, BertPretrainingConfig(**TINY | {"num_hidden_layers": 1}), seed=1)
    if stage == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda _, path, **__: full(path))
    else:
        monkeypatch.setattr(export, "flat_sources", lambda _: full(next(tmp_path.glob(".*")) / "heads.py"))
    with pytest.raises(OSError, match="No space left on device"):
        other.save_pretrained(target)
    with pytest.raises(OSError, match="No space left on device"):
        other.save_pretrained(tmp_path / "new")
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    other.save_pretrained(target)
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 1


def test_leftovers_of_a_killed_save_are_not_published(tmp_path):
    leftover = tmp_path / ".checkpoint.partial"
    leftover.mkdir()
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (leftover / "README.md").write_text("half a ca")
    (leftover / "modeling_gone.py").write_text("raise")
    target = tmp_path / "checkpoint"
    build(BertPretrainingForMaskedLM, BERT).save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert not {"model-00001-of-00002.safetensors", "modeling_gone.py"} & set(contents(target))
    assert b"bestiary card" in contents(target)["README.md"]
