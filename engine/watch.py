"""Ranks watch each other, so that one that dies or hangs ends the others with its name instead of a silent wait.

Every rank keeps a connection to rank 0 in a thread of its own and says once a second which step it is in. A process
that ends closes its connection, which is seen at once; one that is stopped or whose node is gone falls silent; one that
hangs goes on talking, but its step, its place and its pulse (`engine.pulse`) stand still. What is measured are this
thread's own seconds, so a job that is suspended as a whole and woken again is not mistaken for a dead one.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from engine.pulse import PULSE
from engine.ranks import Ranks

BEAT_S = 1.0
# A rank that fails says so; the others may be about to raise the same error, and then end by themselves.
FAILED_GRACE_S = 3.0
INSIDE_STEP = "step"
# Reading and writing checkpoints: what one rank does there while the others wait may take as long as the disk does.
PATIENT = ("start", "saving")


@dataclass
class _Peer:
    """What rank 0 knows of a rank."""

    rank: int
    buffer: bytes = b""
    step: int = 0
    place: str = "start"
    beats: int = 0
    waits: bool = False
    first: bool = True
    silent_s: float = 0.0
    idle_s: float = 0.0
    left_s: float = 0.0
    left: str | None = None

    def abandoned(self, seconds: float) -> str:
        """Verdict on a rank that left `seconds` ago with an error, which those still here have not had."""
        self.left_s += seconds if self.left else 0
        late = self.left_s > FAILED_GRACE_S
        return f"rank {self.rank} failed after step {self.step}: {self.left}" if late else ""

    def hear(self, message: dict[str, object]) -> None:
        """Take in one message of the rank."""
        self.silent_s = 0.0
        if "left" in message:
            self.left = str(message["left"])
        if "step" in message:
            now = (int(str(message["step"])), str(message["place"]), int(str(message["beats"])))
            if now != (self.step, self.place, self.beats):
                self.idle_s, (self.step, self.place, self.beats) = 0.0, now
            self.first, self.waits = bool(message["first"]), bool(message["waits"])

    @property
    def waiting(self) -> bool:
        """Whether the rank may be waiting for others: inside a step, or, in an evaluation, inside an exchange."""
        return self.place == INSIDE_STEP or (self.waits and self.place not in PATIENT)


class RankWatch:
    """The watch of one rank. On one rank, or with a timeout of 0, it does nothing.

    Args:
        timeout: seconds in which no rank makes progress while some wait, inside a step or an evaluation's exchange, for
            others that do not.
        on_lost: called in the watch's thread with one line about what happened; must end the process.
    """

    def __init__(self, ranks: Ranks, *, timeout: float, on_lost: Callable[[str], None]) -> None:
        self.ranks, self.timeout, self.on_lost = ranks, timeout, on_lost
        self.silence = min(30.0, max(3.0, timeout / 20))
        self.step, self.place, self.first = 0, "start", True
        self.active = False
        self._reason = ""
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None
        if ranks.world_size > 1 and timeout > 0:
            self._start()

    def at(self, step: int, place: str) -> None:
        """Say where this rank is: after `step` steps, `step`, `data`, `hooks`, `evaluator knn`, `saving`, ... ."""
        self.first = self.first and not (self.place == INSIDE_STEP and step > self.step)
        self.step, self.place = step, place

    def leave(self, reason: str = "", *, expect_verdict: bool = False) -> None:
        """End the watch of this rank.

        Args:
            reason: why it leaves before the others, empty when it is done.
            expect_verdict: wait a moment first: an exchange that broke may have done so because another rank died, and
                then that is what should be told.
        """
        if self._thread is None:
            return
        if expect_verdict:
            self._thread.join(FAILED_GRACE_S + 3 * BEAT_S)
        self._reason = reason
        self._leaving.set()
        self._thread.join()

    def _start(self) -> None:
        listener = None
        address: tuple[str, int, str] | None = None
        if self.ranks.is_main:
            listener = socket.create_server(("", 0), backlog=self.ranks.world_size)
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            address = (host, listener.getsockname()[1], secrets.token_hex(16))
        host, port, token = self.ranks.broadcast(address)
        loop: Callable[[], None] | None = None
        if listener is not None:
            loop = partial(self._serve, listener, token)
        else:
            with suppress(OSError):  # a fire wall in between: then nobody watches, and the training is told so
                connection = socket.create_connection((host, port), timeout=30)
                _send(connection, {"token": token, "rank": self.ranks.rank, **self._beat()})
                loop = partial(self._follow, connection)
        self.active = not self.ranks.any(loop is None)
        if self.active:
            self._thread = threading.Thread(target=loop, name="watch", daemon=True)
            self._thread.start()

    def _beat(self) -> dict[str, object]:
        here = {"step": self.step, "place": self.place, "first": self.first}
        return here | {"beats": PULSE.beats, "waits": self.ranks.waits}

    def _follow(self, connection: socket.socket) -> None:
        """Ranks but the first: talk to rank 0, and listen to its verdict."""
        zero = _Peer(0)
        connection.settimeout(BEAT_S / 4)
        while not self._leaving.is_set():
            lost = not _send(connection, self._beat())
            for message in _receive(connection, zero, seconds=BEAT_S, until=self._leaving):
                lost = lost or message is None
                if message is not None:
                    zero.hear(message)
                    if "verdict" in message:
                        return self._end(str(message["verdict"]))
            zero.silent_s += BEAT_S
            if verdict := zero.abandoned(BEAT_S):
                return self._end(verdict)
            if zero.left is None and (lost or zero.silent_s > self.silence):
                return self._end(self._obituary(zero, lost=lost))
            if zero.left is not None:
                self._leaving.wait(BEAT_S)
        _send(connection, {"left": self._reason, **self._beat()})
        connection.close()

    def _serve(self, listener: socket.socket, token: str) -> None:
        """The first rank: hear everybody, judge once a second."""
        peers: dict[socket.socket, _Peer] = {}
        selector = selectors.DefaultSelector()
        while len(peers) < self.ranks.world_size - 1 and not self._leaving.is_set():
            connection, _ = listener.accept()
            connection.settimeout(BEAT_S)
            peer = _Peer(-1)
            for message in _receive(connection, peer, seconds=10, until=self._leaving, once=True):
                if message is not None and secrets.compare_digest(str(message.get("token")), token):
                    peer.rank = int(str(message["rank"]))
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ)
                    peers[connection] = peer
        listener.close()
        own = _Peer(0)
        while not self._leaving.is_set():
            own.hear(self._beat())
            verdict = self._hear(selector, peers) or self._judge(own, list(peers.values()))
            for connection, peer in peers.items():
                if peer.left is None:
                    _send(connection, {"verdict": verdict} if verdict else self._beat())
            if verdict:
                return self._end(verdict)
        for connection in peers:
            _send(connection, {"left": self._reason, **self._beat()})
            connection.close()

    def _hear(self, selector: selectors.BaseSelector, peers: dict[socket.socket, _Peer]) -> str:
        """Listen for a second; returns the verdict if a connection broke."""
        until = time.monotonic() + BEAT_S
        while (left := until - time.monotonic()) > 0 and not self._leaving.is_set():
            for key, _ in selector.select(min(left, BEAT_S / 4)):
                connection: socket.socket = key.fileobj  # type: ignore[assignment]
                peer = peers[connection]
                for message in _messages(connection, peer):
                    if message is not None:
                        peer.hear(message)
                    else:
                        selector.unregister(connection)
                        if peer.left is None:
                            return self._obituary(peer, lost=True)
        return ""

    def _judge(self, own: _Peer, others: list[_Peer]) -> str:
        """One line about the rank that keeps the others waiting, or nothing."""
        present = [peer for peer in [own, *others] if peer.left is None]
        for peer in others:
            if verdict := peer.abandoned(BEAT_S):
                return verdict
        for peer in present:
            peer.idle_s += BEAT_S
            peer.silent_s += BEAT_S if peer is not own else 0
            if peer.silent_s > self.silence:
                return self._obituary(peer, lost=False)
        waiting = [peer for peer in present if peer.waiting]
        if not waiting or min(peer.idle_s for peer in present) < self.timeout:
            return ""
        absent = [peer for peer in present if not peer.waiting or peer.step < max(p.step for p in waiting)]
        if absent:
            names = ", ".join(f"rank {p.rank} (after step {p.step}, in {p.place})" for p in absent)
            return f"{names} made no progress for {self.timeout:.0f} s while {len(waiting)} of the others waited"
        if any(peer.first for peer in present):  # the first step compiles, and may take as long as it likes
            return ""
        where = "the step" if own.place == INSIDE_STEP else own.place
        return f"no rank finished {where} after step {own.step} within {self.timeout:.0f} s: all are inside it"

    def _obituary(self, peer: _Peer, *, lost: bool) -> str:
        # the ranks keep step, so this one's own number is nearer than what was heard up to a second ago
        how = "its process ended" if lost else f"no sign of life for {peer.silent_s:.0f} s"
        return f"rank {peer.rank} was lost after step {max(self.step, peer.step)} ({how}; last heard in: {peer.place})"

    def _end(self, verdict: str) -> None:
        if not self._leaving.is_set():
            self.on_lost(verdict)


def broken_exchange(error: BaseException | None) -> bool:
    """Whether `error` may come of another rank's end: from a collective, not from this rank's own work."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "nccl", "c10d"))


def _send(connection: socket.socket, message: dict[str, object]) -> bool:
    """Whether the message left; one that does not fit into the buffers is given up, as the next says the same."""
    try:
        connection.send(json.dumps(message).encode() + b"\n")
    except (BlockingIOError, TimeoutError):
        return True
    except OSError:
        return False
    return True


def _messages(connection: socket.socket, peer: _Peer) -> list[dict[str, object] | None]:
    """What has come in, None for the end of the connection."""
    try:
        data = connection.recv(1 << 16)
    except (BlockingIOError, TimeoutError):
        return []
    except OSError:
        return [None]
    if not data:
        return [None]
    *lines, peer.buffer = (peer.buffer + data).split(b"\n")
    found: list[dict[str, object] | None] = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _receive(
    connection: socket.socket, peer: _Peer, *, seconds: float, until: threading.Event, once: bool = False
) -> list[dict[str, object] | None]:
    """Messages of the next `seconds`, or the first ones with `once`; None marks the end of the connection."""
    found: list[dict[str, object] | None] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until.is_set() and None not in found and not (once and found):
        found += _messages(connection, peer)
    return found
