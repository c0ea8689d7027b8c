"""From a path or a URL to the database of a policy store: connections, and how they are closed."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic
from urllib.parse import quote

from ...errors import PolicyError
from .schema import ArgumentError, Connection, Engine, SQLAlchemyError, create_tables, has_store, read_state, sql

PATIENCE = 10  # seconds to wait for a connection, or for another change to end
_IDLE = 1.0  # seconds after which a server is asked whether it still knows a connection
_SQLITE = b"SQLite format 3\0"  # how every database file of SQLite begins


def open_engine(where: str, create: bool) -> Engine:
    """Return an engine for a path of an SQLite file or a URL; with `create`, what does not exist is created.

    A transaction with the execution option `write` keeps other writers out from its beginning.

    Raises:
        PolicyError: it is no URL, its driver is missing, the database cannot be reached, or it holds no store.
    """
    try:
        url = sql.make_url(where) if "://" in where else sql.URL.create("sqlite", database=where)
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        engine = _open_sqlite(url, create) if url.get_backend_name() == "sqlite" else _open_server(url)
    except (ArgumentError, ValueError):  # their text may hold the password
        raise PolicyError(
            "the store's URL is not understood: expected a file such as tenants.db, or a URL such as "
            "postgresql://user:password@host/database"
        ) from None
    except ImportError as error:
        raise PolicyError(
            f"the store's database needs a driver, and {error.name} is not installed (for PostgreSQL: pip install "
            "'psycopg[binary]')"
        ) from None
    try:
        if create:
            create_tables(engine)
        with engine.connect() as connection:
            there = has_store(connection)
            if there:
                read_state(connection)
    except SQLAlchemyError as error:
        raise PolicyError(f"cannot open the store {describe(engine)}: {reason(error)}") from None
    if not there:
        raise PolicyError(f"{describe(engine)} holds no store: make one with `unlearn-peft tenant add NAME`")
    return engine


def close(engine: Engine) -> None:
    """Close all connections.

    SQLite's -wal and -shm files stay beside its file, all changes moved from them into it: whoever may only read the
    file can open it only if they are there. SQLite deletes them with the last connection, unless that one only reads.
    The first is emptied if nobody needs it: as long as an import once made it, each who opens the store would read it.
    """
    path = Path(str(engine.url.database))
    if engine.dialect.name == "sqlite" and os.access(path, os.W_OK):
        with suppress(sqlite3.Error), closing(sqlite3.connect(_uri(path, "ro"), uri=True)) as last:
            last.execute("SELECT 1 FROM sqlite_master").fetchone()  # only now is the file open
            with closing(sqlite3.connect(_uri(path, "rw"), uri=True, timeout=0)) as writer:
                writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
                writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            engine.dispose()
            return
    engine.dispose()


def describe(engine: Engine) -> str:
    """Return where a database is, without user and password."""
    url = engine.url
    if engine.dialect.name == "sqlite":
        return str(url.database)
    return str(sql.URL.create(url.drivername, host=url.host, port=url.port, database=url.database))


def reason(error: Exception) -> str:
    """Return the first line of a database's error message."""
    lines = str(getattr(error, "orig", None) or error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _open_sqlite(url: sql.URL, create: bool) -> Engine:
    if not url.database or url.database == ":memory:":
        raise PolicyError("a store in memory would be lost: expected a file such as tenants.db")
    path = Path(url.database).absolute()
    try:
        if create and not path.exists():
            path.touch(0o600)  # SQLite gives its -wal and -shm the same permissions
        elif not path.is_file():
            raise PolicyError(f"no store at {path}: make one with `unlearn-peft tenant add NAME`")
        with path.open("rb") as stream:
            beginning = stream.read(len(_SQLITE))
        if beginning != _SQLITE and (beginning or not create):  # SQLite would take it for a database, and write to it
            raise PolicyError(
                f"{path} is no store but another file: choose another path, or make one with `unlearn-peft tenant add`"
            )
    except OSError as error:
        raise PolicyError(f"cannot make the store {path}: {error.strerror}") from None

    def connect() -> sqlite3.Connection:
        writable = os.access(path, os.W_OK)
        connection = sqlite3.connect(
            _uri(path, "rw" if writable else "ro"), uri=True, timeout=PATIENCE, isolation_level=None,
            check_same_thread=False,
        )  # fmt: skip
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON") if writable else ():
            connection.execute(f"PRAGMA {setting}")
        return connection

    engine = sql.create_engine(
        url.set(database=str(path)), creator=connect, poolclass=sql.QueuePool, hide_parameters=True
    )

    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    sql.event.listen(engine, "begin", begin)
    return engine


def _uri(path: Path, mode: str) -> str:
    """Neither "rw" nor "ro" lets a file that was deleted come back empty."""
    return f"file:{quote(str(path))}?mode={mode}"


def _open_server(url: sql.URL) -> Engine:
    timeouts = {}
    if url.drivername == "postgresql+psycopg":  # notice a host that vanished
        timeouts = {"connect_timeout": PATIENCE, "tcp_user_timeout": PATIENCE * 1000}
    arguments = {name: value for name, value in timeouts.items() if name not in url.query}
    engine = sql.create_engine(url, connect_args=arguments, hide_parameters=True)

    def note_use(connection: object, record: sql.pool.ConnectionPoolEntry) -> None:
        record.info["used"] = monotonic()

    def check(
        connection: sql.engine.interfaces.DBAPIConnection, record: sql.pool.ConnectionPoolEntry, proxy: object
    ) -> None:
        if monotonic() - record.info.get("used", monotonic()) < _IDLE:  # each look-up would take twice as long
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error:
            raise sql.exc.DisconnectionError from None  # the pool opens another

    sql.event.listen(engine, "checkin", note_use)
    sql.event.listen(engine, "checkout", check)
    return engine
