"""The papers of the package, one entry each. Importing this module registers them all."""

from .configuration.configuration_adapters import AdaptersConfig
from .configuration.configuration_bert import BertPretrainingConfig
from .configuration.configuration_electra import ElectraJointConfig
from .configuration.configuration_hype import HypeConfig
from .configuration.configuration_linear_attention import LinearAttentionConfig
from .configuration.configuration_minilmv2 import MiniLMv2Config
from .configuration.configuration_performer import PerformerConfig
from .configuration.configuration_realformer import RealformerConfig
from .configuration.configuration_sparse_seq2seq import SparseSeq2seqConfig, SparseTransformerConfig
from .configuration.configuration_theseus import TheseusConfig
from .configuration.configuration_tta import TtaConfig
from .configuration.configuration_tupe import TupeConfig
from .configuration.configuration_unilm import UniLMConfig
from .modeling import modeling_adapters as adapters
from .modeling import modeling_bert as bert
from .modeling import modeling_electra as electra
from .modeling import modeling_hype as hype
from .modeling import modeling_linear_attention as linear_attention
from .modeling import modeling_minilmv2 as minilmv2
from .modeling import modeling_performer as performer
from .modeling import modeling_realformer as realformer
from .modeling import modeling_sparse_seq2seq as sparse_seq2seq
from .modeling import modeling_theseus as theseus
from .modeling import modeling_tta as tta
from .modeling import modeling_tupe as tupe
from .modeling import modeling_unilm as unilm
from .registry import Paper, register, register_extension


