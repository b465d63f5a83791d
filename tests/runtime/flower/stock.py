"""A stock SuperLink with TLS and node authentication, as its own process, for tests."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from http.client import HTTPSConnection
from importlib import import_module
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedlean.runtime.flower.protobufs import _bare_flwr

HOST = "127.0.0.1"
START_SECONDS = 60
COMMANDS = Path(sys.executable).parent  # where flower-superlink and flwr were installed


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def make_key(path: Path) -> bytes:
    """An OpenSSH private key at `path`; its public half in PEM, for `register`."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    path.write_bytes(private)
    path.chmod(0o600)
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def make_certificates(folder: Path, *, name: str = "localhost", hours: float = 24) -> None:
    """ca.crt, server.pem and server.key, good for HOST and `name` for `hours` from now.

    Where those are negative the server's has expired; the authority's never has.
    """
    authority_key, authority = _certificate("test authority", None)
    server_key, server = _certificate("test server", (authority_key, authority), name, hours)
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(authority.public_bytes(pem))
    (folder / "server.pem").write_bytes(server.public_bytes(pem))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(
            pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


def _certificate(
    name: str,
    signer: tuple[Any, x509.Certificate] | None,
    host: str = "localhost",
    hours: float = 24,
) -> tuple[Any, Any]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signing_key, issuer = (key, subject) if signer is None else (signer[0], signer[1].subject)
    addresses = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address(HOST))]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(hours=hours))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
    )
    return key, builder.sign(signing_key, hashes.SHA256())


class StockSuperLink:
    """`folder` holds its certificates, FLWR_HOME (a config.toml that names it "test"), its log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"{HOST}:{self.port}"
        self.ca = folder / "ca.crt"
        self.flwr_home = folder / "home"
        self.flwr_home.mkdir()
        make_certificates(folder)
        (self.flwr_home / "config.toml").write_text(
            f'[superlink.test]\naddress = "{self.address}"\nroot-certificates = "{self.ca}"\n'
        )
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(self.flwr_home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{COMMANDS}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._control = _control_messages()

    def start(self) -> None:
        """Returns once it listens."""
        options = {
            "--host": HOST,
            "--port": str(self.port),
            "--ssl-ca-certfile": str(self.ca),
            "--ssl-certfile": str(self.folder / "server.pem"),
            "--ssl-keyfile": str(self.folder / "server.key"),
            "--database": str(self.folder / "state.db"),
        }
        flags = ["--disable-runtime-dependency-installation", "--enable-supernode-auth"]
        command = [str(COMMANDS / "flower-superlink"), *flags]
        command += [each for option in options.items() for each in option]
        with (self.folder / "superlink.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log
            )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                self.nodes()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    self.kill()
                    raise AssertionError(f"no SuperLink: {self.log()[-2000:]}") from None
            time.sleep(0.2)

    def log(self) -> str:
        return (self.folder / "superlink.log").read_text(errors="replace")

    def stop(self) -> None:
        """As SIGTERM does it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def kill(self) -> None:
        """As kill -9 does it; its port then refuses connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._process = None

    def restart(self) -> None:
        """Kills it and starts it again on the same port, with the same database."""
        self.kill()
        self.start()

    def register(self, public_key: bytes) -> int:
        """As `flwr supernode register` does it; the node's id."""
        request = self._control.RegisterNodeRequest(public_key=public_key)
        return self._ask("register-node", request, self._control.RegisterNodeResponse).node_id

    def nodes(self) -> dict[int, str]:
        """Every registered node's status: registered, online or offline."""
        request = self._control.ListNodesRequest()
        answer = self._ask("list-nodes", request, self._control.ListNodesResponse)
        return {node.node_id: node.status for node in answer.nodes_info}

    def online_until(self, node_id: int) -> float:
        """Seconds since 1970 from which on the node counts as dead, without another heartbeat."""
        request = self._control.ListNodesRequest()
        answer = self._ask("list-nodes", request, self._control.ListNodesResponse)
        return next(node.online_until for node in answer.nodes_info if node.node_id == node_id)

    def run(self, app: Path, *options: str, timeout_seconds: float = 60) -> str:
        """`flwr run APP test --stream OPTIONS` to its end; what it printed."""
        command = [str(COMMANDS / "flwr"), "run", str(app), "test", "--stream", *options]
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def _ask(self, endpoint: str, request: Any, answer_type: Any) -> Any:
        context = ssl.create_default_context(cafile=self.ca)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        connection = HTTPSConnection(HOST, self.port, context=context, timeout=10)
        try:
            headers = {"Content-Type": "application/protobuf"}
            body = request.SerializeToString()
            connection.request("POST", f"/v1/control/{endpoint}", body, headers)
            response = connection.getresponse()
            raw = response.read()
            assert response.status == 200, raw
            return answer_type.FromString(raw)
        finally:
            connection.close()


def _control_messages() -> Any:
    with _bare_flwr():
        return import_module("flwr.proto.control_pb2")
