"""Sparse sequence-to-sequence models: attention and output whose probabilities may be exactly zero (alpha-entmax).

Peters, Niculae, Martins, 2019 (ACL), arXiv 1905.05702. Official code: deep-spin/OpenNMT-entmax (MIT, March 2019) and
deep-spin/entmax (MIT). The model is OpenNMT's LSTM encoder-decoder with global attention (Luong, Pham, Manning, 2015)
and input feeding. `SparseTransformer...` is an extension after Correia, Niculae, Martins, 2019 (EMNLP), arXiv
1909.00015: our shared encoder with that attention, and if wanted an alpha learned by each head.

Decisions, and differences from the official code:
* `logits` are raw, for the loss. In `generate()`, whose processors and searches take softmax or log-softmax of what
  the model gives, the model gives log p instead, so that temperature, top-p, sampling and beams work on the sparse p;
* tokens of probability 0 are never chosen: they stay at -inf, and beams that are only copies, or finished, and that
  transformers keeps at -1e9, above -inf, are dropped (OpenNMT revives them the same way). With no fewer beams than
  hypotheses of non-zero probability the search is exact, by the sum of log p (`length_penalty` 0, the default
  here); rows beyond the number of hypotheses have a score of -1e9. Sampling of beams is refused: it needs more tokens
  of non-zero probability than there may be;
* constraints that leave no token (a minimal length against p(eos) = 1) are an error, not an arbitrary token; so they
  are with beams, where none goes on or has ended;
* W_in^T H ("general") and W_c H ("mlp") are computed once for a source and kept in the state;
* the state is of constant size: hidden and cell vectors, the last attentional vector, and the keys;
* sources may be padded on either side; padding gets an attention of exactly 0. Target padding must be on the right;
* decoder layers may be fewer than encoder layers, as in the official code; the "bridge" is left out, as by the paper;
* label smoothing has no meaning for these losses and does not exist; perplexity may be infinite and is not given;
* the official Transformer decoder takes sparse outputs only; its attention is softmax. It is left out.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_sparse_seq2seq import SparseSeq2seqConfig, SparseTransformerConfig
from .layers.attention import EncoderAttention, EncoderSelfAttention
from .layers.dropout import Dropout, dropout
from .layers.encoder import EncoderLayer, EncoderModel, EncoderPreTrainedModel
from .layers.entmax import LearnedAlpha, entmax, entmax_losses
from .layers.heads import (
    MaskedLMHead,
    MultipleChoiceHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .layers.losses import IGNORE, check_labels, mean_loss
from .layers.pretrained import BestiaryPreTrainedModel


# ------------------------------------------------------------------------------------------------------------- outputs


@dataclass
class SparseSeq2seqEncoderOutput(ModelOutput):
    """last_hidden_state (B, S, D), 0 at padding; hidden and cell (B, L, D): the last states of every layer."""

    last_hidden_state: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    cell: torch.Tensor | None = None


@dataclass
class SparseSeq2seqModelOutput(ModelOutput):
    """last_hidden_state (B, T, D): attentional vectors. cross_attentions: one (B, 1, T, S)."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Any | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None


@dataclass
class SparseSeq2seqLMOutput(Seq2SeqLMOutput):
    """transformers' output, and with labels sums over the labelled positions.

    sequence_losses (B,): without gradient, the sum of the losses of each target. attention_support (): source
    positions with an attention above 0. output_support (): symbols with a probability above 0. zero_loss (): positions
    whose loss is exactly 0. zero_gold (): positions whose label has probability 0.
    """

    sequence_losses: torch.Tensor | None = None
    attention_support: torch.Tensor | None = None
    output_support: torch.Tensor | None = None
    zero_loss: torch.Tensor | None = None
    zero_gold: torch.Tensor | None = None


# --------------------------------------------------------------------------------------------------------------- state


