"""Language-model heads of networks that may be causal: next-token prediction, generation, and either objective.

BERT's `cls.predictions` predicts in both, so a checkpoint of one objective loads into the classes of the other.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .heads import LanguageModelHead, MaskedLMHead
from .losses import LossSum, check_labels, mean_loss


class EitherLanguageModelHead(LanguageModelHead):
    """`cls.predictions` with or without BERT's transform, and the loss of the next token."""

    def add_head(self, config) -> None:
        super().add_head(config)
        if not config.prediction_transform:
            self.cls.predictions.transform = nn.Identity()

    def next_token_loss_sum(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> LossSum:
        """Cross-entropy of labels (B, T), -100 = no loss, each predicted from the state (B, T, D) one place before."""
        check_labels(type(self).__name__, labels, self.config.vocab_size)
        rows, targets = hidden_states[:, :-1], labels[:, 1:]
        if torch.compiler.is_compiling():
            return self.cls.predictions.loss_sum(rows.flatten(0, 1), targets.flatten())
        kept = targets != -100
        return self.cls.predictions.loss_sum(rows[kept], targets[kept])


class BidirectionalLMHead(EitherLanguageModelHead, MaskedLMHead):
    """Masked language model, which refuses a causal encoder."""

    def __init__(self, config):
        if config.is_decoder:
            raise ValueError(
                f"{type(self).__name__} predicts from both sides, but {type(config).__name__}.is_decoder is True; set "
                "is_decoder=False, or load the checkpoint into the class for causal language models."
            )
        super().__init__(config)


class CausalLMHead(EitherLanguageModelHead):
    """Next-token language model. The paper's class has transformers' `GenerationMixin` as its last parent.

    The configuration is copied and its `is_decoder` set.
    """

    _is_stateful = True  # for generate(): there is no way back from a state

    def __init__(self, config):
        config = copy.deepcopy(config)
        config.is_decoder = True
        super().__init__(config)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: generate() leaves the cache to the model."""
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """With `labels` (B, T; the ids themselves, -100 = no loss; shifted here) the loss and no logits, else logits.

        Logits are (B, T, V), of the last `logits_to_keep` tokens only if that is not 0.
        """
        outputs = self.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.cls.predictions(hidden_states[:, kept])
        else:
            loss = mean_loss(self.next_token_loss_sum(hidden_states, labels), num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@dataclass
class LanguageModelPretrainingOutput(ModelOutput):
    """Output of `LanguageModelPretrainingHead`.

    loss (). logits (B, T, V): without labels only. sequence_losses (B,): with labels in evaluation, the sum of the
    losses of each sequence.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    sequence_losses: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class LanguageModelPretrainingHead(EitherLanguageModelHead):
    """The objective that `config.is_decoder` asks for: masked tokens, or the next token."""

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
    ) -> LanguageModelPretrainingOutput:
        """With `labels` (B, T; -100 = no loss; a decoder's are shifted here) the loss and no logits, else logits
        (B, T, V).
        """
        outputs = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        loss_sum = self.next_token_loss_sum if self.config.is_decoder else self.masked_lm_loss_sum
        loss = logits = sequence_losses = None
        if labels is None:
            logits = self.cls.predictions(hidden_states)
        elif self.training or torch.compiler.is_compiling():
            loss = mean_loss(loss_sum(hidden_states, labels), num_items_in_batch)
        else:
            rows = zip(hidden_states.split(1), labels.split(1))
            totals, counts = map(torch.stack, zip(*(loss_sum(states, targets) for states, targets in rows)))
            loss = mean_loss((totals.sum(), counts.sum()), num_items_in_batch)
            sequence_losses = totals.detach()
        return LanguageModelPretrainingOutput(
            loss=loss,
            logits=logits,
            sequence_losses=sequence_losses,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
