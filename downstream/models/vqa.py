"""Visual question answering with attention over the image and over the question's words."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from downstream.models.image import normalised
from downstream.models.text import PADDING
from downstream.protocol import Attended, AttentionModel, Inputs

LookName = Literal["glimpses", "stacked"]


class SmallTrunk(nn.Sequential):
    """Three convolutions of stride 2 to a feature map of an eighth of the image's side, learnt from scratch.

    Batch normalisation: without it the first epochs go by before questions and shapes are brought together.
    """

    def __init__(self, channels: int) -> None:
        widths = (3, max(channels // 4, 1), max(channels // 2, 1), channels)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers)


class WordAttention(nn.Module):
    """Self-attention over the states of an LSTM: `softmax(w tanh(W h))`, and the states it weighs."""

    def __init__(self, embedding: int, *, states: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(embedding, states, batch_first=True)
        self.inner, self.outer = nn.Linear(states, width), nn.Linear(width, 1, bias=False)

    def forward(self, embedded: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """Question vectors `(batch, states)` and densities `(batch, tokens)` from words `(batch, tokens, embedding)`.

        Args:
            exists: bool `(batch, tokens)`, false for padding, which stands behind the words.
        """
        # an LSTM in one direction never sees what stands behind a word, so padding needs no packing
        longest = max(int(exists.sum(1).max()), 1)
        states, _ = self.lstm(torch.tanh(embedded[:, :longest]))
        energies = self.outer(torch.tanh(self.inner(states))).squeeze(2)
        weights = energies.masked_fill(~exists[:, :longest], -torch.inf).softmax(1)
        question = (weights.unsqueeze(1) @ states).squeeze(1)
        return question, functional.pad(weights, (0, exists.shape[1] - longest))


class Glimpses(nn.Module):
    """Attention of Kazemi and Elqursh (2017): Conv1x1 + Linear -> ReLU -> Conv1x1 -> softmax, several maps at once.

    Attributes:
        size: length of the answer vector: the glimpses' features and the question.
    """

    def __init__(self, channels: int, *, question: int, width: int, glimpses: int, dropout: float) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.keys = nn.Linear(channels, width, bias=False)  # the query's bias does for both
        self.query = nn.Linear(question, width)
        self.outer = nn.Linear(width, glimpses)
        self.drop = nn.Dropout(dropout)
        self.size = glimpses * channels + question

    def project(self, features: Tensor) -> Tensor:
        """Features and their keys side by side: without a bias, a mask on both is a mask on the features."""
        return torch.cat([features, self.keys(features)], dim=3)

    def forward(self, projected: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Answer vectors `(batch, size)` and densities `(batch, height, width)`, the mean of glimpses (our choice)."""
        values, keys = projected.split([self.channels, self.width], dim=3)
        query = self.query(self.drop(question))[:, None, None]
        weights = self.outer(self.drop(torch.relu(keys + query))).flatten(1, 2).softmax(1)
        context = (weights.transpose(1, 2) @ values.flatten(1, 2)).flatten(1)
        return torch.cat([context, question], dim=1), weights.mean(2).view(projected.shape[:3])


class StackedAttention(nn.Module):
    """Stacked attention (Yang et al., CVPR 2016): each layer adds what it saw to the question and looks again.

    Attributes:
        size: length of the answer vector, which is the refined question.
    """

    def __init__(self, channels: int, *, question: int, width: int, glimpses: int, dropout: float) -> None:
        super().__init__()
        self.values = nn.Linear(channels, question, bias=False)  # no bias, so that it commutes with masks
        self.keys = nn.ModuleList(nn.Linear(question, width, bias=False) for _ in range(glimpses))
        self.queries = nn.ModuleList(nn.Linear(question, width) for _ in range(glimpses))
        self.outers = nn.ModuleList(nn.Linear(width, 1) for _ in range(glimpses))
        self.drop = nn.Dropout(dropout)
        self.size = question

    def project(self, features: Tensor) -> Tensor:
        """Features in the question's space, before the tanh: a mask on them is a mask on the features."""
        return self.values(features)

    def forward(self, projected: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Answer vectors `(batch, size)` and densities `(batch, height, width)`, the mean of layers (our choice)."""
        values = torch.tanh(projected)
        maps = []
        for keys, query, outer in zip(self.keys, self.queries, self.outers, strict=True):
            inner = self.drop(torch.tanh(keys(values) + query(question)[:, None, None]))
            weights = outer(inner).flatten(1).softmax(1)
            question = question + (weights.unsqueeze(1) @ values.flatten(1, 2)).squeeze(1)
            maps.append(weights)
        return question, torch.stack(maps).mean(0).view(projected.shape[:3])


LOOKS: dict[LookName, type[Glimpses] | type[StackedAttention]] = {"glimpses": Glimpses, "stacked": StackedAttention}


class QuestionAnswering(AttentionModel):
    """Show, Ask, Attend and Answer (Kazemi and Elqursh, 2017), its question read with self-attention over words.

    Image features are L2-normalised over channels before anything else, masks included: a mask that came first would
    be divided out again. The widths of the paper are the defaults.

    Args:
        vocabulary: number of tokens; 0 is padding, 1 unknown words.
        channels: of the feature map.
        trunk: makes the feature map of images; None reads ready maps, `inputs["features"]`.
        look: "glimpses" (Kazemi and Elqursh) or "stacked" (Yang et al.).
        width: of both attention networks.
        glimpses: number of attention maps, or of stacked layers.
        hidden: width of the classifier.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        num_classes: int,
        channels: int = 2048,
        trunk: nn.Module | None = None,
        look: LookName = "glimpses",
        embedding: int = 300,
        lstm: int = 1024,
        width: int = 512,
        glimpses: int = 2,
        hidden: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.drop = nn.Dropout(dropout)
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=PADDING)
        self.read = WordAttention(embedding, states=lstm, width=width)
        self.look = LOOKS[look](channels, question=lstm, width=width, glimpses=glimpses, dropout=dropout)
        self.classify = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(self.look.size, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def encode(self, inputs: Inputs) -> dict[str, Tensor]:
        """Projected feature map `(batch, height, width, channels)` and word vectors `(batch, tokens, embedding)`.

        Args:
            inputs: "tokens" `(batch, tokens)`, and "images" uint8 `(batch, size, size, 3)` where there is a trunk,
                else "features" `(batch, channels, height, width)`.
        """
        maps = inputs["features"].float() if self.trunk is None else self.trunk(normalised(inputs["images"]))
        features = functional.normalize(maps.permute(0, 2, 3, 1), dim=3)
        return {"image": self.look.project(self.drop(features)), "text": self.drop(self.embed(inputs["tokens"]))}

    def settle(self, features: dict[str, Tensor], inputs: Inputs, *, modality: str) -> tuple[dict[str, Tensor], Inputs]:
        """The question is read once where only the image is masked; images are not needed any more."""
        tokens = {"tokens": inputs["tokens"]}
        if modality != "image":
            return features, tokens
        question, weights = self.read(features["text"], inputs["tokens"] != PADDING)
        return {"image": features["image"], "question": question, "words": weights}, tokens

    def attend(self, features: dict[str, Tensor], inputs: Inputs) -> Attended:
        """Attention over words, then over the image, and answer logits."""
        exists = inputs["tokens"] != PADDING
        if "question" in features:
            question, words = features["question"], features["words"]
        else:
            question, words = self.read(features["text"], exists)
        answer, density = self.look(features["image"], question)
        return Attended(self.classify(answer), {"image": density, "text": words}, {"text": exists})
