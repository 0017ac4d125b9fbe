"""Rows for writing targets: UniLM with a cache against the same model that reads everything again at every step."""

import torch

from bestiary.configuration.configuration_unilm import UniLMConfig
from bestiary.modeling.modeling_unilm import (
    SEQ2SEQ,
    UniLMForConditionalGeneration,
    UniLMSeq2SeqOutput,
    UniLMSourceOutput,
)

from .harness import PEER, compare, row


SOURCES, SOURCE, TARGET, BEAMS = 4, 96, 32, 4
SIZE = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 256,
}


class ReadingAgain(UniLMForConditionalGeneration):
    """The plain way: one row [CLS] source [SEP] target [MASK] for every hypothesis and step, all of it encoded."""

    def encode_source(self, input_ids, attention_mask=None, **kwargs):
        """Keep the tokens."""
        return UniLMSourceOutput(last_hidden_state=input_ids)

    def forward(self, decoder_input_ids=None, encoder_outputs=None, attention_mask=None, use_cache=None, **kwargs):
        """Logits (N, 1, V) of the next token."""
        source, written = encoder_outputs.last_hidden_state, decoder_input_ids[:, 1:]
        mask = torch.full_like(source[:, :1], self.config.mask_token_id)
        states = self.bert(
            torch.cat((source, written, mask), 1),
            torch.cat((attention_mask, torch.ones_like(written), torch.ones_like(mask)), 1),
            task_ids=torch.full_like(source[:, 0], SEQ2SEQ),
            num_tokens_a=attention_mask.sum(1),
        ).last_hidden_state
        return UniLMSeq2SeqOutput(logits=self.cls.predictions(states[:, -1:]))


@row("unilm_decoding")
def unilm_decoding(pairs: int) -> dict:
    """Greedy search and beams, targets of one length, the same tokens from all."""
    torch.manual_seed(0)
    cached = UniLMForConditionalGeneration(UniLMConfig(**SIZE, initializer_range=0.1)).eval()
    again = ReadingAgain(cached.config).eval()
    again.load_state_dict(cached.state_dict())
    ids = torch.randint(5, SIZE["vocab_size"], (SOURCES, SOURCE))
    mask = (torch.arange(SOURCE) < torch.tensor([[SOURCE], [80], [60], [88]])).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": TARGET, "min_new_tokens": TARGET}
    metrics = {}
    for name, options in (("greedy", {}), (f"{BEAMS} beams", {"num_beams": BEAMS})):
        functions = {
            PEER: lambda options=options: again.generate(**inputs, **options, use_cache=False),
            "source kept": lambda options=options: cached.generate(**inputs, **options, use_cache=False),
            "cache": lambda options=options: cached.generate(**inputs, **options),
        }
        with torch.no_grad():
            results = [function() for function in functions.values()]
            if not all(torch.equal(result, results[0]) for result in results):
                raise RuntimeError("the ways to decode disagree")
            metrics[name] = compare(functions, pairs)
    return {
        "description": f"UniLM, 4 layers of 256, {SOURCES} sources of {SOURCE} tokens, {TARGET} tokens written",
        "peer": "the same weights, everything read again at every step",
        "metrics": metrics,
    }
