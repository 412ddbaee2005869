"""Mutual authentication of peers by a shared secret: what is sent at the start of a connection. Nothing here does input
or output but `read_secret`.

The client sends a nonce. The server answers with a challenge: its own nonce, a proof that it knows the secret, and a
proof that it is this segment of this generation. The client checks both, and only then proves itself. Every proof is an
HMAC-SHA-256 (RFC 2104) over both nonces, the role of who gives it, and the purpose of the connection, each with its
length before it. So a proof is of no use on another connection, in the other direction, or for another purpose.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from dataclasses import dataclass, field
from enum import StrEnum

from mooncake_hpc.core.errors import AuthenticationError, ConfigError
from mooncake_hpc.core.private_file import read_private
from mooncake_hpc.core.settings import Settings

VERSION = b"mooncake_hpc authentication 1"
NONCE_BYTES = PROOF_BYTES = 32
CHALLENGE_BYTES = NONCE_BYTES + 2 * PROOF_BYTES
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, 4096
TIMEOUT = 5.0  # seconds for a client to prove itself

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Purpose(StrEnum):
    """What a connection is for."""

    CONTROL = "control"
    DATA = "data"
    SHM = "shm"


class Reason(StrEnum):
    """Why a peer and this process do not get together: `AuthenticationError.reason`."""

    NO_SECRET_THERE = "no secret there"
    NO_SECRET_HERE = "no secret here"
    SECRETS_DIFFER = "secrets differ"
    ANOTHER_PROCESS = "another process"


_TEXTS = {
    Reason.NO_SECRET_THERE: "does not authenticate itself: it has no secret, or is not of this package. Start it with "
    "--secret_file (MOONCAKE_HPC_SECRET_FILE), or name its address in --allow_unauthenticated",
    Reason.NO_SECRET_HERE: "wants authentication, and this process has no secret: give it the peer's by --secret_file "
    "(MOONCAKE_HPC_SECRET_FILE)",
    Reason.SECRETS_DIFFER: "has another secret than this process: compare the files of --secret_file "
    "(MOONCAKE_HPC_SECRET_FILE)",
    Reason.ANOTHER_PROCESS: "has our secret, but another process answers than the one that was published: open the "
    "segment again",
}


def refusal(peer: str, reason: Reason) -> AuthenticationError:
    """The error that names the peer and says what to do."""
    return AuthenticationError(f"{peer} {_TEXTS[reason]}", reason)


@dataclass(frozen=True, slots=True)
class Secret:
    """A key that no text shows."""

    key: bytes = field(repr=False)


def read_secret(path: str) -> Secret:
    """The secret in the file: its bytes without one newline at the end.

    Raises ConfigError unless it is a regular file of ours or root's that nobody else may read, of a fitting size.
    """
    where = f"the secret file {path!r} (--secret_file, MOONCAKE_HPC_SECRET_FILE)"
    key = read_private(path, where, MAX_SECRET_BYTES)
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ConfigError(f"{where} must hold {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, without a last newline")
    return Secret(key)


def flags_of(settings: Settings) -> list[str]:
    """Words for the command line of a peer of ours."""
    named = {"secret_file": settings.secret_file, "allow_unauthenticated": settings.allow_unauthenticated}
    return [f"--{name}={value}" for name, value in named.items() if value]


def parse_networks(text: str) -> tuple[Network, ...]:
    """Addresses and networks (`10.0.0.0/8`), separated by commas. Raises ConfigError."""
    networks: list[Network] = []
    for word in text.split(","):
        if word := word.strip():
            try:
                networks.append(ipaddress.ip_network(word.strip("[]")))
            except ValueError as error:
                raise ConfigError(
                    f"--allow_unauthenticated (MOONCAKE_HPC_ALLOW_UNAUTHENTICATED) holds {word!r}, which is neither "
                    f"an IP address nor a network: {error}"
                ) from None
    return tuple(networks)


class Authentication:
    """What this process needs to prove itself and to check others. Without a secret nothing is proved nor checked.

    `allowed` are the networks of peers that need no proof. `name` and `generation` are those of our segment, to be set
    before it is published.
    """

    def __init__(self, secret: Secret | None = None, allowed: tuple[Network, ...] = ()) -> None:
        self._secret = secret
        self._allowed = allowed
        self.name = self.generation = ""

    @classmethod
    def load(cls, settings: Settings) -> Authentication:
        """Read the secret that the settings name, if any. Raises ConfigError."""
        allowed = parse_networks(settings.allow_unauthenticated)
        if not settings.secret_file:
            if allowed:
                raise ConfigError("--allow_unauthenticated has no meaning without --secret_file: everybody is allowed")
            return cls()
        return cls(read_secret(settings.secret_file), allowed)

    @property
    def required(self) -> bool:
        """Whether peers have to prove that they know our secret."""
        return self._secret is not None

    def allows(self, address: str) -> bool:
        """Whether the peer at this IP address needs no proof."""
        if self._secret is None:
            return True
        try:
            parsed = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._allowed)

    def expect(self, name: str = "", generation: str = "") -> Expected:
        """A peer that has to be this segment of this generation; any that knows the secret where that is unknown."""
        return Expected(self, name, generation)

    def answer(self, purpose: Purpose, nonce: bytes) -> ServerExchange:
        """Our side towards a client that has sent `nonce`."""
        assert self._secret is not None
        return ServerExchange(_Proofs(self._secret.key, purpose), nonce, self.name, self.generation)

    def open(self, purpose: Purpose, expected: Expected, peer: str) -> ClientExchange:
        """Our side towards a server, which errors call `peer`."""
        assert self._secret is not None
        return ClientExchange(_Proofs(self._secret.key, purpose), expected.name, expected.generation, peer)


@dataclass(frozen=True, slots=True)
class Expected:
    """Who is to answer at an address."""

    authentication: Authentication
    name: str = ""
    generation: str = ""

    def at(self, where: str) -> str:
        """The peer, for messages."""
        return f"segment {self.name!r} at {where}" if self.name else f"the process at {where}"

    def open(self, purpose: Purpose, where: str) -> ClientExchange:
        """Our side of an exchange with it."""
        return self.authentication.open(purpose, self, self.at(where))


class _Proofs:
    """Proofs under one key for one purpose."""

    def __init__(self, key: bytes, purpose: Purpose) -> None:
        self._key, self._purpose = key, purpose

    def __call__(self, role: bytes, *parts: bytes) -> bytes:
        proof = hmac.new(self._key, digestmod="sha256")
        for part in (VERSION, role, self._purpose.encode(), *parts):
            proof.update(len(part).to_bytes(8, "little") + part)
        return proof.digest()


def _text(value: str) -> bytes:
    return value.encode(errors="surrogatepass")


class ClientExchange:
    """The client's side of one connection."""

    def __init__(self, proofs: _Proofs, name: str, generation: str, peer: str) -> None:
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self.peer = peer
        self._proofs = proofs
        self._name, self._generation = _text(name), _text(generation)
        self._shared: tuple[bytes, ...] = ()  # what both sides know once the server is proved

    def prove(self, challenge: bytes, request: bytes = b"") -> bytes:
        """Check the server's challenge; our proof, which is of `request` as well. Raises AuthenticationError."""
        if len(challenge) != CHALLENGE_BYTES:
            raise refusal(self.peer, Reason.NO_SECRET_THERE)
        nonce, proof, identity = (challenge[at : at + PROOF_BYTES] for at in range(0, CHALLENGE_BYTES, PROOF_BYTES))
        nonces = self.nonce, nonce
        if nonce == self.nonce or not hmac.compare_digest(proof, self._proofs(b"server", *nonces)):
            raise refusal(self.peer, Reason.SECRETS_DIFFER)
        mine = self._proofs(b"identity", *nonces, self._name, self._generation)
        if self._generation and not hmac.compare_digest(identity, mine):
            raise refusal(self.peer, Reason.ANOTHER_PROCESS)
        self._shared = *nonces, identity, request
        return self._proofs(b"client", *self._shared)

    def check_reply(self, proof: bytes, reply: bytes) -> None:
        """Raise AuthenticationError unless the proved server has given this reply to our request."""
        if not self._shared or not hmac.compare_digest(proof, self._proofs(b"reply", *self._shared, reply)):
            raise refusal(self.peer, Reason.SECRETS_DIFFER)


class ServerExchange:
    """The server's side of one connection."""

    def __init__(self, proofs: _Proofs, nonce: bytes, name: str, generation: str) -> None:
        self._proofs = proofs
        own = secrets.token_bytes(NONCE_BYTES)
        nonces = nonce, own
        identity = proofs(b"identity", *nonces, _text(name), _text(generation))
        self._shared: tuple[bytes, ...] = *nonces, identity
        self.challenge = own + proofs(b"server", *nonces) + identity

    def admits(self, proof: bytes, request: bytes = b"") -> bool:
        """Whether the client has proved itself, and to have sent `request`."""
        self._shared = *self._shared[:3], request
        return hmac.compare_digest(proof, self._proofs(b"client", *self._shared))

    def prove_reply(self, reply: bytes) -> bytes:
        """The proof that `reply` is ours, to the request that was admitted."""
        return self._proofs(b"reply", *self._shared, reply)
