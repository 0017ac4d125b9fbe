"""The table of papers: every piece of every paper is there, and registering is strict."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModel, BertConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from bestiary import Paper, get_paper, list_papers, register, registry
from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_core import WrapperConfig
from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.modeling.modeling_bert import BertPretrainingModel
from bestiary.trainers.arguments import BestiaryTrainingArguments
from bestiary.trainers.base import BestiaryTrainer


ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("slug", list_papers())
def test_every_piece_of_a_paper_is_there(slug):
    wanted = [
        f"configuration/configuration_{slug}.py",
        f"modeling/modeling_{slug}.py",
        f"trainers/trainer_{slug}.py",
        f"tests/test_{slug}.py",
        f"model_cards/{slug}.md",
        f"examples/recipes/{slug}_tiny.yaml",
    ]
    if get_paper(slug).converter:
        wanted += [f"bestiary/conversion/{slug}.py", f"tests/fixtures/{slug}/config.json"]
    missing = [name for name in wanted if not (ROOT / name).is_file()]
    assert not missing
    tiny = ROOT / f"examples/recipes/{slug}_tiny.yaml"
    assert [path for path in tiny.parent.glob(f"{slug}_*.yaml") if path != tiny], (
        "no recipe with the published setting"
    )
    test = (ROOT / f"tests/test_{slug}.py").read_text(encoding="utf-8")
    suite = "WrapperSuite" if issubclass(get_paper(slug).config, WrapperConfig) else "EncoderSuite"
    assert suite in test and f'slug = "{slug}"' in test


@pytest.mark.parametrize(
    ("pattern", "shared"),
    [
        ("configuration/configuration_*.py", {"configuration_core"}),
        ("modeling/modeling_*.py", set()),
        ("trainers/trainer_*.py", set()),
        ("model_cards/*.md", set()),
        ("bestiary/conversion/*.py", {"__init__"}),
        ("tests/fixtures/*", set()),
    ],
)
def test_every_piece_belongs_to_a_paper(pattern, shared):
    prefix = pattern.rsplit("/", 1)[1].split("*")[0]
    names = {path.stem for path in ROOT.glob(pattern) if path.stem != "__pycache__"} - shared
    assert {name.removeprefix(prefix) for name in names} <= set(list_papers())


@pytest.mark.parametrize("slug", list_papers())
def test_what_the_entry_names_can_be_loaded(slug):
    paper = get_paper(slug)
    trainer, arguments, collator = map(registry.load_object, (paper.trainer, paper.arguments, paper.collator))
    assert issubclass(trainer, BestiaryTrainer) and trainer.__module__ == f"bestiary.trainers.trainer_{slug}"
    assert issubclass(arguments, BestiaryTrainingArguments) and arguments.__name__.endswith("TrainingArguments")
    assert callable(collator)
    if paper.converter:
        assert registry.load_object(paper.converter).__name__ == f"bestiary.conversion.{slug}"
    assert paper.config.__module__ == f"bestiary.configuration.configuration_{slug}"
    assert paper.config.model_type == "bestiary-" + slug.replace("_", "-")
    assert "AutoModel" in paper.models
    for model in paper.models.values():
        assert model.__module__ == f"bestiary.modeling.modeling_{slug}"
    assert paper.arxiv and paper.summary and paper.official_licence


def test_basenames_are_unique():
    """Exported code lies in one folder, where of two equal names one would overwrite the other."""
    names = [path.name for folder in ("configuration", "modeling") for path in (ROOT / folder).rglob("*.py")]
    names = [name for name in names if name != "__init__.py"]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------------------------------------------------- look-up


def test_list_and_get():
    assert list_papers() == sorted(list_papers()) and {"bert", "electra"} <= set(list_papers())
    assert list_papers("ELEC*") == ["electra"]
    assert list_papers("*replaced token*") == ["electra"]  # a tag
    assert list_papers("*of Deep Bidirectional*") == ["bert"]  # the title
    assert list_papers("nothing*") == []
    with pytest.raises(ValueError, match="No paper 'brt' is registered; there are .*bert"):
        get_paper("brt")


def test_paper_of_configurations_and_models():
    config = BertPretrainingConfig(num_hidden_layers=0, vocab_size=9)
    for thing in (config, BertPretrainingConfig, BertPretrainingModel(config)):
        assert registry.paper_of(thing).slug == "bert"
    assert registry.paper_of(BertConfig()) is None


def test_citation():
    entry = get_paper("electra").citation
    assert entry.startswith("@article{electra2020,\n") and entry.endswith("\n}")
    assert "author = {Kevin Clark and Minh-Thang Luong and Quoc V. Le and Christopher D. Manning}" in entry
    assert "eprint = {2003.10555}" in entry
    assert get_paper("electra").url == "https://arxiv.org/abs/2003.10555"


# --------------------------------------------------------------------------------------------------------- registering


class ProbeConfig(PreTrainedConfig):
    model_type = "tests-probe"


class BareConfig(PreTrainedConfig):
    model_type = "probe"


class ThievishConfig(PreTrainedConfig):
    model_type = "bestiary-bert"


class StockConfig(PreTrainedConfig):
    model_type = "tests-probe"


StockConfig.__name__ = "ElectraConfig"


class NamesakeConfig(PreTrainedConfig):
    model_type = "tests-probe"


NamesakeConfig.__name__ = ElectraJointConfig.__name__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slug": "bert"}, "slug 'bert' is taken by 'BERT: Pre-training"),
        ({"config": BareConfig}, "BareConfig.model_type is 'probe'.*followed by '-probe'"),
        ({"slug": "other"}, "ProbeConfig.model_type is 'tests-probe'.*followed by '-other'"),
        ({"slug": "rt", "config": ThievishConfig}, "followed by '-rt'"),
        ({"config": NamesakeConfig}, "ElectraJointConfig .* clashes with .* of 'electra'"),
        ({"config": StockConfig}, "transformers has a ElectraConfig already"),
        (
            {"models": {"AutoModelForTelepathy": BertPretrainingModel}},
            "'AutoModelForTelepathy', which is no auto class",
        ),
        ({"models": {"AutoConfig": BertPretrainingModel}}, "'AutoConfig', which is no auto class"),
        ({"models": {"AutoModel": BertPretrainingModel}}, "BertPretrainingModel is built from BertPretrainingConfig"),
    ],
)
def test_refused_papers_leave_no_trace(changes, message):
    paper = {"slug": "probe", "title": "A probe", "authors": "Nobody", "year": 2020, "summary": "None."}
    before = list_papers(), list(CONFIG_MAPPING.keys()), len(AutoModel._model_mapping)
    with pytest.raises(ValueError, match=message):
        register(Paper(**paper | {"config": ProbeConfig, "models": {}} | changes))
    assert (list_papers(), list(CONFIG_MAPPING.keys()), len(AutoModel._model_mapping)) == before


def test_no_configuration_shares_its_name_with_transformers():
    stock = set(CONFIG_MAPPING_NAMES.values())
    assert not stock & {get_paper(slug).config.__name__ for slug in list_papers()}


def test_an_extension_is_no_paper_but_belongs_to_one():
    paper = get_paper("sparse_seq2seq")
    entry = registry.paper_of(SimpleNamespace(model_type=f"{paper.config.model_type}-transformer"))
    assert entry is not paper and entry.slug == paper.slug and entry.config in AutoModel._model_mapping
    probe = {"title": "A probe", "authors": "Nobody", "year": 2020, "summary": "None.", "models": {}}
    with pytest.raises(
        ValueError, match="ProbeConfig.model_type is 'tests-probe'; it must be 'bestiary-bert', a hyphen"
    ):
        registry.register_extension(Paper(slug="bert", config=ProbeConfig, **probe))
    with pytest.raises(ValueError, match="No paper 'brt' is registered"):
        registry.register_extension(Paper(slug="brt", config=ProbeConfig, **probe))
    with pytest.raises(ValueError, match="that no other extension has"):
        registry.register_extension(entry)


THIRD_PARTY = """
import bestiary, torch
from bestiary.configuration.configuration_core import EncoderConfig
from bestiary.modeling.layers.encoder import EncoderModel, EncoderPreTrainedModel, PreNormEncoder, PreNormEncoderLayer
from bestiary.modeling.layers.heads import MaskedLMHead
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForMaskedLM


