"""ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators.

Clark, Luong, Le, Manning, ICLR 2020, arXiv 2003.10555. Official code: google-research/electra (Apache-2.0,
TensorFlow). A generator fills masked positions, a discriminator says of every token whether it was replaced; both are
trained at once and the discriminator is kept. Any encoder with an auto class and BERT's field names can be either of
them. Parameter names are those of transformers' ELECTRA, with the generator's encoder under `generator.`.

Differences from the paper: the embedding block that both networks share is that of the official code (word, position
and token-type tables and the LayerNorm), where the paper speaks of token and position embeddings.

Differences from the official code:
* masked positions are drawn without replacement (by the collator); the official draw repeats positions, counts
  repeats twice in the loss and gives a repeated position a meaningless token;
* losses are sums over counts without the 1e-6 in the denominators;
* `embeddings_project`, the discriminator's last layer and fine-tuning heads start from the same cut normal
  distribution as everything else, where TensorFlow's default was Glorot-uniform;
* with `sampling="inverse_cdf"` the same distribution is sampled with one uniform number a position.

torch.compile(fullgraph=True) works with `sampling="inverse_cdf"` or `"gumbel"` when `sampling_seeds` are given.
"""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_electra import ElectraJointConfig, embedding_size
from .layers.encoder import EncoderPreTrainedModel
from .layers.heads import (
    Head,
    MultipleChoiceHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    labelled_rows,
)
from .layers.linear_cross_entropy import CHUNK_LOGITS, PLAIN_LOGITS, linear_cross_entropy_sum
from .layers.losses import IGNORE, LossSum, check_labels, mean_loss
from .layers.sampling import sample_categorical


DISALLOWED = 1000.0
"""What the official code subtracts from the original token's logit when it may not be sampled."""


def encoder_from_config(config: PreTrainedConfig) -> nn.Module:
    """The base model of any configuration with an auto class, without a pooler where the class lets one choose."""
    model_class = AutoModel._model_mapping[type(config)]
    chooses = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return AutoModel.from_config(config, **({"add_pooling_layer": False} if chooses else {}))


class ElectraJointPreTrainedModel(EncoderPreTrainedModel):
    """Base of the ELECTRA classes; `electra` is the discriminator's encoder."""

    config: ElectraJointConfig
    base_model_prefix = "electra"
    _supports_flex_attn = False
    _can_record_outputs: dict = {}
    _keys_to_ignore_on_load_unexpected = [
        r"^generator\.",
        r"^generator_predictions\.",
        r"^generator_lm_head\.",
        r"^discriminator_predictions\.",
    ]

    def build_encoder(self, add_pooling_layer: bool) -> nn.Module:
        return encoder_from_config(self.config.discriminator_config)


