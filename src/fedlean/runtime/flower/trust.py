"""Whom a node believes to be its SuperLink: the authority's certificates, and refusals in words."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

from fedlean.runtime.flower.identity import without_bom

_EXPECTED = "expected the PEM file of the authority that signed the SuperLink's certificate"
_MOST_BYTES = 1 << 24  # of a bundle; all authorities of a Linux system have a quarter of a megabyte
_DER = b"\x30"  # an ASN.1 sequence, as which a certificate begins
_CERTIFICATE = (b"CERTIFICATE-----", b"X509 CERTIFICATE-----")

# of OpenSSL's X509_V_ERR_*
_EARLY, _EXPIRED, _NAMES = 9, 10, (62, 64)
_SIGNERS = (2, 7, 18, 19, 20, 21, 24)


def trust(root_certificates: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer, certificates and host names checked.  Raises ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    raw = _read(root_certificates)
    pem = without_bom(raw, root_certificates)
    if (why := _no_certificate(pem, root_certificates)) is not None:
        raise ValueError(f"no root certificates in {root_certificates}: {why}")
    try:
        if pem == raw:
            context.load_verify_locations(cafile=root_certificates)
        else:  # OpenSSL before 3 passes over the first; what is not ASCII is remarks
            context.load_verify_locations(cadata=pem.decode("ascii", "ignore"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no root certificates in {root_certificates} ({error}): {_EXPECTED}"
        ) from None
    return context


def not_trusted(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with a server's certificate, and the remedy, to follow its name."""
    code, remedy = error.verify_code, ""
    if code in (_EARLY, _EXPIRED):
        now = datetime.now(UTC).isoformat(" ", "minutes").removesuffix("+00:00")
        remedy = f": renew it, or set this device's clock, which says {now} UTC (timedatectl)"
    elif code in _NAMES:
        remedy = (
            ": give --superlink a name that is in the certificate, or add this one to it "
            "(subjectAltName)"
        )
    elif code in _SIGNERS:
        remedy = ": give as --tls-ca the certificate of the authority that signed it"
    return f"is not to be trusted: {error.verify_message}{remedy}"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES)
    except FileNotFoundError:
        why = "there is no such file"
    except IsADirectoryError:
        why = "it is a folder; name the file in it"
    except OSError as error:
        why = f"it cannot be read ({error.strerror})"
    else:
        if len(raw) < _MOST_BYTES:
            return raw
        why = f"it is larger than {_MOST_BYTES >> 20} MiB"
    raise ValueError(f"no root certificates in {path}: {why}; {_EXPECTED}")


def _no_certificate(pem: bytes, path: Path) -> str | None:
    """What stands there instead, and the remedy; None where there is a certificate in PEM."""
    if not pem.strip():
        return f"it is empty; {_EXPECTED}"
    if any(b"-----BEGIN " + kind in pem for kind in _CERTIFICATE):
        return None
    if b"PRIVATE KEY-----" in pem:
        return f"it holds a private key, which belongs to nobody else; {_EXPECTED}"
    if pem.startswith(_DER):
        return (
            "it is in DER, not PEM; convert it with: openssl x509 -inform DER "
            f"-in {path} -out {path}.pem"
        )
    return None
