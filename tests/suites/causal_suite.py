"""What every network with linear-time attention must do as a decoder: the future is not seen, a state decodes what the
parallel pass computes, and generate() works with padding, beams and samples.
"""

from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import GenerationConfig, PreTrainedModel

from bestiary.modeling.layers.kernel_attention import KernelCache
from suites.encoder_suite import LENGTH, gradients


class CausalSuite:
    """Mixin for an `EncoderSuite` whose heads have a causal language model that decodes with a `KernelCache`.

    Attributes:
        causal_class: the class with `generate`.
        pretraining_class: the class with either objective.
        masked_class: the class that refuses a decoder.
        causal_variants: changes to the configuration under which decoding is checked.
    """

    causal_class: ClassVar[type[PreTrainedModel]]
    pretraining_class: ClassVar[type[PreTrainedModel]]
    masked_class: ClassVar[type[PreTrainedModel]]
    causal_variants: ClassVar[tuple[dict, ...]] = ({},)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize(
                "variant", self.causal_variants, ids=lambda v: "-".join(map(str, v.values())) or "plain"
            )

    def labelled(self, head, padding=None):
        if head is not self.causal_class:
            return super().labelled(head, padding)
        inputs = self.inputs(head, padding)
        labels = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.ones(1)) == 0, -100)
        return inputs | {"labels": labels}, int((labels[:, 1:] != -100).sum())

    def decoder(self, **changes) -> PreTrainedModel:
        """A causal language model away from its initial values."""
        return self.build(self.causal_class, self.make_config(is_decoder=True, **changes))

    def prompt(self, left: int = 0, rows: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
        """Random prompts, of which row 1 has `left` padded places on the left."""
        ids = torch.randint(5, self.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(ids)
        mask[1, :left] = 0
        return {"input_ids": ids.masked_fill(mask == 0, self.config.pad_token_id), "attention_mask": mask}

    @torch.no_grad()
    def greedy(self, model: PreTrainedModel, ids: torch.Tensor, new: int) -> torch.Tensor:
        """Greedy decoding of one row without padding, by the parallel pass over everything at every step."""
        for _ in range(new):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
        return ids

    # ------------------------------------------------------------------------------------------------- the past alone

    @pytest.mark.parametrize("backend", ["sdpa", "eager"])
    @torch.no_grad()
    def test_no_token_sees_a_later_one(self, variant, backend):
        model = self.decoder(**variant)
        self.switch(model, backend)
        ids = self.prompt()["input_ids"]
        other = ids.clone()
        other[:, 4] = (other[:, 4] + 1) % 7
        first, second = model(ids).logits, model(other).logits
        assert torch.equal(first[:, :4], second[:, :4])
        assert ((first[:, 4:] - second[:, 4:]).abs().amax(-1) > 1e-5).all()
        for length in (1, 3, 6):
            assert_close(model(ids[:, :length]).logits, first[:, :length], rtol=1e-4, atol=1e-5)

    def test_no_gradient_flows_from_a_token_to_an_earlier_loss(self, variant):
        model = self.decoder(**variant)
        states = torch.randn(
            2, 6, self.config.hidden_size, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        model(inputs_embeds=states).logits[:, 2].sum().backward()
        assert not states.grad[:, 3:].any() and (states.grad[:, :3].abs().amax(-1) > 0).all()

    # ------------------------------------------------------------------------------------------------------- the state

    @torch.no_grad()
    def test_decoding_equals_the_parallel_pass(self, variant):
        model = self.decoder(**variant)
        inputs = self.prompt(left=3, length=10)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        whole = model(**inputs, position_ids=positions).logits
        cache, parts, sizes = None, [], set()
        for start, stop in ((0, 4), (4, 5), (5, 8), (8, 10)):
            outputs = model(
                inputs["input_ids"][:, start:stop],
                attention_mask=inputs["attention_mask"][:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            parts.append(outputs.logits)
            sizes.add(sum(layer.state.numel() for layer in cache.layers))
            assert cache.get_seq_length() == stop
        kept = inputs["attention_mask"].bool()
        assert_close(torch.cat(parts, 1)[kept], whole[kept], rtol=1e-4, atol=1e-5)
        assert len(sizes) == 1, "the state grows"
        first = model(inputs["input_ids"][:, :4], use_cache=True)
        rest = model(inputs["input_ids"][:, 4:], past_key_values=first.past_key_values).logits
        assert_close(rest, model(inputs["input_ids"]).logits[:, 4:], rtol=1e-4, atol=1e-5)

    def test_a_cache_that_does_not_fit(self):
        model = self.decoder()
        ids = self.prompt()["input_ids"]
        with pytest.raises(ValueError, match=r"decodes with a KernelCache of 2 layers, got a KernelCache"):
            model(ids, past_key_values=KernelCache(3))
        encoder = self.build(self.base)
        for given in ({"use_cache": True}, {"past_key_values": KernelCache(2)}):
            with pytest.raises(ValueError, match=r"a cache needs config.is_decoder=True"):
                encoder(ids, **given)

    def test_no_attention_weights_beside_a_state(self):
        """Steps of one token have no keys of earlier ones; without a state every step has all."""
        model = self.decoder()
        self.switch(model, "eager")
        options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        options |= {"output_attentions": True, "return_dict_in_generate": True}
        with pytest.raises(ValueError, match=r"give use_cache=False with output_attentions=True"):
            model.generate(**self.prompt(), **options)
        found = model.generate(**self.prompt(), **options, use_cache=False).attentions
        assert [[weights.shape[-1] for weights in step] for step in found] == [[7, 7], [8, 8]]

    def test_a_state_at_the_end_of_the_positions(self):
        model = self.decoder()
        ids = self.prompt(length=self.config.max_position_embeddings)["input_ids"]
        state = model(ids[:, :-1], use_cache=True).past_key_values
        state = model(ids[:, -1:], past_key_values=state).past_key_values
        with pytest.raises(ValueError, match=rf"got position {ids.shape[1]}, but config.max_position_embeddings is"):
            model(ids[:, :1], past_key_values=state)

    # ------------------------------------------------------------------------------------------------------ generation

    @torch.no_grad()
    def test_generate_is_greedy_decoding_of_the_parallel_pass(self, variant):
        model = self.decoder(**variant)
        inputs = self.prompt(left=3)
        calls = []
        model.bert.register_forward_hook(
            lambda m, args, kwargs, out: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        found = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert calls == [7, 1, 1, 1, 1]
        for row, ids in enumerate(inputs["input_ids"]):
            alone = ids[inputs["attention_mask"][row].bool()][None]
            assert torch.equal(found[row, 7:], self.greedy(model, alone, 5)[0, alone.shape[1] :])
        uncached = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
        assert torch.equal(uncached, found)

    @torch.no_grad()
    def test_beams_and_samples_reorder_the_state(self, monkeypatch):
        model = self.decoder()
        inputs = self.prompt(left=3)
        moved = []
        reorder = KernelCache.reorder_cache
        monkeypatch.setattr(
            KernelCache, "reorder_cache", lambda cache, rows: moved.append(rows) or reorder(cache, rows)
        )
        options = {"max_new_tokens": 6, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
        options |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
        found, expected = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
        assert any(not torch.equal(rows, torch.arange(12)) for rows in moved), "beams that never change show nothing"
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-6)
        sampled = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2, "pad_token_id": 0}
            sampled.append(model.generate(**inputs, **options, use_cache=use_cache))
        assert torch.equal(*sampled) and sampled[0].shape == (6, 11)

    @torch.no_grad()
    def test_generation_goes_on_from_a_state(self):
        model = self.decoder()
        inputs = self.prompt()
        whole = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        first = model.generate(
            **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, pad_token_id=0
        )
        mask = torch.ones_like(first.sequences)
        rest = model.generate(
            first.sequences,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
        )
        assert torch.equal(rest, whole)

    def test_generation_beyond_the_positions(self):
        model = self.decoder()
        with pytest.raises(ValueError, match=r"got position \d+, but config.max_position_embeddings is"):
            model.generate(**self.prompt(), max_new_tokens=30, do_sample=False, pad_token_id=0)
        endless = self.decoder(position_embedding_type="rotary")
        found = endless.generate(**self.prompt(), max_new_tokens=30, do_sample=False, pad_token_id=0)
        assert found.shape[1] == 37

    def test_generation_settings_come_from_the_configuration(self):
        model = self.decoder(eos_token_id=3, bos_token_id=2)
        assert isinstance(model.generation_config, GenerationConfig)
        assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (3, 2)
        assert model.can_generate() and not self.build(self.masked_class).can_generate()

    def test_logits_to_keep(self):
        model = self.decoder()
        inputs = self.prompt()
        whole = model(**inputs).logits
        assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:])
        assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])

    # --------------------------------------------------------------------------------------------------- heads, losses

    def test_next_token_loss(self):
        inputs, count = self.labelled(self.causal_class, "right")
        labels = inputs.pop("labels")
        for model in (
            self.build(self.causal_class),
            self.build(self.pretraining_class, self.make_config(is_decoder=True)),
        ):
            logits = model(**inputs).logits
            expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            assert_close(model(**inputs, labels=labels).loss, expected / count)
            assert_close(model(**inputs, labels=labels, num_items_in_batch=3).loss, expected / 3)
            rows = []
            model.cls.predictions.transform.register_forward_hook(lambda *call, rows=rows: rows.append(len(call[2])))
            model(**inputs, labels=labels)
            assert sum(rows) == count, "the head sees places without a label"
            outputs = self.build(self.pretraining_class, self.make_config(is_decoder=True))(**inputs, labels=labels)
            assert_close(outputs.sequence_losses.sum() / count, outputs.loss)

    def test_the_causal_class_makes_a_decoder_of_any_configuration(self, tmp_path):
        config = self.make_config()
        model = self.causal_class(config)
        assert model.config.is_decoder and not config.is_decoder
        model.save_pretrained(tmp_path)
        assert self.base.from_pretrained(tmp_path).config.is_decoder
        with pytest.raises(ValueError, match="predicts from both sides, but .*is_decoder is True"):
            self.masked_class.from_pretrained(tmp_path)
        masked = self.masked_class.from_pretrained(tmp_path, is_decoder=False)
        assert_close(masked.state_dict(), model.state_dict(), rtol=0, atol=0)
        with_either = self.pretraining_class.from_pretrained(tmp_path)
        assert_close(with_either.state_dict(), model.state_dict(), rtol=0, atol=0)

    @torch.no_grad()
    def test_the_pooler_of_a_decoder_reads_the_last_token(self):
        model = self.build(self.base, self.make_config(is_decoder=True))
        for padding in (None, "left", "right"):
            inputs = self.inputs(self.base, padding)
            outputs = model(**inputs)
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            last = LENGTH - 1 - mask.flip(1).argmax(1)
            rows = outputs.last_hidden_state[torch.arange(4), last]
            assert_close(outputs.pooler_output, torch.tanh(model.pooler.dense(rows)))

    # -------------------------------------------------------------------------------------------------- other variants

    @pytest.mark.parametrize(
        "changes",
        [
            {"layer_norm_position": "pre"},
            {"final_layer_norm": True},
            {"embedding_layer_norm": False},
            {"prediction_transform": False},
            {"position_embedding_type": "rotary"},
            {"position_embedding_type": "absolute_and_rotary"},
        ],
        ids=lambda changes: "-".join(map(str, changes.values())),
    )
    @pytest.mark.parametrize("causal", [False, True])
    def test_variants_of_the_network(self, changes, causal, tmp_path):
        """Backends agree, every parameter is trained, a checkpoint comes back, and the variant is another function."""
        config = self.make_config(is_decoder=causal, **changes)
        model = self.build(self.pretraining_class, config)
        inputs, _ = self.labelled(self.masked_class, "right")
        results = []
        for backend in ("eager", "sdpa"):
            self.switch(model, backend)
            results.append(gradients(model, **inputs))
        assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)
        for name, _ in model.named_parameters():
            assert name in results[0] and (results[0][name].any() or name.endswith("key.bias")), name
        model.save_pretrained(tmp_path)
        loaded, report = self.pretraining_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        ids = inputs["input_ids"]
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        plain = self.build(self.pretraining_class, self.make_config(is_decoder=causal))
        assert (plain(ids).logits - model(ids).logits).abs().max() > 1e-3

    def test_a_mask_of_another_shape_is_refused(self):
        model = self.build(self.base)
        ids = self.prompt()["input_ids"]
        for shape in ((3, 1, 7, 7), (3, 1), (3, 6), (3, 9), (1, 7)):  # (3, 1) would be broadcast, (3, 9) cut
            with pytest.raises(ValueError, match=r"must have the shape \(batch, length\), here \(3, 7\), got"):
                model(ids, attention_mask=torch.ones(shape))

    @pytest.mark.parametrize("causal", [False, True])
    def test_packed_rows_are_refused(self, causal):
        model = self.build(self.base, self.make_config(is_decoder=causal))
        ids = self.prompt()["input_ids"]
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
        for given in ({"position_ids": positions}, {"cu_seq_lens_q": torch.tensor([0, 3, 7])}):
            with pytest.raises(ValueError, match="a row holds several sequences"):
                model(ids, **given)
        mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]]).expand(3, -1)
        model(ids, attention_mask=mask, position_ids=positions * mask)
        model(ids, position_ids=torch.zeros_like(positions))

    def test_causal_pretraining_compiles_into_one_graph(self):
        model = self.build(self.causal_class, self.make_config(is_decoder=True, num_hidden_layers=1))
        inputs, _ = self.labelled(self.causal_class, "right")
        expected = gradients(model, **inputs)
        torch._dynamo.reset()
        found = gradients(torch.compile(model, fullgraph=True, backend="eager"), **inputs)
        torch._dynamo.reset()
        assert_close(found, {f"_orig_mod.{name}": value for name, value in expected.items()}, rtol=1e-4, atol=1e-5)


__all__ = ["CausalSuite"]
