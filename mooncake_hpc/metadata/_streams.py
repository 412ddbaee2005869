"""Changes that etcd tells of by itself: streams that at rest cost no request."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

from mooncake_hpc.metadata import _grpc
from mooncake_hpc.metadata._failures import Failure, Kind, failure_of, text_of

DELETE = 1  # mvccpb.Event.EventType


class Changing:
    """A stream of changes: iterate over lists of (key, value, or None where it was deleted).

    Ends when the server gives the watch up (its revision was compacted away); raises Failure, at the latest when the
    time is up.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[list[tuple[str, str | None]]]:
        grpc = _grpc.module()
        try:
            for reply in self._call:
                if reply.canceled:
                    return
                if reply.events:
                    yield [
                        (text_of(event.kv.key), None if event.type == DELETE else text_of(event.kv.value))
                        for event in reply.events
                    ]
        except grpc.RpcError as error:
            raise failure_of(error) from error
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        """End the stream; the iteration raises Failure."""
        self._call.cancel()


class KeyStream:
    """The changes of single keys: iterate over (key, the lease that it hangs on now; 0: none, or it was removed).

    Ends by a Failure only: when the connection is gone, when etcd refuses, or by `cancel`.
    """

    def __init__(self, rpc: Any, watch: Callable[[Iterable[Any]], Any]) -> None:
        """`rpc` are etcd3's messages; `watch` makes a call of requests."""
        self._rpc = rpc
        self._requests: SimpleQueue[Any] = SimpleQueue()  # None ends them
        self._lock = threading.Lock()  # guards the next two
        self._ids: dict[str, int | None] = {}  # of the watch of each key; None until etcd has told it
        self._asked: deque[str] = deque()  # keys whose watches etcd has not told yet: it does so in this order
        self._call = watch(iter(self._requests.get, None))

    def cover(self, keys: Collection[str]) -> None:
        """Be told of these keys from now on, and of no others."""
        with self._lock:
            for key in [key for key in self._ids if key not in keys]:
                self._forget(self._ids.pop(key))
            for key in keys:
                if key not in self._ids:
                    self._ids[key] = None
                    self._asked.append(key)
                    create = self._rpc.WatchCreateRequest(key=key.encode())
                    self._requests.put(self._rpc.WatchRequest(create_request=create))

    def _forget(self, watch: int | None) -> None:
        if watch is not None:
            cancel = self._rpc.WatchCancelRequest(watch_id=watch)
            self._requests.put(self._rpc.WatchRequest(cancel_request=cancel))

    def _created(self, watch: int) -> None:
        with self._lock:
            key = self._asked.popleft()
            if self._ids.get(key, watch) is None:
                self._ids[key] = watch
            else:  # nobody wants it any more
                self._forget(watch)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        grpc = _grpc.module()
        try:
            for reply in self._call:
                if reply.canceled and (reply.created or reply.watch_id in self._ids.values()):
                    raise Failure(Kind.REFUSED, "etcd has ended the watch")
                if reply.created:
                    self._created(reply.watch_id)
                for event in reply.events:
                    yield text_of(event.kv.key), 0 if event.type == DELETE else event.kv.lease
        except grpc.RpcError as error:
            raise failure_of(error) from error
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the stream; the iteration raises Failure."""
        self._call.cancel()
        self._requests.put(None)
