"""Input embeddings: word + token type + position, LayerNorm, dropout (Devlin et al., 2018, arXiv 1810.04805, section
3).
"""

import torch
from torch import nn

from .dropout import Dropout


class EncoderEmbeddings(nn.Module):
    """Word, position and token-type tables of width `config.embedding_size`, summed and normalised.

    Parameter names are BERT's.
    """

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embed `input_ids` (B, T), or take `inputs_embeds` (B, T, E) for the words; returns (B, T, E).

        `token_type_ids` default to 0 and `position_ids` to 0 ... T-1.
        """
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, E)
        if position_ids is None:
            position_ids = torch.arange(words.shape[1], device=words.device).unsqueeze(0)  # (1, T)
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]  # (E,)
        else:
            types = self.token_type_embeddings(token_type_ids)  # (B, T, E)
        # the sum is taken in BERT's order, so that outputs are equal to the last bit
        return self.dropout(self.LayerNorm(words + types + self.position_embeddings(position_ids)))
