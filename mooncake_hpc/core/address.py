"""`host:port` texts, and the address under which this node is published and listens.

The rule of the published address: `MC_TCP_BIND_ADDRESS`; else the host part of the local server name when it
is an address of this machine; else the source address of the route to the metadata server; else loopback.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import select
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.interrupt import Interrupt, Interrupted
from mooncake_hpc.core.limits import REMEDIES
from mooncake_hpc.core.process import own, own_listener
from mooncake_hpc.core.settings import Settings

log = logging.getLogger(__name__)

P2PHANDSHAKE = "P2PHANDSHAKE"  # the original's word for "no metadata server: peers answer for themselves"
ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # RFC 5737 and RFC 3849: routed by default, owned by nobody
RESOLVE_TIMEOUT = 5.0  # seconds


def split(name: str, default_port: int) -> tuple[str, int]:
    """Host and port of `host:port`, `[v6]:port`, a bare host or a bare IPv6 address (brackets removed).

    Raises ConfigError where there is no host or the port is not in 1 to 65535.
    """
    text = name.strip()
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ConfigError(f"address {name!r}: expected [IPv6 address]:port")
        port = rest[1:] if rest else None
    elif text.count(":") > 1:
        host, port = text, None
    else:
        host, colon, rest = text.partition(":")
        port = rest if colon else None
    if not host:
        raise ConfigError(f"address {name!r} has no host; expected host:port")
    if port is None:
        return host, default_port
    if not (port.isascii() and port.isdecimal() and len(port) < 9 and 0 < int(port) < 65536):
        raise ConfigError(f"address {name!r}: the port must be a number from 1 to 65535")
    return host, int(port)


def join(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def look_up(host: str, port: int | None, flags: int = 0) -> list[Any]:
    """`getaddrinfo`'s entries for TCP. Raises OSError, also for a text that cannot be a host name.

    Such a text has an empty label or one of more than 63 characters, a surrogate, or NUL.
    """
    try:
        if "\0" not in host:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError:
        pass
    raise socket.gaierror(socket.EAI_NONAME, f"{host[:80]!r} is not a host name")


def resolve(
    host: str,
    port: int,
    timeout: float = RESOLVE_TIMEOUT,
    ipv6_first: bool = False,
    interrupt: Interrupt | None = None,
) -> list[Any]:
    """`getaddrinfo`'s entries for TCP, under a deadline of `timeout` seconds.

    Raises OSError (`socket.gaierror`, Interrupted, or TimeoutError when the name service does not answer).
    """
    try:
        return look_up(host, port, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # not a literal address
    try:
        # getaddrinfo has no deadline
        entries = (interrupt or Interrupt()).call(lambda: look_up(host, port), timeout)
    except TimeoutError:
        text = f"no answer about the host name {host!r} within {timeout:g} s"
        raise TimeoutError(errno.ETIMEDOUT, text) from None
    return sorted(entries, key=lambda entry: (entry[0] == socket.AF_INET6) != ipv6_first)


def dial(host: str, port: int, deadline: float, interrupt: Interrupt | None = None) -> socket.socket:
    """A blocking connection to the first of the host's addresses that accepts, until `deadline` (time.monotonic()).

    Each address gets its share of the time, so that a silent one leaves some to the next. Raises OSError,
    Interrupted among it.
    """
    interrupt = interrupt or Interrupt()
    failure = OSError(f"{host!r} has no address")
    entries = resolve(host, port, max(0.0, deadline - time.monotonic()), interrupt=interrupt)
    for index, (family, kind, protocol, _, target) in enumerate(entries):
        share = (deadline - time.monotonic()) / (len(entries) - index)
        if share <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer from {host!r} in time")
        connection = own(socket.socket(family, kind, protocol))
        try:
            _connect(connection, target, share, interrupt)
            return connection
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError) or isinstance(error, Interrupted):
                raise
            failure = error
    raise failure


def is_silent(error: OSError) -> bool:
    """Whether a connection failed since nobody said anything, and not for an answer."""
    return isinstance(error, TimeoutError) or error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


def explain_failure(error: OSError) -> str:
    """Why a connection could not be made, and what that says of the other side."""
    cause = error.strerror or str(error)
    if error.errno == errno.ECONNREFUSED:
        return f"{cause}: its process has ended, as nobody listens there"
    return f"{cause}: stopped, or cut off?" if is_silent(error) else cause


def _connect(connection: socket.socket, target: Any, timeout: float, interrupt: Interrupt) -> None:
    """Raises OSError, Interrupted among it."""
    connection.setblocking(False)
    code = connection.connect_ex(target)
    if code == errno.EINPROGRESS:
        with interrupt.cuts(connection):  # in vain before connect()
            waiting = select.poll()
            waiting.register(connection, select.POLLOUT)
            if not waiting.poll(timeout * 1000):
                raise TimeoutError(errno.ETIMEDOUT, "timed out")
        if interrupt.is_set:
            raise Interrupted
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
    connection.settimeout(timeout)


def is_local(address: str) -> bool:
    """Whether this literal IP address belongs to an interface of this machine (of this network namespace)."""
    try:
        if not _is_unicast(address):
            return False
        family, _, _, _, target = resolve(address, 0)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind(target)
    except (OSError, ValueError):
        return False
    return True


def published_address(name: str, metadata_spec: str, settings: Settings) -> str:
    """The literal address under which this node is reached, by the rule at the head of this module.

    `name` need not resolve. MC_TCP_BIND_ADDRESS may be foreign (an address that is forwarded to us: listen
    with `bind_all` then); ConfigError when it is no address at all.
    """
    if settings.tcp_bind_address:
        return _bind_address(settings)
    host = _host(name)
    meant = host == "localhost" or _is_literal(host)
    for address in _addresses(host, settings):
        # Debian maps the machine's own name to 127.0.1.1, which is no use to other hosts
        if is_local(address) and (meant or not ipaddress.ip_address(address).is_loopback):
            return address
    routes = (address for peer in _route_targets(metadata_spec, settings) for address in _addresses(peer, settings))
    found = next(filter(None, map(source_address, routes)), "::1" if settings.use_ipv6 else "127.0.0.1")
    if _is_literal(host):
        log.warning("name %r holds an address that is none of this machine's: peers are told %s", name, found)
    return found


def source_address(peer: str) -> str | None:
    """Our address on the route to the literal address `peer`, None without a route. Sends no packet."""
    try:
        family, _, _, _, target = resolve(peer, 9)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def bind_listener(
    host: str, ports: Iterable[int], bind_all: bool = False, backlog: int = socket.SOMAXCONN, hint: str = ""
) -> socket.socket:
    """A listening TCP socket on `host` (with `bind_all` on every address of its family),
    on the first free port of `ports`.

    Port 0 lets the system choose. `hint` names the flag or variable with which the user chooses the port.
    Raises ConfigError that names the address when it is not ours or every port is taken; OSError at a limit.
    """
    try:
        family, _, _, _, target = resolve(host, 0)[0]
    except OSError as error:
        raise ConfigError(f"cannot listen on {host!r}: {error}") from error
    if bind_all:
        target = ("::", 0) if family == socket.AF_INET6 else ("0.0.0.0", 0)
    tried: list[int] = []
    for port in ports:
        try:
            return _listen(family, (target[0], port, *target[2:]), backlog)
        except OSError as error:
            if error.errno in REMEDIES:
                raise
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                advice = "; set MC_TCP_BIND_ADDRESS to an address of this machine" if not bind_all else ""
                where = join(target[0], port)
                raise ConfigError(f"cannot listen on {where}: {error.strerror}{advice}") from error
            tried.append(port)
    where = join(host, tried[0]) if len(tried) == 1 else f"{host}, ports {_span(tried)}"
    cause = "in use or not permitted" if tried else "no port was given"
    advice = f"; choose another with {hint}" if hint else ""
    raise ConfigError(f"cannot listen on {where}: {cause}{advice}")


def _listen(family: int, target: tuple[Any, ...], backlog: int) -> socket.socket:
    listener = own_listener(socket.socket(family, socket.SOCK_STREAM))
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past TIME_WAIT, not past a listener
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(target[0] != "::"))
        listener.bind(target)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _bind_address(settings: Settings) -> str:
    for address in _addresses(settings.tcp_bind_address.strip("[]"), settings):
        return address
    raise ConfigError(f"MC_TCP_BIND_ADDRESS={settings.tcp_bind_address!r} is not an address")


def _host(name: str) -> str:
    try:
        return split(name, 1)[0]
    except ConfigError:
        return ""  # a segment name may be any text


def _route_targets(metadata_spec: str, settings: Settings) -> Iterator[str]:
    if metadata_spec == P2PHANDSHAKE:
        yield ELSEWHERE[settings.use_ipv6]
        return
    scheme, separator, rest = metadata_spec.partition("://")
    if scheme == "memory":
        return
    for endpoint in (rest if separator else metadata_spec).split(","):
        yield _host(endpoint.partition("/")[0])


def _addresses(host: str, settings: Settings) -> list[str]:
    if not host:
        return []
    try:
        return [entry[4][0] for entry in resolve(host, 0, ipv6_first=settings.use_ipv6)]
    except OSError:
        return []


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_unicast(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return not (parsed.is_unspecified or parsed.is_multicast or address == "255.255.255.255")


def _span(ports: list[int]) -> str:
    return f"{min(ports)}-{max(ports)}" if ports else "none"
