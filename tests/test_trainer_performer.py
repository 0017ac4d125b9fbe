"""The Performer's trainer: the common suite for both objectives, projections that are drawn at an interval."""

import numpy as np
import pytest
import torch
from suites.trainer_suite import ObjectiveSuite, TrainerSuite, outcome
from transformers import BertConfig, BertForMaskedLM

from bestiary.configuration.configuration_performer import PerformerConfig
from bestiary.modeling.modeling_performer import PerformerForPreTraining, PerformerSelfAttention
from bestiary.trainers.language_model import NextTokenCollator
from bestiary.trainers.masking import MaskingCollator, SpecialTokens
from bestiary.trainers.trainer_performer import PerformerTrainer, PerformerTrainingArguments


VOCABULARY = 40
SPECIAL = SpecialTokens(
    cls_id=2, sep_id=3, pad_id=0, mask_id=4, vocab_size=VOCABULARY, continuation=None, has_token_types=False
)
INTERVAL = 2


def config(dropout: float = 0.0, **fields) -> PerformerConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": dropout,
        "num_random_features": 24,
        "feature_redraw_interval": INTERVAL,
    }
    return PerformerConfig(**sizes | fields)


def rows(number: int) -> list[dict]:
    """Texts of 6 to 16 tokens."""
    rng = np.random.default_rng(5)
    made = []
    for _ in range(number):
        ids = rng.integers(5, 12, int(rng.integers(6, 17)))
        ids[0], ids[-1] = 2, 3
        made.append({"input_ids": ids.tolist()})
    return made


class Performer:
    slug = "performer"

    def make_rows(self, number):
        return rows(number)


class TestPerformerTrainer(Performer, TrainerSuite):
    parts = ("mlm",)
    metrics = ("perplexity",)

    def make_model(self, dropout):
        return PerformerForPreTraining(config(dropout))

    def make_collator(self):
        return MaskingCollator(SPECIAL, mlm_probability=0.3, seed=1)

    def projections(self, trainer):
        """Copies of the projections of all layers."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        return [part.projection_matrix.clone() for part in model.modules() if isinstance(part, PerformerSelfAttention)]

    def test_projections_change_at_the_interval_and_nowhere_else(self, tmp_path):
        trainer = self.make_trainer(tmp_path, max_steps=5, gradient_accumulation_steps=2)
        seen = {}

        def note(module, args, outputs):
            if module.training:
                seen.setdefault(trainer.state.global_step, []).append(self.projections(trainer))
            else:
                evaluated.append(self.projections(trainer))

        evaluated = []
        first = self.projections(trainer)
        trainer.model.register_forward_hook(note)
        trainer.train()
        trainer.evaluate()
        steps = []
        for number in range(5):
            for found in seen[number][1:]:
                assert all(map(torch.equal, found, seen[number][0])), "drawn between micro-batches"
            steps.append(seen[number][0])
        same = [all(map(torch.equal, a, b)) for a, b in zip(steps, steps[1:])]
        assert same == [True, False, True, False] and all(map(torch.equal, steps[0], first))
        for found in evaluated:
            assert all(map(torch.equal, found, steps[-1]))
        assert not torch.equal(*steps[-1]), "two layers have one projection"
        assert not any(value.requires_grad for layer in steps for value in layer)

    def test_drawings_depend_on_the_seed_of_the_run(self, tmp_path):
        found = []
        for seed in (3, 3, 4):
            trainer = self.make_trainer(tmp_path / str(len(found)), max_steps=3, seed=seed)
            trainer.train()
            found.append(self.projections(trainer)[0])
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

    def test_features_that_stay(self, tmp_path):
        trainer = self.make_trainer(tmp_path, max_steps=5)
        trainer.model.config.feature_redraw_interval = None
        first = self.projections(trainer)
        trainer.train()
        assert all(map(torch.equal, self.projections(trainer), first))

    def test_resuming_restores_the_projections(self, tmp_path):
        """From a checkpoint between two drawings, and whatever the new model had before."""
        run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
        straight = self.make_trainer(tmp_path / "a", **run)
        straight.train()
        resumed = self.make_trainer(tmp_path / "b", **run)
        resumed.model.redraw_projections(99, 99)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
        assert all(map(torch.equal, self.projections(resumed), self.projections(straight)))
        for name, value in outcome(straight)["weights"].items():
            assert torch.equal(outcome(resumed)["weights"][name], value), name


class TestCausalPerformerTrainer(Performer, ObjectiveSuite):
    """The next token: labels are shifted, so a row of n tokens has n - 1 items."""

    parts = ("lm",)
    metrics = ("perplexity",)

    def make_model(self, dropout):
        return PerformerForPreTraining(config(dropout, is_decoder=True))

    def make_collator(self):
        return NextTokenCollator(SPECIAL)

    def test_perplexity_is_over_all_predicted_tokens(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        held_out = trainer.eval_dataset
        figures = trainer.evaluate()
        with torch.no_grad():
            losses = []
            for row in held_out:
                ids = torch.tensor([row["input_ids"]])
                logits = trainer.model.eval()(ids).logits[0, :-1]
                losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
        assert figures["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert figures["eval_perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_defaults_of_the_paper(tmp_path):
    arguments = PerformerTrainingArguments(output_dir=str(tmp_path), report_to="none")
    trainer = PerformerTrainer(PerformerForPreTraining(config()), arguments)
    trainer.create_optimizer_and_scheduler(1000)
    for group in trainer.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.98), 1e-9)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.1, 0.0}
    assert arguments.max_grad_norm == 0.5
    assert {trainer.lr_scheduler.lr_lambdas[0](step) for step in (0, 500, 999)} == {1.0}


class TestNextTokenCollator:
    def test_batch(self):
        batch = NextTokenCollator(SPECIAL, pad_to_multiple_of=4)(
            [{"input_ids": [2, 7, 3]}, {"input_ids": [2, 5, 6, 8, 3]}]
        )
        assert batch["input_ids"].tolist() == [[2, 7, 3, 0, 0, 0, 0, 0], [2, 5, 6, 8, 3, 0, 0, 0]]
        assert batch["labels"].tolist() == [[2, 7, 3, *[-100] * 5], [2, 5, 6, 8, 3, -100, -100, -100]]
        assert batch["attention_mask"].sum(1).tolist() == [3, 5]
        assert all(column.dtype == torch.int64 for column in batch.values())

    @pytest.mark.parametrize("row, message", [([], "row 1 has 0 tokens"), ([5] * 9, "row 1 has 9 tokens; .* 1 to 8")])
    def test_rows_that_do_not_fit(self, row, message):
        with pytest.raises(ValueError, match=message):
            NextTokenCollator(SPECIAL, max_length=8)([{"input_ids": [2, 3]}, {"input_ids": row}])


def test_a_recipe_may_start_from_a_stock_bert(tmp_path):
    from types import SimpleNamespace

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    stock = BertForMaskedLM(BertConfig(**sizes, intermediate_size=48, max_position_embeddings=16))
    stock.save_pretrained(tmp_path)
    recipe = SimpleNamespace(slug="performer", model={"name_or_path": str(tmp_path), "num_random_features": 12})
    made = PerformerTrainer.build_config(recipe, None)
    assert (made.num_random_features, made.intermediate_size, made.model_type) == (12, 48, "bestiary-performer")
    model = PerformerTrainer.build_model(recipe, made)
    assert type(model) is PerformerForPreTraining
    state = model.state_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(state[name], value), name
    assert all(value.isfinite().all() and value.any() for name, value in state.items() if "projection" in name)
