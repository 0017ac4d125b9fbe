"""BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding.

Devlin, Chang, Lee, Toutanova, 2018 (NAACL 2019), arXiv 1810.04805. Official code: google-research/bert (Apache-2.0,
TensorFlow). Parameter names are those of transformers' BERT, so its checkpoints load as they are.

Differences from the official code:
* the GELU is the exact one of the paper and of the released checkpoints' configurations; `hidden_act="gelu_new"`
  gives the official code's tanh form;
* losses are sums over counts, without the 1e-5 in the denominator of the official masked-LM loss: every batch has a
  masked token, and a constant in the denominator would make the update depend on how a batch is split;
* vocabulary logits exist at labelled positions only;
* padding cannot be the start or the end of an answer;
* the row of the padding token gets no gradient from the embedding look-up (padding is never attended to).
"""

from ..configuration.configuration_bert import BertPretrainingConfig
from .layers.encoder import EncoderModel, EncoderPreTrainedModel
from .layers.heads import (
    MaskedLMHead,
    MultipleChoiceHead,
    NextSentencePredictionHead,
    PreTrainingHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)


class BertPretrainingPreTrainedModel(EncoderPreTrainedModel):
    """Base of the BERT classes."""

    config: BertPretrainingConfig
    base_model_prefix = "bert"

    def build_encoder(self, add_pooling_layer: bool) -> "BertPretrainingModel":
        return BertPretrainingModel(self.config, add_pooling_layer)


class BertPretrainingModel(EncoderModel, BertPretrainingPreTrainedModel):
    """The BERT encoder."""


class BertPretrainingForPreTraining(PreTrainingHead, BertPretrainingPreTrainedModel):
    """Masked language model and next-sentence prediction; the second is left out by
    `next_sentence_prediction=False`.
    """

    @staticmethod
    def uses_pooler(config: BertPretrainingConfig) -> bool:
        return config.next_sentence_prediction

    def loss_weights(self) -> dict[str, float]:
        return {"mlm": self.config.masked_lm_loss_weight, "sentence": self.config.next_sentence_loss_weight}


class BertPretrainingForMaskedLM(MaskedLMHead, BertPretrainingPreTrainedModel):
    """BERT as a masked language model."""


class BertPretrainingForNextSentencePrediction(NextSentencePredictionHead, BertPretrainingPreTrainedModel):
    """BERT deciding whether a segment follows another."""


class BertPretrainingForSequenceClassification(SequenceClassificationHead, BertPretrainingPreTrainedModel):
    """BERT with a classification or regression layer on the pooled first token."""


class BertPretrainingForTokenClassification(TokenClassificationHead, BertPretrainingPreTrainedModel):
    """BERT with a classification layer on every token."""


class BertPretrainingForQuestionAnswering(QuestionAnsweringHead, BertPretrainingPreTrainedModel):
    """BERT with start and end scores of an answer span."""


class BertPretrainingForMultipleChoice(MultipleChoiceHead, BertPretrainingPreTrainedModel):
    """BERT scoring several choices."""
