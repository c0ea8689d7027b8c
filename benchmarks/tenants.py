"""What a policy store costs with 1,000, 100,000 and 1,000,000 tenants: a look-up, a change, the first request after it.

    python benchmarks/tenants.py --page out/tenants.json     # SQLite; --url postgresql://... for a database server
    python benchmarks/tenants.py --tenants 1000 100000

A server and whoever changes the policy are two stores on one database. Each figure is the median of 50 tries and,
behind it, the 95th of 100, in ms:

    known     a look-up of a key in the cache, with the question whether anything has changed
    new       a look-up of one that must be read
    unknown   a look-up of a key that nobody has
    change    a tenant's set is changed: one transaction, on the disk
    cpu       what of the change is computing
    fsync     4 kB written to the disk of temporary files, where SQLite's file is too
    after     that tenant's next request at the server
    others    one of another tenant then

Of a look-up of a new tenant and of a change also what does not depend on the machine's load: statements that the
database gets and, of a change in SQLite, pages of 4 kB that it writes to its log, each of which goes to the disk once.

MiB is what the process of both takes at its end. Tables are filled by rows, not through edits, which would take hours.
Not to be run against a store that is in use: its tables must be empty.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import sqlalchemy as sql  # noqa: E402

from unlearn_peft.serve.policy import schema, tables  # noqa: E402
from unlearn_peft.serve.policy.policy import key_digest  # noqa: E402
from unlearn_peft.serve.policy.store import PolicyStore  # noqa: E402

_TRIES = 50
_ADAPTERS = 100
_CHUNK = 10_000


def main() -> None:
    """Measure each size in a process of its own, print a table and, with --page, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tenants", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--url", help="an empty database of a server, for one size; default: SQLite in a new folder")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.url, arguments.tenants[0])))
        return
    rows = []
    for count in arguments.tenants:
        with tempfile.TemporaryDirectory() as folder:
            where = arguments.url or f"{folder}/tenants.db"
            command = [sys.executable, __file__, "--one", "--tenants", str(count), "--url", where]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        if count == arguments.tenants[0]:
            print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    if arguments.page:
        arguments.page.write_text(json.dumps(rows, indent=2) + "\n")


def measure(where: str, count: int) -> dict[str, object]:
    """Fill a store and return the row of the table; times in ms, median / 95th of 100."""
    filler = PolicyStore(where, create=True)
    fill(filler, count)
    filler.close()  # so that no change has to write what filling left to be written
    writer, server, dice = PolicyStore(where), PolicyStore(where), random.Random(0)
    server.current()
    order = dice.sample(range(count), 3 * _TRIES)
    new, changed, other = (iter(order[n::3]) for n in range(3))

    def ask(number: int) -> None:
        policy = server.current()
        if (tenant := policy.tenant_of(f"uf-{number}")) != f"t{number}" or not policy.forget_of(tenant):
            raise SystemExit(f"tenant t{number} was not found")

    ask(order[0])
    figures = {
        "known": timed(lambda: ask(order[0])),
        "new": timed(lambda: ask(next(new))),
        "unknown": timed(lambda: server.current().tenant_of("uf-nobody")),
    }
    pairs = [(next(changed), next(other)) for _ in range(_TRIES)]
    seconds: dict[str, list[float]] = {"change": [], "cpu": [], "fsync": [], "after": [], "others": []}
    for number, another in pairs:
        ask(number), ask(another)
        for name, act in (
            ("change", lambda n=number: writer.forget(f"t{n}", "a7", 0.5, who="benchmark")),
            ("fsync", sync),
            ("after", lambda n=number: ask(n)),
            ("others", lambda n=another: ask(n)),
        ):
            began, began_cpu = time.perf_counter(), time.process_time()
            act()
            seconds[name].append(time.perf_counter() - began)
            if name == "change":
                seconds["cpu"].append(time.process_time() - began_cpu)
    figures |= {name: spread(values) for name, values in seconds.items()}
    figures |= counts(writer, server, where, iter(order[-20:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    server.close(), writer.close()
    return {"tenants": f"{count:,}", **figures, "MiB": peak}


def counts(writer: PolicyStore, server: PolicyStore, where: str, numbers: Iterator[int]) -> dict[str, object]:
    """Return the statements of a look-up and of a change, and the pages that a change writes to SQLite's log."""
    seen: list[str] = []

    def note(connection: object, cursor: object, text: str, *_: object) -> None:
        seen.append(text)

    for store in (writer, server):
        sql.event.listen(store._engine, "after_cursor_execute", note)
    server.current().tenant_of(f"uf-{next(numbers)}")
    looked_up, changes = len(seen), 10
    if writer._engine.dialect.name == "sqlite":
        with writer._engine.connect() as connection:
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.exec_driver_sql("BEGIN")
    seen.clear()
    for _ in range(changes):
        writer.forget(f"t{next(numbers)}", "a9", 0.5, who="benchmark")
    found: dict[str, object] = {"statements new, change": f"{looked_up}, {len(seen) / changes:.0f}"}
    if (log := Path(f"{where}-wal")).is_file():
        found["pages"] = f"{log.stat().st_size / 4120 / changes:.1f}"
    return found


def sync() -> None:
    """Write 4 kB to the disk of temporary files."""
    with tempfile.TemporaryFile(buffering=0) as stream:
        stream.write(bytes(4096))
        os.fsync(stream.fileno())


def fill(store: PolicyStore, count: int) -> None:
    """Add tenants t0, t1, ... with one key (uf-0, ...) and one of 100 adapters each."""
    with store._writes.begin() as connection:
        state = schema.begin_change(connection)
        names = [{"name": f"a{n}", "path": f"/srv/a{n}", "sha256": "0" * 64} for n in range(_ADAPTERS)]
        connection.execute(sql.insert(schema.ADAPTERS), names)
        for table, rows in (
            (schema.TENANTS, ({"name": f"t{n}"} for n in range(count))),
            (schema.FORGETS, ({"tenant": f"t{n}", "adapter": f"a{n % 100}", "strength": 1.0} for n in range(count))),
            (schema.KEYS, ({"digest": key_digest(f"uf-{n}"), "tenant": f"t{n}"} for n in range(count))),
        ):
            for chunk in chunks(rows):
                connection.execute(sql.insert(table), chunk)
        history = {"at": "", "who": "benchmark", "action": "import", "what": {}, "why": ""}
        tables.note_change(connection, state, None, None, history)
    if store._writes.dialect.name == "postgresql":  # else it does so by itself, while we measure
        with store._writes.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
            connection.exec_driver_sql("CHECKPOINT")


def chunks(rows: Iterator[dict[str, object]]) -> Iterator[list[dict[str, object]]]:
    """Yield the rows in lists."""
    while chunk := list(itertools.islice(rows, _CHUNK)):
        yield chunk


def timed(act: Callable[[], object]) -> str:
    """Return how long an act takes, over all tries."""
    seconds = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return spread(seconds)


def spread(seconds: list[float]) -> str:
    """Return median and 95th of 100, in ms."""
    return f"{1000 * statistics.median(seconds):.2f} / {1000 * statistics.quantiles(seconds, n=20)[-1]:.2f}"


if __name__ == "__main__":
    main()
