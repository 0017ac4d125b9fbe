"""What every method on any encoder must do, with stock encoders and with ours inside.

A paper adopts it in its test file, beside the tests of what is its own:

    class TestHype(WrapperSuite):
        slug = "hype"
        settings = {"noise_scale": 0.1}  # of its configuration, for an encoder of two layers
        neutral = True  # in eval mode `from_encoder(model)` computes what the model does
"""

import copy
import json
import pickle
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    BertTokenizer,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
    pipeline,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from bestiary import Paper, get_paper
from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_core import WrapperConfig
from bestiary.export import run_without_package
from bestiary.modeling.layers.wrapping import WrapperPreTrainedModel

from .encoder_suite import LENGTH, REAL, Inputs, at_real_tokens, gradients, poisoned_memory, settings


SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
ENCODERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=0),
    "electra": ElectraConfig(**SIZES, embedding_size=8),
    "xlm-roberta": XLMRobertaConfig(**SIZES, pad_token_id=0),
    "deberta-v2": DebertaV2Config(**SIZES, **DEBERTA),
    "distilbert": DistilBertConfig(
        vocab_size=99, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32
    ),
    "bestiary-bert": BertPretrainingConfig(**SIZES),
}
"""Tiny encoders of two layers with dropout, by `model_type`."""

NAMES = {0: "no", 1: "yes", 2: "maybe"}
NUMBERS = {"no": 0, "yes": 1, "maybe": 2}

LOAD_ALL = """
import json, pathlib, sys
import torch, transformers
from safetensors.torch import load_file

folder = pathlib.Path(sys.argv[1])
inputs = load_file(folder / "inputs.safetensors")
for name, auto, remote in json.loads((folder / "cases.json").read_text()):
    auto_class = getattr(transformers, auto)
    model, report = auto_class.from_pretrained(folder / name, trust_remote_code=remote, output_loading_info=True)
    assert not any(report.values()), (name, report)
    assert type(model).__module__.startswith("transformers_modules." if remote else "transformers.models."), name
    with torch.no_grad():
        found = model(**inputs)[0]
    expected = load_file(folder / name / "expected.safetensors")["first"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")
"""


