"""Certificates for tests: an authority, what it signs, and a stranger; made by the ``openssl`` command."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

_DAYS = "2"
_CURVE = ("-pkeyopt", "ec_paramgen_curve:P-256")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM (PKCS #8), apart and in one file."""

    cert: Path
    key: Path
    both: Path


class Authority:
    """Signs certificates for 127.0.0.1.

    Args:
        folder: Where the files go; created.
        name: Its name.
    """

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._own = folder, folder / name
        _openssl(
            *("req", "-x509", "-newkey", "ec", *_CURVE, "-noenc", "-days", _DAYS, "-subj", f"/CN={name}"),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            *("-keyout", f"{self._own}.key", "-out", f"{self._own}.crt"),
        )

    @property
    def cert(self) -> Path:
        """Its certificate, to be trusted."""
        return self._own.with_suffix(".crt")

    def signed(self, name: str, *, ip: str = "127.0.0.1", password: str | None = None) -> Pair:
        """A certificate for an address.

        Args:
            name: Of its files, and its common name.
            ip: Whose it is.
            password: Encrypts the key.
        """
        one = self._folder / name
        pair = Pair(one.with_suffix(".crt"), one.with_suffix(".key"), one.with_suffix(".pem"))
        lock = ["-noenc"] if password is None else ["-passout", f"pass:{password}"]
        request, more = one.with_suffix(".csr"), one.with_suffix(".ext")
        _openssl(
            *(
                "req",
                "-newkey",
                "ec",
                *_CURVE,
                *lock,
                "-subj",
                f"/CN={name}",
                "-keyout",
                f"{pair.key}",
                "-out",
                f"{request}",
            )
        )
        more.write_text(f"subjectAltName=IP:{ip}\nkeyUsage=digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n")
        _openssl(
            *("x509", "-req", "-in", f"{request}", "-CA", f"{self.cert}", "-CAkey", f"{self._own}.key", "-days", _DAYS),
            *("-extfile", f"{more}", "-out", f"{pair.cert}"),
        )
        pair.both.write_bytes(pair.key.read_bytes() + pair.cert.read_bytes() + self.cert.read_bytes())
        return pair


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
