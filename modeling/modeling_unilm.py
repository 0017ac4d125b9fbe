"""Unified Language Model Pre-training for Natural Language Understanding and Generation (UniLM).

Li Dong, Nan Yang, Wenhui Wang, Furu Wei, Xiaodong Liu, Yu Wang, Jianfeng Gao, Ming Zhou, Hsiao-Wuen Hon, 2019 (NeurIPS
2019), arXiv 1905.03197. Official code: microsoft/unilm, unilm-v1 and s2s-ft (MIT). BERT's network is a bidirectional,
left-to-right, right-to-left or sequence-to-sequence cloze model, by the mask of its attention and by segments alone.

What is easily got wrong, and how it is here:
* masks are additive, with the smallest number of the type (a block mask for flex): a boolean one is wrong in eager
  attention, and -inf gives NaN in rows that see nothing. Rows of padding see every real token; nothing reads them;
* every target row sees itself, its own [MASK];
* a batch without a next-sentence label has a next-sentence loss of 0, not NaN;
* epsilon of the LayerNorms is 1e-5; public configurations call it `layer_norm_epsilon` (see the converter);
* the decoder's weight is the word table itself, which is saved once;
* positions run over the real tokens of a packed row, wherever its padding is, and a target goes on where its source
  ends, so that left-padded and right-padded sources give the same;
* decoding keeps keys and values of the source, once for all beams of an example, and of the tokens written so far; the
  official decoder keeps inputs of layers and projects all of them at every step. The token that decoder inputs begin
  with is kept too and never seen, so that the cache counts tokens as that of any encoder-decoder;
* back pointers of the official beam search are floored; greedy search stops at the end of a target.

Differences from the paper and the official code:
* the switches of the v1 code that no published checkpoint uses (four position tables, four prediction transforms, two
  sets of projections, segments in the attention, gated feed-forward) are left out;
* `generate()` searches as transformers does. `official_beam_search` is the search of the official decoder, by
  `generate(..., custom_generate=official_beam_search)`, and `NgramBlock` its blocking of repeated n-grams;
* losses are divided by the number of predicted tokens; the official ones by that number + 1e-5;
* with `labels` alone `UniLMForConditionalGeneration` gives the loss of all target tokens, each under a [MASK] of its
  own that sees the tokens before it: what decoding goes by, and comparable with any encoder-decoder.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin, LogitsProcessor
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_unilm import UniLMConfig
from .layers.attention import EncoderAttention, EncoderSelfAttention, additive_mask, eager_attention_forward
from .layers.encoder import EncoderLayer, EncoderModel, EncoderPreTrainedModel
from .layers.heads import (
    LanguageModelHead,
    MaskedLMHead,
    MultipleChoiceHead,
    PreTrainingHead,
    QuestionAnsweringHead,
    SentencePairPreTrainingOutput,
    SequenceClassificationHead,
    TokenClassificationHead,
    labelled_rows,
)
from .layers.losses import IGNORE, LossSum, check_labels, mean_loss


BIDIRECTIONAL, LEFT_TO_RIGHT, RIGHT_TO_LEFT, SEQ2SEQ = range(4)
TASKS = ("bidirectional", "left_to_right", "right_to_left", "seq2seq")
"""Names of the tasks by number."""

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


# -------------------------------------------------------------------------------------------------------------- masks


def allowed_pairs(
    task_ids: torch.Tensor, num_tokens_a: torch.Tensor, order: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Which query (i) may see which key (j), bool (B, T, T).

    Bidirectional: every j. Left-to-right: j <= i. Right-to-left: j >= i. Sequence to sequence: j <= i, or j in the
    source. Padding is never seen, and sees every real token, since a row must see something.

    Args:
        task_ids: (B,), the numbers of `TASKS`.
        num_tokens_a: (B,), tokens of [CLS] A [SEP].
        order: (B, T), place of each token among the real ones of its row.
        real: (B, T) bool.
    """
    query, key = order[:, :, None], order[:, None, :]  # (B, T, 1), (B, 1, T)
    task, source = task_ids[:, None, None], num_tokens_a[:, None, None]
    allowed = _allows(task, source, query, key)
    return real[:, None, :] & (allowed | ~real[:, :, None])


