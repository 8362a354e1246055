"""A transformer decoder with cross-attention (Vaswani et al., 2017) as a captioner whose attention is supervised."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from downstream.captioning.models.base import Captioner, State, Told
from downstream.captioning.models.trunk import FeatureTrunk
from downstream.captioning.vocabulary import PADDING
from downstream.protocol import Inputs


class CaptionTransformer(Captioner):
    """Decoder layers over words and the feature map.

    The map of a word is the mean over heads of the last layer's cross-attention at the position that predicts it, its
    energies the mean of theirs (our choice).

    Args:
        num_words: size of the vocabulary.
        channels: of the features.
        trunk: turns inputs into features.
        grid: height and width of the feature map.
        max_words: longest caption.
        width: of words and places, a multiple of `heads`.
        hidden: of the feed-forward layers.
    """

    def __init__(
        self,
        num_words: int,
        *,
        channels: int,
        trunk: FeatureTrunk,
        grid: tuple[int, int],
        max_words: int,
        width: int = 512,
        hidden: int = 2048,
        depth: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"caption.embedding {width} must be a multiple of caption.heads {heads}")
        self.trunk = trunk
        self.scale = math.sqrt(width)
        self.embed = nn.Embedding(num_words, width, padding_idx=PADDING)
        self.order = nn.Parameter(torch.randn(max_words + 1, width) * 0.02)
        self.places = nn.Linear(channels, width)
        self.where = nn.Parameter(torch.randn(grid[0] * grid[1], width) * 0.02)
        self.layers = nn.ModuleList(
            DecoderLayer(width, hidden=hidden, heads=heads, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.classify = nn.Linear(width, num_words)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.grid = grid

    def no_weight_decay(self) -> set[str]:
        """Names of weights that are places, not maps."""
        return {"order", "where"}

    def begin(self, inputs: Inputs) -> State:
        """The places, and no words yet."""
        features = self.trunk(inputs)
        places = self.places(features.flatten(2).transpose(1, 2)) + self.where
        empty = {f"past{i}": places.new_zeros(len(places), 0, places.shape[2]) for i in range(len(self.layers))}
        return State({"places": self.drop(places)}, empty)

    def advance(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """One word; the past of every layer is kept, so that only the new word is worked on."""
        hidden, _, weights, state = self._decode(tokens.unsqueeze(1), state)
        return self.classify(hidden).squeeze(1), weights.mean(1).squeeze(1).unflatten(1, self.grid), state

    def forward(self, inputs: Inputs) -> Told:
        """All words of captions that are shown."""
        hidden, energies, weights, _ = self._decode(inputs["tokens"][:, :-1], self.begin(inputs))
        logits = self.classify(self.drop(hidden))
        return Told(logits, energies.mean(1).unflatten(2, self.grid), weights.mean(1).unflatten(2, self.grid))

    def _decode(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        done = state.words["past0"].shape[1]
        words = self.embed(tokens) * self.scale + self.order[done : done + tokens.shape[1]]
        hidden, pasts = self.drop(words), {}
        energies = weights = hidden
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            hidden, energies, weights, past = layer(hidden, state.memory["places"], past=state.words[f"past{number}"])
            pasts[f"past{number}"] = past
        return self.norm(hidden), energies, weights, State(state.memory, pasts)


class DecoderLayer(nn.Module):
    """Self-attention over the words so far, cross-attention over the places, feed-forward; norms before each."""

    def __init__(self, width: int, *, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_self, self.norm_cross, self.norm_feed = (nn.LayerNorm(width) for _ in range(3))
        self.own, self.own_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.memory = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, words: Tensor, places: Tensor, *, past: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Words `(batch, new, width)`, cross-attention's energies and weights `(batch, heads, new, places)`, the past.

        Args:
            past: what this layer's self-attention saw before, `(batch, old, width)`.
        """
        past = torch.cat([past, self.norm_self(words)], dim=1)
        words = words + self.drop(self._look_back(past, count=words.shape[1]))
        query = self._split(self.query(self.norm_cross(words)))
        keys, values = (self._split(x) for x in self.memory(places).chunk(2, dim=2))
        energies = query @ keys.transpose(2, 3) / math.sqrt(query.shape[3])
        weights = energies.float().softmax(3)
        words = words + self.drop(self.cross_out((weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)))
        return words + self.drop(self.feed(self.norm_feed(words))), energies, weights, past

    def _look_back(self, past: Tensor, *, count: int) -> Tensor:
        query, keys, values = (self._split(x) for x in self.own(past).chunk(3, dim=2))
        total = past.shape[1]
        seen = torch.ones(count, total, dtype=torch.bool, device=past.device).tril(total - count)
        found = functional.scaled_dot_product_attention(query[:, :, total - count :], keys, values, attn_mask=seen)
        return self.own_out(found.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
