"""The file of the store: kills, other processes, other versions, damage, full disks."""

import asyncio
import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from knative.eventing.store import EventStore, NewEvent, StoreError

NEW_ROOM = ("unshare", "--user", "--map-root-user", "--mount")  # where a test may mount a disk of its own
DISK_BYTES = 40 << 20

# Accepts, delivers and replies at once from several tasks, and prints what has been acknowledged.
WORKER = """
import asyncio, sys, time
from pathlib import Path
from knative.eventing.store import EventStore, NewEvent

def event(key, target):
    return NewEvent(broker="b", key=key, attributes={"id": key}, data=key.encode() * 20, targets=[target], ttl=9)

async def produce(store, name):
    for number in range(1_000_000):
        batch = [event(f"{name}-{number}-{part}", "work") for part in range(1 + number % 3)]
        await store.accept(batch)
        print("".join(f"accepted {each.key}\\n" for each in batch), end="", flush=True)

async def consume(store):
    while True:
        for delivery in await store.take("work", 3, time.time()):
            if delivery.id % 4 == 0 and delivery.attempt == 1:
                await store.postpone(delivery, time.time(), "busy")
                continue
            assert await store.settle(delivery, replies=[event("reply " + delivery.event.key, "out")])
            print(f"settled {delivery.event.key}", flush=True)

async def main(path, name):
    store = await EventStore.open(Path(path), min_free_bytes=0)
    await asyncio.gather(*(produce(store, f"{name}-{task}") for task in range(4)), consume(store), consume(store))

asyncio.run(main(*sys.argv[1:]))
"""

# On a small disk: others fill it, deliveries go on, intake waits for room.
FULL_DISK = """
import asyncio, json, os, sys
from pathlib import Path
from knative.eventing.store import EventStore, NewEvent, StoreFull

def events(name, count, target):
    return [
        NewEvent(broker="b", key=f"{name}{number}", attributes={}, data=bytes(900), targets=[target], ttl=9)
        for number in range(count)
    ]

async def refused(call):
    try:
        await call
    except StoreFull as error:
        return error.status
    return 0

async def main(folder):
    store = await EventStore.open(folder / "broker.db", min_free_bytes=0)
    await store.accept(events("early", 3000, "work"))
    with (folder / "of others").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    seen = {"refused": await refused(store.accept(events("too large", 5000, "work")))}
    seen["kept"] = store.depth("work")
    seen["reserve"] = [(folder / "broker.db-reserve").exists()]
    while due := await store.take("work", 50, 1e12):
        replies = [events(f"reply {delivery.event.key} ", 1, "out") for delivery in due]
        await asyncio.gather(*(store.settle(*pair[:1], replies=pair[1]) for pair in zip(due, replies)))
    seen["replies"] = store.depth("out")
    seen["reserve"].append((folder / "broker.db-reserve").exists())
    (folder / "of others").unlink()
    seen["accepted"] = len(await store.accept(events("late", 5, "work")))
    seen["reserve"].append((folder / "broker.db-reserve").exists())
    await store.close()
    print(json.dumps(seen))

asyncio.run(main(Path(sys.argv[1])))
"""

# Fills a disk with events until intake stops, delivers them all, and tries again as producers do.
FILLED_BY_ITSELF = """
import asyncio, json, sys
from pathlib import Path
from knative.eventing.store import EventStore, NewEvent, StoreFull

def event(number):
    return NewEvent(broker="b", key=str(number), attributes={}, data=bytes(100_000), targets=["work"], ttl=9)

async def main(folder):
    store = await EventStore.open(folder / "broker.db", min_free_bytes=16 << 20)
    answers = []
    try:
        for number in range(1000):
            await store.accept([event(number)])
    except StoreFull as error:
        answers.append(error.status)
    while due := await store.take("work", 50, 1e12):
        await asyncio.gather(*map(store.settle, due))
    for attempt in range(50):
        await asyncio.sleep(0.3)
        try:
            await store.accept([event("late")])
        except StoreFull:
            continue
        answers.append(202)
        break
    await store.close()
    print(json.dumps(answers))

asyncio.run(main(Path(sys.argv[1])))
"""


def event(key: str, data: bytes = b"{}") -> NewEvent:
    return NewEvent(broker="b", key=key, attributes={}, data=data, targets=["work"], ttl=9)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith(("-lock", "-reserve"))}


async def refusal(path: Path) -> str:
    """Why the store is not opened; no file is changed by it."""
    before = contents(path.parent)
    with pytest.raises(StoreError) as refused:
        await EventStore.open(path)
    assert contents(path.parent) == before
    return str(refused.value)


async def filled(path: Path, count: int = 200) -> Path:
    store = await EventStore.open(path, synchronous="NORMAL")
    await store.accept([event(str(number), data=bytes(1500)) for number in range(count)])
    await store.close()
    return path


def test_nothing_acknowledged_is_lost_or_doubled_by_kills(tmp_path: Path) -> None:
    path, said = tmp_path / "broker.db", Counter[str]()
    chance = random.Random(5)
    for kill in range(5):
        lines = killed_after(chance.randint(50, 1500), path, f"run{kill}")
        said.update(lines)
        with closing(sqlite3.connect(path)) as db:
            found = Counter(db.execute("SELECT target, key FROM event JOIN delivery ON event = id"))
            (events,) = db.execute("SELECT count(*) FROM event").fetchone()
        check_whole(said, found)
        assert events == sum(found.values())
    assert sum(line.startswith("settled") for line in said) > 50


