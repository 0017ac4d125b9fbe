"""The papers of the package, one entry each. Importing this module registers them all."""

from .configuration.configuration_bert import BertPretrainingConfig
from .configuration.configuration_electra import ElectraJointConfig
from .modeling import modeling_bert as bert
from .modeling import modeling_electra as electra
from .registry import Paper, register


register(
    Paper(
        slug="bert",
        title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        authors="Jacob Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova",
        year=2018,
        arxiv="1810.04805",
        kind="pre-training objective",
        summary=(
            "Pre-trains a bidirectional encoder by predicting masked tokens and by deciding whether one segment "
            "follows another. "
            "Here with the paper's data construction, exact-count masking, two-phase lengths and optimizer."
        ),
        config=BertPretrainingConfig,
        models={
            "AutoModel": bert.BertPretrainingModel,
            "AutoModelForPreTraining": bert.BertPretrainingForPreTraining,
            "AutoModelForMaskedLM": bert.BertPretrainingForMaskedLM,
            "AutoModelForNextSentencePrediction": bert.BertPretrainingForNextSentencePrediction,
            "AutoModelForSequenceClassification": bert.BertPretrainingForSequenceClassification,
            "AutoModelForTokenClassification": bert.BertPretrainingForTokenClassification,
            "AutoModelForQuestionAnswering": bert.BertPretrainingForQuestionAnswering,
            "AutoModelForMultipleChoice": bert.BertPretrainingForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_bert:BertPretrainingTrainer",
        arguments="bestiary.trainers.trainer_bert:BertPretrainingTrainingArguments",
        collator="bestiary.trainers.masking:MaskingCollator",
        converter="bestiary.conversion.bert",
        official_code="https://github.com/google-research/bert",
        official_licence="Apache-2.0",
        tags=("masked language model", "next sentence prediction"),
    )
)
register(
    Paper(
        slug="electra",
        title="ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
        authors="Kevin Clark, Minh-Thang Luong, Quoc V. Le, Christopher D. Manning",
        year=2020,
        arxiv="2003.10555",
        kind="pre-training objective",
        summary=(
            "Trains a discriminator to tell, for every token, whether a small generator replaced it, so that all "
            "positions give a signal. "
            "Here both networks are trained jointly, over any encoder, and either is exported as a stock model."
        ),
        config=ElectraJointConfig,
        models={
            "AutoModel": electra.ElectraJointModel,
            "AutoModelForPreTraining": electra.ElectraJointForPreTraining,
            "AutoModelForMaskedLM": electra.ElectraJointForMaskedLM,
            "AutoModelForSequenceClassification": electra.ElectraJointForSequenceClassification,
            "AutoModelForTokenClassification": electra.ElectraJointForTokenClassification,
            "AutoModelForQuestionAnswering": electra.ElectraJointForQuestionAnswering,
            "AutoModelForMultipleChoice": electra.ElectraJointForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_electra:ElectraTrainer",
        arguments="bestiary.trainers.trainer_electra:ElectraTrainingArguments",
        collator="bestiary.trainers.masking:ElectraMaskingCollator",
        converter="bestiary.conversion.electra",
        official_code="https://github.com/google-research/electra",
        official_licence="Apache-2.0",
        tags=("replaced token detection", "masked language model"),
    )
)
