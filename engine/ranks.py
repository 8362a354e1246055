"""Small exchanges between ranks: agreements, means, objects. All over gloo on CPU tensors, so no GPU has to wait."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import Fault, InputError
from engine.pulse import PULSE

# Ranks may share long work out unevenly, an evaluation's for example; who hangs in it is found by engine.watch.
PATIENCE = timedelta(hours=6)


class Ranks:
    """The control plane of a run: this rank's number, and collectives that every rank calls in the same order.

    Attributes:
        waits: whether this rank is inside one of them.
    """

    def __init__(self) -> None:
        connected = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if connected else 0
        self.world_size = dist.get_world_size() if connected else 1
        self._group: Any = None
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.waits = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on at least one."""
        if self._group is None:
            return flag
        value = torch.tensor([int(flag)])
        with self._exchange():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return bool(value.item())

    def mean(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Mean over ranks of each named scalar; every rank gives the same names."""
        names = sorted(values)
        packed = torch.stack([torch.as_tensor(values[name]).detach().to("cpu", torch.float64) for name in names])
        if self._group is not None:
            with self._exchange():
                dist.all_reduce(packed, group=self._group)
            packed /= self.world_size
        return dict(zip(names, packed.tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with self._exchange():
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value` on every rank."""
        if self._group is None:
            return value
        box = [value]
        with self._exchange():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def on_main(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 while the others wait; its InputError or Fault is raised on all ranks alike."""
        found: tuple[type[Exception], str] | None = None
        if self.is_main:
            try:
                action()
            except InputError as error:
                found = InputError, str(error)
            except Fault as error:
                found = Fault, str(error)
        found = self.broadcast(found)
        if found is not None:
            kind, message = found
            raise kind(message)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._group is not None:
            with self._exchange():
                dist.barrier(group=self._group)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        PULSE.beat()
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
            PULSE.beat()
