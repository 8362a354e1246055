"""What goes wrong between a server and us, in our words: faults of the connection, and faults of what it serves."""

import errno
import re
import ssl

from engine.errors import Fault, InputError

ADVICE = "check the address and the network, then run the same command again"
# botocore's and google.auth's own words for "who are you": no try will help.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError", "DefaultCredentialsError")


class RemoteFault(Fault):
    """A remote set cannot be read now: one line with the URL, what happened, and what to do."""

    def __init__(self, message: str) -> None:
        # A data loader rebuilds its worker's exception from a text with traceback, whose last line is ours.
        super().__init__(message.strip().rpartition("\n")[2].rpartition("RemoteFault: ")[2])


class ServerSays(OSError):
    """What the server has is not what it should have: as wrong as the same fault of a local file."""


class ContentFault(ServerSays):
    """Other bytes than the manifest promises."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EIO, reason)


class MissingFile(ServerSays, FileNotFoundError):
    """No such file on the server."""

    def __init__(self, url: str) -> None:
        super().__init__(errno.ENOENT, f"{url}: no such file on the server")


class DeniedFile(ServerSays, PermissionError):
    """The server does not let us read the file."""

    def __init__(self, url: str) -> None:
        super().__init__(errno.EACCES, f"{url}: access denied: check the credentials")


def about_the_file(error: Exception, url: str) -> ServerSays | None:
    """What a client's own error says about the file asked for; None where it speaks of something else."""
    if isinstance(error, FileNotFoundError):
        return MissingFile(url)
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden: ")):
        return DeniedFile(url)  # the second is gcsfs's word
    if _status(error) == 416 or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return ContentFault("the file is shorter than the manifest says")  # the second is s3fs's word
    return None


def describe(error: Exception) -> str:
    """What happened, on one line, without what may be secret: queries (signatures) and user names in URLs."""
    if isinstance(error, TimeoutError):  # asyncio's and fsspec's, which say nothing
        return "no answer in time"
    status = _status(error)
    # Of a status aiohttp's own text names the URL once more.
    text = str(getattr(error, "message", "") or error) if status else str(error)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\?[^\s'\")]*", "?...", re.sub(r"//[^\s/@]+@", "//", text))[:160]
    return (f"HTTP status {status} ({text})" if status else f"{type(error).__name__} ({text})").replace(" ()", "")


def _status(error: BaseException) -> int | None:
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) and 100 <= found < 600 else None


def raise_if_hopeless(error: Exception, *, url: str, described: str) -> None:
    """Raise what no further try can mend."""
    if isinstance(error, InputError | Fault):
        raise error
    status = _status(error) or 0
    if _distrusts(error):
        raise RemoteFault(
            f"{url}: the server's certificate is not trusted: if it is the right server, set SSL_CERT_FILE (for s3:// "
            "AWS_CA_BUNDLE) to a file with the certificate of its authority"
        ) from error
    if type(error).__name__ in _NO_CREDENTIALS:
        raise RemoteFault(f"{url}: no credentials found: set those of your provider (docs/shards.md)") from error
    if 400 <= status < 500 and status not in (408, 425, 429):
        raise RemoteFault(f"{url}: {described}: {ADVICE}") from error
    if isinstance(error, ValueError) and "redirect" in type(error).__name__.lower():
        raise RemoteFault(f"{url}: redirects to something that is not http: correct the URL") from error


def _distrusts(error: BaseException | None) -> bool:
    """Whether a certificate that could not be verified is behind an error."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None