register(
    Paper(
        slug="adapters",
        title="Parameter-Efficient Transfer Learning for NLP",
        authors=(
            "Neil Houlsby, Andrei Giurgiu, Stanislaw Jastrzebski, Bruna Morrone, Quentin de Laroussilhe, "
            "Andrea Gesmundo, Mona Attariyan, Sylvain Gelly"
        ),
        year=2019,
        arxiv="1902.00751",
        kind="fine-tuning",
        summary=(
            "Fine-tunes two small bottleneck networks in every layer, the LayerNorms and the head, and leaves the "
            "pre-trained weights as they are. "
            "Here for any encoder, as models and as a PEFT method, `bestiary.BottleneckAdapterConfig`."
        ),
        config=AdaptersConfig,
        models={
            "AutoModel": adapters.AdaptersModel,
            "AutoModelForSequenceClassification": adapters.AdaptersForSequenceClassification,
            "AutoModelForTokenClassification": adapters.AdaptersForTokenClassification,
            "AutoModelForQuestionAnswering": adapters.AdaptersForQuestionAnswering,
            "AutoModelForMultipleChoice": adapters.AdaptersForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_adapters:AdaptersTrainer",
        arguments="bestiary.trainers.trainer_adapters:AdaptersTrainingArguments",
        collator="transformers:DataCollatorWithPadding",
        converter="bestiary.conversion.adapters",
        official_code="https://github.com/google-research/adapter-bert",
        official_licence="Apache-2.0",
        tags=("parameter-efficient fine-tuning", "bottleneck adapters"),
    )
)
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
register(
    Paper(
        slug="hype",
        title="HyPe: Better Pre-trained Language Model Fine-tuning with Hidden Representation Perturbation",
        authors="Hongyi Yuan, Zheng Yuan, Chuanqi Tan, Fei Huang, Songfang Huang",
        year=2022,
        arxiv="2212.08853",
        kind="fine-tuning",
        summary=(
            "Fine-tunes with a little random noise on the hidden states that enter each layer, in place of dropout. "
            "Here for any encoder with a layer list, drawn per example so that no split of a batch changes an update; "
            "the result is the plain model."
        ),
        config=HypeConfig,
        models={
            "AutoModel": hype.HypeModel,
            "AutoModelForSequenceClassification": hype.HypeForSequenceClassification,
            "AutoModelForTokenClassification": hype.HypeForTokenClassification,
            "AutoModelForQuestionAnswering": hype.HypeForQuestionAnswering,
            "AutoModelForMultipleChoice": hype.HypeForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_hype:HypeTrainer",
        arguments="bestiary.trainers.trainer_hype:HypeTrainingArguments",
        collator="bestiary.trainers.trainer_hype:KeyedNoiseCollator",
        official_code="https://github.com/Yuanhy1997/HyPe",
        official_licence="MIT",
        tags=("fine-tuning", "regularisation", "noise"),
    )
)
register(
    Paper(
        slug="linear_attention",
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        authors="Angelos Katharopoulos, Apoorv Vyas, Nikolaos Pappas, François Fleuret",
        year=2020,
        arxiv="2006.16236",
        kind="architecture",
        summary=(
            "Replaces the softmax by a product of features, so that attention is linear in the length and generation "
            "keeps a state of constant size. "
            "Here with the forms of Su Jianlin's survey: elu + 1, efficient attention's two softmaxes, cosine and "
            "more."
        ),
        config=LinearAttentionConfig,
        models={
            "AutoModel": linear_attention.LinearAttentionModel,
            "AutoModelForPreTraining": linear_attention.LinearAttentionForPreTraining,
            "AutoModelForMaskedLM": linear_attention.LinearAttentionForMaskedLM,
            "AutoModelForCausalLM": linear_attention.LinearAttentionForCausalLM,
            "AutoModelForSequenceClassification": linear_attention.LinearAttentionForSequenceClassification,
            "AutoModelForTokenClassification": linear_attention.LinearAttentionForTokenClassification,
            "AutoModelForQuestionAnswering": linear_attention.LinearAttentionForQuestionAnswering,
            "AutoModelForMultipleChoice": linear_attention.LinearAttentionForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_linear_attention:LinearAttentionTrainer",
        arguments="bestiary.trainers.trainer_linear_attention:LinearAttentionTrainingArguments",
        collator="bestiary.trainers.masking:MaskingCollator",
        converter="bestiary.conversion.linear_attention",
        official_code="https://github.com/idiap/fast-transformers",
        official_licence="MIT",
        tags=("linear attention", "causal language model", "masked language model"),
    )
)
register(
    Paper(
        slug="minilmv2",
        title="MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
        authors="Wenhui Wang, Hangbo Bao, Shaohan Huang, Li Dong, Furu Wei",
        year=2021,
        arxiv="2012.15828",
        kind="compression",
        summary=(
            "Trains a small encoder on plain text to have the relations between tokens (queries with queries, keys "
            "with keys, values with values) that one layer of a large one has. Here for any teacher and any student "
            "that share a vocabulary, with the loss computed block by block."
        ),
        config=MiniLMv2Config,
        models={
            "AutoModel": minilmv2.MiniLMv2Model,
            "AutoModelForPreTraining": minilmv2.MiniLMv2ForPreTraining,
        },
        trainer="bestiary.trainers.trainer_minilmv2:MiniLMv2Trainer",
        arguments="bestiary.trainers.trainer_minilmv2:MiniLMv2TrainingArguments",
        collator="transformers:DataCollatorWithPadding",
        official_code="https://github.com/microsoft/unilm/tree/master/minilm",
        official_licence="MIT",
        tags=("distillation", "compression", "any encoder"),
    )
)
register(
    Paper(
        slug="performer",
        title="Rethinking Attention with Performers",
        authors=(
            "Krzysztof Choromanski, Valerii Likhosherstov, David Dohan, Xingyou Song, Andreea Gane, Tamas Sarlos, "
            "Peter Hawkins, Jared Davis, Afroz Mohiuddin, Lukasz Kaiser, David Belanger, Lucy Colwell, Adrian Weller"
        ),
        year=2021,
        arxiv="2009.14794",
        kind="architecture",
        summary=(
            "Estimates softmax attention in linear time by positive orthogonal random features (FAVOR+), or replaces "
            "it by generalised kernels. "
            "Here bidirectional and strictly causal, started from BERT's weights, with generation in constant memory."
        ),
        config=PerformerConfig,
        models={
            "AutoModel": performer.PerformerModel,
            "AutoModelForPreTraining": performer.PerformerForPreTraining,
            "AutoModelForMaskedLM": performer.PerformerForMaskedLM,
            "AutoModelForCausalLM": performer.PerformerForCausalLM,
            "AutoModelForSequenceClassification": performer.PerformerForSequenceClassification,
            "AutoModelForTokenClassification": performer.PerformerForTokenClassification,
            "AutoModelForQuestionAnswering": performer.PerformerForQuestionAnswering,
            "AutoModelForMultipleChoice": performer.PerformerForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_performer:PerformerTrainer",
        arguments="bestiary.trainers.trainer_performer:PerformerTrainingArguments",
        collator="bestiary.trainers.masking:MaskingCollator",
        converter="bestiary.conversion.performer",
        official_code="https://github.com/google-research/google-research/tree/master/performer",
        official_licence="Apache-2.0",
        tags=("linear attention", "random features", "causal language model", "masked language model"),
    )
)
register(
    Paper(
        slug="sparse_seq2seq",
        title="Sparse Sequence-to-Sequence Models",
        authors="Ben Peters, Vlad Niculae, André F. T. Martins",
        year=2019,
        arxiv="1905.05702",
        kind="architecture",
        summary=(
            "Replaces softmax by alpha-entmax, which gives exact zeros, in the attention and in the output of an LSTM "
            "encoder-decoder, and trains by the loss that belongs to it. "
            "Here with exact beam search by transformers' generate(), any or a learned alpha, and as an extension a "
            "Transformer encoder with that attention."
        ),
        config=SparseSeq2seqConfig,
        models={
            "AutoModel": sparse_seq2seq.SparseSeq2seqModel,
            "AutoModelForSeq2SeqLM": sparse_seq2seq.SparseSeq2seqForConditionalGeneration,
        },
        trainer="bestiary.trainers.trainer_sparse_seq2seq:SparseSeq2seqTrainer",
        arguments="bestiary.trainers.trainer_sparse_seq2seq:SparseSeq2seqTrainingArguments",
        collator="bestiary.trainers.seq2seq:Seq2SeqCollator",
        converter="bestiary.conversion.sparse_seq2seq",
        official_code="https://github.com/deep-spin/OpenNMT-entmax",
        official_licence="MIT",
        tags=("sparse attention", "entmax", "sequence to sequence", "text generation"),
    )
)
register_extension(
    Paper(
        slug="sparse_seq2seq",
        title="Adaptively Sparse Transformers",
        authors="Gonçalo M. Correia, Vlad Niculae, André F. T. Martins",
        year=2019,
        arxiv="1909.00015",
        kind="architecture",
        summary=(
            "Replaces softmax by alpha-entmax in the attention of a Transformer, with an alpha that every head may "
            "learn. Here an extension of `sparse_seq2seq`: a BERT-like encoder, not the authors' translation model."
        ),
        config=SparseTransformerConfig,
        models={
            "AutoModel": sparse_seq2seq.SparseTransformerModel,
            "AutoModelForMaskedLM": sparse_seq2seq.SparseTransformerForMaskedLM,
            "AutoModelForSequenceClassification": sparse_seq2seq.SparseTransformerForSequenceClassification,
            "AutoModelForTokenClassification": sparse_seq2seq.SparseTransformerForTokenClassification,
            "AutoModelForQuestionAnswering": sparse_seq2seq.SparseTransformerForQuestionAnswering,
            "AutoModelForMultipleChoice": sparse_seq2seq.SparseTransformerForMultipleChoice,
        },
        official_code="https://github.com/deep-spin/entmax",
        official_licence="MIT",
        tags=("sparse attention", "entmax"),
    )
)
register(
    Paper(
        slug="theseus",
        title="BERT-of-Theseus: Compressing BERT by Progressive Module Replacing",
        authors="Canwen Xu, Wangchunshu Zhou, Tao Ge, Furu Wei, Ming Zhou",
        year=2020,
        arxiv="2002.02925",
        kind="compression",
        summary=(
            "Compresses a fine-tuned encoder by replacing modules of its layers at random by single layers, ever more "
            "often, until only these are left; they are trained by the task's loss alone. "
            "Here over any encoder with a list of layers, with both phases in one run, exported as a plain model."
        ),
        config=TheseusConfig,
        models={
            "AutoModel": theseus.TheseusModel,
            "AutoModelForSequenceClassification": theseus.TheseusForSequenceClassification,
            "AutoModelForTokenClassification": theseus.TheseusForTokenClassification,
            "AutoModelForQuestionAnswering": theseus.TheseusForQuestionAnswering,
            "AutoModelForMultipleChoice": theseus.TheseusForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_theseus:TheseusTrainer",
        arguments="bestiary.trainers.trainer_theseus:TheseusTrainingArguments",
        collator="transformers:DataCollatorWithPadding",
        converter="bestiary.conversion.theseus",
        official_code="https://github.com/JetRunner/BERT-of-Theseus",
        official_licence="Apache-2.0",
        tags=("compression", "fine-tuning", "module replacing"),
    )
)
register(
    Paper(
        slug="tta",
        title="Fast and Accurate Deep Bidirectional Language Representations for Unsupervised Learning",
        authors="Joongbo Shin, Yoonhyung Lee, Seunghyun Yoon, Kyomin Jung",
        year=2020,
        arxiv="2004.08097",
        kind="architecture",
        summary=(
            "Predicts every token from all the others in one pass, without masks: queries that start from positions "
            "read keys and values of the embeddings in every layer, and never their own token's. "
            "Here with scoring of sentences, rescoring of n-best lists and sentence similarity."
        ),
        config=TtaConfig,
        models={
            "AutoModel": tta.TtaModel,
            "AutoModelForMaskedLM": tta.TtaForMaskedLM,
            "AutoModelForPreTraining": tta.TtaForMaskedLM,
            "AutoModelForSequenceClassification": tta.TtaForSequenceClassification,
            "AutoModelForTokenClassification": tta.TtaForTokenClassification,
            "AutoModelForQuestionAnswering": tta.TtaForQuestionAnswering,
            "AutoModelForMultipleChoice": tta.TtaForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_tta:TtaTrainer",
        arguments="bestiary.trainers.trainer_tta:TtaTrainingArguments",
        collator="bestiary.trainers.trainer_tta:TtaCollator",
        converter="bestiary.conversion.tta",
        official_code="https://github.com/joongbo/tta",
        official_licence="Apache-2.0",
        tags=("language autoencoding", "n-best rescoring", "sentence similarity"),
    )
)
register(
    Paper(
        slug="realformer",
        title="RealFormer: Transformer Likes Residual Attention",
        authors="Ruining He, Anirudh Ravula, Bhargav Kanagal, Joshua Ainslie",
        year=2020,
        arxiv="2012.11747",
        kind="architecture",
        summary=(
            "Adds the raw attention scores of all earlier layers to those of each layer, head by head: BERT with one "
            "more residual path and no more parameters. "
            "Here as running sum or running mean, with BERT's names, so that BERT's checkpoints load."
        ),
        config=RealformerConfig,
        models={
            "AutoModel": realformer.RealformerModel,
            "AutoModelForPreTraining": realformer.RealformerForPreTraining,
            "AutoModelForMaskedLM": realformer.RealformerForMaskedLM,
            "AutoModelForNextSentencePrediction": realformer.RealformerForNextSentencePrediction,
            "AutoModelForSequenceClassification": realformer.RealformerForSequenceClassification,
            "AutoModelForTokenClassification": realformer.RealformerForTokenClassification,
            "AutoModelForQuestionAnswering": realformer.RealformerForQuestionAnswering,
            "AutoModelForMultipleChoice": realformer.RealformerForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_realformer:RealformerTrainer",
        arguments="bestiary.trainers.trainer_realformer:RealformerTrainingArguments",
        collator="bestiary.trainers.masking:MaskingCollator",
        converter="bestiary.conversion.realformer",
        official_code="https://github.com/google-research/google-research/tree/master/realformer",
        official_licence="Apache-2.0",
        tags=("residual attention", "masked language model"),
    )
)
register(
    Paper(
        slug="tupe",
        title="Rethinking Positional Encoding in Language Pre-training",
        authors="Guolin Ke, Di He, Tie-Yan Liu",
        year=2020,
        arxiv="2006.15595",
        kind="architecture",
        summary=(
            "Scores positions by projections of their own, apart from the words, once for all layers, and unties "
            "[CLS] from its position. "
            "Here as TUPE-A and TUPE-R with the ablations, for left-padded and packed rows too, and as either network "
            "of ELECTRA."
        ),
        config=TupeConfig,
        models={
            "AutoModel": tupe.TupeModel,
            "AutoModelForPreTraining": tupe.TupeForPreTraining,
            "AutoModelForMaskedLM": tupe.TupeForMaskedLM,
            "AutoModelForSequenceClassification": tupe.TupeForSequenceClassification,
            "AutoModelForTokenClassification": tupe.TupeForTokenClassification,
            "AutoModelForQuestionAnswering": tupe.TupeForQuestionAnswering,
            "AutoModelForMultipleChoice": tupe.TupeForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_tupe:TupeTrainer",
        arguments="bestiary.trainers.trainer_tupe:TupeTrainingArguments",
        collator="bestiary.trainers.masking:MaskingCollator",
        converter="bestiary.conversion.tupe",
        official_code="https://github.com/guolinke/TUPE",
        official_licence="MIT",
        tags=("untied positions", "relative positions", "masked language model"),
    )
)
register(
    Paper(
        slug="unilm",
        title="Unified Language Model Pre-training for Natural Language Understanding and Generation",
        authors=(
            "Li Dong, Nan Yang, Wenhui Wang, Furu Wei, Xiaodong Liu, Yu Wang, Jianfeng Gao, Ming Zhou, Hsiao-Wuen Hon"
        ),
        year=2019,
        arxiv="1905.03197",
        kind="pre-training objective",
        summary=(
            "Trains one BERT as a bidirectional, left-to-right, right-to-left and sequence-to-sequence cloze model by "
            "masks on its attention. "
            "Here with fine-tuning to write, and decoding under [MASK]s by transformers' generate() with a cache."
        ),
        config=UniLMConfig,
        models={
            "AutoModel": unilm.UniLMModel,
            "AutoModelForPreTraining": unilm.UniLMForPreTraining,
            "AutoModelForMaskedLM": unilm.UniLMForMaskedLM,
            "AutoModelForSeq2SeqLM": unilm.UniLMForConditionalGeneration,
            "AutoModelForSequenceClassification": unilm.UniLMForSequenceClassification,
            "AutoModelForTokenClassification": unilm.UniLMForTokenClassification,
            "AutoModelForQuestionAnswering": unilm.UniLMForQuestionAnswering,
            "AutoModelForMultipleChoice": unilm.UniLMForMultipleChoice,
        },
        trainer="bestiary.trainers.trainer_unilm:UniLMTrainer",
        arguments="bestiary.trainers.trainer_unilm:UniLMTrainingArguments",
        collator="bestiary.trainers.trainer_unilm:UniLMCollator",
        seq2seq_trainer="bestiary.trainers.trainer_unilm:UniLMSeq2SeqTrainer",
        converter="bestiary.conversion.unilm",
        official_code="https://github.com/microsoft/unilm",
        official_licence="MIT",
        tags=("masked language model", "sequence to sequence", "text generation"),
    )
)