def _allows(task: torch.Tensor, source: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    earlier = (task == LEFT_TO_RIGHT) & (key <= query)
    later = (task == RIGHT_TO_LEFT) & (key >= query)
    target = (task == SEQ2SEQ) & ((key < source) | (key <= query))
    return (task == BIDIRECTIONAL) | earlier | later | target


def places(real: torch.Tensor) -> torch.Tensor:
    """Place of every token among the real ones of its row, (B, T); padding has that of the token before it, or 0."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


def segments(
    config: UniLMConfig, task_ids: torch.Tensor, num_tokens_a: torch.Tensor, order: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Segment of every token, (B, T): 0 and 1 for A and B of the bidirectional task, 2 left-to-right, 3 right-to-left,
    source and target as configured; 0 at padding. A table of two segments has 0 and 1 for all tasks.
    """
    second = order >= num_tokens_a[:, None]
    pairs = torch.tensor(
        [[0, 1], [2, 2], [3, 3], [config.source_type_id, config.target_type_id]]
        if config.type_vocab_size > 3
        else [[0, 1], [0, 1], [0, 1], [config.source_type_id, config.target_type_id]],
        device=order.device,
    )
    return pairs[task_ids[:, None], second.long()] * real


# ----------------------------------------------------------------------------------------------------------- attention


@dataclass
class DecodingStep:
    """What the attention of all layers needs for rows that go on after a source whose keys and values are there.

    Attributes:
        source: keys and values (B, H, S, d) of every layer; B examples.
        source_mask: additive, (B, 1, 1, S).
        cache: of the tokens written so far, which grows by the new ones; N = B * beams rows. None if all are new.
        written: how many of the rows are new tokens; the others, after them, are [MASK]s and are not kept.
        mask: additive, (1 or N, 1, R, W + R) over the W tokens in the cache and the R rows.
    """

    source: tuple[KeysAndValues, ...]
    source_mask: torch.Tensor
    cache: Cache | None
    written: int
    mask: torch.Tensor

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """softmax over source, cache and own rows; query, key, value (N, H, R, d) -> context (N, R, H, d) and the
        probabilities (N, H, R, S + W + R).

        Beams of one example are rows of one product with its source, which therefore is there once.
        """
        source_key, source_value = self.source[layer]
        if self.cache is not None:
            kept = self.cache.update(key[:, :, : self.written], value[:, :, : self.written], layer)
            key, value = (torch.cat((old, new[:, :, self.written :]), 2) for old, new in zip(kept, (key, value)))
        examples, rows = source_key.shape[0], query.shape[2]
        beams = query.shape[0] // examples

        def folded(states: torch.Tensor) -> torch.Tensor:  # (N, H, R, x) -> (B, H, beams * R, x)
            return states.unflatten(0, (examples, beams)).transpose(1, 2).flatten(2, 3)

        def unfolded(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(2, (beams, rows)).transpose(1, 2).flatten(0, 1)

        query = query * scale
        of_source = unfolded(folded(query) @ source_key.mT + self.source_mask)  # (N, H, R, S)
        of_target = query @ key.mT + self.mask  # (N, H, R, W + R)
        probabilities = torch.cat((of_source, of_target), -1).softmax(-1)
        on_source, on_target = probabilities.split((source_key.shape[2], key.shape[2]), -1)
        context = unfolded(folded(on_source) @ source_value) + on_target @ value
        return context.transpose(1, 2), probabilities


class UniLMSelfAttention(EncoderSelfAttention):
    """Self-attention that can give its keys and values away, or go on after those of a source."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        collected: list[KeysAndValues] | None = None,
        step: DecodingStep | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the probabilities if the backend gives them. Keys and values of all tokens are
        appended to `collected`. With `step` the rows of a decoding step attend.
        """
        query, key, value = self.project(hidden_states)
        if step is not None:
            context, probabilities = step.attend(self.layer_idx, query, key, value, self.score_scale())
            return context.flatten(-2), probabilities
        if collected is not None:
            collected.append((key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout_prob if self.training else 0.0
        context, probabilities = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.score_scale(), **kwargs
        )
        return context.flatten(-2), probabilities


class UniLMAttention(EncoderAttention):
    """Post-norm attention of UniLM."""

    self_class = UniLMSelfAttention


class ResidualLinear(nn.Linear):
    """The linear map of a sub-layer onto the residual stream; the number of its layer sets its initial values."""

    def __init__(self, input_size: int, output_size: int, layer_idx: int):
        super().__init__(input_size, output_size)
        self.layer_idx = layer_idx


class UniLMLayer(EncoderLayer):
    """Post-norm layer of UniLM."""

    attention_class = UniLMAttention

    def __init__(self, config: UniLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        for part, size in ((self.attention.output, config.hidden_size), (self.output, config.intermediate_size)):
            part.dense = ResidualLinear(size, config.hidden_size, layer_idx)


# -------------------------------------------------------------------------------------------------------------- models


class UniLMPreTrainedModel(EncoderPreTrainedModel):
    """Base of the UniLM classes."""

    config: UniLMConfig
    base_model_prefix = "bert"
    _can_record_outputs = {"hidden_states": UniLMLayer, "attentions": UniLMSelfAttention}

    def build_encoder(self, add_pooling_layer: bool) -> "UniLMModel":
        return UniLMModel(self.config, add_pooling_layer)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal, not cut; what layer l = 0, 1, ... adds to the residual stream is divided by sqrt(2(l + 1))."""
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            depth = math.sqrt(2 * (module.layer_idx + 1)) if isinstance(module, ResidualLinear) else 1
            init.normal_(module.weight, std=self.config.initializer_range / depth)


class Reader:
    """First base of the classes that only read: the configuration of one that writes is copied, and says so."""

    def __init__(self, config: UniLMConfig, *args, **kwargs):
        if config.is_encoder_decoder:
            config = copy.deepcopy(config)
            config.is_encoder_decoder = False
        super().__init__(config, *args, **kwargs)


class UniLMModel(Reader, EncoderModel, UniLMPreTrainedModel):
    """The UniLM encoder: BERT, or with `task_ids` one of its four language models."""

    layer_class = UniLMLayer

    def _worth_unpadding(self, attention_mask: Any, recording: dict) -> bool:
        whole = "collected" not in recording and "step" not in recording
        return (
            isinstance(attention_mask, torch.Tensor) and whole and super()._worth_unpadding(attention_mask, recording)
        )

    def task_mask(
        self, task_ids: torch.Tensor, num_tokens_a: torch.Tensor, order: torch.Tensor, real: torch.Tensor
    ) -> Any:
        """The mask of `allowed_pairs` in the form of the attention backend."""
        if self.config._attn_implementation != "flex_attention":
            return additive_mask(allowed_pairs(task_ids, num_tokens_a, order, real), self.dtype).unsqueeze(1)

        def allows(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            pair = _allows(task_ids[batch], num_tokens_a[batch], order[batch, query], order[batch, key])
            return real[batch, key] & (pair | ~real[batch, query])

        return create_block_mask(allows, len(order), None, order.shape[1], order.shape[1], device=order.device)

    def dense_mask(self, allowed: torch.Tensor) -> Any:
        """A mask (B, T, T) bool in the form of the attention backend."""
        if self.config._attn_implementation != "flex_attention":
            return additive_mask(allowed, self.dtype).unsqueeze(1)
        batch, length, _ = allowed.shape
        return create_block_mask(
            lambda row, head, query, key: allowed[row, query, key], batch, None, length, length, device=allowed.device
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        num_tokens_a: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode `input_ids` (B, T) or `inputs_embeds` (B, T, E); see `EncoderModel.forward`.

        `task_ids` (B,) choose one of `TASKS` for every row, `num_tokens_a` (B,) say how many tokens [CLS] A [SEP] has
        (by default all). Segments then follow from the task and positions count the real tokens, unless they are
        given. Without `task_ids` this is BERT.

        Raises:
            ValueError: a task that does not exist, `num_tokens_a` without `task_ids`, a mask that is not (B, T), or as
                in `EncoderModel.forward`.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if task_ids is None:
            if num_tokens_a is not None:
                raise ValueError(f"{type(self).__name__}: num_tokens_a belongs to task_ids, which are not given.")
            return super().forward(*inputs, **kwargs)
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        self.check_tasks(task_ids, attention_mask, shape)
        real = (
            torch.ones(shape, dtype=torch.bool, device=task_ids.device)
            if attention_mask is None
            else attention_mask != 0
        )
        order = places(real)
        num_tokens_a = real.sum(1) if num_tokens_a is None else num_tokens_a
        return super().forward(
            input_ids,
            self.task_mask(task_ids, num_tokens_a, order, real),
            segments(self.config, task_ids, num_tokens_a, order, real) if token_type_ids is None else token_type_ids,
            order * real if position_ids is None else position_ids,
            inputs_embeds,
            **kwargs,
        )

    def check_tasks(self, task_ids: torch.Tensor, attention_mask: torch.Tensor | None, shape: torch.Size) -> None:
        """`ValueError` for a mask that is not (B, T); on CPU also for tasks that do not exist."""
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: with task_ids attention_mask must be {tuple(shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )
        if torch.compiler.is_compiling() or task_ids.device.type != "cpu" or task_ids.numel() == 0:
            return
        if not 0 <= int(task_ids.min()) <= int(task_ids.max()) < len(TASKS):
            raise ValueError(
                f"{type(self).__name__}: task_ids must be in [0, {len(TASKS)}), the numbers of {', '.join(TASKS)}; "
                f"got {task_ids.tolist()}."
            )

    def real_tokens(self, sources: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Which tokens of sources (B, S) or (B, S, E) are real, (B, S) bool; `ValueError` for another shape, on CPU
        also for an empty source.
        """
        shape = sources.shape[:2]
        if attention_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=sources.device)
        if attention_mask.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: attention_mask must be {tuple(shape)} as the sources, got "
                f"{tuple(attention_mask.shape)}."
            )
        real = attention_mask != 0
        if real.device.type == "cpu" and not torch.compiler.is_compiling() and not real.any(1).all():
            raise ValueError(f"{type(self).__name__}: source {int(real.any(1).long().argmin())} has no tokens.")
        return real

    def check_room(self, source: int, target: int) -> None:
        """`ValueError` unless source and target fit into the position table together."""
        if source + target > self.config.max_position_embeddings:
            raise ValueError(
                f"{type(self).__name__}: a source of {source} and a target of {target} tokens, but "
                f"config.max_position_embeddings is {self.config.max_position_embeddings} for both; shorten the "
                "source (max_source_length) or the target (max_new_tokens)."
            )


@dataclass
class UniLMPreTrainingOutput(SentencePairPreTrainingOutput):
    """Output of `UniLMForPreTraining`. task_losses, task_counts (4,): cloze losses summed by task, and their tokens;
    with labels and `task_ids`, outside torch.compile.
    """

    task_losses: torch.Tensor | None = None
    task_counts: torch.Tensor | None = None


class UniLMForPreTraining(Reader, PreTrainingHead, UniLMPreTrainedModel):
    """The cloze loss of any task, and next-sentence prediction for the pairs that have a label.

    Besides the inputs of `PreTrainingHead` it takes `task_ids` (B,) and `num_tokens_a` (B,); see `UniLMModel.forward`.
    """

    output_class = UniLMPreTrainingOutput

    def loss_weights(self) -> dict[str, float]:
        return {"mlm": self.config.masked_lm_loss_weight, "sentence": self.config.next_sentence_loss_weight}

    def token_losses(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, task_ids: torch.Tensor | None = None, **kwargs
    ) -> tuple[LossSum, dict[str, torch.Tensor]]:
        """As in `PreTrainingHead`, task by task if there are `task_ids` (B,)."""
        if task_ids is None or torch.compiler.is_compiling():
            return super().token_losses(hidden_states, labels, **kwargs)
        groups = [task_ids == task for task in range(len(TASKS))]
        parts = [self.masked_lm_loss_sum(hidden_states[rows], labels[rows]) for rows in groups]
        sums, numbers = (torch.stack(values) for values in zip(*parts))
        return (sums.sum(), numbers.sum()), {"task_losses": sums.detach(), "task_counts": numbers}


class UniLMForMaskedLM(Reader, MaskedLMHead, UniLMPreTrainedModel):
    """UniLM as a masked language model; `task_ids` and `num_tokens_a` may be given."""


class UniLMForSequenceClassification(Reader, SequenceClassificationHead, UniLMPreTrainedModel):
    """UniLM with a classification or regression layer on the pooled first token."""


class UniLMForTokenClassification(Reader, TokenClassificationHead, UniLMPreTrainedModel):
    """UniLM with a classification layer on every token."""


class UniLMForQuestionAnswering(Reader, QuestionAnsweringHead, UniLMPreTrainedModel):
    """UniLM with start and end scores of an answer span."""


class UniLMForMultipleChoice(Reader, MultipleChoiceHead, UniLMPreTrainedModel):
    """UniLM scoring several choices."""


# ---------------------------------------------------------------------------------------------------------- generation


@dataclass
class UniLMSourceOutput(BaseModelOutput):
    """An encoded source. source_states: keys and values (B, H, S, d) of every layer, which beams share and are
    therefore not repeated for each of them. longest: tokens of the longest source.
    """

    source_states: tuple[KeysAndValues, ...] | None = None
    source_attention_mask: Any | None = None
    longest: int | None = None


def smoothed_cloze_sum(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float, pad_token_id: int | None
) -> LossSum:
    """Sum of KL(q || softmax(logits)), with q = 1 - s on the label, s / (V - 2) on all others but padding, 0 there.

    logits (M, V), labels (M,) without -100. A label that is padding gives 0, and counts.
    """
    log_probs = logits.float().log_softmax(-1)
    if smoothing == 0:
        losses = -log_probs.gather(1, labels[:, None]).squeeze(1)
    else:
        rest = smoothing / (logits.shape[-1] - 2)
        total = log_probs.sum(-1) if pad_token_id is None else log_probs.sum(-1) - log_probs[:, pad_token_id]
        gold = log_probs.gather(1, labels[:, None]).squeeze(1)
        entropy = (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(rest)
        losses = entropy - (1 - smoothing - rest) * gold - rest * total
    if pad_token_id is not None:
        losses = losses.masked_fill(labels == pad_token_id, 0.0)
    return losses.sum(), torch.full((), len(labels), device=labels.device)


class UniLMSourceEncoder(nn.Module):
    """The pass over sources, by the same parameters as that over targets: what `get_encoder()` gives."""

    main_input_name = "input_ids"

    def __init__(self, bert: UniLMModel):
        super().__init__()
        self.bert = bert

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> UniLMSourceOutput:
        """Encode sources (B, S) or (B, S, E), padded on either side, and keep the keys and values of all layers.

        Raises:
            ValueError: a mask that is not (B, S), an empty source, or one longer than the position table.
        """
        sources = inputs_embeds if input_ids is None else input_ids
        if sources is None:
            raise ValueError(f"{type(self).__name__} needs input_ids or inputs_embeds, the source.")
        real = self.bert.real_tokens(sources, attention_mask)
        longest = int(real.sum(1).max())
        self.bert.check_room(longest, 0)
        collected: list[KeysAndValues] = []
        outputs = self.bert(
            input_ids,
            real.long(),
            self.bert.config.source_type_id * real.long(),
            places(real) * real,
            inputs_embeds,
            collected=collected,
            **{name: value for name, value in kwargs.items() if name.startswith("output_")},
        )
        return UniLMSourceOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            source_states=tuple(collected),
            source_attention_mask=(real,),
            longest=longest,
        )


class Writer(LanguageModelHead):
    """Language-model head of a class that writes, with a configuration of its own that says so."""

    def __init__(self, config: UniLMConfig):
        for name in ("mask_token_id", "decoder_start_token_id"):
            value = getattr(config, name)
            if value is None or not 0 <= value < config.vocab_size:
                raise ValueError(
                    f"{type(config).__name__}.{name} must be in [0, vocab_size={config.vocab_size}) to write targets, "
                    f"got {value!r}; take it from the tokenizer."
                )
        config = copy.deepcopy(config)
        config.is_encoder_decoder = False  # as long as the encoder is built, which shares it
        super().__init__(config)
        self.config.is_encoder_decoder = True


class UniLMForConditionalGeneration(Writer, UniLMPreTrainedModel, GenerationMixin):
    """UniLM that reads a source and writes a target, with the interface of any encoder-decoder.

    Sources are [CLS] text [SEP], targets text [SEP]. Decoder inputs begin with `config.decoder_start_token_id`, which
    stands for nothing: the next token is predicted under a [MASK] after the tokens written so far.
    """

    _keys_to_ignore_on_load_unexpected = [
        *UniLMPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"seq_relationship",
    ]

    def get_encoder(self, modality: str | None = None) -> UniLMSourceEncoder:
        """The pass over the source, as `generate()` calls it."""
        return UniLMSourceEncoder(self.bert)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) one place later, after the token that a target begins with."""
        start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        shifted = torch.cat((start, labels[:, :-1]), 1)
        return shifted.masked_fill(shifted == IGNORE, self.config.pad_token_id or 0)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, for a target that fits behind its source, and for caches that grow.

        Raises:
            ValueError: source and longest target do not fit into the position table together, or a static cache.
        """
        source = self.check_source(model_kwargs["encoder_outputs"])
        self.bert.check_room(source.longest, generation_config.max_length - 1)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.is_compileable:
            raise ValueError(f"{type(self).__name__} writes with a cache that grows; leave cache_implementation out.")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cloze_input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        encoder_outputs: UniLMSourceOutput | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Predict targets of the sources `input_ids` (B, S) with `attention_mask` (B, S).

        * `labels` (B, T; -100 = no loss) alone: loss of every token given the ones before it.
        * `cloze_input_ids` (B, T), targets of which some tokens were replaced, and `labels` at these places: the loss
          of fine-tuning, smoothed by `config.label_smoothing`. `decoder_attention_mask` (B, T) tells its padding; by
          default that is the padding token.
        * `decoder_input_ids` (B, T), from the token that targets begin with: logits of the next token after each, or
          of the last `logits_to_keep`. With `past_key_values`, which `use_cache` makes, only those that are new; rows
          may then be several times the sources. `decoder_attention_mask` (B, all so far) is 0 at padding, which may
          stand on either side.

        `inputs_embeds` (B, S, E) may stand for `input_ids`, but not with `cloze_input_ids`. `token_type_ids` of a
        tokenizer are not read: sources and targets have the segments of the configuration.

        Returns:
            loss (). logits (B, T, V), not in training with labels. With `output_hidden_states` and
            `output_attentions` the decoder's are those of the [MASK]s (with `cloze_input_ids` of the target), whose
            attention goes over source, target and [MASK]s.

        Raises:
            ValueError: no source, or an empty one; source and target together longer than the position table; masks
                of other shapes; labels out of range; an encoded source of another model.
        """
        if labels is not None:
            check_labels(type(self).__name__, labels, self.config.vocab_size)
        sources = inputs_embeds if input_ids is None and cloze_input_ids is None else input_ids
        if sources is None and (encoder_outputs is None or cloze_input_ids is not None):
            raise ValueError(f"{type(self).__name__} needs input_ids, the source.")
        if cloze_input_ids is not None:
            packed = (input_ids, attention_mask, cloze_input_ids, decoder_attention_mask)
            return self.cloze(*packed, labels, num_items_in_batch, kwargs)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if decoder_attention_mask is None:  # up to the last label
                decoder_attention_mask = (labels != IGNORE).flip(1).cumsum(1).flip(1) > 0
        if decoder_input_ids is None:
            sources = sources if encoder_outputs is None else encoder_outputs[0]
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.full((len(sources), 1), start, dtype=torch.long, device=sources.device)
        decoder = (decoder_input_ids, decoder_attention_mask)
        at_once = encoder_outputs is None and past_key_values is None and not (use_cache and labels is None)
        if at_once and inputs_embeds is None:
            states, result = self.teacher_forced(input_ids, attention_mask, *decoder, kwargs)
            return self.predicted(result, states, labels, logits_to_keep, num_items_in_batch)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask, inputs_embeds, **kwargs)
        source = self.check_source(encoder_outputs)
        if past_key_values is None and use_cache:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        keep = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        states, result = self.next_states(source, *decoder, past_key_values, keep, kwargs)
        result.past_key_values = past_key_values
        return self.predicted(result, states, labels, logits_to_keep, num_items_in_batch)

    def predicted(
        self,
        result: Seq2SeqLMOutput,
        states: torch.Tensor,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Seq2SeqLMOutput:
        """The result with logits of the [MASK] states (B, T, D), and the loss of labels (B, T)."""
        if labels is not None:
            result.loss = mean_loss(self.cls.predictions.loss_sum(*labelled_rows(states, labels)), num_items_in_batch)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            result.logits = self.cls.predictions(states[:, kept])
        return result

    def check_source(self, source: Any) -> UniLMSourceOutput:
        """`ValueError` unless the source was encoded by a UniLM."""
        if not isinstance(source, UniLMSourceOutput) or source.source_states is None:
            raise ValueError(
                f"{type(self).__name__}: encoder_outputs must be what get_encoder() gives, with keys and values of "
                f"all layers, got a {type(source).__name__}."
            )
        return source

    # The three passes

    def cloze(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cloze_input_ids: torch.Tensor,
        target_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        kwargs: dict[str, Any],
    ) -> Seq2SeqLMOutput:
        """Packed rows [CLS] source [SEP] target [SEP], of whose target some tokens were replaced (the paper's
        fine-tuning).
        """
        source = self.bert.real_tokens(input_ids, attention_mask)
        target = cloze_input_ids != self.config.pad_token_id if target_mask is None else target_mask != 0
        self.check_packed(source, target)
        real = torch.cat((source, target), 1)
        outputs = self.bert(
            torch.cat((input_ids, cloze_input_ids), 1),
            real.long(),
            task_ids=torch.full_like(input_ids[:, 0], SEQ2SEQ),
            num_tokens_a=source.sum(1),
            position_ids=places(real) * real,
            **kwargs,
        )
        result = sides(outputs, input_ids.shape[1], cloze_input_ids.shape[1])
        states = outputs.last_hidden_state[:, input_ids.shape[1] :]  # (B, T, D)
        if labels is None:
            result.logits = self.cls.predictions(states)
            return result
        if self.config.label_smoothing == 0:
            total = self.cls.predictions.loss_sum(*labelled_rows(states, labels))
        else:
            rows, targets = labelled_rows(states, labels)
            kept = targets != IGNORE  # all are, outside torch.compile
            total = smoothed_cloze_sum(
                self.cls.predictions(rows[kept]), targets[kept], self.config.label_smoothing, self.config.pad_token_id
            )
        result.loss = mean_loss(total, num_items_in_batch)
        return result

    def check_packed(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """`UniLMModel.check_room` of rows of real tokens, (B, S) and (B, T)."""
        if source.shape[1] + target.shape[1] <= self.config.max_position_embeddings or torch.compiler.is_compiling():
            return
        lengths = torch.stack((source.sum(1), target.sum(1).expand(len(source))))  # (2, B)
        self.bert.check_room(*lengths[:, lengths.sum(0).argmax()].tolist())

    def teacher_forced(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        decoder_input_ids: torch.Tensor,
        decoder_attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Seq2SeqLMOutput]:
        """States (B, T, D) of a [MASK] after each decoder input, in one pass over source, inputs and [MASK]s."""
        source = self.bert.real_tokens(input_ids, attention_mask)
        batch, length, number = *input_ids.shape, decoder_input_ids.shape[1]
        real = self.real_inputs(decoder_input_ids, decoder_attention_mask, number)  # (1 or B, T)
        self.check_packed(source, real)
        order = (real.long().cumsum(1) - 1).expand(batch, -1)
        begin = source.sum(1, keepdim=True)  # (B, 1)
        positions = torch.cat(
            (places(source) * source, begin + (order - 1).clamp(min=0), begin + order.clamp(min=0)), 1
        )
        masks = torch.full_like(decoder_input_ids, self.config.mask_token_id)
        # source rows see the source; inputs and [MASK]s see it, the inputs up to their own place, and themselves
        rows = length + 2 * number
        to_inputs = nn.functional.pad(seen_inputs(order, real, torch.cat((order, order), 1)), (0, 0, length, 0))
        allowed = torch.cat(
            (source[:, None].expand(-1, rows, -1), to_inputs, torch.zeros_like(to_inputs)), 2
        ) | torch.eye(rows, dtype=torch.bool, device=source.device)  # (B, S + 2T, S + 2T)
        types = torch.full_like(positions, self.config.target_type_id)
        types[:, :length] = self.config.source_type_id
        outputs = self.bert(
            torch.cat((input_ids, decoder_input_ids, masks), 1),
            self.bert.dense_mask(allowed),
            types,
            positions,
            **kwargs,
        )
        return outputs.last_hidden_state[:, -number:], sides(outputs, length, number)

    def real_inputs(
        self, decoder_input_ids: torch.Tensor, decoder_attention_mask: torch.Tensor | None, number: int
    ) -> torch.Tensor:
        """Which of `number` decoder inputs, old and new, are real: (1, number) or (N, number) bool."""
        if decoder_attention_mask is None:
            return torch.ones(1, number, dtype=torch.bool, device=decoder_input_ids.device)
        if decoder_attention_mask.shape != (len(decoder_input_ids), number):
            raise ValueError(
                f"{type(self).__name__}: decoder_attention_mask must be {(len(decoder_input_ids), number)}, for all "
                f"decoder inputs with those in the cache, got {tuple(decoder_attention_mask.shape)}."
            )
        return decoder_attention_mask != 0

    def next_states(
        self,
        source: UniLMSourceOutput,
        decoder_input_ids: torch.Tensor,
        decoder_attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        keep: int,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Seq2SeqLMOutput]:
        """States of a [MASK] after each new decoder input, or after the last `keep`, given the cache, which grows."""
        cache = past_key_values
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        (of_source,) = source.source_attention_mask  # (B, S)
        held = 0 if cache is None else cache.get_seq_length()
        batch, number = decoder_input_ids.shape
        if batch == 0 or batch % len(of_source):
            raise ValueError(
                f"{type(self).__name__}: {batch} rows of decoder inputs for {len(of_source)} sources; give every "
                "source equally many, one after the other."
            )
        self.bert.check_room(source.longest, held + number)
        real = self.real_inputs(decoder_input_ids, decoder_attention_mask, held + number)
        order = real.long().cumsum(1) - 1  # (1 or N, W + R)
        new = order[:, held:]
        masked = new[:, -keep:]  # all with 0
        masks = masked.shape[1]
        itself = torch.eye(masks, dtype=torch.bool, device=order.device)
        itself = nn.functional.pad(itself, (0, 0, number, 0)).expand(len(order), -1, -1)
        allowed = torch.cat((seen_inputs(order, real, torch.cat((new, masked), 1)), itself), 2)
        source_mask = additive_mask(of_source, self.dtype)[:, None, None]  # (B, 1, 1, S)
        mask = additive_mask(allowed, self.dtype).unsqueeze(1)
        step = DecodingStep(source.source_states, source_mask, cache, number, mask)
        begin = of_source.sum(1, keepdim=True).repeat_interleave(batch // len(of_source), 0)  # (N, 1)
        fill = torch.full_like(decoder_input_ids[:, :1], self.config.mask_token_id).expand(-1, masks)
        ids = torch.cat((decoder_input_ids, fill), 1)
        outputs = self.bert(
            ids,
            token_type_ids=torch.full_like(ids, self.config.target_type_id),
            position_ids=begin + torch.cat(((new - 1).clamp(min=0), masked.clamp(min=0)), 1),
            step=step,
            **kwargs,
        )
        result = sides(outputs, 0, masks)
        result.encoder_last_hidden_state = source.last_hidden_state
        result.encoder_hidden_states, result.encoder_attentions = source.hidden_states, source.attentions
        return outputs.last_hidden_state[:, number:], result


def seen_inputs(order: torch.Tensor, real: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Which decoder inputs, the `order`-th (N, K) of their rows, queries that stand after the `query`-th (N, Q) see:
    (N, Q, K) bool. What is not `real` (N, K) is never seen, nor is the first, which a target begins with.
    """
    return (real & (order > 0))[:, None, :] & (order[:, None, :] <= query[:, :, None])


def sides(outputs: ModelOutput, source: int, target: int) -> Seq2SeqLMOutput:
    """States and attention of the first `source` rows as the encoder's, of the last `target` rows as the decoder's."""
    result = Seq2SeqLMOutput()
    if outputs.hidden_states is not None:
        result.encoder_hidden_states = tuple(states[:, :source] for states in outputs.hidden_states)
        result.decoder_hidden_states = tuple(states[:, -target:] for states in outputs.hidden_states)
    if outputs.attentions is not None:
        result.encoder_attentions = tuple(part[:, :, :source, :source] for part in outputs.attentions)
        result.decoder_attentions = tuple(part[:, :, -target:] for part in outputs.attentions)
    return result


# ------------------------------------------------------------------------------------------ the official beam search


@dataclass
class OfficialBeamOutput(GenerateBeamEncoderDecoderOutput):
    """Output of `official_beam_search`. frame_scores, frame_tokens, frame_pointers (B, L, K): of every step the
    summed log-probabilities, the tokens, and the beams of the step before that they go on from.
    """

    frame_scores: torch.Tensor | None = None
    frame_tokens: torch.Tensor | None = None
    frame_pointers: torch.Tensor | None = None


FINISHED = -10000.0
"""What the official code adds to the scores of beams that have ended."""


class NgramBlock(LogitsProcessor):
    """No n-gram of a target twice, but for n-grams with an exempt token, such as a full stop: the ignore set of the
    official decoder. `model.generate(source, logits_processor=[NgramBlock(3, exempt=[119])])`; without exempt tokens
    it is `no_repeat_ngram_size=3`.

    Args:
        size: n.
        exempt: tokens whose n-grams may come again.
    """

    def __init__(self, size: int, exempt: Iterable[int] = ()):
        if size < 1:
            raise ValueError(f"{type(self).__name__}.size must be at least 1, got {size}; the official decoder has 3.")
        self.size, self.exempt = size, tuple(exempt)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (N, V) with -inf at tokens that would repeat an n-gram of `input_ids` (N, T) after the start."""
        written = input_ids[:, 1:]
        if written.shape[1] < self.size:
            return scores
        grams = written.unfold(1, self.size, 1)  # (N, T - n, n)
        tail = written[:, written.shape[1] - self.size + 1 :]  # (N, n - 1)
        repeated = (grams[..., :-1] == tail[:, None]).all(-1)
        repeated &= ~torch.isin(grams, torch.tensor(self.exempt, dtype=torch.long, device=grams.device)).any(-1)
        blocked = torch.zeros_like(scores).scatter_add_(1, grams[..., -1], repeated.to(scores.dtype))
        return scores.masked_fill(blocked > 0, -math.inf)


@torch.no_grad()
def official_beam_search(
    model: UniLMForConditionalGeneration,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs,
) -> Any:
    """The beam search of the official decoder: `model.generate(source, custom_generate=official_beam_search,
    num_beams=5, length_penalty=1.0, no_repeat_ngram_size=3)`.

    An ended hypothesis stays in the beam, with continuations at -10000. In every step the K best tokens of each beam
    compete. The answer is the best of all hypotheses that ended, in any step, or stood in the last one, by
    score / ((5 + length) / 6)^alpha with alpha = `length_penalty` and the end counted. Processors of `generate()`
    (n-gram blocking, shortest length, forbidden words) apply to log-probabilities.

    Returns:
        Targets (B, L) after the token that they begin with; with `return_dict_in_generate` an `OfficialBeamOutput`.

    Raises:
        ValueError: sampling, or more than one target of a source.
    """
    if generation_config.do_sample or generation_config.num_return_sequences != 1:
        raise ValueError(
            "official_beam_search gives the best target of every source; leave out do_sample and num_return_sequences."
        )
    beams, pad = generation_config.num_beams, generation_config._pad_token_tensor
    ends = generation_config._eos_token_tensor
    examples = len(input_ids) // beams
    first = torch.arange(examples, device=input_ids.device)[:, None] * beams  # row of the first beam of each example
    finished = torch.zeros(examples, beams, dtype=torch.bool, device=input_ids.device)
    scores = torch.zeros(examples, beams, device=input_ids.device)
    frames: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    sequences = input_ids
    while not frames or not stopping_criteria(sequences, None).all():
        inputs = model.prepare_inputs_for_generation(
            sequences,
            next_sequence_length=1 if frames and model_kwargs["use_cache"] else None,
            is_first_iteration=not frames,
            **model_kwargs,
        )
        outputs = model(**inputs)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=True)
        log_probs = outputs.logits[:, -1].float().log_softmax(-1)
        log_probs = logits_processor(sequences, log_probs).view(examples, beams, -1)  # (B, K, V)
        values, tokens = log_probs.topk(beams, -1)  # (B, K, K)
        if not frames:  # all beams are the same
            scores, tokens = values[:, 0], tokens[:, 0]
            pointers = torch.zeros_like(tokens)
        else:
            values = values + (scores + finished * FINISHED)[..., None]
            scores, chosen = values.flatten(1).topk(beams, -1)
            pointers = torch.div(chosen, beams, rounding_mode="floor")
            tokens = tokens.flatten(1).gather(1, chosen)
        finished = torch.isin(tokens, ends) if ends is not None else torch.zeros_like(finished)
        frames.append((scores, tokens, pointers))
        rows = (first + pointers).flatten()
        sequences = torch.cat((sequences[rows], tokens.reshape(-1, 1)), 1)
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"].reorder_cache(rows)
    all_scores, all_tokens, all_pointers = (torch.stack(part, 1) for part in zip(*frames))
    answers, best = _best_of_frames(all_scores, all_tokens, all_pointers, ends, generation_config.length_penalty)
    width = max(map(len, answers))
    fill = 0 if pad is None else int(pad)
    padded = torch.tensor([answer + [fill] * (width - len(answer)) for answer in answers], device=input_ids.device)
    result = torch.cat((input_ids[::beams], padded), 1)
    if not generation_config.return_dict_in_generate:
        return result
    return OfficialBeamOutput(
        sequences=result,
        sequences_scores=best,
        frame_scores=all_scores,
        frame_tokens=all_tokens,
        frame_pointers=all_pointers,
    )


def _best_of_frames(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    pointers: torch.Tensor,
    ends: torch.Tensor | None,
    alpha: float,
) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens and score of the best hypothesis of every example; (B, L, K) each."""
    final = set() if ends is None else set(ends.tolist())
    answers, values = [], []
    for frame_scores, frame_tokens, frame_pointers in zip(scores.tolist(), tokens.tolist(), pointers.tolist()):
        last = next(
            (step for step, row in enumerate(frame_tokens) if all(token in final for token in row)),
            len(frame_tokens) - 1,
        )
        found, place = -math.inf, (last, 0)
        for step in range(last + 1):
            for beam, token in enumerate(frame_tokens[step]):
                if token in final or step == last:
                    value = frame_scores[step][beam]
                    value = value / ((5 + step + 1) / 6) ** alpha if alpha > 0 else value
                    if value > found:
                        found, place = value, (step, beam)
        step, beam = place
        answer = []
        while step >= 0:
            answer.append(frame_tokens[step][beam])
            step, beam = step - 1, frame_pointers[step][beam]
        answers.append(answer[::-1])
        values.append(found)
    return answers, torch.tensor(values, device=scores.device)
