"""Who a node is: an ECDSA key, and the headers that prove it to a SuperLink."""

from __future__ import annotations

import codecs
import os
import stat
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_MAKE = "make one with: ssh-keygen -t ecdsa -b 384 -N '' -f node.key"
_FILE_BYTES = 1 << 16
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class PrivateKey:
    def __init__(self, key: EllipticCurvePrivateKey) -> None:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        public = key.public_key()
        self.public_pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        ssh = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
        digest = b64encode(sha256(b64decode(ssh)).digest()).decode("ascii")
        self.fingerprint = f"SHA256:{digest.rstrip('=')}"  # as ssh-keygen -lf shows it
        self.device = f"{self.fingerprint} {_secret(key)}"  # what a server knows the device by
        self._key, self._sha256 = key, SHA256()

    def headers(self) -> dict[str, str]:
        """Of one request: the public key, the time and its signature; good for five minutes."""
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

        now = datetime.now(UTC).isoformat()
        signature = self._key.sign(now.encode("ascii"), ECDSA(self._sha256))
        return {
            "flwr-public-key": b64encode(self.public_pem).decode("ascii"),
            "flwr-timestamp": now,
            "flwr-signature": b64encode(signature).decode("ascii"),
        }


def _secret(key: EllipticCurvePrivateKey) -> str:
    """What only the key's holder can say, and which does not give the key away."""
    value = key.private_numbers().private_value
    data = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return blake2b(data, digest_size=16, person=b"fedlean device").hexdigest()


def new_key() -> PrivateKey:
    """For one connection to a SuperLink that takes nodes which nobody registered."""
    from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key

    return PrivateKey(generate_private_key(SECP384R1()))


def read_key(path: Path) -> PrivateKey:
    """An OpenSSH private key file without a passphrase, ECDSA.  Raises ValueError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization.ssh import load_ssh_private_key

    raw, about = _read(path)
    raw = without_bom(raw, path)
    try:
        key = load_ssh_private_key(raw, None)
    except TypeError:
        raise ValueError(
            f"the key in {path} has a passphrase, and a node has nobody to ask: "
            f"remove it with: ssh-keygen -p -N '' -f {path}"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{path} {_instead(raw, path)}{_MAKE}") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError(f"the key in {path} is not an ECDSA key, which Flower expects; {_MAKE}")
    _check_private(about, path)
    return PrivateKey(key)


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    """The file's bytes and what the system says of that same file, links followed."""
    try:
        with path.open("rb") as file:
            return file.read(_FILE_BYTES), os.fstat(file.fileno())
    except FileNotFoundError:
        raise ValueError(f"there is no key file {path}: {_MAKE}") from None
    except OSError as error:
        raise ValueError(f"the key file {path} cannot be read: {error.strerror}") from None


def _instead(raw: bytes, path: Path) -> str:
    """What a file holds that is no private key in OpenSSH format, and a remedy of its own."""
    if not raw.strip():
        return "is empty, so it holds no private key in OpenSSH format; "
    if raw.startswith((b"ecdsa-", b"ssh-")) or b"PUBLIC KEY-----" in raw:
        return "holds a public key; its private half is the file without .pub, or "
    if b"CERTIFICATE-----" in raw:
        return "holds a certificate, and no private key in OpenSSH format; "
    if b"PRIVATE KEY-----" in raw and b"OPENSSH" not in raw:
        return (
            "holds no private key in OpenSSH format; if it is an ECDSA key, convert it with: "
            f"ssh-keygen -p -N '' -f {path}; else "
        )
    return "holds no private key in OpenSSH format; "


def _check_private(about: os.stat_result, path: Path) -> None:
    """Raises ValueError where others may read or replace the key.

    Root may own it, for a service that reads it through its group, as systemd's credentials do.
    File systems without modes are not excepted: on them everybody may read it.
    """
    mode, user = stat.S_IMODE(about.st_mode), os.geteuid()
    if about.st_uid not in (0, user):
        raise ValueError(
            f"the key in {path} belongs to another user (number {about.st_uid}), who may read and "
            f"replace it: make it this user's (chown {user} {path})"
        )
    by_group = stat.S_IRGRP if about.st_uid == 0 != user else 0
    if mode & (stat.S_IRWXG | stat.S_IRWXO) & ~by_group:
        raise ValueError(
            f"the key in {path} can be read or changed by others (mode {mode:04o}): chmod 600 "
            f"{path}; where that has no effect, as on a FAT card, keep it on another file system"
        )


def without_bom(raw: bytes, path: Path) -> bytes:
    """A text file's bytes without the mark that some editors begin UTF-8 with.

    Raises ValueError for UTF-16.
    """
    if raw.startswith(_UTF_16):
        raise ValueError(f"{path} is text in UTF-16: save it as UTF-8 or ASCII")
    return raw.removeprefix(codecs.BOM_UTF8)
