"""Rows for writing targets: UniLM with a cache against the same model that reads everything again at every step."""

import torch
from torch import nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from bestiary.configuration.configuration_unilm import UniLMConfig
from bestiary.modeling.modeling_unilm import SEQ2SEQ, UniLMForConditionalGeneration, UniLMSourceOutput

from .harness import PEER, compare, row


SOURCE, TARGET, BEAMS = 128, 32, 4
SIZE = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 256,
}


class Unread(nn.Module):
    """Keeps the tokens of sources as they are."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """What `generate()` hands to every step."""
        return UniLMSourceOutput(last_hidden_state=input_ids, source_states=(), longest=input_ids.shape[1])


class ReadingAgain(UniLMForConditionalGeneration):
    """The plain way: one row [CLS] source [SEP] target [MASK] for every hypothesis and step, all of it encoded."""

    def get_encoder(self, modality=None):
        """Nothing is encoded beforehand."""
        return Unread()

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
        return Seq2SeqLMOutput(logits=self.cls.predictions(states[:, -1:]))


@row("unilm_decoding")
def unilm_decoding(pairs: int) -> dict:
    """Greedy search of two sources and beams of one, targets of one length, the same tokens from all."""
    torch.manual_seed(0)
    cached = UniLMForConditionalGeneration(UniLMConfig(**SIZE, initializer_range=0.1)).eval()
    again = ReadingAgain(cached.config).eval()
    again.load_state_dict(cached.state_dict())
    ids = torch.randint(5, SIZE["vocab_size"], (2, SOURCE))
    mask = (torch.arange(SOURCE) < torch.tensor([[SOURCE], [SOURCE * 3 // 4]])).long()
    metrics = {}
    for name, sources, options in (
        ("greedy, 2 sources", 2, {}),
        (f"{BEAMS} beams, 1 source", 1, {"num_beams": BEAMS}),
    ):
        inputs = {"input_ids": (ids * mask)[:sources], "attention_mask": mask[:sources]} | options

        def write(model, use_cache, tokens=TARGET, inputs=inputs):
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            return model.generate(**inputs, **lengths, use_cache=use_cache)

        ways = {PEER: (again, False), "source kept": (cached, False), "cache": (cached, True)}
        results = [write(*way, tokens=8) for way in ways.values()]
        if not all(torch.equal(result, results[0]) for result in results):
            raise RuntimeError("the ways to decode disagree")
        metrics[name] = compare({label: lambda way=way: write(*way) for label, way in ways.items()}, pairs)
    return {
        "description": f"UniLM, 2 layers of 512, sources of {SOURCE} tokens, {TARGET} tokens written",
        "peer": "the same weights, everything read again at every step",
        "metrics": metrics,
    }
