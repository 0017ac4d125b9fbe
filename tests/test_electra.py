"""ELECTRA's models: the common suite over two types of encoder, and the paper's own checks."""

import math

import pytest
import torch
from suites.encoder_suite import EncoderSuite, at_real_tokens, gradients, poisoned_memory
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.modeling import modeling_electra as electra
from bestiary.modeling.modeling_electra import ElectraJointForMaskedLM, ElectraJointForPreTraining


ENCODER = {
    "vocab_size": 99,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
SMALLER = ENCODER | {"hidden_size": 24, "num_attention_heads": 2}
VARIANTS = {
    "separate embeddings": {"tie_generator_embeddings": False},
    "all weights tied": {"untied_generator": False},
    "uniform generator": {"uniform_generator": True},
    "mlm": {"objective": "mlm"},
    "no correct samples": {"disallow_correct": True},
    "inverse cdf": {"sampling": "inverse_cdf", "sampling_temperature": 2.0},
}


def electra_config(model_type: str = "electra", **fields) -> ElectraJointConfig:
    return ElectraJointConfig(
        discriminator_config=ENCODER | {"model_type": model_type},
        generator_config=SMALLER | {"model_type": model_type},
        num_labels=3,
        max_predictions_per_sequence=9,
        **fields,
    )


def published(encoder: int, generator: int, joint: int) -> dict[type, int]:
    return {
        electra.ElectraJointModel: encoder,
        ElectraJointForMaskedLM: generator,
        ElectraJointForPreTraining: joint,
    }


class ElectraSuite(EncoderSuite):
    slug = "electra"
    base = electra.ElectraJointModel
    heads = (
        ElectraJointForPreTraining,
        ElectraJointForMaskedLM,
        electra.ElectraJointForSequenceClassification,
        electra.ElectraJointForTokenClassification,
        electra.ElectraJointForQuestionAnswering,
        electra.ElectraJointForMultipleChoice,
    )

    def with_encoder(self, **changes):
        names = ("discriminator_config", "generator_config")
        return self.make_config(**{name: getattr(self.config, name).to_dict() | changes for name in names})

    def zero_gradients(self, head):
        """The first token is scored without a pooler: what is added to it is added to the scores of all choices."""
        last = ("layer.1.output.LayerNorm.bias",) if head is electra.ElectraJointForMultipleChoice else ()
        return super().zero_gradients(head) + last

    def recorded_encoder(self, model_class):
        generator = model_class is ElectraJointForMaskedLM
        return self.config.generator_config if generator else self.config.discriminator_config

    def pretraining_targets(self, labels, real):
        counts = {"mlm": int((labels != -100).sum()), "discriminator": int(real.sum())}
        return {"sampling_seeds": torch.tensor([3, 1, 4, 159])}, counts


class TestElectra(ElectraSuite):
    """Over transformers' own encoder."""

    config = electra_config()
    can_unpad = False
    parameters = {
        "small": published(13_483_008, 4_620_026, 14_196_219),
        "base": published(108_891_648, 33_740_602, 119_386_427),
        "large": published(334_092_288, 51_295_290, 354_655_291),
    }
    reduces_to_bert = {
        "discriminator_config": ENCODER | {"embedding_size": 32},
        "generator_config": SMALLER | {"embedding_size": 32},
    }
    bad_config = (
        ({"generator_loss_weight": -1}, "generator_loss_weight must be at least 0"),
        ({"sampling_temperature": 0}, "sampling_temperature must be above 0"),
        ({"sampling": "nucleus"}, "sampling"),
        ({"objective": "sop"}, "objective"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True.*tie_generator_embeddings=False"),
        ({"generator_config": None, "generator_size_fraction": 1.5}, r"generator_size_fraction must be in \(0, 1\]"),
        ({"generator_config": SMALLER | {"vocab_size": 98}}, "vocab_size is 99 in discriminator_config and 98"),
        ({"generator_config": SMALLER | {"embedding_size": 8}}, "its width is 16 in the discriminator and 8"),
        ({"generator_config": SMALLER | {"num_attention_heads": 5}}, "24 is no multiple of num_attention_heads 5"),
        ({"generator_config": SMALLER | {"hiden_size": 8}}, "did you mean 'hidden_size'"),
        ({"generator_config": SMALLER | {"model_type": "elektra"}}, "no encoder type 'elektra'"),
        (
            {"discriminator_config": {"model_type": "distilbert"}},
            "wrap .*'distilbert', which has no .*hidden_act",
        ),
        ({"hidden_size": 64}, "no field 'hidden_size' of its own; give it in discriminator_config"),
        ({"vocab_size": 50}, "vocab_size is 50, but 99 in discriminator_config"),
    )

    # ---------------------------------------------------------------------------------------------------------- sizes

    @pytest.mark.parametrize(
        ("size", "discriminator", "shared"),
        [
            ("small", 13_549_057, 3_972_864),
            ("base", 109_483_009, 23_837_184),
            ("large", 335_142_913, 31_782_912),
        ],
    )
    def test_parameters_of_the_parts(self, size, discriminator, shared):
        with torch.device("meta"):
            model = ElectraJointForPreTraining(ElectraJointConfig.from_size(size))

        def count(*parts):
            return sum(value.numel() for part in parts for value in part.parameters())

        assert count(model.electra, model.discriminator_predictions) == discriminator
        assert count(model.electra.embeddings) == shared
        for name, value in model.electra.embeddings.named_parameters():
            assert model.generator.embeddings.get_parameter(name) is value

    def test_released_small_generator_has_full_width(self):
        with torch.device("meta"):
            model = ElectraJointForPreTraining(ElectraJointConfig.from_size("small", generator_size_fraction=1))
        assert sum(value.numel() for value in model.parameters()) == 23_122_875

    def test_derived_generator(self):
        config = ElectraJointConfig.from_size("base", generator_layers_fraction=0.5)
        theirs = config.generator_config
        assert (theirs.hidden_size, theirs.num_attention_heads, theirs.intermediate_size) == (256, 4, 1024)
        assert (theirs.num_hidden_layers, theirs.embedding_size) == (6, 768)
        with pytest.raises(ValueError, match="width 200 .* has 3 heads .* do not divide it"):
            ElectraJointConfig(discriminator_config=ENCODER | {"hidden_size": 200}, generator_size_fraction=1)
        with pytest.raises(ValueError, match="no size 'tiny'; there are small, base, large"):
            ElectraJointConfig.from_size("tiny")

    # -------------------------------------------------------------------------------------------------- joint training

    def test_discriminator_loss_reaches_the_shared_embeddings_only(self):
        model = self.build(ElectraJointForPreTraining)
        inputs, _ = self.labelled(ElectraJointForPreTraining, "right")
        model(**inputs).discriminator_loss.backward()
        for name, value in model.named_parameters():
            if name.startswith("generator"):
                assert value.grad is None, name
            elif not name.endswith("key.bias"):
                assert value.grad is not None and value.grad.any(), name

    def test_without_the_discriminator_loss_it_is_a_masked_language_model(self):
        joint = self.build(ElectraJointForPreTraining, self.make_config(discriminator_loss_weight=0))
        inputs, _ = self.labelled(ElectraJointForPreTraining, "right")
        plain = self.build(ElectraJointForMaskedLM)
        plain.load_state_dict(
            {name: value for name, value in joint.state_dict().items() if name in plain.state_dict()}
        )
        expected = gradients(plain, **{name: value for name, value in inputs.items() if name != "sampling_seeds"})
        found = gradients(joint, **inputs)
        assert joint(**inputs).loss == joint(**inputs).mlm_loss
        assert len(expected) > 20
        assert_close({name: found.pop(name) for name in expected}, expected)
        assert not any(value.any() for value in found.values())

    def test_loss_is_the_weighted_sum(self):
        model = self.build(ElectraJointForPreTraining)
        outputs = model(**self.labelled(ElectraJointForPreTraining)[0])
        assert_close(outputs.loss, outputs.mlm_loss + 50 * outputs.discriminator_loss)

    def test_discriminator_loss_by_hand(self, monkeypatch):
        """Scores 0.5, -1.2, 2, 3, of which the last two are fakes and the last is padding: 50 * 0.4547625."""
        config = self.make_config(generator_loss_weight=0, disallow_correct=True)
        model = self.build(ElectraJointForPreTraining, config)
        scores = torch.tensor([[0.5, -1.2, 2.0, 3.0]])
        monkeypatch.setattr(model.discriminator_predictions, "forward", lambda hidden: scores)
        outputs = model(
            input_ids=torch.tensor([[7, 8, 4, 4]]),
            attention_mask=torch.tensor([[1, 1, 1, 0]]),
            labels=torch.tensor([[-100, -100, 9, 9]]),
        )
        assert outputs.is_fake.tolist() == [[False, False, True, True]]
        assert_close(outputs.loss.item(), 22.738124, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("sampling", ["gumbel", "inverse_cdf"])
    def test_a_correct_sample_is_no_fake(self, sampling):
        """At a low temperature the sample is the most probable token; were it the original, nothing is fake."""
        settings = {"sampling_temperature": 1e-3, "sampling": sampling}
        model = self.build(ElectraJointForPreTraining, self.make_config(**settings))
        inputs, _ = self.labelled(ElectraJointForPreTraining, "right")
        masked = inputs["labels"] != -100
        first = model(**inputs)
        assert torch.equal(first.generator_predictions != -100, masked)
        assert torch.equal(first.corrupted_ids, torch.where(masked, first.generator_predictions, inputs["input_ids"]))
        assert torch.equal(first.is_fake, masked & (first.corrupted_ids != inputs["labels"])) and first.is_fake.any()
        right = inputs | {"labels": first.generator_predictions}
        assert not model(**right).is_fake.any()
        model.config.disallow_correct = True
        second = model(**right)
        assert torch.equal(second.is_fake, masked)
        assert second.mlm_loss == model(**right).mlm_loss  # the generator's own loss does not change

    def test_ids_at_padding_do_not_matter_in_training(self):
        model = self.build(ElectraJointForPreTraining)
        inputs, _ = self.labelled(ElectraJointForPreTraining, "right")
        other = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], inputs["input_ids"].flip(1))
        assert not torch.equal(other, inputs["input_ids"])
        assert model(**inputs).loss == model(**inputs | {"input_ids": other}).loss

    @pytest.mark.parametrize("sampling", ["gumbel", "inverse_cdf"])
    def test_samples_depend_on_the_seed_of_the_example_only(self, sampling):
        model = self.build(ElectraJointForPreTraining, self.make_config(sampling=sampling))
        inputs, _ = self.labelled(ElectraJointForPreTraining, "right")
        together = model(**inputs).corrupted_ids
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            alone = {name: value[row : row + 1, ..., :length] for name, value in inputs.items() if value.dim() > 1}
            alone["sampling_seeds"] = inputs["sampling_seeds"][row : row + 1]
            assert torch.equal(model(**alone).corrupted_ids, together[row : row + 1, :length])
        others = inputs | {"sampling_seeds": inputs["sampling_seeds"] + 1}
        assert not torch.equal(model(**others).corrupted_ids, together)
        del inputs["sampling_seeds"]
        draws = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            draws.append(model(**inputs).corrupted_ids)
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])

    def test_generator_runs_once_and_its_head_on_masked_rows(self):
        model = self.build(ElectraJointForPreTraining)
        inputs, counts = self.labelled(ElectraJointForPreTraining, "right")
        calls, rows = [], []
        model.generator.register_forward_hook(lambda *call: calls.append(call))
        model.generator_predictions.register_forward_hook(lambda *call: rows.append(call[2].shape))
        model(**inputs)
        assert len(calls) == 1 and rows == [(counts["mlm"], ENCODER["embedding_size"])]

    def test_more_labels_than_the_configuration_allows(self):
        model = self.build(ElectraJointForPreTraining, self.make_config(max_predictions_per_sequence=2))
        with pytest.raises(ValueError, match="max_predictions_per_sequence is 2"):
            model(**self.labelled(ElectraJointForPreTraining)[0])

    # -------------------------------------------------------------------------------------------------------- variants

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_variants_train_and_survive_saving(self, variant, tmp_path):
        config = self.make_config(**VARIANTS[variant])
        model = self.build(ElectraJointForPreTraining, config)
        assert (model.generator_encoder() is model.electra) == (
            variant in ("all weights tied", "uniform generator", "mlm")
        )
        inputs, _ = self.labelled(ElectraJointForPreTraining, "right")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(5):
            found = gradients(model, **inputs)
            optimizer.step()
            losses.append(model(**inputs).loss.item())
        assert losses[-1] < losses[0]
        missing = {name for name, _ in model.named_parameters()} - set(found)
        assert not missing, missing
        model.save_pretrained(tmp_path)
        with poisoned_memory():
            loaded, report = ElectraJointForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        self.check_ties(loaded)
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert loaded(**inputs).loss == model(**inputs).loss
        with poisoned_memory():
            classifier, report = electra.ElectraJointForSequenceClassification.from_pretrained(
                tmp_path, output_loading_info=True
            )
        assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
        assert_close(classifier.electra.state_dict(), model.electra.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_vocabulary_of_variants_can_grow(self, variant):
        config = self.make_config(**VARIANTS[variant])
        model = self.build(ElectraJointForPreTraining, config)
        model.resize_token_embeddings(107, mean_resizing=False)
        self.check_ties(model)
        inputs, _ = self.labelled(ElectraJointForPreTraining)
        inputs["input_ids"][:, 2] = inputs["labels"][:, 2] = 106
        assert model(**inputs).loss.isfinite()

    @pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "uniform generator"])
    def test_generator_of_variants_is_a_masked_language_model(self, variant, tmp_path):
        joint = self.build(ElectraJointForPreTraining, self.make_config(**VARIANTS[variant]))
        joint.save_pretrained(tmp_path)
        with poisoned_memory():
            model, report = ElectraJointForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        self.check_ties(model)
        inputs, _ = self.labelled(ElectraJointForPreTraining, "right")
        expected = joint(**inputs).mlm_loss
        del inputs["sampling_seeds"]
        assert_close(model(**inputs).loss, expected)
        model.save_pretrained(tmp_path / "again")
        again, report = ElectraJointForMaskedLM.from_pretrained(tmp_path / "again", output_loading_info=True)
        assert not any(report.values())
        assert again(**inputs).loss == model(**inputs).loss

    def test_uniform_generator(self):
        model = self.build(ElectraJointForPreTraining, self.make_config(uniform_generator=True))
        assert not [name for name, _ in model.named_parameters() if name.startswith("generator")]
        inputs, _ = self.labelled(ElectraJointForPreTraining)
        outputs = model(**inputs)
        assert_close(outputs.mlm_loss.item(), math.log(99))
        draws = torch.cat(
            [
                model(**inputs | {"sampling_seeds": torch.arange(4) + 4 * step}).corrupted_ids[
                    inputs["labels"] != -100
                ]
                for step in range(200)
            ]
        )
        counts = draws.bincount(minlength=99).double()
        expected = draws.numel() / 99
        assert ((counts - expected) ** 2 / expected).sum() < 98 + 5 * math.sqrt(2 * 98)  # chi-squared, 98 degrees
        with pytest.raises(ValueError, match="uniform_generator=True and has no language model"):
            ElectraJointForMaskedLM(model.config)
        with pytest.raises(ValueError, match="no generator_predictions .*uniform_generator=True.*ElectraForMaskedLM"):
            model.to_generator()

    def test_mlm_control_has_no_discriminator(self):
        model = self.build(ElectraJointForPreTraining, self.make_config(objective="mlm"))
        inputs = self.inputs(ElectraJointForPreTraining)
        with pytest.raises(ValueError, match="objective='mlm' has no discriminator; pass labels"):
            model(**inputs)
        with pytest.raises(ValueError, match="no discriminator_predictions .*objective='mlm'.*ElectraForPreTraining"):
            model.to_discriminator()
        assert_close(
            model.to_generator()(**inputs).logits,
            model.generator_lm_head(model.generator_predictions(model.electra(**inputs).last_hidden_state)),
        )