@strict
class ZooConfig(EncoderConfig):
    model_type = "acme-zoo-net"


class ZooPreTrainedModel(EncoderPreTrainedModel):
    config: ZooConfig

    def build_encoder(self, add_pooling_layer):
        return ZooModel(self.config, add_pooling_layer)


class ZooModel(EncoderModel, ZooPreTrainedModel):
    layer_class = PreNormEncoderLayer
    encoder_class = PreNormEncoder


class ZooForMaskedLM(MaskedLMHead, ZooPreTrainedModel):
    pass


paper = bestiary.Paper(
    slug="zoo_net", title="Zoo", authors="A. Cme", year=2021, summary="A test.", config=ZooConfig,
    models={"AutoModel": ZooModel, "AutoModelForMaskedLM": ZooForMaskedLM},
)
assert bestiary.register(paper) is paper and bestiary.get_paper("zoo_net") is paper
assert "zoo_net" in bestiary.list_papers()
try:
    bestiary.register(paper)
except ValueError as error:
    assert "taken" in str(error)
else:
    raise SystemExit("registered twice")
config = AutoConfig.for_model("acme-zoo-net", vocab_size=20, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
model = AutoModelForMaskedLM.from_config(config).eval()
model.save_pretrained("saved")
loaded = AutoModelForMaskedLM.from_pretrained("saved")
ids = torch.arange(6)[None]
assert type(loaded) is ZooForMaskedLM and torch.equal(loaded(ids).logits, model(ids).logits)
"""


def test_a_third_party_registers_a_paper(tmp_path):
    (tmp_path / "zoo_net.py").write_text(THIRD_PARTY, encoding="utf-8")
    run = subprocess.run([sys.executable, "-c", "import zoo_net"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