class RecurrentStateLayer(CacheLayerMixin):
    """What the decoder keeps, by name, each with the batch first: `hidden` and `cell` (B, L, D), `feed` (B, D), `keys`
    (B, S, D).
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self.seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the first step brings the state."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Refused: there are no keys and values of targets to keep.

        Raises:
            ValueError: always.
        """
        raise ValueError("SparseSeq2seqCache keeps a recurrent state, no keys and values; the decoder advances it.")

    def advance(self, tensors: dict[str, torch.Tensor], tokens: int) -> None:
        """Replace the state by that after `tokens` more tokens."""
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.seen += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: without limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.tensors, self.seen, self.is_initialized = {}, 0, False

    def offload(self) -> None:
        """Nothing: the state is too small to move away."""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: an LSTM does not run backwards.

        Raises:
            ValueError: always.
        """
        raise ValueError("SparseSeq2seqCache cannot be cropped; decode without assistant and rollback.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row b becomes row beam_idx[b]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self.tensors = {name: part.index_select(0, indices.to(part.device)) for name, part in self.tensors.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.tensors = {name: part.repeat_interleave(repeats, 0) for name, part in self.tensors.items()}


class SparseSeq2seqCache(Cache):
    """The decoder's state, of constant size, as transformers' `generate()` handles it."""

    def __init__(self):
        super().__init__(layers=[RecurrentStateLayer()])


# ------------------------------------------------------------------------------------------------------------- network


class SparseSeq2seqEncoder(nn.Module):
    """Embeddings and a (bidirectional) LSTM over packed sequences."""

    def __init__(self, config: SparseSeq2seqConfig):
        super().__init__()
        directions = 2 if config.bidirectional_encoder else 1
        self.directions = directions
        self.embed_tokens = nn.Embedding(config.src_vocab_size, config.embedding_size, config.pad_token_id)
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size // directions,
            config.num_encoder_layers,
            batch_first=True,
            dropout=config.dropout if config.num_encoder_layers > 1 else 0.0,
            bidirectional=directions == 2,
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> SparseSeq2seqEncoderOutput:
        """Encode `input_ids` (B, S) or `inputs_embeds` (B, S, E); `attention_mask` (B, S) has 1 at real tokens.

        Raises:
            ValueError: both or none of the inputs, a mask of another shape, or a row without a real token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__} needs exactly one of input_ids and inputs_embeds.")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, S, E)
        batch, length = embedded.shape[:2]
        real = embedded.new_ones(batch, length, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != real.shape:
                raise ValueError(
                    f"{type(self).__name__}: attention_mask must be {list(real.shape)} as the source, got "
                    f"{list(attention_mask.shape)}."
                )
            real = attention_mask.bool()
        lengths = real.sum(1)
        if not bool((lengths > 0).all()):
            raise ValueError(f"{type(self).__name__}: row {int(lengths.argmin())} has no real token to read.")
        order = None
        if bool((real[:, 1:] & ~real[:, :-1]).any()):  # not padded on the right: real tokens go to the left
            order = (~real).int().argsort(dim=1, stable=True).unsqueeze(-1)
            embedded = embedded.take_along_dim(order, 1)
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed, last = self.lstm(packed)
        states, _ = pad_packed_sequence(packed, batch_first=True, total_length=length)  # (B, S, D)
        if order is not None:
            states = torch.zeros_like(states).scatter(1, order.expand_as(states), states)
        hidden, cell = (
            part.unflatten(0, (-1, self.directions)).permute(2, 0, 1, 3).flatten(2)  # (L * 2, B, D / 2) -> (B, L, D)
            for part in last
        )
        return SparseSeq2seqEncoderOutput(last_hidden_state=states, hidden=hidden, cell=cell)


class GlobalAttention(nn.Module):
    """Entmax over source states, then the attentional vector (Luong et al., 2015, equation 5)."""

    def __init__(self, config: SparseSeq2seqConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.score = config.attention_score
        if self.score == "general":
            self.linear_in = nn.Linear(width, width, bias=False)
        elif self.score == "mlp":
            self.linear_context = nn.Linear(width, width, bias=False)
            self.linear_query = nn.Linear(width, width)
            self.v = nn.Linear(width, 1, bias=False)
        self.linear_out = nn.Linear(2 * width, width, bias=self.score == "mlp")
        self.alpha = LearnedAlpha(1, config.attention_alpha) if config.learn_attention_alpha else None

    def keys(self, memory: torch.Tensor) -> torch.Tensor:
        """What queries are compared with, (B, S, D), once for a source (B, S, D)."""
        if self.score == "general":
            return memory @ self.linear_in.weight  # (W h) . H_s = h . (W^T H_s)
        return self.linear_context(memory) if self.score == "mlp" else memory

    def forward(
        self, query: torch.Tensor, memory: torch.Tensor, keys: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attentional vectors (B, T, D) of queries (B, T, D), and weights (B, T, S).

        `memory` and `keys` are (B, S, D), `real` (B, S) is False at padding.
        """
        if self.score == "mlp":
            scores = self.v(torch.tanh(self.linear_query(query).unsqueeze(2) + keys.unsqueeze(1))).squeeze(-1)
        else:
            scores = query @ keys.mT  # (B, T, S)
        if real is not None:
            scores = scores.masked_fill(~real.unsqueeze(1), -math.inf)
        alpha = self.config.attention_alpha if self.alpha is None else self.alpha()
        method = self.config.entmax_method if self.alpha is None else None
        weights = entmax(scores, alpha, -1, method, self.config.entmax_topk, self.config.entmax_n_iter)
        context = weights @ memory
        mixed = self.linear_out(torch.cat((context, query), -1))
        return mixed if self.score == "mlp" else torch.tanh(mixed), weights


class SparseSeq2seqDecoder(nn.Module):
    """Embeddings, stacked LSTM cells and attention, with input feeding if wanted."""

    def __init__(self, config: SparseSeq2seqConfig):
        super().__init__()
        self.input_feed = config.input_feed
        self.embed_tokens = nn.Embedding(config.tgt_vocab_size, config.embedding_size, config.pad_token_id)
        first = config.embedding_size + (config.hidden_size if config.input_feed else 0)
        sizes = [first] + [config.hidden_size] * (config.num_decoder_layers - 1)
        self.layers = nn.ModuleList(nn.LSTMCell(size, config.hidden_size) for size in sizes)
        self.attention = GlobalAttention(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        input_ids: torch.Tensor,
        memory: torch.Tensor,
        real: torch.Tensor | None,
        state: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Attentional vectors (B, T, D) and attention (B, T, S) of target symbols (B, T), and the state after them.

        `memory` (B, S, D) and `real` (B, S) are of the source; `state` has `hidden`, `cell` (B, L, D), `feed` (B, D)
        and `keys` (B, S, D).
        """
        embedded = self.embed_tokens(input_ids)  # (B, T, E)
        keys, feed = state["keys"], state["feed"]
        hidden, cell = list(state["hidden"].unbind(1)), list(state["cell"].unbind(1))
        tops, vectors, attention = [], [], []
        for step in embedded.unbind(1):
            below = torch.cat((step, feed), -1) if self.input_feed else step
            for index, layer in enumerate(self.layers):
                if index:
                    below = self.dropout(below)
                hidden[index], cell[index] = layer(below, (hidden[index], cell[index]))
                below = hidden[index]
            if self.input_feed:
                vector, weights = self.attention(below.unsqueeze(1), memory, keys, real)
                vectors.append(self.dropout(vector))
                attention.append(weights)
                feed = vectors[-1].squeeze(1)
            else:
                tops.append(below)
        if self.input_feed:
            states, weights = torch.cat(vectors, 1), torch.cat(attention, 1)
        else:
            states, weights = self.attention(torch.stack(tops, 1), memory, keys, real)
            states = self.dropout(states)
        after = {"hidden": torch.stack(hidden, 1), "cell": torch.stack(cell, 1), "feed": feed, "keys": keys}
        return states, weights, after


class SparseSeq2seqPreTrainedModel(BestiaryPreTrainedModel):
    """Base of the LSTM classes."""

    config: SparseSeq2seqConfig
    base_model_prefix = "model"
    _no_split_modules = []

    @torch.no_grad()
    # trf-ignore: TRF018
    def _init_weights(self, module: nn.Module) -> None:
        """Uniform in +- `init_range`, whatever it is; a learned alpha starts at `attention_alpha`."""
        if isinstance(module, LearnedAlpha):
            init.constant_(module.logit, module.initial_logit)
        else:
            for parameter in module.parameters(recurse=False):
                init.uniform_(parameter, -self.config.init_range, self.config.init_range)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused, since source and target have vocabularies of their own.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} has one vocabulary to read and one to write, which cannot be resized as one; "
            "build it with src_vocab_size and tgt_vocab_size."
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) one place to the right, after the start token; -100 becomes padding."""
        shifted = labels.roll(1, 1)
        shifted[:, 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == IGNORE, self.config.pad_token_id)


class SparseSeq2seqModel(SparseSeq2seqPreTrainedModel):
    """Encoder and decoder, without the output layer."""

    def __init__(self, config: SparseSeq2seqConfig):
        super().__init__(config)
        self.encoder = SparseSeq2seqEncoder(config)
        self.decoder = SparseSeq2seqDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: SparseSeq2seqEncoderOutput | None = None,
        past_key_values: SparseSeq2seqCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SparseSeq2seqModelOutput:
        """Read a source and decode `decoder_input_ids` (B, T), which begin with the start token.

        Args:
            input_ids: (B, S), or `inputs_embeds` (B, S, E), or `encoder_outputs` of an earlier call.
            attention_mask: (B, S), 1 at real source tokens.
            decoder_input_ids: (B, T); the default is the start token alone.
            decoder_attention_mask: (B, T), which may mark padding on the right. It changes nothing, since no symbol
                sees a later one.
            past_key_values: the state after earlier symbols; `decoder_input_ids` are those after them.
            use_cache: return the state; default: `config.use_cache` outside of training.

        Raises:
            ValueError: no source or more than one, a cache of another kind, target padding on the left.
        """
        if decoder_attention_mask is not None and bool((decoder_attention_mask.diff(dim=1) > 0).any()):
            raise ValueError(f"{type(self).__name__}: decoder_attention_mask must mark padding on the right alone.")
        if past_key_values is not None and not isinstance(past_key_values, SparseSeq2seqCache):
            raise ValueError(
                f"{type(self).__name__} decodes with a SparseSeq2seqCache, got a {type(past_key_values).__name__}; "
                "pass none, and the model makes its own."
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds)
        elif not isinstance(encoder_outputs, SparseSeq2seqEncoderOutput):
            raise ValueError(
                f"{type(self).__name__}: encoder_outputs must be what get_encoder() gives, with the last states of "
                f"its layers, got a {type(encoder_outputs).__name__}."
            )
        memory = encoder_outputs.last_hidden_state  # (B, S, D)
        if decoder_input_ids is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.full((len(memory), 1), start, device=memory.device)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = SparseSeq2seqCache()
        state = {} if past_key_values is None else past_key_values.layers[0].tensors
        if not state:
            layers = self.config.num_decoder_layers
            state = {
                "hidden": encoder_outputs.hidden[:, :layers],
                "cell": encoder_outputs.cell[:, :layers],
                "feed": memory.new_zeros(len(memory), self.config.hidden_size),
                "keys": self.decoder.attention.keys(memory),
            }
        real = None if attention_mask is None else attention_mask.bool()
        states, attention, state = self.decoder(decoder_input_ids, memory, real, state)
        if past_key_values is not None:
            past_key_values.layers[0].advance(state, decoder_input_ids.shape[1])
        return SparseSeq2seqModelOutput(
            last_hidden_state=states,
            past_key_values=past_key_values,
            cross_attentions=(attention.unsqueeze(1),),
            encoder_last_hidden_state=memory,
        )


# ---------------------------------------------------------------------------------------------------------- generation


LOST = -5e8
"""Scores of beams below this are no sums of log p: transformers keeps copies and ended beams at -1e9."""


def no_token_left(row: int, step: int) -> ValueError:
    """What is raised where a hypothesis that has not ended cannot go on."""
    return ValueError(
        f"generate(): all tokens that the model gives row {row} at step {step} are excluded by the other settings "
        "(such as min_new_tokens), and its sparse output has no more; or its weights are not finite. Remove the "
        "setting, or search with more beams."
    )


class RefuseNoToken(LogitsProcessor):
    """An error where a row that has not ended has no token left to choose; -inf for tokens that other processors made
    nan or the smallest number.
    """

    def __init__(self, prompt_length: int, eos_token_id: torch.Tensor | None):
        self.prompt_length, self.eos_token_id = prompt_length, eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.masked_fill(~(scores > torch.finfo(scores.dtype).min), -math.inf)
        empty = scores.amax(-1) == -math.inf
        if self.eos_token_id is not None:
            ends = self.eos_token_id.to(input_ids.device)
            empty = empty & ~torch.isin(input_ids[:, self.prompt_length :], ends).any(1)
        if bool(empty.any()):
            raise no_token_left(int(empty.nonzero()[0]), input_ids.shape[1] - self.prompt_length)
        return scores


class SparseSeq2seqForConditionalGeneration(SparseSeq2seqPreTrainedModel, GenerationMixin):
    """The model with its output layer and the entmax loss; generates by transformers' `generate()`."""

    accepts_loss_kwargs = True
    _is_stateful = True  # for generate(): there is no way back from a state

    def __init__(self, config: SparseSeq2seqConfig):
        super().__init__(config)
        self.model = SparseSeq2seqModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.tgt_vocab_size)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: generate() leaves the cache to the model."""
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.model.encoder

    def get_decoder(self) -> nn.Module:
        return self.model.decoder

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The sparse distribution (..., V) of logits (..., V)."""
        config = self.config
        return entmax(logits, config.output_alpha, -1, config.entmax_method, config.entmax_topk, config.entmax_n_iter)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: SparseSeq2seqEncoderOutput | None = None,
        past_key_values: SparseSeq2seqCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        log_probabilities: bool = False,
        **kwargs,
    ) -> SparseSeq2seqLMOutput:
        """With `labels` (B, T; -100 = no loss) the entmax loss and statistics and no logits, else logits (B, T, V).

        Labels are what follows `decoder_input_ids`, which are made of them if not given. With `log_probabilities` the
        log of the sparse distribution takes the place of the logits, as `generate()` needs it. Other arguments as in
        `SparseSeq2seqModel.forward`.
        """
        if labels is not None:
            check_labels(type(self).__name__, labels, self.config.tgt_vocab_size)
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
        )
        states, (attention,) = outputs.last_hidden_state, outputs.cross_attentions
        loss = logits = None
        statistics = {}
        if labels is None:
            logits = self.lm_head(states)  # (B, T, V)
            if log_probabilities:
                logits = self.probabilities(logits.float()).log()
        else:
            loss, statistics = self.loss(states, attention, labels, num_items_in_batch)
        return SparseSeq2seqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            cross_attentions=outputs.cross_attentions if kwargs.get("output_attentions") else None,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            **statistics,
        )

    def loss(
        self,
        states: torch.Tensor,
        attention: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The entmax loss of labels (B, T) after states (B, T, D), and the sums of `SparseSeq2seqLMOutput`.

        `attention` is (B, 1, T, S).
        """
        config = self.config
        kept = labels != IGNORE
        parts = entmax_losses(
            self.lm_head(states[kept]),  # (M, V)
            labels[kept],
            config.output_alpha,
            config.entmax_method,
            config.entmax_topk,
            config.entmax_n_iter,
        )
        loss = mean_loss((parts.losses.sum(), kept.sum()), num_items_in_batch)
        losses = parts.losses.detach()
        return loss, {
            "sequence_losses": losses.new_zeros(labels.shape).masked_scatter(kept, losses).sum(1),
            "attention_support": (attention[:, 0][kept] > 0).sum(),
            "output_support": parts.support.sum(),
            "zero_loss": (losses == 0).sum(),
            "zero_gold": (parts.gold == 0).sum(),
        }

    # Generation

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        """As in transformers, but beams are compared by the sum of log p unless a `length_penalty` is set: that is the
        paper's score, and the one by which the search is exact.
        """
        given = (self.generation_config, generation_config or self.generation_config)
        is_set = kwargs.get("length_penalty") is not None or any(one.length_penalty is not None for one in given)
        prepared, rest = super()._prepare_generation_config(generation_config, **kwargs)
        if not is_set:
            prepared.length_penalty = 0.0
        return prepared, rest

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, and the log of the sparse distribution is asked for."""
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"log_probabilities": True}

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args: Any, **kwargs: Any):
        last = RefuseNoToken(input_ids.shape[1], generation_config._eos_token_tensor)
        processors = LogitsProcessorList([*logits_processor, last])
        return super()._sample(input_ids, processors, stopping_criteria, generation_config, *args, **kwargs)

    def _beam_search(
        self, input_ids, logits_processor, stopping_criteria, generation_config, *args: Any, **kwargs: Any
    ):
        if generation_config.do_sample:
            raise ValueError(
                f"{type(self).__name__}: beams cannot be sampled, since fewer tokens than beams may have a "
                "probability above 0; set do_sample=False, or num_beams=1 with num_return_sequences."
            )
        return super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs)

    def _get_top_k_continuations(self, accumulated_log_probs: torch.Tensor, **kwargs: Any):
        """Beams that are no hypotheses, which would rank above tokens of probability 0, get -inf; so does nan."""
        lost = ~(accumulated_log_probs > LOST)
        return super()._get_top_k_continuations(accumulated_log_probs.masked_fill(lost, -math.inf), **kwargs)

    def _check_early_stop_heuristic(
        self, running_beam_scores: torch.Tensor, is_sent_finished: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """As in transformers, and an error where no beam of a row goes on or has ended."""
        lost = ~((running_beam_scores > LOST) | is_sent_finished).any(1)
        if bool(lost.any()):
            raise no_token_left(int(lost.nonzero()[0]), kwargs["cur_len"] - kwargs["decoder_prompt_len"] - 1)
        return super()._check_early_stop_heuristic(
            running_beam_scores=running_beam_scores, is_sent_finished=is_sent_finished, **kwargs
        )


# ---------------------------------------------------------------------- an extension: the shared encoder with entmax


class SparseSelfAttention(EncoderSelfAttention):
    """alpha-entmax(q k^T * scale + mask) v (Correia et al., 2019, section 3)."""

    def __init__(self, config: SparseTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        learns = config.learn_attention_alpha
        self.alpha = LearnedAlpha(config.num_attention_heads, config.attention_alpha) if learns else None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Context (B, T, D) of hidden states (B, T, D), and probabilities (B, H, T, T)."""
        query, key, value = self.project(hidden_states)
        scores = query @ key.mT * self.score_scale()  # (B, H, T, T)
        if attention_mask is not None:
            scores = scores + attention_mask
        config = self.config
        alpha = config.attention_alpha if self.alpha is None else self.alpha().view(-1, 1, 1)
        method = config.entmax_method if self.alpha is None else None
        probabilities = entmax(scores, alpha, -1, method, config.entmax_topk, config.entmax_n_iter)
        probabilities = dropout(probabilities, self.dropout_prob, self.training)
        return (probabilities @ value).transpose(1, 2).flatten(-2), probabilities


class SparseAttention(EncoderAttention):
    """Sparse self-attention, output projection, residual, LayerNorm."""

    self_class = SparseSelfAttention


class SparseTransformerLayer(EncoderLayer):
    """BERT's layer with sparse attention."""

    attention_class = SparseAttention


class SparseTransformerPreTrainedModel(EncoderPreTrainedModel):
    """Base of the Transformer classes. There is one implementation of the attention, "eager"."""

    config: SparseTransformerConfig
    base_model_prefix = "bert"
    _supports_sdpa = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_record_outputs = {"hidden_states": SparseTransformerLayer, "attentions": SparseSelfAttention}

    def build_encoder(self, add_pooling_layer: bool) -> "SparseTransformerModel":
        return SparseTransformerModel(self.config, add_pooling_layer)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LearnedAlpha):
            init.constant_(module.logit, module.initial_logit)


class SparseTransformerModel(EncoderModel, SparseTransformerPreTrainedModel):
    """A BERT-like encoder with sparse attention."""

    layer_class = SparseTransformerLayer


class SparseTransformerForMaskedLM(MaskedLMHead, SparseTransformerPreTrainedModel):
    """The encoder as a masked language model."""


class SparseTransformerForSequenceClassification(SequenceClassificationHead, SparseTransformerPreTrainedModel):
    """The encoder with a classification or regression layer on the pooled token."""


class SparseTransformerForTokenClassification(TokenClassificationHead, SparseTransformerPreTrainedModel):
    """The encoder with a classification layer on every token."""


class SparseTransformerForQuestionAnswering(QuestionAnsweringHead, SparseTransformerPreTrainedModel):
    """The encoder with start and end scores of an answer span."""


class SparseTransformerForMultipleChoice(MultipleChoiceHead, SparseTransformerPreTrainedModel):
    """The encoder scoring several choices."""