class WrapperSuite:
    """Mixin. Tests that take `model_class` run for all classes of the paper, `head` for those with a loss, and
    `encoder` for all of `encoders`.

    Attributes:
        slug: the paper's entry in the registry.
        settings: fields of the paper's configuration for encoders of two layers.
        neutral: whether `from_encoder(model)` computes what `model` does, in evaluation mode.
        plain_result: whether `to_base()` computes what the model itself does in evaluation mode. False for a method
            that takes away something trained.
        encoders: tiny configurations by name. A method that cannot wrap one leaves it out, and says why.
        compiles: whether a training step is one graph; if not, say why.
        half_settings: changes to `settings` for weights in bfloat16.
        bad_settings: (settings, regular expression that the error must match).
    """

    slug: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {}
    neutral: ClassVar[bool]
    plain_result: ClassVar[bool] = True
    encoders: ClassVar[dict[str, PreTrainedConfig]] = ENCODERS
    compiles: ClassVar[bool] = True
    half_settings: ClassVar[dict[str, Any]] = {}
    bad_settings: ClassVar[tuple[tuple[dict[str, Any], str], ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if hasattr(super(), "pytest_generate_tests"):
            super().pytest_generate_tests(metafunc)
        models = self.paper().models
        choices: dict[str, Any] = {
            "model_class": tuple(models.values()),
            "head": self.heads(),
            "encoder": tuple(self.encoders),
            "bad, message": self.bad_settings,
        }
        for names, values in choices.items():
            if names.split(",")[0] in metafunc.fixturenames:
                metafunc.parametrize(names, values, ids=lambda value: getattr(value, "__name__", None))

    # ---------------------------------------------------------------------------------- what a subclass may override

    @classmethod
    def paper(cls) -> Paper:
        """The registry's entry."""
        return get_paper(cls.slug)

    @classmethod
    def heads(cls) -> tuple[type[WrapperPreTrainedModel], ...]:
        """The classes with a loss of their own."""
        return tuple(model for name, model in cls.paper().models.items() if name != "AutoModel")

    def make_config(self, encoder: str = "bert", **changes: Any) -> WrapperConfig:
        """The paper's configuration around a tiny encoder; skips a test of one that the paper leaves out."""
        if encoder not in self.encoders:
            pytest.skip(f"this method is not tested with {encoder}")
        given = {"encoder_config": self.encoders[encoder]} | self.settings | changes
        return self.paper().config(**copy.deepcopy(given))

    def labelled(self, head: type) -> Inputs:
        """A padded batch with labels."""
        inputs = self.inputs(head)
        draw = torch.Generator().manual_seed(2)
        name = self.auto_name(head).removeprefix("AutoModelFor")
        ids = inputs["input_ids"]
        if name == "TokenClassification":
            labels = torch.randint(0, 2, ids.shape, generator=draw)
            return inputs | {"labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}
        if name == "QuestionAnswering":
            return inputs | {
                "start_positions": torch.tensor([1, 0, 2, 1]),
                "end_positions": torch.tensor([3, 2, 2, 3]),
            }
        if name == "MaskedLM":
            return inputs | {"labels": ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.5, -100)}
        return inputs | {"labels": torch.randint(0, 2, ids.shape[:1], generator=draw)}

    # ------------------------------------------------------------------------------------------------------ building

    def auto_name(self, model_class: type) -> str:
        """The auto class under which a class is registered."""
        return next(name for name, known in self.paper().models.items() if known is model_class)

    @property
    def classifier(self) -> tuple[str, type[WrapperPreTrainedModel]]:
        """The sequence classifier or, if there is none, the first class; with its auto class."""
        models = self.paper().models
        name = "AutoModelForSequenceClassification"
        return (name, models[name]) if name in models else next(iter(models.items()))

    @staticmethod
    def moved(model: PreTrainedModel) -> PreTrainedModel:
        """`model` in evaluation mode with all of its parameters away from their initial values."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    def build(self, model_class: type, encoder: str = "bert", **changes: Any) -> Any:
        """A model of the paper in evaluation mode, away from its initial values."""
        torch.manual_seed(0)
        return self.moved(model_class(self.make_config(encoder, **changes)))

    def plain(self, model_class: type[WrapperPreTrainedModel], encoder: str = "bert") -> PreTrainedModel:
        """A plain model of the kind that a class wraps."""
        torch.manual_seed(1)
        return self.moved(model_class.wrapped_auto_class.from_config(copy.deepcopy(self.encoders[encoder])))

    def inputs(self, model_class: type) -> Inputs:
        """A batch of 4 sequences (2 examples of 2 choices), padded on the right."""
        draw = torch.Generator().manual_seed(1)
        real = torch.arange(LENGTH) < torch.tensor(REAL)[:, None]  # (B, T)
        ids = torch.randint(5, 99, real.shape, generator=draw).masked_fill(~real, 0)
        inputs = {"input_ids": ids, "attention_mask": real.long()}
        if self.auto_name(model_class) == "AutoModelForMultipleChoice":
            inputs = {name: value.unflatten(0, (2, -1)) for name, value in inputs.items()}
        return inputs

    def outputs(self, model: PreTrainedModel, model_class: type) -> Inputs:
        """What a model computes for a batch, at real tokens."""
        inputs = self.inputs(model_class)
        with torch.no_grad():
            return at_real_tokens(model(**inputs), inputs["attention_mask"])

    # ------------------------------------------------------------------------------------------------- configuration

    def test_config_round_trip(self, encoder, tmp_path):
        config = self.make_config(encoder, id2label=NAMES, problem_type="single_label_classification")
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is self.paper().config and type(loaded.encoder_config) is type(self.encoders[encoder])
        assert settings(loaded) == settings(config)
        for part in (config, loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            for each in (part, part.encoder_config):
                assert (each.id2label, each.label2id) == (NAMES, NUMBERS)
                assert each.problem_type == "single_label_classification"
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            assert getattr(loaded, name) == getattr(self.encoders[encoder], name), name

    def test_labels_are_the_same_on_both_sides(self, encoder, tmp_path):
        inside = {"model_type": encoder, **self.encoders[encoder].to_diff_dict()}
        self.make_config(encoder, num_labels=4).save_pretrained(tmp_path)
        changed = self.make_config(encoder)
        changed.num_labels = 3
        configs = {
            "outside": self.make_config(encoder, num_labels=3),
            "inside": self.make_config(encoder, encoder_config=inside | {"num_labels": 3}),
            "outside wins": self.make_config(encoder, encoder_config=inside | {"num_labels": 5}, num_labels=3),
            "names outside": self.make_config(encoder, id2label=NAMES),
            "names inside": self.make_config(encoder, encoder_config=inside | {"id2label": NAMES}),
            "set later": changed,
            "set while loading": AutoConfig.from_pretrained(tmp_path, num_labels=3),
            "from_encoder": self.paper().config.from_encoder(
                self.encoders[encoder], **copy.deepcopy(self.settings), num_labels=3
            ),
        }
        for way, config in configs.items():
            names = NAMES if "names" in way else {number: f"LABEL_{number}" for number in range(3)}
            for each in (config, config.encoder_config):
                assert each.num_labels == 3 and each.id2label == names, way
                assert each.label2id == {name: number for number, name in names.items()}, way

    def test_config_refuses_misspelt_and_misplaced_fields(self, encoder):
        kind, name = self.paper().config, self.paper().config.__name__
        inherited = {field.name for field in fields(PreTrainedConfig)}
        for field in fields(kind):
            if field.name not in inherited and len(field.name) > 6:
                misspelt = field.name[:3] + field.name[4:]
                with pytest.raises(ValueError, match=f"{name} has no field '{misspelt}'"):
                    kind(**{misspelt: None})
        theirs = type(self.encoders[encoder])
        field = "n_layers" if encoder == "distilbert" else "num_hidden_layers"
        with pytest.raises(ValueError, match=f"{name} has no field '{field}' of its own; give it in encoder_config"):
            self.make_config(encoder, **{field: 2})
        with pytest.raises(ValueError, match=f"{theirs.__name__} has no field 'vocab_sze'"):
            self.make_config(encoder, encoder_config={"model_type": encoder, "vocab_sze": 9})
        with pytest.raises(ValueError, match=f"'no_such_field', but {theirs.__name__} has no such field"):
            kind.from_encoder(self.encoders[encoder], encoder_config={"no_such_field": 1})

    def test_config_refuses_values_out_of_range(self, bad, message):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            self.make_config(**bad)

    # ------------------------------------------------------------------------------------------- loading and saving

    def test_classes_are_registered_and_named_alike(self):
        paper = self.paper()
        stem = paper.models["AutoModel"].__name__.removesuffix("Model")
        for name, model in paper.models.items():
            task = name.removeprefix("AutoModel")
            assert model.__name__ == (f"{stem}{task}" if task else f"{stem}Model")
            assert issubclass(model, WrapperPreTrainedModel) and model.config_class is paper.config

    def test_from_encoder(self, model_class, encoder, tmp_path):
        plain = self.plain(model_class, encoder)
        plain.save_pretrained(tmp_path)
        expected = self.outputs(plain, model_class)
        state = {name: value.clone() for name, value in plain.state_dict().items()}
        chosen = copy.deepcopy(self.settings)
        config = self.paper().config.from_encoder(self.encoders[encoder], **copy.deepcopy(chosen))
        for source, given in ((tmp_path, chosen), (tmp_path, {"config": config}), (plain, chosen)):
            torch.manual_seed(4)
            model = model_class.from_encoder(source, **given)
            assert type(model) is model_class and not model.training
            assert model.config.encoder_config is model.wrapped.config
            found = self.outputs(model, model_class)
            assert {name: value.shape for name, value in found.items()} == {
                name: value.shape for name, value in expected.items()
            }
            if self.neutral:
                assert_close(found, expected, rtol=1e-5, atol=1e-6)
                assert_close(model.to_base().state_dict(), state, rtol=0, atol=0)
        assert config.encoder_config is not model.config.encoder_config, "the given configuration was taken over"

    def test_a_plain_encoder_is_not_loaded_by_its_bare_names(self, model_class, tmp_path):
        """The names of a model without a head fit nothing, and all would be random."""
        encoder = self.build(model_class).wrapped.base_model
        encoder.save_pretrained(tmp_path)
        config = self.paper().config.from_encoder(encoder.config, **copy.deepcopy(self.settings))
        with pytest.raises(ValueError, match=rf"no weight of a \w+ under .*{model_class.__name__}.from_encoder"):
            model_class.from_pretrained(tmp_path, config=config)

    def test_save_and_load(self, model_class, encoder, tmp_path):
        """Through the auto class, into memory that holds NaN."""
        model = self.build(model_class, encoder)
        model.save_pretrained(tmp_path)
        auto_class = getattr(transformers, self.auto_name(model_class))
        with poisoned_memory():
            loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is model_class and not loaded.training
        assert not any(report.values()), report
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert_close(dict(loaded.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)
        assert_close(self.outputs(loaded, model_class), self.outputs(model, model_class), rtol=1e-5, atol=1e-7)
        trained = [
            [name for name, value in each.named_parameters() if value.requires_grad] for each in (model, loaded)
        ]
        assert trained[0] == trained[1], "loading changed what is trained"
        assert loaded.config.encoder_config is loaded.wrapped.config
        assert settings(loaded.config) == settings(model.config)

    @pytest.mark.parametrize("kind", ["weights", "others"])
    def test_missing_parameters_are_initialised_and_others_untouched(self, kind, tmp_path):
        model_class = self.classifier[1]
        model = self.build(model_class)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        state = load_file(file)
        missing = {name for name in state if name.endswith("weight") == (kind == "weights")}
        save_file({name: value for name, value in state.items() if name not in missing}, file, {"format": "pt"})
        with poisoned_memory():
            loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] == missing
        torch.manual_seed(5)
        fresh = dict(model_class(self.make_config()).named_parameters())
        before = dict(model.named_parameters())
        for name, value in loaded.named_parameters():
            if name not in missing:
                assert torch.equal(value, before[name]), f"{name} was loaded and then overwritten"
            elif fresh[name].unique().numel() == 1:
                assert torch.equal(value, fresh[name]), f"{name} is {value}, should be {fresh[name]}"
            else:
                ratio = (value.std(correction=0) / fresh[name].std(correction=0)).item()
                assert 0.4 < ratio < 2.5, f"{name} varies {ratio} times as much as after initialisation"

    @pytest.mark.parametrize("inside", ["bert", "bestiary-bert"])
    def test_classes_load_the_checkpoints_of_each_other(self, model_class, inside, tmp_path):
        model = self.build(model_class, inside)
        model.save_pretrained(tmp_path)
        state = model.state_dict()
        body = {name for name in self.build(self.paper().models["AutoModel"], inside).state_dict()}
        for other in self.paper().models.values():
            loaded, report = other.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
            lost = (report["missing_keys"] | report["unexpected_keys"]) & body
            assert all("pooler" in name for name in lost), f"{other.__name__} lost {sorted(lost)[:5]}"
            for name, value in loaded.state_dict().items():
                if name in body & state.keys() - report["missing_keys"]:
                    assert torch.equal(value, state[name]), f"{name} in {other.__name__}"

    # ------------------------------------------------------------------------------------------------- the plain model

    def test_to_base_is_a_plain_model(self, model_class, encoder, tmp_path):
        model = self.build(model_class, encoder)
        expected = self.outputs(model, model_class)
        base = model.to_base()
        stock = self.plain(model_class, encoder)
        assert type(base) is type(stock)
        base.save_pretrained(tmp_path)
        loaded, report = type(stock).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        if loaded.config.num_hidden_layers == stock.config.num_hidden_layers:
            assert loaded.state_dict().keys() == stock.state_dict().keys() == base.state_dict().keys()
            assert settings(loaded.config) == settings(stock.config)
        if self.plain_result:
            assert_close(self.outputs(loaded, model_class), expected, rtol=1e-5, atol=1e-6)
        if not encoder.startswith("bestiary"):
            assert not [*tmp_path.glob("*.py"), *tmp_path.glob("README.md")]
            assert "bestiary" not in (tmp_path / "config.json").read_text()
        assert_close(self.outputs(model, model_class), expected, rtol=0, atol=0)  # the wrapper works on

    def test_in_a_process_without_bestiary(self, tmp_path):
        """The plain model loads by the stock class, the pair by its exported code, with encoders stock and ours."""
        auto, model_class = self.classifier
        cases = []
        for encoder in ("bert", "bestiary-bert"):
            model = self.build(model_class, encoder)
            stock = not encoder.startswith("bestiary")
            for name, part in (("pair", model), ("plain", model.to_base())):
                folder = tmp_path / f"{name}-{encoder}"
                part.save_pretrained(folder)
                first = part.eval()(**self.inputs(model_class))[0].detach()
                save_file({"first": first.contiguous()}, folder / "expected.safetensors")
                cases.append((folder.name, auto, not (stock and name == "plain")))
        save_file(self.inputs(model_class), tmp_path / "inputs.safetensors")
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        result = run_without_package(LOAD_ALL, tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]

    # ------------------------------------------------------------------------------------------------ changes in place

    def test_resizing_keeps_the_configurations_in_step(self, encoder, tmp_path):
        auto, model_class = self.classifier
        model = self.build(model_class, encoder)
        model.resize_token_embeddings(104, mean_resizing=False)
        assert model.config.vocab_size == model.wrapped.config.vocab_size == 104
        assert model.get_input_embeddings().weight.shape[0] == 104
        model.save_pretrained(tmp_path)
        loaded, report = getattr(transformers, auto).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()) and loaded.config.vocab_size == 104
        assert model.to_base().get_input_embeddings().weight.shape[0] == 104
        assert model.to_base().config.vocab_size == 104

    def test_attention_backends_reach_the_encoder(self, encoder, tmp_path):
        model_class = self.paper().models["AutoModel"]
        model = self.build(model_class, encoder)
        model.save_pretrained(tmp_path)
        expected = self.outputs(model, model_class)
        loaded = model_class.from_pretrained(tmp_path, attn_implementation="eager")
        wrapped = model_class.from_encoder(self.plain(model_class, encoder), **copy.deepcopy(self.settings))
        wrapped.set_attn_implementation("eager")
        model.set_attn_implementation("eager")
        for each in (model, loaded, wrapped):
            parts = [part for part in each.modules() if isinstance(part, PreTrainedModel)]
            assert len(parts) > 1 and {part.config._attn_implementation for part in parts} == {"eager"}
        assert_close(self.outputs(model, model_class), expected, rtol=1e-4, atol=1e-5)
        model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == model.wrapped.config._attn_implementation
        assert_close(self.outputs(model, model_class), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="nonsense"):
            model.set_attn_implementation("nonsense")

    def test_copies_are_independent(self, encoder):
        model_class = self.classifier[1]
        model = self.build(model_class, encoder)
        expected = self.outputs(model, model_class)
        for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert duplicate.config.encoder_config is duplicate.wrapped.config is not model.wrapped.config
            assert_close(self.outputs(duplicate, model_class), expected, rtol=1e-5, atol=1e-7)
            with torch.no_grad():
                for value in duplicate.parameters():
                    value.zero_()
            duplicate.train()(**self.inputs(model_class))
            assert_close(self.outputs(model, model_class), expected, rtol=0, atol=0)
        shared = self.make_config(encoder)
        first, second = model_class(shared), model_class(shared)
        first.resize_token_embeddings(101, mean_resizing=False)
        assert first.config.vocab_size == first.wrapped.config.vocab_size == 101
        del second

    # ---------------------------------------------------------------------------------------------------- number types

    @staticmethod
    def types_of(model: PreTrainedModel) -> set[torch.dtype]:
        """Types of the parameters, but of those that the class keeps in float32."""
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        return {value.dtype for name, value in model.named_parameters() if not kept & set(name.split("."))}

    def test_number_types(self, tmp_path):
        auto, model_class = self.classifier
        half, chosen = torch.bfloat16, copy.deepcopy(self.settings)
        self.build(model_class).save_pretrained(tmp_path / "pair")
        self.plain(model_class).save_pretrained(tmp_path / "plain")
        plain = self.plain(model_class).to(half)
        plain.save_pretrained(tmp_path / "half")
        models = {
            "loaded": getattr(transformers, auto).from_pretrained(tmp_path / "pair", dtype=half),
            "asked for": model_class.from_encoder(tmp_path / "plain", dtype=half, **chosen),
            "as saved": model_class.from_encoder(tmp_path / "half", **chosen),
        }
        for way, model in models.items():
            assert self.types_of(model) == {half}, way
            assert model.config.dtype == model.wrapped.config.dtype == half, way
            model(**self.inputs(model_class))
        model = model_class.from_encoder(plain, **chosen)
        assert self.types_of(model) == {half}
        model(**self.inputs(model_class))
        assert self.types_of(model_class.from_encoder(tmp_path / "half", dtype=torch.float32, **chosen)) == {
            torch.float32
        }

    @pytest.mark.parametrize("autocast", [True, False])
    def test_bfloat16(self, head, autocast):
        changes = {} if autocast else self.half_settings
        for encoder in ("bert", "deberta-v2") if head is self.classifier[1] else ("bert",):
            model = self.build(head, encoder, **changes).train()
            model = model if autocast else model.bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**self.labelled(head)).loss
            assert loss.isfinite()
            loss.backward()
            for name, value in model.named_parameters():
                assert value.grad is None or value.grad.isfinite().all(), name

    # -------------------------------------------------------------------------------------------------------- training

    def test_activation_checkpointing_keeps_the_gradients(self, head):
        for encoder in self.encoders if head is self.classifier[1] else ("bert",):
            results, calls = [], [0, 0]
            for enabled in (False, True):
                model = self.build(head, encoder).train()
                if enabled:
                    model.activation_checkpointing_enable()
                for layer in model.modules():
                    if isinstance(layer, GradientCheckpointingLayer):
                        part = next(layer.children())  # the checkpoint is inside the layer's own hooks
                        part.register_forward_pre_hook(
                            lambda *_, run=enabled, calls=calls: calls.__setitem__(run, calls[run] + 1)
                        )
                torch.manual_seed(7)  # of dropout
                results.append(gradients(model, **self.labelled(head)))
            assert calls[1] > calls[0] > 0, f"{encoder}: nothing was computed twice"
            assert results[0] and results[0].keys() == results[1].keys()
            assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)

    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
    @pytest.mark.parametrize("inside", ["bert", "distilbert"])
    def test_shards_layer_by_layer(self, inside, one_process_group):
        """FSDP2 wraps the classes that the model names."""
        if not self.heads():
            pytest.skip("this paper has no class with a loss from labels")
        head = self.heads()[0]
        model = self.build(head, inside)
        inputs = self.labelled(head)
        expected = gradients(model, **inputs)
        parts = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
        assert len(parts) >= model.wrapped.config.num_hidden_layers
        for part in (*parts, model):
            fully_shard(part, mesh=one_process_group)
        found = {name: value.full_tensor() for name, value in gradients(model, **inputs).items()}
        assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.fixture
    def one_process_group(self) -> Iterator[DeviceMesh]:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("inside", ["bert", pytest.param("bestiary-bert", marks=pytest.mark.slow)])
    def test_compiles_into_one_graph(self, inside):
        if not self.compiles or not self.heads():
            pytest.skip("a training step of this method is no single graph, or needs more than labels")
        head = self.heads()[0]
        model = self.build(head, inside)
        inputs = self.labelled(head)
        expected = gradients(model, **inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = gradients(compiled, **inputs)
        assert compiled.train()(**inputs).loss.isfinite()  # with dropout, and with what the method does in training
        torch._dynamo.reset()
        assert_close(found, {f"_orig_mod.{name}": value for name, value in expected.items()}, rtol=1e-4, atol=1e-5)

    def test_labels_out_of_range(self, head):
        inputs = self.labelled(head)
        if self.auto_name(head) not in ("AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
            return
        model = self.build(head)
        for wrong in (2, -1):
            labels = inputs["labels"].clone()
            labels.view(-1)[0] = wrong
            with pytest.raises(ValueError, match=rf"{head.__name__}.*labels must be in \[0, 2\).*{wrong}"):
                model(**inputs | {"labels": labels})

    # ------------------------------------------------------------------------------------------------ uses and misuses

    def test_pipeline(self, encoder, tmp_path):
        auto, model_class = self.classifier
        if auto != "AutoModelForSequenceClassification":
            pytest.skip("this paper has no classifier")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
        BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path)
        self.build(model_class, encoder, id2label=NAMES).save_pretrained(tmp_path)
        classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
        assert type(classify.model) is model_class
        (scores,) = classify(["good bad"])
        assert {score["label"] for score in scores} == set(NUMBERS)

    def test_wrong_kinds_are_refused(self, tmp_path):
        auto, model_class = self.classifier
        chosen, name = copy.deepcopy(self.settings), model_class.__name__
        pair = self.build(model_class)
        pair.save_pretrained(tmp_path / "pair")
        BartConfig(d_model=16, encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path / "bart")
        plain = self.plain(model_class)
        config = self.make_config()
        for source, given, message in (
            (tmp_path / "pair", chosen, f"{type(config).__name__}.from_encoder wraps a plain encoder, but got a"),
            (pair, chosen, f"{name}.from_encoder wraps a plain model, but got a {name}; unwrap it first"),
            (tmp_path / "bart", chosen, f"{type(config).__name__} wraps an encoder, but BartConfig is of an encoder-"),
            (plain, {"config": config, "no_field": 1}, f"{name}.from_encoder: give either config or single settings"),
            (plain, chosen | {"num_labels": 3}, f"{name}.from_encoder: num_labels cannot be given for a"),
        ):
            with pytest.raises(ValueError, match=message):
                model_class.from_encoder(source, **given)
        if auto != "AutoModel":
            with pytest.raises(ValueError, match=f"{name} wraps models of {auto}, but got a BertModel"):
                model_class.from_encoder(plain.base_model, **chosen)


__all__ = ["ENCODERS", "WrapperSuite"]
