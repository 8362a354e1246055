"""Text classifiers with attention over tokens."""

import torch
from torch import Tensor, nn

from downstream.protocol import Attended, AttentionModel, Inputs

PADDING, UNKNOWN = 0, 1


class SelfAttentiveText(AttentionModel):
    """Structured self-attention (Lin et al., ICLR 2017): BiLSTM, hops of attention, their sentences side by side.

    `A = softmax(W2 tanh(W1 H))` over the tokens, `M = A H`, then a hidden layer and the classes. The map that is mined
    and supervised is the mean over hops (our choice). Padding gets no attention and does not enter the LSTM.

    Args:
        vocabulary: number of tokens; 0 is padding, 1 unknown words.
        hidden: width of the layer behind the sentence matrix; the public code of Patro et al. has 2000.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        num_classes: int,
        embedding: int = 300,
        lstm: int = 256,
        attention: int = 350,
        hops: int = 30,
        hidden: int = 2000,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=PADDING)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding, lstm, batch_first=True, bidirectional=True)
        self.inner = nn.Linear(2 * lstm, attention, bias=False)
        self.outer = nn.Linear(attention, hops, bias=False)
        self.hidden = nn.Linear(hops * 2 * lstm, hidden)
        self.classify = nn.Linear(hidden, num_classes)

    def encode(self, inputs: Inputs) -> dict[str, Tensor]:
        """Word embeddings `(batch, tokens, embedding)` of `inputs["tokens"]`."""
        return {"text": self.drop(self.embed(inputs["tokens"]))}

    def attend(self, features: dict[str, Tensor], inputs: Inputs) -> Attended:
        """Attention over the tokens, averaged over hops, and class logits."""
        exists = inputs["tokens"] != PADDING
        states = self._states(features["text"], exists)
        energies = self.outer(torch.tanh(self.inner(states))).masked_fill(~exists.unsqueeze(2), -torch.inf)
        weights = energies.softmax(1)
        sentence = (weights.transpose(1, 2) @ states).flatten(1)
        logits = self.classify(self.drop(torch.relu(self.hidden(sentence))))
        return Attended(logits, {"text": weights.mean(2)}, {"text": exists})

    def _states(self, embedded: Tensor, exists: Tensor) -> Tensor:
        lengths = exists.sum(1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = self.lstm(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=embedded.shape[1])
        return padded


class TransformerText(AttentionModel):
    """A transformer encoder whose class token's attention in the last layer, mean over heads, is the map.

    Args:
        vocabulary: number of tokens; 0 is padding, 1 unknown words.
        tokens: longest text.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        num_classes: int,
        tokens: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        layer = {"dim_feedforward": 4 * width, "dropout": dropout, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, **layer) for _ in range(depth - 1))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width)
        self.read = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, num_classes))

    def encode(self, inputs: Inputs) -> dict[str, Tensor]:
        """Word embeddings `(batch, tokens, width)` of `inputs["tokens"]`."""
        return {"text": self.embed(inputs["tokens"])}

    def attend(self, features: dict[str, Tensor], inputs: Inputs) -> Attended:
        """The class token's attention over the tokens, and class logits."""
        exists = inputs["tokens"] != PADDING
        length = exists.shape[1]
        words = features["text"] + self.place[:, :length]
        for layer in self.layers:
            words = layer(words, src_key_padding_mask=~exists)
        words = self.norm(words)
        query = self.token.expand(len(words), -1, -1)
        read, weights = self.read(query, words, words, key_padding_mask=~exists, average_attn_weights=True)
        return Attended(
            self.classify(query.squeeze(1) + read.squeeze(1)), {"text": weights.squeeze(1)}, {"text": exists}
        )
