"""Keys and certificates: what is taken, and what a wrong one is answered with."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import ssl
import stat
import subprocess
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed", allow_module_level=True)

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from runtime.flower.stock import make_certificates, make_key

from fedlean.runtime.flower import identity
from fedlean.runtime.flower.identity import new_key, read_key
from fedlean.runtime.flower.superlink import SuperLink
from fedlean.runtime.flower.trust import trust

OPENSSH = serialization.PrivateFormat.OpenSSH
PLAIN = serialization.NoEncryption()
BOM = codecs.BOM_UTF8


def pem(key, form=OPENSSH, encryption=PLAIN) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, encryption)


def test_headers_verify_as_the_superlink_verifies_them(tmp_path):
    public_pem = make_key(tmp_path / "key")
    headers = read_key(tmp_path / "key").headers()
    assert set(headers) == {"flwr-public-key", "flwr-timestamp", "flwr-signature"}
    assert b64decode(headers["flwr-public-key"], validate=True) == public_pem
    public = serialization.load_pem_public_key(public_pem)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    signed = headers["flwr-timestamp"].encode("ascii")
    signature = b64decode(headers["flwr-signature"], validate=True)
    public.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    age = datetime.now(UTC) - datetime.fromisoformat(headers["flwr-timestamp"])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_a_fingerprint_is_that_of_ssh_keygen(tmp_path):
    make_key(tmp_path / "key")
    key = read_key(tmp_path / "key")
    assert re.fullmatch("SHA256:[A-Za-z0-9+/]{43}", key.fingerprint)
    if shutil.which("ssh-keygen"):
        (tmp_path / "key").chmod(0o600)
        command = ["ssh-keygen", "-lf", str(tmp_path / "key")]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert key.fingerprint in shown.split()


def test_what_a_device_is_known_by_cannot_be_had_from_its_public_key(tmp_path):
    """It is a digest of the private number, and stays the same as long as the key does."""
    keys = [identity.PrivateKey(ec.derive_private_key(n, ec.SECP384R1())) for n in (5, 5, 6)]
    five = blake2b(b"\x05", digest_size=16, person=b"fedlean device").hexdigest()
    assert [key.device == f"{keys[0].fingerprint} {five}" for key in keys] == [True, True, False]
    assert all(five not in value for value in keys[0].headers().values())
    make_certificates(tmp_path)
    settings: Any = {"root_certificates": tmp_path / "ca.crt", "insecure": False, "limit_bytes": 1}
    assert SuperLink("127.0.0.1:9", key=keys[0], say=str, **settings).device == keys[0].device


P384 = ec.generate_private_key(ec.SECP384R1())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"nonsense", "no private key in OpenSSH format"),
        (pem(P384)[:200], "no private key in OpenSSH format"),
        (pem(P384, serialization.PrivateFormat.PKCS8), "convert it with: ssh-keygen -p"),
        (pem(P384, serialization.PrivateFormat.TraditionalOpenSSL), "convert it with: ssh-keygen"),
        (
            P384.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
            "holds a public key; its private half",
        ),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n", "holds a certificate"),
        (b"ecdsa-sha2-nistp384 AAAA", "holds a public key"),
        (pem(ed25519.Ed25519PrivateKey.generate()), "is not an ECDSA key"),
        (pem(rsa.generate_private_key(65537, 2048)), "is not an ECDSA key"),
    ],
)
def test_keys_that_are_refused(tmp_path, content, says):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_key(path)
    assert says in str(caught.value) and "ssh-keygen -t ecdsa -b 384" in str(caught.value)


def test_a_key_with_a_passphrase(tmp_path, monkeypatch):
    def load(raw, password):
        raise TypeError("Key is password-protected")  # as cryptography does it; needs bcrypt

    monkeypatch.setattr(serialization.ssh, "load_ssh_private_key", load)
    make_key(tmp_path / "key")
    with pytest.raises(ValueError, match=r"has a passphrase.*ssh-keygen -p"):
        read_key(tmp_path / "key")


def test_a_key_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no key file.*ssh-keygen"):
        read_key(tmp_path / "key")
    with pytest.raises(ValueError, match="cannot be read"):
        read_key(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o644, 0o777])
def test_a_key_that_others_can_read_or_change(tmp_path, mode):
    path, link = tmp_path / "key", tmp_path / "link"
    make_key(path)
    link.symlink_to(path)
    path.chmod(mode)
    for each in (path, link):
        said = rf"{each} can be read or changed by others \(mode {mode:04o}\): chmod 600 {each};"
        with pytest.raises(ValueError, match=said) as caught:
            read_key(each)
        assert "\n" not in str(caught.value)
    for private in (0o600, 0o400, 0o700):
        path.chmod(private)
        read_key(link)


def test_the_owner_of_a_key(tmp_path, monkeypatch):
    path = tmp_path / "key"
    make_key(path)
    mine, fstat = os.geteuid(), os.fstat

    def owned_by(user: int, mode: int) -> None:
        def about(file: int) -> os.stat_result:
            found = fstat(file)
            return os.stat_result((stat.S_IFREG | mode, *found[1:4], user, *found[5:10]))

        monkeypatch.setattr(identity.os, "fstat", about)

    monkeypatch.setattr(identity.os, "geteuid", lambda: mine + 1)
    owned_by(mine + 2, 0o600)
    with pytest.raises(ValueError, match=rf"another user \(number {mine + 2}\).*chown {mine + 1}"):
        read_key(path)
    owned_by(mine + 1, 0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_key(path)
    owned_by(0, 0o440)  # as systemd's credentials are: of root, read through a group
    read_key(path)
    for mode in (0o460, 0o444):
        owned_by(0, mode)
        with pytest.raises(ValueError, match="chmod 600"):
            read_key(path)
    monkeypatch.setattr(identity.os, "geteuid", lambda: 0)
    owned_by(0, 0o440)
    with pytest.raises(ValueError, match="chmod 600"):
        read_key(path)


def test_certificates(tmp_path):
    make_certificates(tmp_path)
    trust(tmp_path / "ca.crt")
    der = ssl.PEM_cert_to_DER_cert((tmp_path / "ca.crt").read_text())
    make_key(tmp_path / "node.key")
    wrong = {
        "other": (b"no certificate", "expected the PEM file"),
        "broken": (b"-----BEGIN CERTIFICATE-----\nAAAA\n", "expected the PEM file"),
        "empty": (b"", "it is empty; expected the PEM file"),
        "key": ((tmp_path / "server.key").read_bytes(), "it holds a private key"),
        "ssh key": ((tmp_path / "node.key").read_bytes(), "it holds a private key"),
        "der": (der, f"openssl x509 -inform DER -in {tmp_path}/der -out {tmp_path}/der.pem"),
    }
    for name, (content, _) in wrong.items():
        (tmp_path / name).write_bytes(content)
    wrong["missing"] = (b"", "there is no such file; expected the PEM file")
    wrong["."] = (b"", "it is a folder; name the file in it")
    for name, (_, says) in wrong.items():
        with pytest.raises(
            ValueError, match=f"no root certificates in {tmp_path / name}"
        ) as caught:
            trust(tmp_path / name)
        assert says in str(caught.value) and "\n" not in str(caught.value)


WINDOWS = [
    lambda text: BOM + text,
    lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: BOM + text.replace(b"\n", b"\r\n"),
]


@pytest.mark.parametrize("saved", WINDOWS)
def test_a_key_as_a_windows_editor_saves_it(tmp_path, saved):
    path = tmp_path / "key"
    make_key(path)
    public_pem = read_key(path).public_pem
    path.write_bytes(saved(path.read_bytes()))
    assert read_key(path).public_pem == public_pem
    path.write_bytes(saved(b"ecdsa-sha2-nistp384 AAAA\n"))
    with pytest.raises(ValueError, match="holds a public key"):
        read_key(path)


@pytest.mark.parametrize("saved", WINDOWS)
@pytest.mark.parametrize("remark", ["", "Bündel\n"])
def test_certificates_as_a_windows_editor_saves_them(tmp_path, saved, remark):
    """A bundle: each counts, the first one, too."""
    bundle = remark.encode()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_certificates(tmp_path / name)
        bundle += (tmp_path / name / "ca.crt").read_bytes()
    path = tmp_path / "bundle.crt"
    path.write_bytes(saved(bundle))
    assert trust(path).cert_store_stats()["x509_ca"] == 2
    path.write_bytes(saved(b""))
    with pytest.raises(ValueError, match=f"no root certificates in {path}"):
        trust(path)


@pytest.mark.parametrize("bom", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
@pytest.mark.parametrize("read", [read_key, trust])
def test_utf_16_is_named(tmp_path, bom, read):
    path = tmp_path / "file"
    path.write_bytes(bom + b"-\0" * 99)
    with pytest.raises(ValueError, match=f"{path} is text in UTF-16: save it as UTF-8") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_security_is_not_given_up_silently(tmp_path):
    make_certificates(tmp_path)

    def link(address="127.0.0.1:1", **settings):
        asked = {"key": None, "root_certificates": None, "insecure": False} | settings
        return SuperLink(address, limit_bytes=1, say=str, **asked)

    ca = tmp_path / "ca.crt"
    with pytest.raises(ValueError, match="no root certificates"):
        link(key=new_key())
    with pytest.raises(ValueError, match=r"no key.*flwr supernode register"):
        link(root_certificates=ca)
    with pytest.raises(ValueError, match="a key without root certificates"):
        link(key=new_key(), insecure=True)
    with pytest.raises(ValueError, match="HOST:PORT"):
        link("nowhere", insecure=True)
    with pytest.raises(ValueError, match=r"https://127\.0\.0\.1:1 and --insecure contradict"):
        link("https://127.0.0.1:1", root_certificates=ca, insecure=True)
    for settings in ({}, {"root_certificates": ca, "insecure": True}, {"key": new_key()}):
        with pytest.raises(ValueError, match="http:// has no TLS: give https://"):
            link("http://127.0.0.1:1", **settings)
    link("http://127.0.0.1:1", insecure=True).close()
    link("https://127.0.0.1:1", key=new_key(), root_certificates=ca).close()
    for allowed in (
        {"key": new_key(), "root_certificates": ca},
        {"root_certificates": ca, "insecure": True},
        {"insecure": True},
    ):
        link(**allowed).close()
