"""The exchange of proofs, without sockets: what is refused; secret files; what no text shows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mooncake_hpc.core.authentication import (
    CHALLENGE_BYTES,
    MAX_SECRET_BYTES,
    PROOF_BYTES,
    Authentication,
    ClientExchange,
    Purpose,
    Reason,
    Secret,
    ServerExchange,
    parse_networks,
    read_secret,
)
from mooncake_hpc.core.errors import AuthenticationError, ConfigError, PeerLost
from mooncake_hpc.core.settings import Settings

KEY = b"0123456789abcdef the secret"


def known(key: bytes = KEY, name: str = "a:1", generation: str = "g1") -> Authentication:
    """A process of this segment."""
    authentication = Authentication(Secret(key))
    authentication.name, authentication.generation = name, generation
    return authentication


def client(
    expecting: tuple[str, str] = ("a:1", "g1"), key: bytes = KEY, purpose: Purpose = Purpose.DATA
) -> ClientExchange:
    return known(key).expect(*expecting).open(purpose, "10.0.0.1:5")


def meet(ours: ClientExchange, server: Authentication, purpose: Purpose = Purpose.DATA) -> ServerExchange:
    """Both sides of a connection; the server's."""
    theirs = server.answer(purpose, ours.nonce)
    assert theirs.admits(ours.prove(theirs.challenge, b"request"), b"request")
    return theirs


def test_two_that_share_a_secret_prove_it_and_what_they_say() -> None:
    ours = client()
    theirs = meet(ours, known())
    ours.check_reply(theirs.prove_reply(b"reply"), b"reply")
    for proof, reply in ((theirs.prove_reply(b"reply"), b"another"), (b"", b"reply"), (bytes(32), b"reply")):
        with pytest.raises(AuthenticationError):
            ours.check_reply(proof, reply)


def test_a_server_that_is_not_known_yet_need_only_know_the_secret() -> None:
    meet(client(("", "")), known())


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (known(b"another secret, as long"), Reason.SECRETS_DIFFER),
        (known(name="a:2"), Reason.ANOTHER_PROCESS),
        (known(generation="g2"), Reason.ANOTHER_PROCESS),
        (known(name="a:1g", generation="1"), Reason.ANOTHER_PROCESS),  # as one text they are the same
    ],
)
def test_another_server(server: Authentication, reason: Reason) -> None:
    ours = client()
    with pytest.raises(AuthenticationError, match=r"segment 'a:1' at 10\.0\.0\.1:5") as failure:
        ours.prove(server.answer(Purpose.DATA, ours.nonce).challenge)
    assert failure.value.reason == reason and isinstance(failure.value, PeerLost | PermissionError)


def test_a_client_with_another_secret_cannot_even_ask() -> None:
    ours, theirs = client(key=b"another secret, as long"), known()
    answer = theirs.answer(Purpose.DATA, ours.nonce)
    with pytest.raises(AuthenticationError):
        ours.prove(answer.challenge)
    assert not answer.admits(bytes(PROOF_BYTES)) and not answer.admits(b"")


def test_replayed_messages_prove_nothing() -> None:
    ours = client()
    first = known().answer(Purpose.DATA, ours.nonce)
    proof = ours.prove(first.challenge)
    assert first.admits(proof)
    assert not known().answer(Purpose.DATA, ours.nonce).admits(proof)  # its nonce is new
    with pytest.raises(AuthenticationError):
        client().prove(first.challenge)  # and so is ours


def test_reflected_messages_prove_nothing() -> None:
    ours, server = client(("", "")), known()
    challenge = server.answer(Purpose.DATA, ours.nonce).challenge
    for reflected in (ours.nonce + challenge[32:], ours.nonce * 3, challenge[:32] + challenge[64:] + challenge[32:64]):
        with pytest.raises(AuthenticationError):
            ours.prove(reflected)
    theirs = server.answer(Purpose.DATA, ours.nonce)
    for part in range(0, CHALLENGE_BYTES, PROOF_BYTES):
        assert not theirs.admits(theirs.challenge[part : part + PROOF_BYTES])


@pytest.mark.parametrize("size", [0, 1, 32, 64, CHALLENGE_BYTES - 1, CHALLENGE_BYTES + 1])
def test_a_challenge_of_another_size(size: int) -> None:
    with pytest.raises(AuthenticationError):
        client().prove(bytes(size))


def test_a_proof_is_for_one_purpose() -> None:
    ours = client(purpose=Purpose.SHM)
    with pytest.raises(AuthenticationError):
        ours.prove(known().answer(Purpose.DATA, ours.nonce).challenge)


