"""The tables of a policy store: all of its SQL. A path or URL becomes an engine; `read` and `write` give and take the
content as the plain mapping that a policy's YAML has, too.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...errors import PolicyError

try:
    import sqlalchemy as sql
    from sqlalchemy import Column, Connection, Engine, ForeignKey, Integer, String, Table, Text
    from sqlalchemy.exc import ArgumentError
    from sqlalchemy.exc import SQLAlchemyError as SQLAlchemyError
except ModuleNotFoundError:
    raise PolicyError(
        "a policy store needs SQLAlchemy, which is not installed: pip install 'unlearn-peft[serve]'"
    ) from None


SCHEMA_VERSION = 2  # 1 has no table of trusted keys: it is read as it is, and upgraded when the first key is trusted
PATIENCE = 10  # seconds to wait for a connection, or for another change to end
_TRIES = 5
_SQLITE = b"SQLite format 3\0"  # how every database file of SQLite begins

_metadata = sql.MetaData()
STATE = Table(  # one row; a transaction that changes anything locks it to its end
    "unlearn_state", _metadata,
    Column("id", Integer, sql.CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("token", String(16), nullable=False),  # random: tells a backup that was put back and changed otherwise
)  # fmt: skip
ADAPTERS = Table(
    "unlearn_adapters", _metadata,
    Column("name", String(64), primary_key=True),
    Column("path", Text, nullable=False),
    Column("sha256", String(64)),
)  # fmt: skip
TENANTS = Table("unlearn_tenants", _metadata, Column("name", String(64), primary_key=True))
FORGETS = Table(
    "unlearn_forgets", _metadata,
    Column("tenant", ForeignKey(TENANTS.c.name), primary_key=True),
    Column("adapter", ForeignKey(ADAPTERS.c.name), primary_key=True),
    Column("strength", sql.Double, sql.CheckConstraint("strength > 0"), nullable=False),
)  # fmt: skip
KEYS = Table(
    "unlearn_keys", _metadata,
    Column("digest", String(64), primary_key=True),
    Column("tenant", ForeignKey(TENANTS.c.name), nullable=False),
)  # fmt: skip
TRUSTED = Table(
    "unlearn_trusted_keys", _metadata,
    Column("tenant", ForeignKey(TENANTS.c.name), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("pem", Text, nullable=False),
)  # fmt: skip
HISTORY = Table(  # one row a revision, never changed
    "unlearn_history", _metadata,
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),  # UTC, ISO 8601
    Column("who", Text, nullable=False),
    Column("action", String(16), nullable=False),
    Column("what", sql.JSON, nullable=False),
    Column("why", Text, nullable=False),
)  # fmt: skip
_KEEP_HISTORY = {  # the database itself refuses to change what is there
    "sqlite": [
        f"CREATE TRIGGER unlearn_history_{verb} BEFORE {verb} ON unlearn_history "
        "BEGIN SELECT RAISE(ABORT, 'the history is only added to'); END"
        for verb in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION unlearn_history_stays() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the history is only added to'; END $$",
        "CREATE TRIGGER unlearn_history_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON unlearn_history "
        "FOR EACH STATEMENT EXECUTE FUNCTION unlearn_history_stays()",
    ],
}


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
            _create(engine)
        with engine.connect() as connection:
            version = connection.scalar(sql.select(STATE.c.schema_version)) if _has_store(connection) else None
    except SQLAlchemyError as error:
        raise PolicyError(f"cannot open the store {describe(engine)}: {reason(error)}") from None
    if version is None:
        raise PolicyError(f"{describe(engine)} holds no store: make one with `unlearn-peft tenant add NAME`")
    _check_version(engine, version)
    return engine


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


def state_of(connection: Connection) -> tuple[int, str]:
    """Return the revision and its random token."""
    row = connection.execute(sql.select(STATE.c.revision, STATE.c.token)).one()
    return row.revision, row.token


def begin_change(connection: Connection) -> int:
    """Increase the revision and return it; other writers wait here until the transaction ends."""
    connection.execute(sql.update(STATE).values(revision=STATE.c.revision + 1, token=secrets.token_hex(8)))
    return state_of(connection)[0]


def note_change(connection: Connection, row: Mapping[str, Any]) -> None:
    """Add a row to the history."""
    connection.execute(sql.insert(HISTORY).values(row))


def read_history(connection: Connection, limit: int | None) -> list[dict[str, Any]]:
    """Return the rows of the history, the newest first."""
    rows = connection.execute(sql.select(HISTORY).order_by(HISTORY.c.revision.desc()).limit(limit))
    return [dict(row) for row in rows.mappings()]


def read(connection: Connection) -> dict[str, Any]:
    """Return the content of the tables.

    Raises:
        PolicyError: a row refers to no tenant, which the database should have refused; or the tables are of a newer
            version of this package.
    """
    version = connection.execute(sql.select(STATE.c.schema_version)).scalar_one()
    _check_version(connection.engine, version)
    adapters = {
        row.name: {"path": row.path, "sha256": row.sha256}
        for row in connection.execute(sql.select(ADAPTERS).order_by(ADAPTERS.c.name))
    }
    tenants: dict[str, Any] = {
        row.name: {"forget": {}, "keys": []} for row in connection.execute(sql.select(TENANTS).order_by(TENANTS.c.name))
    }
    try:
        for row in connection.execute(sql.select(FORGETS).order_by(FORGETS.c.adapter)):
            tenants[row.tenant]["forget"][row.adapter] = row.strength
        for row in connection.execute(sql.select(KEYS)):
            tenants[row.tenant]["keys"].append(row.digest)
        for row in connection.execute(sql.select(TRUSTED).order_by(TRUSTED.c.name)) if version > 1 else ():
            tenants[row.tenant].setdefault("trusted_keys", {})[row.name] = row.pem
    except KeyError as error:
        raise PolicyError(f"the store is damaged: it holds rows of a tenant {error} that is not there") from None
    return {"adapters": adapters, "tenants": tenants}


def write(connection: Connection, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Change the tables from one content to another: only the rows that differ."""
    old, new = _rows(before), _rows(after)
    if new[TRUSTED] and connection.scalar(sql.select(STATE.c.schema_version)) == 1:
        TRUSTED.create(connection)
        connection.execute(sql.update(STATE).values(schema_version=SCHEMA_VERSION))
    for table in new:  # rows that others refer to are added first and deleted last
        names = table.primary_key.columns.keys()
        added = [dict(zip(names, key, strict=True)) | new[table][key] for key in new[table].keys() - old[table].keys()]
        if added:
            connection.execute(sql.insert(table), added)
        for key, values in new[table].items():
            if old[table].get(key, values) != values:
                connection.execute(sql.update(table).where(*_by_key(table, key)).values(values))
    for table in reversed(new):
        for key in old[table].keys() - new[table].keys():
            connection.execute(sql.delete(table).where(*_by_key(table, key)))


