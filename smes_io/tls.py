"""TLS to a server: the files that it takes, and what a refused handshake means in plain words."""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from smes_io.secrets import SecretError, SecretPlace

_REASON = re.compile(r"\[(?:SSL|X509)[^\]]*?: ([A-Z0-9_]+)\]")
_WRONG_CLIENT = "the server does not accept the client's certificate (cert_file, key_file)"
_NO_TLS = "the server does not speak TLS on this port"
_NOTHING_IN_COMMON = "client and server have no protocol version or cipher in common"
_MEANINGS = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not to be trusted (ca_file, check_hostname)",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server wants a client's certificate (cert_file, key_file)",
    "SSLV3_ALERT_BAD_CERTIFICATE": _WRONG_CLIENT,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": _WRONG_CLIENT,
    "SSLV3_ALERT_CERTIFICATE_REVOKED": _WRONG_CLIENT,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _WRONG_CLIENT,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": _WRONG_CLIENT,
    "TLSV1_ALERT_UNKNOWN_CA": _WRONG_CLIENT,
    "TLSV1_ALERT_DECRYPT_ERROR": _WRONG_CLIENT,
    "TLSV1_ALERT_ACCESS_DENIED": _WRONG_CLIENT,
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "PACKET_LENGTH_TOO_LONG": _NO_TLS,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": f"{_NOTHING_IN_COMMON}, or the server wants a client's certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": _NOTHING_IN_COMMON,
    "UNSUPPORTED_PROTOCOL": _NOTHING_IN_COMMON,
    "NO_PROTOCOLS_AVAILABLE": _NOTHING_IN_COMMON,
}
"""What OpenSSL calls an error → what to do about it. None of these goes away by trying again."""


@dataclass(frozen=True)
class TlsFiles:
    """Whom to trust, and how to prove who one is. The files are read again for every new connection.

    Attributes:
        ca_file: Certificates, in PEM, one of which must have signed the server's. Null: those of the system.
        cert_file: The client's own certificate and its chain, in PEM, for a server that asks for one.
        key_file: Its key, in PEM. Null: it is in ``cert_file``.
        key_password: Where the password of an encrypted key is: ``{file: …}`` or ``{env: …}``.
        check_hostname: Whether the server's certificate must be for the name that it is reached by.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    key_password: SecretPlace | None = None
    check_hostname: bool = True

    def __post_init__(self) -> None:
        if self.cert_file is None and self.key_file is not None:
            raise ValueError(f"TlsFiles.key_file: {str(self.key_file)!r} without a certificate, expected cert_file")
        if self.cert_file is None and self.key_password is not None:
            raise ValueError("TlsFiles.key_password: without a certificate, expected cert_file")

    def context(self) -> ssl.SSLContext:
        """A context for a client; TLS 1.2 at least.

        Raises:
            SecretError: A file or the key's password cannot be read; the message names it.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.check_hostname
        if self.ca_file is None:
            context.load_default_certs()
        else:
            _check_readable("ca_file", self.ca_file)
            try:
                context.load_verify_locations(self.ca_file)
            except ssl.SSLError as error:
                raise SecretError(f"ca_file {self.ca_file}: {_text(error)}, expected certificates in PEM") from error
        if self.cert_file is not None:
            self._load_own(context, self.cert_file)
        return context

    def _load_own(self, context: ssl.SSLContext, cert_file: Path) -> None:
        _check_readable("cert_file", cert_file)
        if self.key_file is not None:
            _check_readable("key_file", self.key_file)
        # Never None: OpenSSL would ask for the password on the terminal.
        password = "" if self.key_password is None else self.key_password.read()
        try:
            context.load_cert_chain(cert_file, self.key_file, lambda: password)
        except (ssl.SSLError, ValueError) as error:
            where = f"cert_file {cert_file}" + (f" with key_file {self.key_file}" if self.key_file else "")
            wanted = "a certificate and its key in PEM, and key_password if it is encrypted"
            raise SecretError(f"{where}: {_text(error)}, expected {wanted}") from error


def refusal(error: BaseException) -> str | None:
    """What a refused handshake means, None for an error that is none or that may go away.

    Args:
        error: As raised by :mod:`ssl`, or by a client that quotes its text.
    """
    found = _REASON.search(str(error))
    meaning = _MEANINGS.get(found[1]) if found else None
    return None if meaning is None else f"{meaning}: {_text(error)}"


def _text(error: BaseException) -> str:
    """OpenSSL's words without the line of its source."""
    return re.sub(r" \(_ssl\.c:\d+\)", "", str(error.args[1] if len(error.args) > 1 else error))


def _check_readable(key: str, path: Path) -> None:
    """Raise SecretError unless a file can be read: :mod:`ssl` does not name it."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise SecretError(f"{key} {path}: cannot be read: {error.strerror}") from error
