"""Show, Attend and Tell (Xu et al., ICML 2015) with soft attention, in the form of its best-known public code."""

import torch
from torch import Tensor, nn

from downstream.captioning.models.base import Captioner, State, Told
from downstream.captioning.models.trunk import FeatureTrunk
from downstream.captioning.vocabulary import PADDING
from downstream.protocol import Inputs


class ShowAttendTell(Captioner):
    """LSTM that looks at the feature map before every word.

    Attention is additive with a ReLU, `e_i = v . relu(W a_i + U h)`; the context is gated by `sigmoid(B h)`; a word
    comes from the state alone. The first state is a linear map of the mean feature.

    Args:
        num_words: size of the vocabulary.
        channels: of the features.
        trunk: turns inputs into features.
        embedding, attention, decoder: widths; 512 each in the public code.
        dropout: before the classifier of words.
    """

    def __init__(
        self,
        num_words: int,
        *,
        channels: int,
        trunk: FeatureTrunk,
        embedding: int = 512,
        attention: int = 512,
        decoder: int = 512,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.embed = nn.Embedding(num_words, embedding, padding_idx=PADDING)
        self.keys, self.query = nn.Linear(channels, attention), nn.Linear(decoder, attention)
        self.outer = nn.Linear(attention, 1)
        self.gate = nn.Linear(decoder, channels)
        self.first_hidden, self.first_cell = nn.Linear(channels, decoder), nn.Linear(channels, decoder)
        self.cell = nn.LSTMCell(embedding + channels, decoder)
        self.drop = nn.Dropout(dropout)
        self.classify = nn.Linear(decoder, num_words)
        for layer in (self.embed, self.classify):
            nn.init.uniform_(layer.weight, -0.1, 0.1)
        nn.init.zeros_(self.classify.bias)

    def begin(self, inputs: Inputs) -> State:
        """Places, their keys, and the first hidden state and cell."""
        features = self.trunk(inputs)
        places = features.flatten(2).transpose(1, 2)
        mean = places.mean(1)
        grid = features.new_empty(len(features), 0, *features.shape[2:])  # only its shape is read
        memory = {"places": places, "keys": self.keys(places), "grid": grid}
        return State(memory, {"hidden": self.first_hidden(mean), "cell": self.first_cell(mean)})

    def advance(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """One word."""
        hidden, _, maps, state = self._step(self.embed(tokens), state)
        return self.classify(hidden), maps.unflatten(1, state.memory["grid"].shape[2:]), state

    def forward(self, inputs: Inputs) -> Told:
        """All words of captions that are shown."""
        words = self.embed(inputs["tokens"][:, :-1])
        state = self.begin(inputs)
        hidden, energies, maps = [], [], []
        for step in range(words.shape[1]):
            one, energy, density, state = self._step(words[:, step], state)
            hidden.append(one)
            energies.append(energy)
            maps.append(density)
        grid = state.memory["grid"].shape[2:]
        return Told(
            self.classify(self.drop(torch.stack(hidden, dim=1))),
            torch.stack(energies, dim=1).unflatten(2, grid),
            torch.stack(maps, dim=1).unflatten(2, grid),
        )

    def _step(self, words: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        hidden, cell = state.words["hidden"], state.words["cell"]
        query = self.query(hidden).unsqueeze(1)
        energies = self.outer(torch.relu(state.memory["keys"] + query)).squeeze(2)
        maps = energies.float().softmax(1)
        context = torch.einsum("bn,bnc->bc", maps.to(state.memory["places"].dtype), state.memory["places"])
        context = torch.sigmoid(self.gate(hidden)) * context
        hidden, cell = self.cell(torch.cat([words, context], dim=1), (hidden, cell))
        return hidden, energies, maps, State(state.memory, {"hidden": hidden, "cell": cell})