class TestElectraOverBert(ElectraSuite):
    """Over bestiary's own encoder."""

    config = electra_config("bestiary-bert")
    reduces_to_bert = {
        "discriminator_config": config.discriminator_config.to_dict() | {"embedding_size": 32},
        "generator_config": config.generator_config.to_dict() | {"embedding_size": 32},
    }
    bad_config = (
        (
            {"discriminator_config": ENCODER | {"model_type": "bestiary-bert", "unpad_threshold": -1}},
            "unpad_threshold",
        ),
    )


class TestStockModels:
    """To and from the classes of transformers, and over its other encoders."""

    suite = TestElectra()

    @pytest.mark.parametrize("model_type", ["electra", "bestiary-bert"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_both_networks_are_stock_models(self, model_type, tied, tmp_path):
        config = electra_config(model_type, tie_generator_embeddings=tied)
        joint = self.suite.build(ElectraJointForPreTraining, config)
        inputs = self.suite.inputs(ElectraJointForPreTraining, "right")
        joint.save_pretrained(tmp_path / "joint")
        ours = {
            ElectraForPreTraining: joint,
            ElectraForMaskedLM: ElectraJointForMaskedLM.from_pretrained(tmp_path / "joint"),
        }
        for stock_class, model in ours.items():
            stock = joint.to_discriminator() if model is joint else joint.to_generator()
            assert type(stock) is stock_class and not stock.training
            stock.save_pretrained(tmp_path / stock_class.__name__)
            loaded, report = stock_class.from_pretrained(tmp_path / stock_class.__name__, output_loading_info=True)
            assert not any(report.values())
            outputs = (at_real_tokens(each(**inputs), inputs["attention_mask"]) for each in (loaded, model))
            assert_close(*outputs, rtol=1e-5, atol=1e-6)
            assert len(list(loaded.parameters())) == len(list(stock.parameters()))

    def test_stock_discriminator_loads(self, tmp_path):
        torch.manual_seed(0)
        stock = ElectraForPreTraining(ElectraConfig(**ENCODER)).eval()
        stock.save_pretrained(tmp_path)
        config = electra_config()
        model, report = ElectraJointForPreTraining.from_pretrained(tmp_path, config=config, output_loading_info=True)
        assert report["missing_keys"] and all(name.startswith("generator") for name in report["missing_keys"])
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        inputs = self.suite.inputs(ElectraJointForPreTraining)
        assert_close(model(**inputs).logits, stock(**inputs).logits)
        labels = torch.randint(0, 2, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0))
        expected = F.binary_cross_entropy_with_logits(stock(**inputs).logits, labels.float())
        assert_close(stock(**inputs, labels=labels).loss, expected)

    @pytest.mark.parametrize("model_type", ["bert", "roberta", "albert", "deberta-v2", "mpnet", "convbert"])
    def test_other_encoders(self, model_type, tmp_path):
        encoder = ENCODER | {"model_type": model_type, "embedding_size": 32, "max_position_embeddings": 40}
        smaller = encoder | {"num_hidden_layers": 1}
        config = ElectraJointConfig(discriminator_config=encoder, generator_config=smaller)
        model = self.suite.build(ElectraJointForPreTraining, config)
        inputs, _ = self.suite.labelled(ElectraJointForPreTraining, "right")
        if model_type in ("roberta", "mpnet"):
            del inputs["token_type_ids"]
        found = gradients(model, **inputs)
        assert set(found) == {name for name, _ in model.named_parameters()}
        model.save_pretrained(tmp_path)
        with poisoned_memory():
            loaded, report = ElectraJointForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
            generator = ElectraJointForMaskedLM.from_pretrained(tmp_path)
        assert not any(report.values()), report
        assert_close(loaded(**inputs).loss, model(**inputs).loss)
        del inputs["sampling_seeds"]
        assert_close(generator(**inputs).loss, model(**inputs).mlm_loss)
        if model_type in ("deberta-v2", "convbert"):
            with pytest.raises(ValueError, match=f"{model_type}.*has not the parameters of transformers' ELECTRA"):
                model.to_discriminator()

    def test_encoder_of_a_user(self, tmp_path):
        """An encoder that was trained before starts the discriminator."""
        torch.manual_seed(0)
        source = BertConfig(**{name: value for name, value in ENCODER.items() if name != "embedding_size"})
        config = ElectraJointConfig(discriminator_config=source, generator_size_fraction=1)
        assert config.discriminator_config is source
        assert config.generator_config.hidden_size == 32 and config.generator_config.num_attention_heads == 1
        assert type(config.generator_config) is BertConfig
