"""Task heads as mixins. A paper's head is two lines: `class XForMaskedLM(MaskedLMHead, XPreTrainedModel): ...`.

Each head builds the paper's base model through `build_encoder` and names its parameters as BERT does. Every loss takes
`num_items_in_batch`. Vocabulary logits are computed at labelled positions only; without labels they are computed
everywhere.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .dropout import Dropout
from .linear_cross_entropy import linear_cross_entropy_sum
from .losses import (
    IGNORE,
    LossSum,
    check_labels,
    cross_entropy_sum,
    mean_loss,
    sequence_classification_sum,
    span_sum,
)


class PredictionTransform(nn.Module):
    """LayerNorm(activation(W h + b)): (..., D) -> (..., E)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class LMPrediction(nn.Module):
    """Transform, then the word table transposed plus a free bias: (..., D) -> (..., V).

    `decoder.bias` is tied to `bias`.
    """

    def __init__(self, config):
        super().__init__()
        self.transform = PredictionTransform(config)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size), requires_grad=config.tie_word_embeddings)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))

    def loss_sum(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> LossSum:
        """Cross-entropy at the labelled rows; hidden_states (M, D), labels (M,) with -100 for rows to skip."""
        total = linear_cross_entropy_sum(self.transform(hidden_states), self.decoder.weight, self.decoder.bias, labels)
        return total, (labels != IGNORE).sum()


def labelled_rows(
    hidden_states: torch.Tensor, labels: torch.Tensor, max_per_sequence: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and labels at the labelled positions: (B, T, D), (B, T) -> (M, D), (M,).

    Under torch.compile the number of rows must be fixed: `max_per_sequence` rows a sequence are taken, labelled ones
    first, and the surplus keeps label -100 (None takes all T).

    Raises:
        ValueError: more labels in a sequence than that (looked at on CPU, outside torch.compile).
    """
    if not torch.compiler.is_compiling():
        kept = labels != IGNORE  # (B, T)
        if max_per_sequence is not None and labels.device.type == "cpu" and (kept.sum(1) > max_per_sequence).any():
            raise ValueError(
                f"{int(kept.sum(1).max())} labels in one sequence, but config.max_predictions_per_sequence is "
                f"{max_per_sequence}; under torch.compile the surplus would be lost: raise that number or mask less."
            )
        return hidden_states[kept], labels[kept]
    if max_per_sequence is None or max_per_sequence >= labels.shape[1]:
        return hidden_states.flatten(0, 1), labels.flatten()
    order = (labels == IGNORE).int().argsort(dim=1, stable=True)[:, :max_per_sequence]  # (B, P)
    rows = hidden_states.gather(1, order.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
    return rows.flatten(0, 1), labels.gather(1, order).flatten()


class Head:
    """Common part of all heads: the paper's base model under its prefix."""

    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.build_encoder(self.uses_pooler(config)))
        self.add_head(config)
        self.post_init()

    @staticmethod
    def uses_pooler(config) -> bool:
        """Whether the head reads the pooled first token."""
        return False

    def encode(self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs) -> ModelOutput:
        """Output of the base model; inputs that are None are not passed, since not every encoder knows them all."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        return self.base_model(**{name: value for name, value in given.items() if value is not None}, **kwargs)

    def add_head(self, config) -> None:
        """Create the head's modules."""
        raise NotImplementedError


class LanguageModelHead(Head):
    """What heads with `cls.predictions` share: the tie with the word table, resizing, the masked loss."""

    accepts_loss_kwargs = True
    sees_own_token: ClassVar[bool] = True
    """Whether the logits at a position depend on the token there. False: its likelihood needs no mask, and the class
    has `token_log_likelihoods`.
    """

    def add_head(self, config) -> None:
        self.cls = nn.Module()
        self.cls.predictions = LMPrediction(config)
        self._tied_weights_keys = {
            "cls.predictions.decoder.weight": f"{self.base_model_prefix}.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LMPrediction):
            init.zeros_(module.bias)

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def masked_lm_loss_sum(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> LossSum:
        """Masked-language-model loss of hidden states (B, T, D) at the positions where labels (B, T) are not -100."""
        check_labels(type(self).__name__, labels, self.config.vocab_size)
        rows, targets = labelled_rows(hidden_states, labels, self.config.max_predictions_per_sequence)
        return self.cls.predictions.loss_sum(rows, targets)


class MaskedLMHead(LanguageModelHead):
    """Masked language model (Devlin et al., 2018, section 3.1)."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """With `labels` (B, T; -100 = no loss) returns the loss and no logits, else logits (B, T, V)."""
        outputs = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        loss = logits = None
        if labels is None:
            logits = self.cls.predictions(outputs.last_hidden_state)
        else:
            loss = mean_loss(self.masked_lm_loss_sum(outputs.last_hidden_state, labels), num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@dataclass
class SentencePairPreTrainingOutput(ModelOutput):
    """Output of `PreTrainingHead`.

    loss (): weighted sum of the parts. mlm_loss (), sentence_loss (): the parts, each divided by its own count.
    prediction_logits (B, T, V): without labels only. seq_relationship_logits (B, 2).
    """

    loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    sentence_loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class PreTrainingHead(LanguageModelHead):
    """Masked language model plus a two-class decision on the sentence pair (Devlin et al., 2018, section 3.1)."""

    accepts_loss_kwargs = False  # one count cannot normalise two losses; BestiaryTrainer passes both
    output_class: type[SentencePairPreTrainingOutput] = SentencePairPreTrainingOutput

    @staticmethod
    def uses_pooler(config) -> bool:
        """Whether there is a decision on the sentence pair."""
        return True

    def token_losses(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs
    ) -> tuple[LossSum, dict[str, torch.Tensor]]:
        """Summed loss and number of the labelled tokens, and what else the output has of them; hidden_states
        (B, T, D), labels (B, T), and the other inputs of the encoder.
        """
        return self.masked_lm_loss_sum(hidden_states, labels), {}

    def loss_weights(self) -> dict[str, float]:
        """Weights of the parts `mlm` and `sentence` in the loss."""
        return {"mlm": 1.0, "sentence": 1.0}

    def add_head(self, config) -> None:
        super().add_head(config)
        if self.uses_pooler(config):
            self.cls.seq_relationship = nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        num_items_in_batch: dict[str, torch.Tensor | int] | None = None,
        **kwargs,
    ) -> SentencePairPreTrainingOutput:
        """`labels` (B, T; -100 = no loss) and `next_sentence_label` (B,; 1 = the second segment is random), each
        optional.

        `num_items_in_batch` holds the counts `mlm` (labelled tokens) and `sentence` (pairs) of the whole optimizer
        step.
        """
        outputs = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        counts = num_items_in_batch or {}
        losses, more, prediction_logits, pair_logits = {}, {}, None, None
        if labels is None:
            prediction_logits = self.cls.predictions(hidden_states)
        else:
            total, more = self.token_losses(hidden_states, labels, **kwargs)
            losses["mlm"] = mean_loss(total, counts.get("mlm"))
        if self.uses_pooler(self.config):
            pair_logits = self.cls.seq_relationship(outputs.pooler_output)  # (B, 2)
            if next_sentence_label is not None:
                check_labels(type(self).__name__, next_sentence_label, 2, "next_sentence_label")
                losses["sentence"] = mean_loss(
                    cross_entropy_sum(pair_logits, next_sentence_label), counts.get("sentence")
                )
        weights = self.loss_weights()
        return self.output_class(
            loss=sum(weights[name] * loss for name, loss in losses.items()) if losses else None,
            mlm_loss=losses.get("mlm"),
            sentence_loss=losses.get("sentence"),
            prediction_logits=prediction_logits,
            seq_relationship_logits=pair_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **more,
        )


class NextSentencePredictionHead(Head):
    """Two-class decision on the sentence pair alone."""

    @staticmethod
    def uses_pooler(config) -> bool:
        return True

    def add_head(self, config) -> None:
        self.cls = nn.Module()
        self.cls.seq_relationship = nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> NextSentencePredictorOutput:
        """`labels` (B,): 0 = the second segment follows the first, 1 = it is random. Logits (B, 2)."""
        outputs = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.cls.seq_relationship(outputs.pooler_output)
        loss = None
        if labels is not None:
            check_labels(type(self).__name__, labels, 2)
            loss = mean_loss(cross_entropy_sum(logits, labels), num_items_in_batch)
        return NextSentencePredictorOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def classifier_dropout(config) -> Dropout:
    """Dropout before a classification layer."""
    return Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class SequenceClassificationHead(Head):
    """Dropout and one linear layer on the pooled first token; regression, single-label or multi-label by
    `config.problem_type`.
    """

    @staticmethod
    def uses_pooler(config) -> bool:
        return True

    def add_head(self, config) -> None:
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def sequence_states(self, outputs) -> torch.Tensor:
        """The vector (B, D) that is classified."""
        return outputs.pooler_output

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """`labels` (B,) integer classes, (B,) or (B, C) floats for regression, (B, C) floats for multi-label.

        Logits (B, C).
        """
        outputs = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(self.sequence_states(outputs)))
        loss = None
        if labels is not None:
            loss = mean_loss(sequence_classification_sum(self.config, logits, labels), num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TokenClassificationHead(Head):
    """Dropout and one linear layer on every token."""

    def add_head(self, config) -> None:
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """`labels` (B, T), -100 = no loss. Logits (B, T, C)."""
        outputs = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(type(self).__name__, labels, self.config.num_labels)
            loss = mean_loss(cross_entropy_sum(logits, labels), num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class QuestionAnsweringHead(Head):
    """Start and end scores of an answer span on every token (Devlin et al., 2018, section 4.2)."""

    def add_head(self, config) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """`start_positions` and `end_positions` (B,); positions outside the sequence carry no loss.

        Logits (B, T) each. Those of padding are the smallest number: padding is no answer, and how far a batch is
        padded must not change the loss.
        """
        outputs = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)  # (B, T, 2)
        if attention_mask is not None and attention_mask.dim() == 2:
            logits = logits.masked_fill(attention_mask.unsqueeze(-1) == 0, torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = mean_loss(span_sum(start_logits, end_logits, start_positions, end_positions), num_items_in_batch)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MultipleChoiceHead(Head):
    """One score per choice from the pooled first token, softmax over the choices."""

    @staticmethod
    def uses_pooler(config) -> bool:
        return True

    def add_head(self, config) -> None:
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def sequence_states(self, outputs) -> torch.Tensor:
        """The vector (B * C, D) that is scored."""
        return outputs.pooler_output

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Inputs have a choice axis, `input_ids` (B, C, T); `labels` (B,) name the right choice. Logits (B, C)."""
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        batch, choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        flat = [
            None if given is None else given.flatten(0, 1)
            for given in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        outputs = self.encode(*flat, **kwargs)
        logits = self.classifier(self.dropout(self.sequence_states(outputs))).view(batch, choices)
        loss = None
        if labels is not None:
            check_labels(type(self).__name__, labels, choices)
            loss = mean_loss(cross_entropy_sum(logits, labels), num_items_in_batch)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