@pytest.mark.parametrize("where", range(0, CHALLENGE_BYTES, 7))
def test_a_challenge_with_one_bit_changed(where: int) -> None:
    ours = client()
    challenge = bytearray(known().answer(Purpose.DATA, ours.nonce).challenge)
    challenge[where] ^= 1
    with pytest.raises(AuthenticationError):
        ours.prove(bytes(challenge))


# --- secret files -----------------------------------------------------------------------------------------------


def write(path: Path, content: bytes = KEY, mode: int = 0o600) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(("content", "mode"), [(KEY + b"\n", 0o600), (KEY, 0o400)])
def test_a_secret_is_what_its_private_file_holds(tmp_path: Path, content: bytes, mode: int) -> None:
    assert read_secret(write(tmp_path / "secret", content, mode)) == Secret(KEY)


def test_only_one_newline_at_the_end_is_left_out(tmp_path: Path) -> None:
    assert read_secret(write(tmp_path / "secret", KEY + b"\n\n")) == Secret(KEY + b"\n")


def fifo(path: Path) -> str:
    os.mkfifo(path, 0o600)
    return str(path)


def link(path: Path) -> str:
    path.symlink_to(write(path.parent / "target", mode=0o644))
    return str(path)


UNFIT: dict[str, tuple[Callable[[Path], str], str]] = {
    "absent": (str, "cannot be read: No such file"),
    "group may read": (lambda path: write(path, mode=0o640), "0640.*chmod 600"),
    "others may write": (lambda path: write(path, mode=0o602), "0602"),
    "a link to what others may read": (link, "0644"),
    "a folder": (lambda path: str(path.parent), "no regular file"),
    "a FIFO": (fifo, "no regular file"),
    "a device": (lambda _: "/dev/zero", "no regular file"),
    "short": (lambda path: write(path, b"x" * 15 + b"\n"), "16 to 4096 bytes"),
    "long": (lambda path: write(path, b"x" * (MAX_SECRET_BYTES + 1)), "16 to 4096 bytes"),
    "NUL in its path": (lambda _: "a\0b", "cannot be read"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_other_secret_files_are_refused(tmp_path: Path, kind: str) -> None:
    make, text = UNFIT[kind]
    path = make(tmp_path / "secret")
    with pytest.raises(ConfigError, match=text) as failure:
        read_secret(path)
    assert repr(path)[1:-1] in str(failure.value) and "MOONCAKE_HPC_SECRET_FILE" in str(failure.value)
    assert failure.value.__cause__ is None and "xxxx" not in str(failure.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root gives files away")
def test_a_secret_file_of_somebody_else(tmp_path: Path) -> None:
    path = write(tmp_path / "secret")
    os.chown(path, 4321, -1)
    with pytest.raises(ConfigError, match="belongs to the user id 4321"):
        read_secret(path)


def test_no_text_shows_a_secret(tmp_path: Path) -> None:
    authentication = Authentication.load(Settings(secret_file=write(tmp_path / "secret")))
    exchange = authentication.expect().open(Purpose.DATA, "x")
    shown = [authentication, authentication.__dict__, exchange, exchange.__dict__, Secret(KEY), authentication.expect()]
    assert not any("0123456789abcdef" in f"{value!r} {value}" for value in shown)


# --- who needs no proof -----------------------------------------------------------------------------------------


def test_addresses_that_need_no_proof() -> None:
    allowed = parse_networks("10.0.0.5, 192.168.0.0/16,[::1],fe80::/10,")
    authentication = Authentication(Secret(KEY), allowed)
    for address in ("10.0.0.5", "::ffff:10.0.0.5", "192.168.3.4", "::1", "fe80::1%eth0"):
        assert authentication.allows(address)
    for address in ("10.0.0.6", "127.0.0.1", "::2", "", "/tmp/socket", "host"):
        assert not authentication.allows(address)
    assert not Authentication(Secret(KEY)).allows("127.0.0.1") and Authentication().allows("127.0.0.1")


@pytest.mark.parametrize("text", ["host", "10.0.0.1/8", "10.0.0.0/33", "1.2.3", "10.0.0.1:5"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="--allow_unauthenticated"):
        parse_networks(f"::1,{text}")


def test_everybody_is_allowed_without_a_secret_already() -> None:
    with pytest.raises(ConfigError, match="without --secret_file"):
        Authentication.load(Settings(allow_unauthenticated="10.0.0.1"))


def test_settings_name_both(tmp_path: Path) -> None:
    env = {"MOONCAKE_HPC_SECRET_FILE": str(tmp_path), "MOONCAKE_HPC_ALLOW_UNAUTHENTICATED": "::1"}
    settings = Settings.from_env(env)
    assert (settings.secret_file, settings.allow_unauthenticated) == (str(tmp_path), "::1")
