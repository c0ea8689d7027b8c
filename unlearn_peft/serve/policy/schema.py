"""The tables of a policy store, and the versions of their schema."""

from __future__ import annotations

import secrets
import time
from typing import NamedTuple

from ...errors import PolicyError

try:
    import sqlalchemy
    from sqlalchemy import Column, ForeignKey, Integer, String, Text
    from sqlalchemy import Connection as Connection
    from sqlalchemy import Engine as Engine
    from sqlalchemy import Table as Table
    from sqlalchemy.exc import ArgumentError as ArgumentError
    from sqlalchemy.exc import SQLAlchemyError as SQLAlchemyError
except ModuleNotFoundError:
    raise PolicyError(
        "a policy store needs SQLAlchemy, which is not installed: pip install 'unlearn-peft[serve]'"
    ) from None


sql = sqlalchemy
# 5 has no choice of the prefix cache, 4 neither probes nor settings of keys nor quotas either, 3 nothing that requests
# may add either, 2 no changes and no indexes either, 1 no trusted keys either; the first edit adds what is missing
SCHEMA_VERSION = 6
_TRIES = 5

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
    Column("probes", Text),
    Column("canary", String(8)),
)  # fmt: skip
TENANTS = Table(
    "unlearn_tenants", _metadata,
    Column("name", String(64), primary_key=True),
    Column("quotas", Text),  # JSON; null: none
    Column("prefix_cache", Integer),  # 0: off; null: on
)  # fmt: skip


def _strengths(name: str) -> Table:
    """Return a table of adapters by tenant, each with a strength."""
    return Table(
        name, _metadata,
        Column("tenant", ForeignKey(TENANTS.c.name), primary_key=True),
        Column("adapter", ForeignKey(ADAPTERS.c.name), primary_key=True),
        Column("strength", sql.Double, sql.CheckConstraint("strength > 0"), nullable=False),
        sql.Index(f"{name}_adapter", "adapter"),
    )  # fmt: skip


FORGETS = _strengths("unlearn_forgets")
MAY_ADD = _strengths("unlearn_may_add")
KEYS = Table(
    "unlearn_keys", _metadata,
    Column("digest", String(64), primary_key=True),
    Column("tenant", ForeignKey(TENANTS.c.name), nullable=False),
    Column("name", String(64)),
    Column("expires", String(32)),  # UTC, ISO 8601
    Column("scopes", Text),  # joined by commas; null: all
    Column("used", String(32)),  # UTC, ISO 8601; servers write it now and then, without a revision
    sql.Index("unlearn_keys_tenant", "tenant"),
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
CHANGES = Table(  # one row a revision: what readers must read anew; neither tenant nor adapter: everything
    "unlearn_changes", _metadata,
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("token", String(16), nullable=False),
    Column("tenant", String(64)),
    Column("adapter", String(64)),
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


_STATE = sql.select(STATE.c.schema_version, STATE.c.revision, STATE.c.token)


class State(NamedTuple):
    """Which version of the store this is; `token` tells a backup that was put back and changed otherwise."""

    schema_version: int
    revision: int
    token: str


def has_store(connection: Connection) -> bool:
    """Return whether the database holds a store."""
    return connection.dialect.has_table(connection, STATE.name)


def create_tables(engine: Engine) -> None:
    """Create missing tables; several processes may do so at once."""
    for attempts_left in reversed(range(_TRIES)):
        try:
            with engine.execution_options(write=True).begin() as connection:
                if not has_store(connection):
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


def read_state(connection: Connection) -> State:
    """Return the store's version.

    Raises:
        PolicyError: its tables are of a newer version of this package.
    """
    row = connection.execute(_STATE).one()
    if not 1 <= row.schema_version <= SCHEMA_VERSION:
        raise PolicyError(
            f"the store has schema version {row.schema_version}, expected at most {SCHEMA_VERSION}: update unlearn_peft"
        )
    return State(*row)


def begin_change(connection: Connection) -> State:
    """Increase the revision and return the new state; other writers wait here until the transaction ends."""
    connection.execute(sql.update(STATE).values(revision=STATE.c.revision + 1, token=secrets.token_hex(8)))
    state = read_state(connection)
    if state.schema_version < SCHEMA_VERSION:
        _metadata.create_all(connection)
        for table in _metadata.tables.values():
            there = {column["name"] for column in sql.inspect(connection).get_columns(table.name)}
            for column in (column for column in table.columns if column.name not in there):
                what = sql.schema.CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {what}")
        for index in (index for table in _metadata.tables.values() for index in table.indexes):
            index.create(connection, checkfirst=True)
        connection.execute(sql.update(STATE).values(schema_version=SCHEMA_VERSION))
    return state._replace(schema_version=SCHEMA_VERSION)
