"""The metadata store in etcd: one lease a process, several endpoints, and a deadline for every call."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self, TypeVar

from mooncake_hpc.core import process
from mooncake_hpc.core.errors import ConfigError, MetadataError, MetadataUnavailable, MooncakeError, NameInUse
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.core.trouble import Trouble
from mooncake_hpc.metadata._etcd3 import Access, Connection
from mooncake_hpc.metadata._etcd_watch import EtcdWatch
from mooncake_hpc.metadata._failures import Failure, Kind
from mooncake_hpc.metadata._streams import Changing, KeyStream
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.guard import Guard
from mooncake_hpc.metadata.watch import OnChange, Watch

T = TypeVar("T")

log = logging.getLogger(__name__)

REQUEST_LIMIT = 3 << 19  # bytes: etcd's --max-request-bytes where nobody has set it
FIRST_PAUSE, LAST_PAUSE = 0.02, 0.5  # seconds between two rounds over all endpoints
SHORTEST_ATTEMPT = 0.05  # seconds
WATCH_TIME = 10.0  # seconds until a watch looks at everything again: a cut cable tells nobody that it is cut
MAX_LOGINS = 2  # within one call; a token is good for minutes


class EtcdStore(MetadataStore):
    """`endpoints` are "host:port" of the members of one etcd. Opens no connection before the first call.

    Every key that this process publishes hangs on its one lease, so a key is ours exactly while it hangs on
    it: that is what decides whether a key may be put back or removed. A thread renews the lease at a third of
    its TTL. Only where something went wrong meanwhile (a call, a connection, the lease), or when the guard says that
    somebody else has put or removed a key of ours, it also looks at what hangs on the lease, and sets right whatever
    differs. ConfigError: impossible TLS or user settings, or no etcd3.
    """

    def __init__(self, endpoints: Sequence[str], settings: Settings) -> None:
        self.spec = ",".join(endpoints)
        self._endpoints = tuple(endpoints)
        self._access = Access.of(settings)
        self._timeout = settings.metadata_timeout
        self._ttl = math.ceil(settings.lease_ttl)  # seconds; etcd may grant more
        self._process = process.here

        self._switching = threading.Lock()  # guards the next two
        self._current = 0  # index of the endpoint in use
        self._connection: Connection | None = Connection(self._endpoints[0], self._access)

        self._writing = threading.Lock()  # held through every write; guards all that follows
        self._lease = 0
        self._published: dict[str, str] = {}
        self._lost: frozenset[str] = frozenset()
        self._doubt = False  # what hangs on the lease may not be what was published
        self._keeper: threading.Thread | None = None
        self._guard = Guard(self._follow_keys, self._changed)
        self._early = threading.Event()  # the keeper is to look now
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self._check_usable()
        return self

    def get(self, key: str) -> str | None:
        self._check_usable()
        return self._call(lambda etcd, timeout: etcd.get(key, timeout), self._deadline())

    def list(self, prefix: str) -> dict[str, str]:
        self._check_usable()
        return self._call(lambda etcd, timeout: etcd.list(prefix, timeout), self._deadline())

    def publish(self, key: str, value: str) -> None:
        self._check_usable()
        deadline = self._deadline()
        with self._write(deadline):
            try:
                kept = self._put(key, value, deadline)
            except Failure as error:
                raise self._refusal(key, value, error) from error
            if not kept:
                self._give_up(key)
                raise NameInUse(f"{key} at etcd {self.spec} now belongs to another process: it is left alone")
            self._hold(key, value)

    def create(self, key: str, value: str) -> bool:
        self._check_usable()
        deadline = self._deadline()
        with self._write(deadline):
            if key in self._published:
                return False
            try:
                created = self._put_by(Connection.put_if_absent, key, value, deadline)
            except Failure as error:
                raise self._refusal(key, value, error) from error
            if created:
                self._hold(key, value)
            return created

    def watch(self, prefix: str, on_change: OnChange) -> Watch:
        self._check_usable()
        return EtcdWatch(self, prefix, on_change)

    def withdraw(self, key: str) -> None:
        self._check_usable()
        deadline = self._deadline()
        with self._write(deadline):
            self._published.pop(key, None)
            self._lost -= {key}
            self._cover()
            if self._lease:
                self._remove(key, deadline)

    @property
    def lost(self) -> frozenset[str]:
        process.check(self)
        return self._lost

    def close(self) -> None:
        if self._process is not process.here or self._closing.is_set():
            return
        self._closing.set()
        self._early.set()
        deadline = self._deadline()
        if self._keeper is not None:
            self._keeper.join(self._timeout)
        if self._writing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._writing.release()  # no other writer is under way, and none can start any more
        self._guard.close()
        if self._lease:
            try:
                self._call(lambda etcd, timeout: etcd.revoke(self._lease, timeout), deadline, last=True)
            except (MooncakeError, Failure) as error:
                log.info("etcd %s: keys left to expire within %d s: %s", self.spec, self._ttl, error)
        with self._switching:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # Watching

    def list_at(self, prefix: str) -> tuple[dict[str, str], int]:
        """All keys under the prefix, and the revision that they are of, for a watch."""
        process.check(self)
        return self._call(lambda etcd, timeout: etcd.list_at(prefix, timeout), self._deadline())

    def follow(self, prefix: str, revision: int) -> Changing:
        """Changes from a revision on. Raises Failure."""
        process.check(self)
        return self._connected().follow(prefix, revision, WATCH_TIME)

    def _follow_keys(self) -> KeyStream:
        return self._connected().follow_keys(self._timeout)

    def _changed(self, key: str, lease: int) -> None:
        """What the guard saw: where it was not us, the keeper looks at once."""
        if lease != self._lease and key in self._published:
            self._doubt = True
            self._early.set()

    def _cover(self) -> None:
        if self._guard.cover(self._published.keys()):
            self._doubt = True

    # One call: fail-over, log-in, deadline

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _check_usable(self) -> None:
        process.check(self)
        if self._closing.is_set():
            raise MetadataError(f"the metadata store {self.spec} is closed")

    def _call(self, call: Callable[[Connection, float], T], deadline: float, last: bool = False) -> T:
        """Try the endpoints in turn until one answers; `last` tries each once, and also while closing.

        Raises MetadataUnavailable at the deadline, MetadataError when etcd refuses, Failure for a lost lease
        or a request that is too large.
        """
        pause, attempts, logins = FIRST_PAUSE, 0, 0
        failure: Failure | None = None
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or (last and attempts == len(self._endpoints)):
                raise self._unavailable(failure) from failure
            if not last:
                self._check_usable()
            connection = self._connected()
            try:
                # A silent endpoint may use up its share of the time, not that of the others.
                return call(connection, max(SHORTEST_ATTEMPT, remaining / (len(self._endpoints) + 1)))
            except Failure as error:
                failure = error
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"etcd at {self.spec} takes Unicode texts only, no lone surrogates: {error}"
                ) from error
            if failure.kind in (Kind.LEASE, Kind.TOO_LARGE):
                raise failure
            if failure.kind is Kind.LOGIN and logins < MAX_LOGINS:
                logins += 1
                connection.log_out()
                continue
            if failure.kind is not Kind.UNAVAILABLE:
                raise MetadataError(f"etcd at {self.spec} refuses: {failure}") from failure
            self._drop(connection)
            attempts += 1
            if attempts % len(self._endpoints) == 0 and not last:
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
                pause = min(2 * pause, LAST_PAUSE)

    def _connected(self) -> Connection:
        with self._switching:
            if self._connection is None:
                self._connection = Connection(self._endpoints[self._current], self._access)
            return self._connection

    def _drop(self, connection: Connection) -> None:
        """Leave a connection that failed and go to the next endpoint; other threads' calls on it try again."""
        self._doubt = True  # etcd may have done what it did not answer
        with self._switching:
            if self._connection is connection:
                self._connection = None
                self._current = (self._current + 1) % len(self._endpoints)
        connection.close()

    def _unavailable(self, failure: Failure | None) -> MetadataUnavailable:
        return MetadataUnavailable(
            f"no answer from etcd at {self.spec} within {self._timeout:g} s: "
            f"{failure or 'busy with other writes'}. Check that it runs and that this host reaches it "
            "(MOONCAKE_HPC_METADATA_TIMEOUT sets the deadline)"
        )

    # Writing, and whose a key is

    @contextmanager
    def _write(self, deadline: float) -> Iterator[None]:
        if not self._writing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise self._unavailable(None)
        try:
            self._check_usable()
            yield
        except BaseException:
            self._doubt = True
            raise
        finally:
            self._writing.release()

    def _hold(self, key: str, value: str) -> None:
        """Keep alive what was put."""
        new = key not in self._published
        self._published[key] = value
        self._lost -= {key}
        if new:
            self._cover()
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="mooncake-etcd-lease", daemon=True)
            self._keeper.start()

    def _put(self, key: str, value: str, deadline: float) -> bool:
        """A new key over whatever is there; one that we hold, or have lost, only where nobody else's stands there."""
        put = Connection.put_if_ours if key in self._published or key in self._lost else Connection.put
        return self._put_by(put, key, value, deadline)

    def _put_by(
        self, put: Callable[[Connection, str, str, int, float], bool], key: str, value: str, deadline: float
    ) -> bool:
        if not self._lease:
            self._new_lease(deadline)
        try:
            return self._call(lambda etcd, timeout: put(etcd, key, value, self._lease, timeout), deadline)
        except Failure as error:
            if error.kind is not Kind.LEASE:
                raise
        self._new_lease(deadline)  # the keeper moves our other keys to it
        return self._call(lambda etcd, timeout: put(etcd, key, value, self._lease, timeout), deadline)

    def _new_lease(self, deadline: float) -> None:
        wanted = self._ttl
        self._lease, self._ttl = self._call(lambda etcd, timeout: etcd.grant(wanted, timeout), deadline)
        if self._published:  # they hang on the old one
            self._doubt = True

    def _remove(self, key: str, deadline: float) -> None:
        self._call(lambda etcd, timeout: etcd.delete_if_leased(key, self._lease, timeout), deadline)

    def _give_up(self, key: str) -> None:
        if self._published.pop(key, None) is None:
            return  # it has been told
        self._lost |= {key}
        self._cover()
        log.warning(
            "etcd %s: another process has published %s, which was ours: what it put is left alone, and ours is "
            "published no more",
            self.spec,
            key,
        )

    def _refusal(self, key: str, value: str, error: Failure) -> MetadataError:
        if error.kind is Kind.TOO_LARGE:
            return MetadataError(
                f"etcd at {self.spec} refuses the value of {key}: {len(value.encode())} bytes are above its "
                f"limit ({REQUEST_LIMIT} bytes a request, unless its --max-request-bytes says otherwise)"
            )
        return MetadataError(f"etcd at {self.spec} loses the lease before {key} is put: {error}")

    # The thread that keeps the lease

    def _keep(self) -> None:
        trouble, bug = False, Trouble(log, f"etcd {self.spec}: the lease")
        while True:
            self._early.wait(max(1, self._ttl) / 3)
            self._early.clear()
            if self._closing.is_set():
                return
            try:
                self._renew(time.monotonic() + min(self._timeout, self._ttl))
            except (MooncakeError, Failure) as error:
                if not (trouble or self._closing.is_set()):
                    log.warning("etcd %s: cannot renew the lease, going on trying: %s", self.spec, error)
                trouble = True
            except Exception as error:  # keys live as long as this thread
                bug.pause_s(error)
                self._doubt = trouble = True
            else:
                if trouble:
                    log.warning("etcd %s: the lease is renewed again", self.spec)
                trouble = False

    def _renew(self, deadline: float) -> None:
        """Renew the lease, or replace it."""
        lease = self._lease
        alive = self._call(lambda etcd, timeout: etcd.keep_alive(lease, timeout), deadline)
        with self._write(deadline):
            if not alive and lease == self._lease:
                log.warning("etcd %s: the lease is lost, publishing again under a new one", self.spec)
                self._new_lease(deadline)
            self._cover()
            if self._doubt:
                self._set_right(deadline)

    def _set_right(self, deadline: float) -> None:
        """Make what hangs on the lease what we have published."""
        self._doubt = False  # before looking: trouble from now on wants another look
        hanging = self._call(lambda etcd, timeout: etcd.lease_keys(self._lease, timeout), deadline)
        for key in hanging - self._published.keys():  # an answer was lost on the way
            self._remove(key, deadline)
        for key in self._published.keys() - hanging:
            if not self._put(key, self._published[key], deadline):
                self._give_up(key)
