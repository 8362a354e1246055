"""Writing captions: batched beam search, of which greedy decoding is the beam of one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from downstream.captioning.models.base import Captioner
from downstream.captioning.vocabulary import END, PADDING, START, UNKNOWN
from downstream.protocol import Inputs

NEVER = (PADDING, START, UNKNOWN)


@dataclass
class Written:
    """Captions of a batch of images.

    Attributes:
        tokens: `(images, length)`, the end token included where there is one, 0 behind it.
        scores: `(images,)`, log-probability, divided by (number of tokens)^length_penalty; always finite.
        maps: `(images, length, height, width)`, where the model looked for each token; zero behind the end.
    """

    tokens: Tensor
    scores: Tensor
    maps: Tensor


@torch.inference_mode()
def search(
    model: Captioner, inputs: Inputs, *, beam: int = 1, max_words: int = 30, length_penalty: float = 0.0
) -> Written:
    """The best caption of each image that a beam search finds; exact where the beam holds all prefixes.

    Captions that have ended keep their place in the beam and compete with those that go on, all by their score. A
    caption that reaches `max_words` without an end counts as it stands.

    Args:
        model: in evaluation mode.
        beam: number of captions kept per image.
        length_penalty: 0 compares sums of log-probabilities, 1 means per token.

    Raises:
        ValueError: a beam or a length below 1.
    """
    if beam < 1 or max_words < 1:
        raise ValueError(f"beam {beam} and max_words {max_words} must be at least 1")
    state = model.begin(inputs)
    some = next(iter(state.words.values()))
    first = torch.arange(len(some), device=some.device).repeat_interleave(beam)
    state, beams = state.take(first), _Beams(len(some), beam, length_penalty=length_penalty, device=some.device)
    for _ in range(max_words):
        logits, maps, state = model.advance(beams.last_tokens(), state)
        state = state.take(beams.extend(logits, maps), same_images=True)
        if beams.settled():
            break
    return beams.best()


class _Beams:
    """All captions of a search; tensors are `(images, beam)` and more axes."""

    def __init__(self, count: int, beam: int, *, length_penalty: float, device: torch.device) -> None:
        self.length_penalty = length_penalty
        self.sums = torch.full((count, beam), -torch.inf, device=device)
        self.sums[:, 0] = 0  # one beginning, not `beam` equal ones
        self.lengths = torch.zeros(count, beam, dtype=torch.int64, device=device)
        self.ended = torch.zeros(count, beam, dtype=torch.bool, device=device)
        self.tokens = torch.full((count, beam, 1), START, device=device)
        self.maps: list[Tensor] = []

    def last_tokens(self) -> Tensor:
        """What each caption ends in so far, `(images * beam,)`."""
        return self.tokens[:, :, -1].flatten()

    def extend(self, logits: Tensor, maps: Tensor) -> Tensor:
        """Go on with the best `beam` of all candidates of each image; the rows of the state that they go on from."""
        count, beam = self.sums.shape
        steps = logits.float().log_softmax(1).unflatten(0, (count, beam))
        steps[:, :, list(NEVER)] = -torch.inf
        # an ended caption has one candidate, itself
        steps.masked_fill_(self.ended.unsqueeze(2), -torch.inf)
        steps[:, :, PADDING].masked_fill_(self.ended, 0.0)
        sums = self.sums.unsqueeze(2) + steps
        lengths = self.lengths + ~self.ended
        chosen = self._compared(sums, lengths.unsqueeze(2)).flatten(1).topk(beam, dim=1).indices
        source, token = chosen // steps.shape[2], chosen % steps.shape[2]
        self.sums = sums.flatten(1).gather(1, chosen)
        self.lengths = lengths.gather(1, source)
        seen = maps.unflatten(0, (count, beam)).masked_fill(self.ended[:, :, None, None], 0.0)
        self.ended = self.ended.gather(1, source) | (token == END)
        rows = torch.arange(count, device=source.device).unsqueeze(1)
        self.tokens = torch.cat([self.tokens[rows, source], token.unsqueeze(2)], dim=2)
        self.maps = [*(old[rows, source] for old in self.maps), seen[rows, source]]
        return (source + beam * rows).flatten()

    def settled(self) -> bool:
        """Whether no caption that goes on can still win."""
        going = self.sums.masked_fill(self.ended, -torch.inf).amax(1)
        if self.length_penalty:
            return bool(torch.isinf(going).all())
        return bool((self.sums.masked_fill(~self.ended, -torch.inf).amax(1) >= going).all())

    def best(self) -> Written:
        """The best caption of each image."""
        scores, place = self._compared(self.sums, self.lengths).max(1)
        rows = torch.arange(len(place), device=place.device)
        maps = torch.stack([one[rows, place] for one in self.maps], dim=1)
        return Written(self.tokens[rows, place, 1:], scores, maps)

    def _compared(self, sums: Tensor, lengths: Tensor) -> Tensor:
        return sums / lengths.clamp(min=1).float() ** self.length_penalty