def _rows(content: Mapping[str, Any]) -> dict[Table, dict[tuple[str, ...], dict[str, Any]]]:
    """Table -> primary key -> other columns."""
    tenants = content["tenants"]
    return {
        ADAPTERS: {(name,): entry for name, entry in content["adapters"].items()},
        TENANTS: {(name,): {} for name in tenants},
        FORGETS: {
            (tenant, name): {"strength": strength}
            for tenant, entry in tenants.items()
            for name, strength in entry["forget"].items()
        },
        KEYS: {(digest,): {"tenant": tenant} for tenant, entry in tenants.items() for digest in entry["keys"]},
        TRUSTED: {
            (tenant, name): {"pem": pem}
            for tenant, entry in tenants.items()
            for name, pem in (entry.get("trusted_keys") or {}).items()
        },
    }


def _by_key(table: Table, key: tuple[str, ...]) -> list[Any]:
    return [column == value for column, value in zip(table.primary_key.columns, key, strict=True)]


def _open_sqlite(url: sql.URL, create: bool) -> Engine:
    if not url.database or url.database == ":memory:":
        raise PolicyError("a store in memory would be lost: expected a file such as tenants.db")
    path = Path(url.database).absolute()
    try:
        if create and not path.exists():
            path.touch()
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
        connection = sqlite3.connect(  # mode=rw: a file that was deleted does not come back empty
            f"file:{quote(str(path))}?mode=rw", uri=True, timeout=PATIENCE, isolation_level=None,
            check_same_thread=False,
        )  # fmt: skip
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
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


def _open_server(url: sql.URL) -> Engine:
    timeouts = {}
    if url.drivername == "postgresql+psycopg":  # notice a host that vanished
        timeouts = {"connect_timeout": PATIENCE, "tcp_user_timeout": PATIENCE * 1000}
    arguments = {name: value for name, value in timeouts.items() if name not in url.query}
    return sql.create_engine(url, connect_args=arguments, pool_pre_ping=True, hide_parameters=True)


def _check_version(engine: Engine, version: int) -> None:
    if not 1 <= version <= SCHEMA_VERSION:
        raise PolicyError(
            f"the store {describe(engine)} has schema version {version}, expected at most {SCHEMA_VERSION}: update "
            "unlearn_peft"
        )


def _has_store(connection: Connection) -> bool:
    return connection.dialect.has_table(connection, STATE.name)


def _create(engine: Engine) -> None:
    """Create missing tables; several processes may do so at once."""
    for attempts_left in reversed(range(_TRIES)):
        try:
            with engine.execution_options(write=True).begin() as connection:
                if not _has_store(connection):
                    _metadata.create_all(connection)
                    for statement in _KEEP_HISTORY.get(engine.dialect.name, ()):
                        connection.exec_driver_sql(statement)
                    connection.execute(
                        sql.insert(STATE).values(id=1, schema_version=SCHEMA_VERSION, revision=0, token="")
                    )
            return
        except SQLAlchemyError:
            if not attempts_left:
                raise
            time.sleep(0.1)
