"""A knock at a listener of Kafka, by TLS and SASL, that tells at once why it would not let us in.

kafka-python's clients try again and again when a broker refuses the handshake or the credentials, and say in the end
that nobody answered. So before a client is made, :func:`knock` connects, shakes hands and authenticates once by itself.
"""

import re
import socket
import ssl
from typing import Any

from kafka.errors import (
    AuthorizationError,
    KafkaConnectionError,
    KafkaError,
    UnsupportedSaslMechanismError,
    for_code,
)
from kafka.net.sasl import get_sasl_mechanism
from kafka.protocol.parser import KafkaProtocol
from kafka.protocol.sasl import SaslAuthenticateRequest, SaslHandshakeRequest

from smes_io.tls import refusal

_MOST_STEPS = 4  # of an exchange of credentials; SCRAM has two
_PIECE = 65_536
_REFUSAL_S = 0.2
_RIGHTS = re.compile(r"\w+AuthorizationFailedError")


class NotLetIn(KafkaError):  # type: ignore[misc]  # kafka-python has no types
    """The brokers, or what we have to show to them, are not as they should be; to try again would not help."""

    def __str__(self) -> str:
        return str(self.args[0])


def knock(address: tuple[str, int], options: dict[str, object], timeout_s: float) -> None:
    """Connect to a listener, shake hands and log in, as a client with these options would.

    Args:
        address: Host and port.
        options: From :meth:`stream.log.kafka_config.KafkaAccess.options`.
        timeout_s: Longest wait for each answer.

    Raises:
        KafkaConnectionError: Nobody answers, or not to the end.
        NotLetIn: The certificates or the credentials are refused; the message says why.
    """
    host, port = address
    try:
        with socket.create_connection(address, timeout=timeout_s) as plain:
            context = options.get("ssl_context")
            if not isinstance(context, ssl.SSLContext):
                _log_in(plain, options, host)
                return
            with context.wrap_socket(plain, server_hostname=host) as encrypted:
                _log_in(encrypted, options, host)
                if "sasl_mechanism" not in options:
                    _hear_refusal(encrypted)
    except OSError as error:
        if why := refusal(error):
            raise NotLetIn(f"{host}:{port} cannot be used: {why}") from error
        within = " during the TLS handshake (does the listener speak TLS?)" if isinstance(error, ssl.SSLError) else ""
        raise KafkaConnectionError(f"{host}:{port}{within}: {error}") from error
    except NotLetIn as error:
        raise NotLetIn(f"{host}:{port} {error}") from error.__cause__


def lacking(error: BaseException | None) -> str | None:
    """Which kind of right the user lacks, as the brokers say; None for another error."""
    if isinstance(error, AuthorizationError):
        return type(error).__name__
    found = _RIGHTS.search(str(error))  # the producer quotes what it was answered when it asked for its identity
    return found[0] if found else None


def _log_in(connection: socket.socket, options: dict[str, object], host: str) -> None:
    """Exchange credentials as https://kafka.apache.org/protocol says, if there are any."""
    name = options.get("sasl_mechanism")
    if not isinstance(name, str):
        return
    talk = KafkaProtocol(client_id="smes")
    answer = _ask(connection, talk, SaslHandshakeRequest(version=1, mechanism=name))
    if for_code(answer.error_code) is UnsupportedSaslMechanismError or name not in answer.mechanisms:
        offered = ", ".join(answer.mechanisms) or "none"
        raise NotLetIn(f"offers the SASL mechanisms {offered}, expected {name}")
    user, exchange = options["sasl_plain_username"], get_sasl_mechanism(name)(host=host, **options)
    for _ in range(_MOST_STEPS):
        if exchange.is_done():
            return
        answer = _ask(connection, talk, SaslAuthenticateRequest(version=1, auth_bytes=exchange.auth_bytes()))
        if answer.error_code:
            why = answer.error_message or for_code(answer.error_code).__name__
            raise NotLetIn(f"refused the credentials of user {user!r} ({name}): {why}")
        try:
            exchange.receive(answer.auth_bytes)
        except (ValueError, KeyError) as error:  # it does not know the password either
            raise NotLetIn(f"did not prove that it knows user {user!r} ({name})") from error
    raise NotLetIn(f"did not end the exchange of credentials of user {user!r} ({name})")


def _ask(connection: socket.socket, talk: KafkaProtocol, request: Any) -> Any:
    talk.send_request(request)
    connection.sendall(talk.send_bytes())
    while True:
        received = connection.recv(_PIECE)
        if not received:
            raise ConnectionResetError("the listener closed the connection (does it speak SASL?)")
        for _, answer in talk.receive_bytes(received):
            return answer


def _hear_refusal(connection: ssl.SSLSocket) -> None:
    """Raise what the listener has to say of our certificate: in TLS 1.3 it says so after the handshake."""
    connection.settimeout(_REFUSAL_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return  # silence is consent