class ElectraJointModel(Head, ElectraJointPreTrainedModel):
    """The discriminator's encoder, whatever its type; outputs are that encoder's."""

    def add_head(self, config: ElectraJointConfig) -> None:
        """Nothing: this is the bare encoder."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> ModelOutput:
        """Encode `input_ids` (B, T) or `inputs_embeds` (B, T, E)."""
        return self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)


class GeneratorPredictions(nn.Module):
    """LayerNorm(gelu(W h + b)): (..., generator width) -> (..., E)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, embedding_size(config))
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(embedding_size(config), eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class DiscriminatorPredictions(nn.Module):
    """w . act(W h + b) + c, the score of "replaced": (..., D) -> (...)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense_prediction = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_prediction(self.activation(self.dense(hidden_states))).squeeze(-1)


class GeneratorHead(Head):
    """What the classes with a generator share: its encoder, its head, and the ties.

    The generator's encoder is `generator`; where its weights are the discriminator's (all weights tied, or the MLM
    control) there is only `electra`. Shared embeddings are tied parameter by parameter and stored as the
    discriminator's: one module under two names would stay without memory if a checkpoint lacks it.
    """

    def add_generator(self, config: ElectraJointConfig) -> None:
        """Create the generator's encoder and head."""
        self.has_generator = config.untied_generator and config.objective == "electra" and not config.uniform_generator
        output = self.generator_settings(config)
        self._tied_weights_keys = {}
        if self.has_generator:
            self.generator = encoder_from_config(config.generator_config)
            if config.tie_generator_embeddings:
                shapes = {name: value.shape for name, value in self.generator.embeddings.named_parameters()}
                self._tied_weights_keys |= {
                    f"generator.embeddings.{name}": f"electra.embeddings.{name}"
                    for name, value in self.electra.embeddings.named_parameters()
                    if shapes.get(name) == value.shape  # some types have a map to the width in here
                }
        if config.uniform_generator and config.objective == "electra":
            return
        table = "generator" if self.has_generator and not config.tie_generator_embeddings else "electra"
        self._tied_weights_keys["generator_lm_head.weight"] = f"{table}.embeddings.word_embeddings.weight"
        self.generator_predictions = GeneratorPredictions(output)
        self.generator_lm_head = nn.Linear(embedding_size(output), output.vocab_size)

    def generator_settings(self, config: ElectraJointConfig) -> PreTrainedConfig:
        """Configuration of the encoder that generates."""
        separate = config.untied_generator and config.objective == "electra"
        return config.generator_config if separate else config.discriminator_config

    def generator_encoder(self) -> nn.Module:
        """The encoder that generates."""
        return self.generator if self.has_generator else self.electra

    def get_output_embeddings(self) -> nn.Linear | None:
        return getattr(self, "generator_lm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.generator_lm_head = new_embeddings


@dataclass
class ElectraJointOutput(ModelOutput):
    """Output of `ElectraJointForPreTraining`.

    loss (): weighted sum of the parts. mlm_loss (), discriminator_loss (): each divided by its own count.
    logits (B, T): score of "this token was replaced", of `input_ids` without labels, of `corrupted_ids` with labels.
    corrupted_ids (B, T), is_fake (B, T): the discriminator's input and its labels.
    generator_predictions (B, T): the generator's most probable token at masked positions, -100 elsewhere.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    discriminator_loss: torch.Tensor | None = None
    corrupted_ids: torch.Tensor | None = None
    is_fake: torch.Tensor | None = None
    generator_predictions: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ElectraJointForPreTraining(GeneratorHead, ElectraJointPreTrainedModel):
    """Generator and discriminator with their joint loss (section 2)."""

    accepts_loss_kwargs = False  # one count cannot normalise two losses; BestiaryTrainer passes both

    def add_head(self, config: ElectraJointConfig) -> None:
        self.add_generator(config)
        if config.objective == "electra":
            self.discriminator_predictions = DiscriminatorPredictions(config.discriminator_config)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Give both networks' tables another number of tokens; arguments and result as in transformers."""
        if self.has_generator and not self.config.tie_generator_embeddings:
            self.generator.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def loss_weights(self) -> dict[str, float]:
        """Weights of the parts `mlm` and `discriminator` in the loss."""
        if self.config.objective == "mlm":
            return {"mlm": 1.0}
        return {"mlm": self.config.generator_loss_weight, "discriminator": self.config.discriminator_loss_weight}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sampling_seeds: torch.Tensor | None = None,
        num_items_in_batch: dict[str, torch.Tensor | int] | None = None,
        **kwargs,
    ) -> ElectraJointOutput:
        """Joint training step with labels, replaced-token scores without.

        Args:
            input_ids: (B, T); with labels, masked as ELECTRA does (85 % [MASK], 15 % left as they are).
            labels: (B, T), the original token at masked positions, -100 elsewhere.
            sampling_seeds: (B,) int64; the generator's samples for an example depend on its seed alone, so splitting
                a batch does not change them. None draws from the global generator.
            num_items_in_batch: counts `mlm` (masked tokens) and `discriminator` (real tokens) of the whole optimizer
            step.

        Raises:
            ValueError: labels out of range, or (MLM control) no labels.
        """
        shared = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs = {name: value for name, value in shared.items() if value is not None}
        self.check_inputs(input_ids, None, position_ids)
        if labels is None:
            if self.config.objective == "mlm":
                raise ValueError(
                    "ElectraJointForPreTraining with objective='mlm' has no discriminator; pass labels, or load the "
                    "checkpoint with AutoModelForMaskedLM."
                )
            encoded = self.electra(input_ids, **inputs, **kwargs)
            return ElectraJointOutput(
                logits=self.discriminator_predictions(encoded.last_hidden_state),
                hidden_states=encoded.hidden_states,
                attentions=encoded.attentions,
            )
        check_labels(type(self).__name__, labels, self.config.vocab_size)
        counts = num_items_in_batch or {}
        generated = self.generate_replacements(input_ids, labels, inputs, sampling_seeds)
        mlm_loss = mean_loss(generated.loss, counts.get("mlm"))
        if self.config.objective == "mlm":
            return ElectraJointOutput(loss=mlm_loss, mlm_loss=mlm_loss, generator_predictions=generated.predictions)

        masked = labels != IGNORE  # (B, T)
        corrupted = torch.where(masked, generated.samples, input_ids)
        is_fake = masked & (generated.samples != labels)  # a correct sample counts as real
        encoded = self.electra(corrupted, **inputs, **kwargs)
        logits = self.discriminator_predictions(encoded.last_hidden_state)  # (B, T)
        real = torch.ones_like(masked) if attention_mask is None else attention_mask.bool()
        per_token = F.binary_cross_entropy_with_logits(logits.float(), is_fake.float(), reduction="none")
        discriminator_loss = mean_loss(
            (torch.where(real, per_token, 0.0).sum(), real.sum()), counts.get("discriminator")
        )
        weights = self.loss_weights()
        return ElectraJointOutput(
            loss=weights["mlm"] * mlm_loss + weights["discriminator"] * discriminator_loss,
            logits=logits,
            mlm_loss=mlm_loss,
            discriminator_loss=discriminator_loss,
            corrupted_ids=corrupted,
            is_fake=is_fake,
            generator_predictions=generated.predictions,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def generate_replacements(
        self, input_ids: torch.Tensor, labels: torch.Tensor, inputs: dict, seeds: torch.Tensor | None
    ) -> "Generated":
        """Run the generator on masked ids (B, T) and sample a token at every masked position."""
        batch, length = labels.shape
        positions = torch.arange(batch * length, device=labels.device).view(batch, length, 1)
        places, targets = labelled_rows(positions, labels, self.config.max_predictions_per_sequence)  # (M, 1), (M,)
        places = places.squeeze(1)
        if self.config.uniform_generator and self.config.objective == "electra":
            total = math.log(self.config.vocab_size) * (targets != IGNORE).sum()
            logits = torch.zeros(places.shape[0], self.config.vocab_size, device=labels.device)
            predicted, sampled = self._draw(logits, places, targets, seeds, length)
        else:
            hidden_states = self.generator_encoder()(input_ids, **inputs).last_hidden_state
            rows = self.generator_predictions(hidden_states.flatten(0, 1).index_select(0, places))  # (M, E)
            table, bias = self.generator_lm_head.weight, self.generator_lm_head.bias
            if torch.compiler.is_compiling() or rows.shape[0] * table.shape[0] <= PLAIN_LOGITS:
                logits = F.linear(rows, table, bias)  # (M, V), for the loss and for the samples
                total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
                predicted, sampled = self._draw(logits.detach(), places, targets, seeds, length)
            else:
                total = linear_cross_entropy_sum(rows, table, bias, targets)
                with torch.no_grad():
                    chunk = max(1, CHUNK_LOGITS // table.shape[0])
                    parts = zip(rows.split(chunk), places.split(chunk), targets.split(chunk))
                    drawn = [self._draw(F.linear(r, table, bias), p, t, seeds, length) for r, p, t in parts]
                predicted, sampled = (torch.cat(column) for column in zip(*drawn))
        predictions = labels.new_full((batch * length,), IGNORE).scatter(0, places, predicted).view(batch, length)
        predictions = torch.where(labels == IGNORE, IGNORE, predictions)
        samples = input_ids.flatten().scatter(0, places, sampled).view(batch, length)
        return Generated((total, (targets != IGNORE).sum()), predictions, samples)

    @torch.no_grad()
    def _draw(
        self,
        logits: torch.Tensor,
        places: torch.Tensor,
        targets: torch.Tensor,
        seeds: torch.Tensor | None,
        length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Most probable and sampled token, (M,) each, of logits (M, V) at places (M,) in the flattened batch."""
        logits = logits.float()
        predicted = logits.argmax(1)
        if self.config.objective == "mlm":
            return predicted, targets.clamp(min=0)
        if self.config.disallow_correct:
            penalty = torch.full_like(logits[:, :1], -DISALLOWED)
            logits = logits.scatter_add(1, targets.clamp(min=0).unsqueeze(1), penalty)
        sampled = sample_categorical(
            logits,
            method=self.config.sampling,
            temperature=self.config.sampling_temperature,
            seeds=seeds,
            rows=None if seeds is None else (places // length, places % length),
        )
        return predicted, sampled

    def to_discriminator(self) -> ElectraForPreTraining:
        """The discriminator as transformers' own `ElectraForPreTraining`; `ValueError` if its encoder is not
        ELECTRA's.
        """
        return self._to_stock(
            ElectraForPreTraining, self.config.discriminator_config, self.electra, "discriminator_predictions"
        )

    def to_generator(self) -> ElectraForMaskedLM:
        """The generator as transformers' own `ElectraForMaskedLM`; `ValueError` if its encoder is not ELECTRA's."""
        config = self.generator_settings(self.config)
        return self._to_stock(
            ElectraForMaskedLM, config, self.generator_encoder(), "generator_predictions", "generator_lm_head"
        )

    def _to_stock(self, model_class: type, config: PreTrainedConfig, encoder: nn.Module, *heads: str):
        known = ElectraConfig().to_dict().keys()
        settings = {name: value for name, value in config.to_dict().items() if name in known and name != "model_type"}
        model = model_class(ElectraConfig(**settings | {"embedding_size": embedding_size(config)}))
        state = {f"electra.{name}": value for name, value in encoder.state_dict().items()}
        for head in heads:
            if head not in self._modules:
                raise ValueError(
                    f"{type(self).__name__} has no {head} (objective={self.config.objective!r}, "
                    f"uniform_generator={self.config.uniform_generator}), so there is no {model_class.__name__} "
                    "to export."
                )
            state |= {f"{head}.{name}": value for name, value in self._modules[head].state_dict().items()}
        wanted = model.state_dict()
        differing = sorted(wanted.keys() ^ state.keys()) or [n for n in wanted if wanted[n].shape != state[n].shape]
        if differing:
            raise ValueError(
                f"The encoder type {config.model_type!r} has not the parameters of transformers' ELECTRA (they "
                "differ in "
                f"{', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}); save the joint model instead."
            )
        model.load_state_dict(state)
        return model.to(self.dtype).eval()


@dataclass
class Generated:
    """What the generator gives: (sum, count) of its loss, most probable tokens (B, T) and `input_ids` with samples
    filled in (B, T).
    """

    loss: LossSum
    predictions: torch.Tensor
    samples: torch.Tensor


class ElectraJointForMaskedLM(GeneratorHead, ElectraJointPreTrainedModel):
    """The generator (in the MLM control, the one encoder) as a masked language model."""

    _keys_to_ignore_on_load_unexpected = [r"^electra\.(encoder|embeddings_project)\.", r"^discriminator_predictions\."]

    def add_head(self, config: ElectraJointConfig) -> None:
        if config.uniform_generator and config.objective == "electra":
            raise ValueError(
                f"{type(self).__name__}: the checkpoint was trained with uniform_generator=True and has no "
                "language model."
            )
        self.add_generator(config)
        self.has_shared_tables = self.has_generator and config.tie_generator_embeddings
        if self.has_generator:
            # of the discriminator only the embedding block is needed, as the place where the shared tables are stored
            stored = nn.Module()
            if self.has_shared_tables:
                stored.embeddings = self.electra.embeddings
            self.electra = stored

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.has_shared_tables and module is self.electra.embeddings:
            self.generator._init_weights(module)  # its buffers: the encoder that would fill them is not there

    def get_input_embeddings(self) -> nn.Embedding:
        owner = self.electra if self.has_shared_tables else self.generator_encoder()
        return owner.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        owner = self.electra if self.has_shared_tables else self.generator_encoder()
        owner.embeddings.word_embeddings = value

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
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        encoded = self.generator_encoder()(**inputs, **kwargs)
        loss = logits = None
        if labels is None:
            logits = self.generator_lm_head(self.generator_predictions(encoded.last_hidden_state))
        else:
            check_labels(type(self).__name__, labels, self.config.vocab_size)
            rows, targets = labelled_rows(encoded.last_hidden_state, labels, self.config.max_predictions_per_sequence)
            rows = self.generator_predictions(rows)
            total = linear_cross_entropy_sum(rows, self.generator_lm_head.weight, self.generator_lm_head.bias, targets)
            loss = mean_loss((total, (targets != IGNORE).sum()), num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


class FirstToken:
    """ELECTRA has no pooler: sequence-level heads read the first token (dropout, then one linear layer, as the
    official code).
    """

    @staticmethod
    def uses_pooler(config: ElectraJointConfig) -> bool:
        return False

    def sequence_states(self, outputs: ModelOutput) -> torch.Tensor:
        return outputs.last_hidden_state[:, 0]


class ElectraJointForSequenceClassification(FirstToken, SequenceClassificationHead, ElectraJointPreTrainedModel):
    """The discriminator with a classification or regression layer on the first token."""


class ElectraJointForTokenClassification(TokenClassificationHead, ElectraJointPreTrainedModel):
    """The discriminator with a classification layer on every token."""


class ElectraJointForQuestionAnswering(QuestionAnsweringHead, ElectraJointPreTrainedModel):
    """The discriminator with start and end scores of an answer span."""


class ElectraJointForMultipleChoice(FirstToken, MultipleChoiceHead, ElectraJointPreTrainedModel):
    """The discriminator scoring several choices."""
