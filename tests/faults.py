"""Faults that tests put into a program before it starts: importable and picklable, as the forks need them."""

import functools
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _replace(target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function or method `package.module.Class.name` by `make` of it."""
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:-1]:
            owner = getattr(owner, name)
        return setattr(owner, parts[-1], make(getattr(owner, parts[-1])))
    raise ValueError(f"no {target}")


@dataclass(frozen=True)
class At:
    """Something happens right before the n-th call of a function.

    Attributes:
        target: dotted name of the function or method.
        call: number of the call, from 1.
        what: a signal for this process, or "hang", or "fail".
        thread: count the calls of the thread with this name alone.
    """

    target: str
    call: int
    what: signal.Signals | str = signal.SIGKILL
    thread: str = ""

    def __call__(self) -> None:
        calls = 0

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def counted(*arguments: Any, **named: Any) -> Any:
                nonlocal calls
                if not self.thread or threading.current_thread().name == self.thread:
                    calls += 1
                    if calls == self.call:
                        self._happen()
                return function(*arguments, **named)

            return counted

        _replace(self.target, make)

    def _happen(self) -> None:
        if isinstance(self.what, signal.Signals):
            os.kill(os.getpid(), self.what)
        elif self.what == "hang":
            time.sleep(1000)
        else:
            raise RuntimeError("a fault of the test")


@dataclass(frozen=True)
class BadLoss:
    """The losses of some steps become infinite on this rank, while their gradients stay finite.

    Attributes:
        steps: numbers from 1, of this process.
    """

    steps: tuple[int, ...]

    def __call__(self) -> None:
        import torch

        from engine.faults import CheckedBackward

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            calls = 0

            def backward(self_: CheckedBackward, loss: torch.Tensor) -> Any:
                nonlocal calls
                calls += 1
                return function(self_, loss + torch.inf if calls in self.steps else loss)

            return backward

        _replace("engine.faults.CheckedBackward.__call__", make)


@dataclass(frozen=True)
class BadGradient:
    """The gradient of one parameter of some steps becomes NaN on this rank, while the losses stay finite.

    Attributes:
        steps: numbers from 1, of this process; each must make one backward.
    """

    steps: tuple[int, ...]

    def __call__(self) -> None:
        from engine.faults import CheckedBackward

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            calls = 0

            def backward(self_: CheckedBackward, loss: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls not in self.steps:
                    return function(self_, loss)
                hook = next(self_.module.parameters()).register_hook(lambda gradient: gradient * float("nan"))
                try:
                    return function(self_, loss)
                finally:
                    hook.remove()

            return backward

        _replace("engine.faults.CheckedBackward.__call__", make)


@dataclass(frozen=True)
class Several:
    """More than one fault."""

    faults: tuple[Callable[[], None], ...]

    def __call__(self) -> None:
        for fault in self.faults:
            fault()


@dataclass(frozen=True)
class Vanish:
    """A folder of the run is gone when a checkpoint is about to be written, as when a file system is unmounted.

    Attributes:
        folder: name inside the run folder; it is moved to `<name>.away`.
        save: number of the save, from 1.
    """

    folder: str
    save: int

    def __call__(self) -> None:
        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            calls = 0

            def save(directory: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == self.save:
                    place = directory.parent / self.folder
                    os.rename(place, place.with_name(f"{self.folder}.away"))
                return function(directory, **named)

            return save

        _replace("engine.saver.save_checkpoint", make)
