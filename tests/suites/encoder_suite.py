"""What every model of the zoo must do. A paper tests it by one subclass: slug, tiny configuration, classes."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
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
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from bestiary import get_paper
from bestiary.modeling.layers import encoder as core


LENGTH = 12  # of the longest sequence in a batch
REAL = (12, 5, 9, 4)  # real tokens of each sequence of a padded batch
Inputs = dict[str, torch.Tensor]
Counts = int | dict[str, int]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote to is NaN (integers: the largest one), so that reading it shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def at_real_tokens(outputs: Any, mask: torch.Tensor | None = None) -> Inputs:
    """The tensors of a model's output; those with an entry per token without the entries of padding."""
    found = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    if mask is None:
        return found
    return {
        name: value[mask.bool()] if value.shape[: mask.dim()] == mask.shape else value for name, value in found.items()
    }


def settings(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration holds, without what saving adds."""
    added = {"_name_or_path", "auto_map", "architectures", "dtype", "transformers_version"}

    def without(part: dict[str, Any]) -> dict[str, Any]:
        return {
            name: without(value) if isinstance(value, dict) else value
            for name, value in part.items()
            if name not in added
        }

    return without(config.to_dict())


def gradients(model: PreTrainedModel, **inputs: Any) -> Inputs:
    """Gradient of the loss for every parameter that has one."""
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


class EncoderSuite:
    """Mixin. Tests that take `model_class` run for all classes of the paper, `head` for those with a loss.

    Attributes:
        slug: the paper's entry in the registry.
        config: a tiny configuration: at least 2 layers, at least `LENGTH` positions, dropout on.
        base: the class without a head.
        heads: the classes with a loss; the first one is the paper's own objective.
        parameters: size -> class -> published number of parameters. Sizes are those of `config.from_size`.
        reduces_to_bert: changes to `config` that switch the paper's idea off, so that the encoder is BERT's; None (say
            why) if nothing does.
        bad_config: (keywords, regular expression that the error must match).
        sequence_limit: whether sequences longer than `config.max_position_embeddings` are refused.
        backends: attention implementations to compare with eager.
        can_unpad: whether `unpad_threshold` works for this encoder.
    """

    TOKEN_HEADS: ClassVar[tuple[str, ...]] = ("AutoModelForMaskedLM", "AutoModelForTokenClassification")

    slug: ClassVar[str]
    config: ClassVar[PreTrainedConfig]
    base: ClassVar[type[PreTrainedModel]]
    heads: ClassVar[tuple[type[PreTrainedModel], ...]]
    parameters: ClassVar[dict[str, dict[type[PreTrainedModel], int]]] = {}
    reduces_to_bert: ClassVar[dict[str, Any] | None] = None
    bad_config: ClassVar[tuple[tuple[dict[str, Any], str], ...]] = ()
    sequence_limit: ClassVar[bool] = True
    backends: ClassVar[tuple[str, ...]] = ("sdpa",)
    can_unpad: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if hasattr(super(), "pytest_generate_tests"):
            super().pytest_generate_tests(metafunc)
        choices: dict[str, Any] = {
            "model_class": (self.base, *self.heads),
            "head": self.heads,
            "token_head": [head for head in self.heads if self.auto_name(head) in self.TOKEN_HEADS],
            "packed_class": (self.base, *self.heads) if self.can_unpad else (),
            "masked_lm": [head for head in self.heads if self.auto_name(head) == "AutoModelForMaskedLM"],
            "published_size": tuple(self.parameters),
            "keywords, message": self.bad_config,
        }
        for names, values in choices.items():
            if names.split(",")[0] in metafunc.fixturenames:
                metafunc.parametrize(names, values, ids=lambda value: getattr(value, "__name__", None))

    # ---------------------------------------------------------------------------------- what a subclass may override

    def make_config(self, **changes: Any) -> PreTrainedConfig:
        """The tiny configuration with some fields changed."""
        return type(self.config).from_dict(self.config.to_dict() | changes)

    def with_encoder(self, **changes: Any) -> PreTrainedConfig:
        """The same for fields of the encoder, for configurations that hold one."""
        return self.make_config(**changes)

    def pretraining_targets(self, labels: torch.Tensor, real: torch.Tensor) -> tuple[Inputs, Counts]:
        """What the pre-training class takes beside `labels` (B, T; -100 = no loss), and the counts of its losses."""
        return {}, int((labels != -100).sum())

    def zero_gradients(self, head: type) -> tuple[str, ...]:
        """Ends of the names of parameters with a gradient of 0: what softmax finds in all scores alike."""
        choices = self.auto_name(head) == "AutoModelForMultipleChoice"
        return ("key.bias", "classifier.bias") if choices else ("key.bias",)

    def recorded_encoder(self, model_class: type) -> PreTrainedConfig:
        """The configuration of the encoder whose hidden states a class records."""
        return self.config

    # ------------------------------------------------------------------------------------------------------ building

    def build(self, model_class: type, config: PreTrainedConfig | None = None, seed: int = 0) -> PreTrainedModel:
        """A model in evaluation mode, all of whose parameters are away from their initial values."""
        torch.manual_seed(seed)
        model = model_class(copy.deepcopy(config or self.config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    def auto_name(self, model_class: type) -> str:
        """The auto class under which a class is registered."""
        return next(name for name, known in get_paper(self.slug).models.items() if known is model_class)

    def inputs(self, model_class: type, padding: str | None = None) -> Inputs:
        """A batch of 4 sequences (2 examples of 2 choices); without padding there is no mask."""
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(5, self.config.vocab_size, (len(REAL), LENGTH), generator=draw)
        places = torch.arange(LENGTH)
        inputs = {"input_ids": ids, "token_type_ids": (places >= 4).long().expand_as(ids).clone()}
        if padding is not None:
            real = places < torch.tensor(REAL)[:, None]  # (B, T)
            real = real.flip(1) if padding == "left" else real
            inputs["input_ids"] = ids.masked_fill(~real, self.config.pad_token_id)
            inputs["attention_mask"] = real.long()
        if self.auto_name(model_class) == "AutoModelForMultipleChoice":
            inputs = {name: value.unflatten(0, (2, -1)) for name, value in inputs.items()}
        return inputs

    def labelled(self, head: type, padding: str | None = None) -> tuple[Inputs, Counts]:
        """A batch with what the head's loss needs, and the number of items that the loss is a mean over."""
        inputs = self.inputs(head, padding)
        ids = inputs["input_ids"]
        batch = ids.shape[0]
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        draw = torch.Generator().manual_seed(2)
        name = self.auto_name(head).removeprefix("AutoModelFor")
        if name in ("MaskedLM", "PreTraining"):
            chosen = real & (torch.rand(ids.shape, generator=draw) < 0.4)
            original = torch.randint(5, self.config.vocab_size, ids.shape, generator=draw)
            labels = torch.where(chosen, original, -100)
            others, counts = ({}, int(chosen.sum())) if name == "MaskedLM" else self.pretraining_targets(labels, real)
            return inputs | {"labels": labels} | others, counts
        if name == "TokenClassification":
            classes = torch.randint(0, self.config.num_labels, ids.shape, generator=draw)
            return inputs | {"labels": torch.where(real, classes, -100)}, int(real.sum())
        if name == "QuestionAnswering":
            ends = real.long().argmax(1), LENGTH - 1 - real.long().flip(1).argmax(1)
            return inputs | {"start_positions": ends[0], "end_positions": ends[1]}, 2 * batch
        classes = 2 if name in ("NextSentencePrediction", "MultipleChoice") else self.config.num_labels
        return inputs | {"labels": torch.randint(0, classes, (batch,), generator=draw)}, batch

    # ------------------------------------------------------------------------------------------------- configuration

    def test_config_round_trip(self, tmp_path):
        self.config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is type(self.config) and loaded.model_type == get_paper(self.slug).config.model_type
        assert settings(loaded) == settings(self.config)

    def test_config_has_the_canonical_names(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "pad_token_id",
        ):
            assert isinstance(getattr(self.config, name), int), name
        assert "tie_word_embeddings" in self.config.to_dict()

    def test_config_refuses_a_misspelt_field(self):
        inherited = {field.name for field in fields(PreTrainedConfig)}
        for field in fields(self.config):
            if field.name not in inherited and len(field.name) > 6:
                misspelt = field.name[:3] + field.name[4:]
                with pytest.raises(ValueError, match=f"{type(self.config).__name__} has no field '{misspelt}'"):
                    type(self.config)(**{misspelt: getattr(self.config, field.name)})

    def test_config_refuses_values_out_of_range(self, keywords, message):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            self.make_config(**keywords)

    def test_number_of_parameters(self, published_size):
        config = type(self.config).from_size(published_size)
        for model_class, published in self.parameters[published_size].items():
            with torch.device("meta"):
                model = model_class(config)
            assert sum(parameter.numel() for parameter in model.parameters()) == published, model_class.__name__

    # ------------------------------------------------------------------------------------------- loading, saving, ties

    def test_heads_are_the_registered_ones(self):
        assert set(get_paper(self.slug).models.values()) == {self.base, *self.heads}

    def test_save_and_load(self, model_class, tmp_path):
        """Through the auto class, into memory that holds NaN: also buffers that no file stores must be there."""
        model = self.build(model_class)
        model.save_pretrained(tmp_path)
        auto_class = getattr(transformers, self.auto_name(model_class))
        with poisoned_memory():
            loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is model_class and not loaded.training
        assert not any(report.values()), report
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert_close(dict(loaded.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)
        inputs = self.inputs(model_class)
        del inputs["token_type_ids"]
        with torch.no_grad():
            assert_close(at_real_tokens(loaded(**inputs)), at_real_tokens(model(**inputs)), rtol=0, atol=0)
        assert settings(loaded.config) == settings(model.config)

    @pytest.mark.parametrize("kind", ["weights", "others"])
    def test_missing_parameters_are_initialised_and_others_untouched(self, model_class, kind, tmp_path):
        model = self.build(model_class)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        state = load_file(file)
        missing = {name for name in state if name.endswith("weight") == (kind == "weights")}
        save_file({name: value for name, value in state.items() if name not in missing}, file, {"format": "pt"})
        with poisoned_memory():
            loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        ties = model.all_tied_weights_keys
        assert {ties.get(name, name) for name in report["missing_keys"]} == missing
        torch.manual_seed(5)
        fresh = dict(model_class(copy.deepcopy(self.config)).named_parameters())
        before = dict(model.named_parameters())
        for name, value in loaded.named_parameters():
            if name not in missing:
                assert torch.equal(value, before[name]), f"{name} was loaded and then overwritten"
            elif fresh[name].unique().numel() == 1:
                assert torch.equal(value, fresh[name]), f"{name} is {value}, should be {fresh[name]}"
            else:
                ratio = (value.std(correction=0) / fresh[name].std(correction=0)).item()
                assert 0.5 < ratio < 2, f"{name} varies {ratio} times as much as after initialisation"

    def test_checkpoints_load_into_the_encoder_and_into_heads(self, head, tmp_path):
        model = self.build(head)
        model.save_pretrained(tmp_path / "head")
        encoder, report = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
        assert type(encoder) is self.base
        kept = {f"{head.base_model_prefix}.{name}" for name in model.base_model.state_dict()}
        kept |= set(model.base_model.state_dict())  # a paper's own encoder has no prefix
        assert not kept & (report["missing_keys"] | report["unexpected_keys"])
        own, other = model.base_model.state_dict(), encoder.base_model.state_dict()
        assert_close({name: other[name] for name in own}, own, rtol=0, atol=0)

        encoder.save_pretrained(tmp_path / "encoder")
        loaded, report = head.from_pretrained(tmp_path / "encoder", output_loading_info=True)
        assert not kept & report["missing_keys"]
        assert all("pooler" in name for name in report["unexpected_keys"])
        other = loaded.base_model.state_dict()
        assert_close({name: other[name] for name in own}, own, rtol=0, atol=0)

    def check_ties(self, model: PreTrainedModel) -> None:
        """Every tie that the model declares holds."""
        for target, source in model.all_tied_weights_keys.items():
            assert model.get_parameter(target) is model.get_parameter(source), f"{target} is not tied to {source}"

    def test_ties_hold_after_loading_and_resizing(self, model_class, tmp_path):
        model = self.build(model_class)
        self.check_ties(model)
        model.save_pretrained(tmp_path / "first")
        model = model_class.from_pretrained(tmp_path / "first")
        self.check_ties(model)
        larger = self.config.vocab_size + 5
        model.resize_token_embeddings(larger, mean_resizing=False)
        assert model.config.vocab_size == larger == model.get_input_embeddings().weight.shape[0]
        self.check_ties(model)
        model.save_pretrained(tmp_path / "second")
        loaded, report = model_class.from_pretrained(tmp_path / "second", output_loading_info=True)
        assert not any(report.values()), report
        self.check_ties(loaded)
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        inputs = self.inputs(model_class) if model_class is self.base else self.labelled(model_class)[0]
        inputs["input_ids"][..., 1] = larger - 1
        if self.auto_name(model_class) in ("AutoModelForMaskedLM", "AutoModelForPreTraining"):
            inputs["labels"][..., 1] = larger - 1
        for value in at_real_tokens(loaded(**inputs)).values():
            assert value.isfinite().all()

    # ------------------------------------------------------------------------------------------------------ attention

    @staticmethod
    def switch(model: PreTrainedModel, backend: str) -> None:
        """Choose the attention implementation of a model and of the encoders in it."""
        model.set_attn_implementation(backend)
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        assert {part.config._attn_implementation for part in parts} == {backend}

    @pytest.mark.parametrize("padding", [None, "left", "right"])
    def test_backends_agree(self, model_class, padding):
        """Without padding there is no mask, which shows an attention that is causal by accident."""
        labels = model_class is not self.base
        inputs = self.labelled(model_class, padding)[0] if labels else self.inputs(model_class, padding)
        model = self.build(model_class)
        results = {}
        for backend in ("eager", *self.backends):
            self.switch(model, backend)
            results[backend] = at_real_tokens(model(**inputs), inputs.get("attention_mask"))
            if labels:
                results[backend]["gradients"] = gradients(model, **inputs)
        for backend in self.backends:
            assert_close(results[backend], results["eager"], rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
    @pytest.mark.parametrize("padding", [None, "right"])
    def test_flex_attention_agrees(self, padding):
        model = self.build(self.base)
        if not model._supports_flex_attn:
            pytest.skip(f"{self.base.__name__} does not support flex attention")
        inputs = self.inputs(self.base, padding)
        results = []
        for backend in ("sdpa", "flex_attention"):
            self.switch(model, backend)
            with torch.no_grad():
                results.append(
                    model(**inputs).last_hidden_state[inputs.get("attention_mask", torch.ones(4, LENGTH)).bool()]
                )
        assert_close(*results, rtol=1e-4, atol=1e-5)

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match="nonsense"):
            self.base._from_config(copy.deepcopy(self.config), attn_implementation="nonsense")

    def test_every_token_sees_every_other(self):
        model = self.build(self.base)
        inputs = self.inputs(self.base)
        for backend in ("eager", *self.backends):
            self.switch(model, backend)
            for changed, seen in ((0, -1), (-1, 0)):
                other = inputs | {"input_ids": inputs["input_ids"].clone()}
                other["input_ids"][:, changed] = 3
                before, after = (model(**batch).last_hidden_state[:, seen] for batch in (inputs, other))
                assert ((before - after).abs().amax(1) > 1e-4).all(), f"{backend}: {seen} does not see {changed}"

    def test_result_does_not_depend_on_padding_or_batch(self, model_class):
        model = self.build(model_class)
        inputs = self.inputs(model_class, "right")
        mask = inputs["attention_mask"]
        with torch.no_grad():
            together = model(**inputs)
            for row in range(mask.shape[0]):
                longest = int(mask[row].sum(-1).max())
                alone = {name: value[row : row + 1, ..., :longest] for name, value in inputs.items()}
                kept = alone["attention_mask"]
                if kept.all():
                    del alone["attention_mask"]
                expected = at_real_tokens(model(**alone), kept)
                for name, value in at_real_tokens(together).items():
                    part = value[row : row + 1]
                    if value.shape[: mask.dim()] == mask.shape:
                        part = part[mask[row : row + 1].bool()]
                    elif value.shape[-1] == LENGTH:
                        part = part[..., :longest]
                    assert_close(part, expected[name], rtol=1e-4, atol=1e-5)

    def test_ids_at_padding_do_not_matter(self, model_class):
        model = self.build(model_class)
        for padding in ("left", "right"):
            inputs = self.inputs(model_class, padding)
            mask = inputs["attention_mask"]
            other = torch.where(mask.bool(), inputs["input_ids"], inputs["input_ids"].flip(-1) % 7)
            assert not torch.equal(other, inputs["input_ids"])
            with torch.no_grad():
                first, second = (
                    at_real_tokens(model(**inputs | {"input_ids": ids}), mask) for ids in (inputs["input_ids"], other)
                )
            for name in first:
                if padding == "right" or first[name].dim() == 2 and first[name].shape[0] == mask.sum():
                    assert_close(second[name], first[name], rtol=1e-5, atol=1e-6)

    def test_left_padding_with_positions_is_right_padding(self):
        if "position_ids" not in inspect.signature(self.base.forward).parameters:
            pytest.skip("positions cannot be given")
        model = self.build(self.base)
        results = []
        for padding in ("left", "right"):
            inputs = self.inputs(self.base)
            mask = self.inputs(self.base, padding)["attention_mask"]
            flat = torch.arange(int(mask.sum()))
            for name in inputs:  # the same tokens at the real places of both batches
                inputs[name] = torch.zeros_like(mask).masked_scatter(mask.bool(), flat % (2 if "type" in name else 90))
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                encoded = model(**inputs, attention_mask=mask, position_ids=positions)
            results.append(encoded.last_hidden_state[mask.bool()])
        assert_close(*results, rtol=1e-4, atol=1e-5)

    def test_embeddings_as_input(self):
        model = self.build(self.base)
        inputs = self.inputs(self.base, "right")
        expected = model(**inputs)
        ids = inputs.pop("input_ids")
        given = model(**inputs, inputs_embeds=model.get_input_embeddings()(ids))
        assert_close(at_real_tokens(given), at_real_tokens(expected), rtol=0, atol=0)
        with pytest.raises(ValueError, match="input_ids"):
            model(**inputs)

    # ------------------------------------------------------------------------------------------------------ unpadding

    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    def test_unpadding_changes_nothing(self, packed_class, backend, monkeypatch):
        plans = []
        monkeypatch.setattr(core, "plan_packing", lambda mask, plan=core.plan_packing: plans.append(1) or plan(mask))
        labels = packed_class is not self.base
        for padding in ("right",) if labels else ("right", "left"):
            inputs = self.labelled(packed_class, padding)[0] if labels else self.inputs(packed_class, padding)
            results = []
            for threshold in (None, 0.0):
                plans.clear()
                model = self.build(packed_class, self.with_encoder(unpad_threshold=threshold))
                self.switch(model, backend)
                outputs = model(**inputs)
                assert bool(plans) == (threshold is not None)
                found = at_real_tokens(outputs, inputs["attention_mask"])
                if padding == "left":
                    found.pop("pooler_output", None)  # of the first token, which is padding
                results.append((found, gradients(model, **inputs) if labels else {}))
            assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
            if not labels:
                assert not outputs.last_hidden_state[inputs["attention_mask"] == 0].any()

    def test_unpadding_is_left_out_when_it_cannot_be(self, monkeypatch):
        if not self.can_unpad:
            pytest.skip("this encoder cannot be run on packed rows")
        monkeypatch.setattr(core, "plan_packing", lambda mask: pytest.fail("the batch was packed"))
        inputs = self.inputs(self.base, "right")
        model, plain = (self.build(self.base, self.with_encoder(unpad_threshold=t)) for t in (0.0, None))
        recorded, expected = (m(**inputs, output_hidden_states=True).hidden_states for m in (model, plain))
        assert_close(recorded, expected, rtol=0, atol=0)
        model(**inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})  # nothing to gain
        share = 1 - sum(REAL) / (len(REAL) * LENGTH)
        self.build(self.base, self.with_encoder(unpad_threshold=share + 0.01))(**inputs)

    # --------------------------------------------------------------------------------------------------- heads, losses

    def test_loss_is_a_sum_over_a_count(self, head):
        """The way a batch is split changes nothing once the counts of the whole batch are given."""
        model = self.build(head)
        inputs, counts = self.labelled(head, "right")
        whole = model(**inputs).loss
        assert_close(model(**inputs, num_items_in_batch=counts).loss, whole)
        expected = gradients(model, **inputs)
        model.zero_grad(set_to_none=True)
        parts = []  # each padded to its own longest sequence only
        for rows in (slice(0, 1), slice(1, None)):
            longest = int(inputs["attention_mask"][rows].sum(-1).max())
            parts.append(
                {
                    name: value[rows, ..., :longest] if value.dim() > 1 else value[rows]
                    for name, value in inputs.items()
                }
            )
        assert parts[1]["input_ids"].shape[-1] < LENGTH
        losses = [model(**part, num_items_in_batch=counts).loss for part in parts]
        sum(losses).backward()
        assert_close(sum(losses), whole)
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert_close(found, expected, rtol=1e-4, atol=1e-6)
        if isinstance(counts, dict):  # each count divides a part of its own
            shares = [
                whole - model(**inputs, num_items_in_batch=counts | {name: 2 * counts[name]}).loss for name in counts
            ]
            assert min(shares) > 0
            assert_close(sum(shares), whole / 2)

    def test_no_label_in_the_batch(self, token_head):
        """Distributed training needs a gradient, of zeros, from every process."""
        model = self.build(token_head)
        inputs, _ = self.labelled(token_head)
        found = gradients(model, **inputs | {"labels": torch.full_like(inputs["labels"], -100)})
        assert set(found) == {name for name, value in model.named_parameters() if value.requires_grad}
        assert not any(value.any() for value in found.values())

    def test_masked_rows_give_the_dense_loss(self, masked_lm):
        model = self.build(masked_lm)
        inputs, _ = self.labelled(masked_lm, "right")
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        assert logits.shape == (*labels.shape, self.config.vocab_size)
        assert model.get_output_embeddings().weight.shape[0] == self.config.vocab_size
        labelled = model(**inputs, labels=labels)
        assert labelled.logits is None
        assert_close(labelled.loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    def test_every_parameter_gets_a_gradient(self, head):
        model = self.build(head)
        found = gradients(model, **self.labelled(head, "right")[0])
        zero = self.zero_gradients(head)
        for name, value in model.named_parameters():
            if not value.requires_grad:
                assert name not in found, f"{name} is frozen"
            else:
                assert name in found, f"{name} gets no gradient"
                assert name.endswith(zero) or found[name].any(), f"the gradient of {name} is 0"

    def test_activation_checkpointing_keeps_the_gradients(self, head):
        inputs, _ = self.labelled(head, "right")
        results, calls = [], [0, 0]
        for enabled in (False, True):
            model = self.build(head).train()
            if enabled:
                model.activation_checkpointing_enable()
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    part = next(layer.children())  # the checkpoint is inside the layer's own hooks
                    part.register_forward_pre_hook(lambda *_, run=enabled: calls.__setitem__(run, calls[run] + 1))
            torch.manual_seed(7)  # of dropout
            results.append(gradients(model, **inputs))
        assert calls[1] > calls[0] > 0, "nothing was computed twice"
        assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("autocast", [True, False])
    def test_bfloat16(self, head, autocast):
        inputs, _ = self.labelled(head, "right")
        model = self.build(head).train()
        if not autocast:
            model = model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        assert loss.dtype == torch.float32 and loss.isfinite()
        loss.backward()
        for name, value in model.named_parameters():
            assert value.grad is None or value.grad.isfinite().all(), name

    def test_pretraining_compiles_into_one_graph(self):
        self.check_compiling(self.heads[0])

    @pytest.mark.slow
    def test_compiles_into_one_graph(self, head):
        self.check_compiling(head)

    def check_compiling(self, head: type) -> None:
        """The loss in one graph; the labelled rows are then taken at a fixed number of places."""
        model = self.build(head, self.with_encoder(num_hidden_layers=1))
        inputs, _ = self.labelled(head, "right")
        expected = gradients(model, **inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = gradients(compiled, **inputs)
        assert compiled.train()(**inputs).loss.isfinite()  # with dropout
        torch._dynamo.reset()
        assert_close(found, {f"_orig_mod.{name}": value for name, value in expected.items()}, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
    def test_shards_layer_by_layer(self, head, one_process_group):
        """FSDP2 wraps the classes that the model names, and refuses a tie between two groups."""
        model = self.build(head)
        inputs, _ = self.labelled(head, "right")
        expected = gradients(model, **inputs)
        parts = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
        assert len(parts) >= self.config.num_hidden_layers
        for part in (*parts, model):
            fully_shard(part, mesh=one_process_group)
        found = {name: value.full_tensor() for name, value in gradients(model, **inputs).items()}
        assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.fixture
    def one_process_group(self) -> Iterator[DeviceMesh]:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()

    def test_recorded_states(self, model_class):
        model = self.build(model_class)
        self.switch(model, "eager")
        inputs = self.inputs(model_class)
        ids, config = inputs["input_ids"], self.recorded_encoder(model_class)
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        rows = ids.shape[:-1].numel()
        assert len(outputs.hidden_states) == config.num_hidden_layers + 1
        assert len(outputs.attentions) == config.num_hidden_layers
        for state in outputs.hidden_states[1:]:
            assert state.shape == (rows, LENGTH, config.hidden_size)
        for probabilities in outputs.attentions:
            assert probabilities.shape == (rows, config.num_attention_heads, LENGTH, LENGTH)
            assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
        if model_class is self.base:
            assert outputs.hidden_states[-1] is outputs.last_hidden_state
        as_tuple = model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.is_tensor(as_tuple[0])

    def test_labels_out_of_range(self, head):
        model = self.build(head)
        inputs, _ = self.labelled(head)
        names = [name for name in inputs if "label" in name]
        for name in names:
            for wrong in (10**4, -1):
                broken = inputs | {name: inputs[name].clone()}
                broken[name].view(-1)[0] = wrong
                with pytest.raises(
                    ValueError, match=rf"({head.__name__}|{type(self.config).__name__}).*{name}.*{wrong}"
                ):
                    model(**broken)

    def test_sequence_too_long(self, model_class):
        if not self.sequence_limit:
            pytest.skip("this model has no longest sequence")
        model = self.build(model_class)
        longest = self.config.max_position_embeddings
        ids = self.inputs(model_class)["input_ids"][..., :1].repeat_interleave(longest + 1, -1)
        model(input_ids=ids[..., :longest])
        with pytest.raises(ValueError, match=rf"{longest + 1} tokens.*max_position_embeddings is {longest}"):
            model(input_ids=ids)

    # ------------------------------------------------------------------------------------------------------------ BERT

    def test_is_bert_when_switched_off(self):
        if self.reduces_to_bert is None:
            pytest.skip("no setting of this paper is BERT")
        encoder = self.build(self.base, self.make_config(**self.reduces_to_bert)).base_model
        known = BertConfig().to_dict().keys() - {"model_type"}
        sizes = {name: value for name, value in encoder.config.to_dict().items() if name in known}
        state = encoder.state_dict()
        stock = BertModel(BertConfig(**sizes), add_pooling_layer="pooler.dense.weight" in state).eval()
        stock.load_state_dict(state)
        full = self.inputs(self.base, "right")
        for inputs in (full, {"input_ids": full["input_ids"]}):
            ours, theirs = (
                at_real_tokens(model(**inputs), inputs.get("attention_mask")) for model in (encoder, stock)
            )
            assert_close(ours, {name: theirs[name] for name in ours}, rtol=1e-5, atol=1e-6)


__all__ = ["EncoderSuite", "at_real_tokens", "gradients", "poisoned_memory"]
