"""Servers on loopback for the tests of remote reading: nginx, moto's S3, and a proxy that spoils what they answer."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from tests.tools import free_port

NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; {user}
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; root "{root}"; gzip on; gzip_types *; gzip_min_length 1; }}
  {tls}
}}
"""
TLS = """
  server {{ listen 127.0.0.1:{port} ssl; root "{root}"; ssl_certificate {cert}; ssl_certificate_key {key}; }}
"""


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError("the server did not start")


@contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody but itself vouches for, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = builder.add_extension(address, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate, secret = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, secret


@contextmanager
def nginx(root: Path, folder: Path, *, tls: tuple[Path, Path] | None = None) -> Iterator[int]:
    """nginx serving `root`; its port, that of https where a certificate and key are given. `folder` takes its files."""
    port, secure = free_port(), free_port()
    more = TLS.format(port=secure, root=root, cert=tls[0], key=tls[1]) if tls else ""
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, root=root, port=port, user=user, tls=more))
    with _running(["nginx", "-c", str(config), "-e", str(folder / "error.log")], secure if tls else port) as found:
        yield found


@contextmanager
def moto_s3() -> Iterator[int]:
    """An S3 server; the port."""
    port = free_port()
    with _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield port


@contextmanager
def google_storage(bucket: str) -> Iterator[int]:
    """A Google Cloud Storage API with one bucket; the port."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    server.start()
    try:
        yield port
    finally:
        server.stop()


class SpoilingProxy(ThreadingHTTPServer):
    """Passes GETs on to a server and spoils the answers, one after the other as `faults` says, over and over.

    "ok", "drop" (closes without a word), "short" (half the body, then closes), "cut" (half the body as if it were all),
    "503", "403", "slow" (half a second late), "stale" (other bytes, same length), "whole" (the whole file for a range).
    With `in_a_row`, one file's range is spoiled at most so often in a row: several clients share the turns, and one of
    them could else meet nothing but faults until its tries are used up.
    """

    daemon_threads = True

    def __init__(self, upstream: int, faults: Sequence[str] = ("ok",)) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.faults, self.delay_s = upstream, list(faults), 0.0
        self.in_a_row: int | None = None
        self.turn, self.lock = 0, threading.Lock()
        self.row: Counter[tuple[str, str]] = Counter()
        self.seen: Counter[tuple[str, str]] = Counter()
        self.spoiled: Counter[str] = Counter()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def next_fault(self, path: str, byte_range: str) -> str:
        """Note a request and say what becomes of it."""
        with self.lock:
            self.seen[path.rpartition("/")[2], byte_range] += 1
            if self.row[path, byte_range] == self.in_a_row:
                fault = "ok"
            else:
                fault = self.faults[self.turn % len(self.faults)]
                self.turn += 1
            self.row[path, byte_range] = 0 if fault == "ok" else self.row[path, byte_range] + 1
            self.spoiled[fault] += 1
        return fault

    def requests(self, name: str) -> int:
        """Requests for one file."""
        return sum(count for (path, _), count in self.seen.items() if path == name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SpoilingProxy

    def do_GET(self) -> None:
        fault = self.server.next_fault(self.path, self.headers.get("Range", ""))
        time.sleep(self.server.delay_s)
        if fault == "drop":
            self.close_connection = True
            return
        headers = {name: value for name, value in self.headers.items() if fault != "whole" or name != "Range"}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=10)
        connection.request("GET", self.path, headers=headers)
        answer = connection.getresponse()
        body, status = answer.read(), answer.status
        connection.close()
        if fault == "slow":
            time.sleep(0.5)
        elif fault in ("503", "403"):
            status, body = int(fault), b"<Error><Code>ServiceUnavailable</Code></Error>"
        elif fault == "stale" and status in (200, 206):
            body = bytes(byte ^ 0x55 for byte in body)
        elif fault == "cut":
            body = body[: len(body) // 2]
        self._send(status, dict(answer.getheaders()), body, half=fault == "short")

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, half: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@contextmanager
def spoiling(upstream: int, faults: Sequence[str] = ("ok",)) -> Iterator[SpoilingProxy]:
    """A running proxy."""
    proxy = SpoilingProxy(upstream, faults)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(timeout=10)


class Redirecting(BaseHTTPRequestHandler):
    """Answers every request with a redirect to `target`."""

    target = "file:///etc/hostname"

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""
