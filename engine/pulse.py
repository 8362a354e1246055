"""A process's pulse: counts what it gets done, so that its watch can tell slow work from none."""


class Pulse:
    """A counter that many places count up and one thread reads.

    Attributes:
        beats: batches read, exchanges with other ranks begun and ended, and items of progress bars so far.
    """

    def __init__(self) -> None:
        self.beats = 0

    def beat(self) -> None:
        """Something was done."""
        self.beats += 1


PULSE = Pulse()
