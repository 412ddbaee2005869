"""What every metadata store must do. Subclass `MetadataStoreConformance` and give it `open_another`."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from mooncake_hpc.core.errors import MetadataError, NameInUse
from mooncake_hpc.metadata import MetadataStore

Open = Callable[[], MetadataStore]


class MetadataStoreConformance:
    """Each store that `opener` returns stands for a process of its own; all of a test share one space."""

    @pytest.fixture
    def open_another(self) -> Open:
        """Override: a function that opens one more store over the same, empty space."""
        raise NotImplementedError

    @pytest.fixture
    def opener(self, open_another: Open) -> Iterator[Open]:
        """`open_another`, with everything closed in the end."""
        with ExitStack() as stack:
            yield lambda: stack.enter_context(open_another())

    def test_published_is_seen_by_others(self, opener: Open) -> None:
        ours, other = opener(), opener()
        assert other.get("mooncake/ram/a") is None
        ours.publish("mooncake/ram/a", "1")
        assert ours.get("mooncake/ram/a") == other.get("mooncake/ram/a") == "1"
        ours.publish("mooncake/ram/a", "2")
        assert other.get("mooncake/ram/a") == "2"

    def test_values_come_back_as_they_were(self, opener: Open) -> None:
        store = opener()
        for value in ("", "{}", "Zürich ✓ \0 \n", "x" * 1_000_000):
            store.publish("k", value)
            assert store.get("k") == value

    def test_list_by_prefix(self, opener: Open) -> None:
        store = opener()
        assert store.list("mooncake/") == {}
        published = {f"mooncake/ram/host-{i}": str(i) for i in range(200)}
        for key, value in published.items():
            store.publish(key, value)
        store.publish("mooncake/ran", "not under ram/")
        assert store.list("mooncake/ram/") == published
        assert store.list("mooncake/ram/host-19") == {f"mooncake/ram/host-{i}": str(i) for i in (19, *range(190, 200))}
        assert store.list("") == {**published, "mooncake/ran": "not under ram/"}

    def test_withdraw(self, opener: Open) -> None:
        ours, other = opener(), opener()
        ours.publish("k", "v")
        ours.withdraw("k")
        assert other.get("k") is None
        ours.withdraw("k")
        ours.withdraw("never published")
        ours.publish("k", "again")
        assert other.get("k") == "again"

    def test_a_new_publisher_takes_the_key_over(self, opener: Open) -> None:
        old, new = opener(), opener()
        old.publish("k", "old")
        new.publish("k", "new")
        assert old.get("k") == "new"

    @pytest.mark.parametrize("value", ["new", "old"])  # even an equal value is not ours
    @pytest.mark.parametrize("leave", [lambda store: store.withdraw("k"), lambda store: store.close()])
    def test_successors_key_stays(self, opener: Open, leave: Callable[[MetadataStore], None], value: str) -> None:
        old, new = opener(), opener()
        old.publish("k", "old")
        new.publish("k", value)
        leave(old)
        assert new.get("k") == value

    def test_update_of_a_key_taken_over_is_refused(self, opener: Open) -> None:
        old, new = opener(), opener()
        old.publish("k", "old")
        new.publish("k", "new")
        with pytest.raises(NameInUse, match="k at "):
            old.publish("k", "old, changed")
        with pytest.raises(NameInUse, match="k at "):
            old.publish("k", "old, changed again")
        assert new.get("k") == "new"
        assert old.lost == {"k"}
        old.withdraw("k")
        old.publish("k", "on purpose")  # a new key of ours
        assert new.get("k") == "on purpose"
        assert old.lost == frozenset()

    def test_update_after_the_other_has_left(self, opener: Open) -> None:
        ours, other = opener(), opener()
        ours.publish("k", "1")
        other.publish("k", "2")
        other.close()
        ours.publish("k", "3")
        assert ours.get("k") == "3"
        assert ours.lost == frozenset()

    def test_takeover_is_noticed(self, opener: Open) -> None:
        """Without a call of ours; what was not taken goes on as ours, and what was stays the other's."""
        old, new = opener(), opener()
        for key in ("k", "kept", "gone"):
            old.publish(key, "old")
        old.withdraw("gone")
        for key in ("k", "gone", "other"):
            new.publish(key, "new")
        deadline = time.monotonic() + 30
        while old.lost != {"k"}:
            assert time.monotonic() < deadline, old.lost
            time.sleep(0.01)
        old.publish("kept", "still ours")
        assert new.list("") == {"gone": "new", "k": "new", "kept": "still ours", "other": "new"}
        old.close()
        assert new.list("") == {"gone": "new", "k": "new", "other": "new"}

    def test_close_withdraws_everything_ours(self, opener: Open) -> None:
        ours, other = opener(), opener()
        for i in range(20):
            ours.publish(f"ours/{i}", "v")
        other.publish("other", "v")
        ours.close()
        assert other.list("") == {"other": "v"}
        ours.close()

    def test_closed_store_says_so(self, opener: Open) -> None:
        store = opener()
        store.close()
        for call in (
            lambda: store.get("k"),
            lambda: store.list(""),
            lambda: store.publish("k", "v"),
            lambda: store.withdraw("k"),
        ):
            with pytest.raises(MetadataError, match="closed"):
                call()

    def test_create_where_absent(self, opener: Open) -> None:
        ours, other = opener(), opener()
        assert ours.create("k", "1")
        assert not other.create("k", "2")
        assert not ours.create("k", "3")
        assert other.get("k") == "1"
        ours.publish("k", "4")  # it is held as a published one
        assert other.get("k") == "4"
        ours.withdraw("k")
        assert other.create("k", "5")
        ours.close()
        assert other.get("k") == "5"

    def test_create_by_many_at_once_has_one_winner(self, opener: Open) -> None:
        stores = [opener() for _ in range(6)]
        won: list[str] = []

        def work(name: str, store: MetadataStore) -> None:
            if store.create("k", name):
                won.append(name)

        threads = [threading.Thread(target=work, args=(str(i), store)) for i, store in enumerate(stores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [stores[0].get("k")] == won

    def test_watch(self, opener: Open) -> None:
        ours, other = opener(), opener()
        ours.publish("w/a", "1")
        told: queue.Queue[dict[str, str | None]] = queue.Queue()
        with other.watch("w/", lambda changes: told.put(dict(changes))):
            assert told.get(timeout=30) == {"w/a": "1"}
            ours.publish("w/b", "2")
            assert told.get(timeout=30) == {"w/b": "2"}
            ours.publish("x", "not under w/")
            ours.publish("w/a", "3")
            assert told.get(timeout=30) == {"w/a": "3"}
            ours.withdraw("w/b")
            assert told.get(timeout=30) == {"w/b": None}
            ours.close()
            assert told.get(timeout=30) == {"w/a": None}
        assert told.empty()

    def test_watch_of_nothing_says_so(self, opener: Open) -> None:
        told: queue.Queue[dict[str, str | None]] = queue.Queue()
        with opener().watch("nothing/", lambda changes: told.put(dict(changes))):
            assert told.get(timeout=30) == {}

    def test_many_threads(self, opener: Open) -> None:
        store = opener()
        errors: list[BaseException] = []

        def work(thread: int) -> None:
            try:
                for i in range(50):
                    store.publish(f"t/{thread}/{i}", str(i))
                    assert store.get(f"t/{thread}/{i}") == str(i)
                    if i % 2:
                        store.withdraw(f"t/{thread}/{i}")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert len(store.list("t/")) == 4 * 25
