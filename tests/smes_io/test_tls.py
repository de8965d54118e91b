"""Files for TLS, and what a refused handshake means."""

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from smes_io.secrets import SecretError, SecretPlace
from smes_io.tls import TlsFiles, refusal
from tests.certificates import Authority, Pair

PASSWORD = "k3y-s3cret"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, openssl: None) -> tuple[Authority, Pair]:
    """An authority, and a certificate with an encrypted key."""
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    return authority, authority.signed("client", password=PASSWORD)


@pytest.fixture
def password(tmp_path: Path) -> SecretPlace:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return SecretPlace(file=path)


def test_files_make_a_context_that_trusts_this_authority_alone(
    made: tuple[Authority, Pair], password: SecretPlace
) -> None:
    authority, client = made

    context = TlsFiles(authority.cert, client.cert, client.key, password).context()

    assert [one["subject"] for one in context.get_ca_certs()] == [((("commonName", "authority"),),)]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_without_an_authority_those_of_the_system_are_trusted() -> None:
    context = TlsFiles().context()

    assert context.verify_mode == ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == len(ssl.create_default_context().get_ca_certs())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (lambda a, c, p: TlsFiles(ca_file=Path("/no/ca")), "ca_file /no/ca: cannot be read: No such file"),
        (lambda a, c, p: TlsFiles(a.cert, Path("/no/cert")), "cert_file /no/cert: cannot be read: No such file"),
        (lambda a, c, p: TlsFiles(a.cert, c.cert, Path("/no/key")), "key_file /no/key: cannot be read: No such file"),
        (lambda a, c, p: TlsFiles(ca_file=c.key), r"ca_file .*client\.key: .*, expected certificates in PEM"),
        (lambda a, c, p: TlsFiles(a.cert, a.cert, c.key, p), r"cert_file .* with key_file .*client\.key: .*expected a"),
        (lambda a, c, p: TlsFiles(a.cert, c.cert, c.key), r"client\.key: .*, and key_password if it is encrypted"),
        (
            lambda a, c, p: TlsFiles(a.cert, c.cert, c.key, SecretPlace(env="NO_SUCH_VARIABLE")),
            "environment variable NO_SUCH_VARIABLE: not set",
        ),
    ],
    ids=["no ca", "no cert", "no key", "ca is a key", "key of another", "no password", "password not set"],
)
def test_a_wrong_file_is_named_without_its_content(
    made: tuple[Authority, Pair],
    password: SecretPlace,
    files: Callable[[Authority, Pair, SecretPlace], TlsFiles],
    message: str,
) -> None:
    with pytest.raises(SecretError, match=message) as error:
        files(*made, password).context()
    assert PASSWORD not in str(error.value)
    assert "PRIVATE KEY" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TlsFiles(key_file=Path("k")), "TlsFiles.key_file: 'k' without a certificate, expected cert_file"),
        (
            lambda: TlsFiles(key_password=SecretPlace(env="X")),
            "TlsFiles.key_password: without a certificate, expected cert_file",
        ),
    ],
)
def test_a_key_needs_its_certificate(build: Callable[[], TlsFiles], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: x (_ssl.c:992)", "is not to be trusted"),
        ("Error while reading : (1, '[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] y')", "wants a client's certificate"),
        ("[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca", "does not accept the client's certificate"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", "does not speak TLS on this port"),
    ],
)
def test_a_refused_handshake_is_said_in_plain_words(text: str, meaning: str) -> None:
    said = refusal(OSError(text))

    assert said is not None
    assert meaning in said
    assert "_ssl.c" not in said


@pytest.mark.parametrize("text", ["[SSL: UNEXPECTED_EOF_WHILE_READING] EOF", "connection reset by peer", ""])
def test_what_may_go_away_is_no_refusal(text: str) -> None:
    assert refusal(OSError(text)) is None
