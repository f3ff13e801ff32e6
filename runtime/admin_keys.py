"""Who may administer a service over TCP: CURVE keys, made of a shared token or kept in files, and nobody else.

CURVE encrypts and authenticates both sides.  With files, the server knows its own secret key and the public keys of
its clients; with a token, both sides make both secret keys of it, so that a client proves to know the token and the
server does as well, and neither sends it.  Files hold one key each, as the 40 characters of Z85.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import zmq
from zmq.utils import z85

from vlmrt.runtime.config import AdminOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.transport import FramePump, Socket

MIN_TOKEN_LENGTH = 16
KEY_LENGTH = 40
ZAP_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks whether a client may come in
ZAP_DOMAIN = b"vlmrt-admin"
SERVER_SECRET, SERVER_PUBLIC = "server.secret", "server.public"
CLIENT_SECRET, CLIENT_PUBLIC = "client.secret", "client.public"
CLIENTS = "clients"  # folder of public keys beside the server's secret
_SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "dklen": 32}


class ServerKeys(NamedTuple):
    secret: bytes
    clients: frozenset[bytes]  # public keys that are let in


class ClientKeys(NamedTuple):
    server: bytes  # its public key
    public: bytes
    secret: bytes


def server_keys(options: AdminOptions) -> ServerKeys | None:
    """The keys of --admin-address; None without it.  Raises StartupError naming option, value and what is wrong."""
    if options.address is None:
        for option, value in (("--admin-keys", options.keys), ("--admin-token-file", options.token_file)):
            if value is not None:
                raise StartupError(f"{option} {value}: is for --admin-address, which is not given")
        return None
    bindable(options.address)
    if (options.keys is None) == (options.token_file is None):
        raise StartupError(
            f"--admin-address {options.address}: whoever reaches it could steer the service; give --admin-keys DIR "
            "(see `vlmrt admin keygen`) or --admin-token-file FILE, one of them"
        )
    if not zmq.has("curve"):
        raise StartupError("--admin-address: this libzmq has no CURVE; install pyzmq from its wheel")
    if options.keys is None:
        secrets = token_secrets(read_token(Path(options.token_file or ""), "--admin-token-file"))
        return ServerKeys(secrets[0], frozenset({zmq.curve_public(secrets[1])}))
    folder = Path(options.keys)
    secret = read_key(folder / SERVER_SECRET, "--admin-keys")
    clients = [read_key(path, "--admin-keys") for path in sorted((folder / CLIENTS).glob("*.public"))]
    if not clients:
        raise StartupError(f"--admin-keys {folder}: no client's key in {folder / CLIENTS}/*.public")
    return ServerKeys(secret, frozenset(clients))


def client_keys(keys: str | None, token_file: str | None) -> ClientKeys | None:
    """What a client of a TCP address needs; None of neither.  Raises StartupError naming what is wrong."""
    if token_file is not None:
        server_secret, secret = token_secrets(read_token(Path(token_file), "--token-file"))
        return ClientKeys(zmq.curve_public(server_secret), zmq.curve_public(secret), secret)
    if keys is None:
        return None
    secret = read_key(Path(keys) / CLIENT_SECRET, "--keys")
    return ClientKeys(read_key(Path(keys) / SERVER_PUBLIC, "--keys"), zmq.curve_public(secret), secret)


def bindable(address: str) -> str:
    """tcp://HOST:PORT as ZeroMQ binds it: HOST as a number, * in place of port 0.

    Raises StartupError if it is no such address, or its host is unknown.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or address.lower() not in (f"tcp://{host}:{port}", f"tcp://[{host}]:{port}"):
        raise StartupError(f"--admin-address {address}: must be tcp://HOST:PORT")
    try:
        family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise StartupError(f"--admin-address {address}: {error.strerror}") from None
    number = f"[{found[0]}]" if family == socket.AF_INET6 else found[0]
    return f"tcp://{number}:{port or '*'}"


def token_secrets(token: bytes) -> tuple[bytes, bytes]:
    """The secret keys of the server and of its clients."""
    server, client = (
        z85.encode(hashlib.scrypt(token, salt=b"vlmrt admin " + side, **_SCRYPT)) for side in (b"server", b"client")
    )
    return server, client


def read_token(path: Path, option: str) -> bytes:
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise StartupError(f"{option} {path}: {error.strerror}") from None
    if len(token) < MIN_TOKEN_LENGTH:
        raise StartupError(
            f"{option} {path}: a token of {len(token)} bytes; at least {MIN_TOKEN_LENGTH} (try `openssl rand -hex 32`)"
        )
    return token


def read_key(path: Path, option: str) -> bytes:
    try:
        key = path.read_bytes().strip()
        zmq.curve_public(key)  # of the right length and alphabet
    except OSError as error:
        raise StartupError(f"{option}: {path}: {error.strerror}") from None
    except (ValueError, zmq.ZMQError, KeyError, AssertionError):
        raise StartupError(f"{option}: {path} holds no CURVE key ({KEY_LENGTH} characters of Z85)") from None
    return key


def make_key_files(folder: Path) -> tuple[Path, Path]:
    """New keys in folder/server, for --admin-keys, and folder/client, for --keys.

    Raises: FileExistsError if one of them is there already.
    """
    server, client = folder / "server", folder / "client"
    for path in (server, client):
        path.mkdir(mode=0o700, parents=True)
    (server / CLIENTS).mkdir(mode=0o700)
    server_public, server_secret = zmq.curve_keypair()
    public, secret = zmq.curve_keypair()
    files = {
        server / SERVER_SECRET: server_secret,
        server / CLIENTS / "client.public": public,
        client / SERVER_PUBLIC: server_public,
        client / CLIENT_SECRET: secret,
        client / CLIENT_PUBLIC: public,
    }
    for path, key in files.items():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(key + b"\n")
    return server, client


class DoorKeeper:
    """Lets in, to the CURVE sockets of a context, the clients whose keys it knows.

    https://rfc.zeromq.org/spec/27: libzmq asks over a socket of the context, and waits for the answer.
    """

    def __init__(self, context: zmq.Context[Socket], clients: frozenset[bytes], metrics: Metrics) -> None:
        self._clients = clients
        self._metrics = metrics
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ZAP_ADDRESS)
        self._pump = FramePump(self._socket, self._deliver)

    def _deliver(self, frames: Sequence[bytes]) -> None:
        request_id = frames[1] if len(frames) > 1 else b""
        is_known = len(frames) == 7 and frames[5] == b"CURVE" and z85.encode(frames[6]) in self._clients
        if not is_known:
            self._metrics.add("bad_frames_total")
        verdict = (b"200", b"OK") if is_known else (b"400", b"unknown key")
        self._socket.send_multipart((b"1.0", request_id, *verdict, b"", b""), zmq.NOBLOCK)
        self._pump.poke()

    def close(self) -> None:
        self._pump.close()
        self._socket.close()