def killed_after(line_count: int, path: Path, name: str) -> list[str]:
    with subprocess.Popen([sys.executable, "-c", WORKER, path, name], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout
        try:
            lines = [line for line, _ in zip(worker.stdout, range(line_count), strict=False)]
        finally:
            worker.kill()
        assert len(lines) == line_count
        rest = worker.stdout.read()  # said before the kill reached it
    return [line.rstrip("\n") for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith("\n")]


def check_whole(said: Counter[str], found: Counter[tuple[str, str]]) -> None:
    assert set(found.values()) <= {1}
    for line in said:
        what, key = line.split(" ", 1)
        waiting, replied = found["work", key], found["out", f"reply {key}"]
        assert waiting + replied == 1, f"{line}: {waiting} waiting, {replied} replies"
        if what == "settled":
            assert replied


async def test_only_one_process_has_it(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    store = await EventStore.open(path)
    with pytest.raises(StoreError, match="in use: only one process"):
        await EventStore.open(path)
    other = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", WORKER, path, "x"], capture_output=True, text=True
    )
    assert "in use: only one process" in other.stderr
    with pytest.raises(sqlite3.OperationalError, match="locked"), closing(sqlite3.connect(path, timeout=0)) as db:
        db.execute("SELECT count(*) FROM event")
    await store.accept([event("a")])
    await store.close()
    await (await EventStore.open(path)).close()


@pytest.mark.parametrize("in_log", [True, False], ids=["in the log", "in the file"])
async def test_a_newer_version_is_refused_and_unchanged(tmp_path: Path, in_log: bool) -> None:
    path = killed_upgrade(await filled(tmp_path / "written.db"), in_log)
    reason = await refusal(path)
    assert str(path) in reason
    assert "has version 2, this program reads and writes version 1" in reason


def killed_upgrade(written: Path, in_log: bool) -> Path:
    """The files that a newer program leaves when it is killed before or after folding its log into the file."""
    path = written.parent / "killed" / "broker.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(written)) as db:
        db.execute("PRAGMA user_version = 2")
        if not in_log:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{written}{suffix}", f"{path}{suffix}")
    assert (Path(f"{path}-wal").stat().st_size > 0) == in_log
    return path


async def test_what_is_no_store_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("dear diary" * 1000)
    assert "it is no SQLite database or is damaged" in await refusal(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE history (url TEXT)")
    assert "database of another program" in await refusal(path)
    with pytest.raises(StoreError, match="is no file"):
        await EventStore.open(tmp_path)
    with pytest.raises(StoreError, match="No such file or directory"):
        await EventStore.open(tmp_path / "missing" / "broker.db")


async def test_a_truncated_file_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = await filled(tmp_path / "broker.db")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert str(path) in await refusal(path)


async def test_damage_found_later_stops_the_store(tmp_path: Path) -> None:
    path = await filled(tmp_path / "broker.db")
    with path.open("r+b") as file:
        for offset in event_pages(path.read_bytes())[:-1]:  # opening reads the last
            file.seek(offset)
            file.write(b"\xff" * 100)
    store = await EventStore.open(path)
    for _ in range(2):
        with pytest.raises(StoreError, match="cannot be trusted any more"):
            await store.take("work", 9, 1e12)
        with pytest.raises(StoreError, match="cannot be trusted any more"):
            await store.accept([event("a")])
    await store.close()


def event_pages(file: bytes) -> list[int]:
    """Offsets of leaf pages of tables with a row id, without that of the schema (SQLite file format, section 1.6)."""
    return [offset for offset in range(4096, len(file), 4096) if file[offset] == 0x0D]


async def test_a_store_that_was_killed_while_being_created_is_created_anew(tmp_path: Path) -> None:
    (tmp_path / "broker.db-new").write_bytes(b"SQLite format 3\0 and no more")
    await filled(tmp_path / "broker.db", 3)
    assert not (tmp_path / "broker.db-new").exists()


needs_small_disk = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NEW_ROOM, "true"], capture_output=True).returncode != 0,
    reason="no user namespaces here: no small disk can be mounted",
)


def on_a_small_disk(program: str, folder: Path) -> Any:
    """What it prints, as JSON; it gets the folder where the disk is mounted."""
    script = f'mount -t tmpfs -o size={DISK_BYTES} tmpfs "$1" && exec "$2" -c "$3" "$1"'
    ran = subprocess.run(
        [*NEW_ROOM, "sh", "-c", script, "sh", folder, sys.executable, program], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@needs_small_disk
def test_on_a_full_disk_intake_stops_and_every_delivery_is_settled(tmp_path: Path) -> None:
    assert on_a_small_disk(FULL_DISK, tmp_path) == {
        "refused": 507, "kept": 3000, "reserve": [True, False, True], "replies": 3000, "accepted": 5,
    }  # fmt: skip


@needs_small_disk
def test_a_disk_that_only_the_store_has_filled_has_room_again_once_all_is_delivered(tmp_path: Path) -> None:
    """What it keeps for the next events is less than it may keep elsewhere, and more than this disk has."""
    assert on_a_small_disk(FILLED_BY_ITSELF, tmp_path) == [507, 202]
