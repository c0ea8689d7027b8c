"""The tables of a policy store: all of its SQL. Content is read and written as the plain mapping that a policy's YAML
has, too: {"adapters": {name: ...}, "tenants": {name: ...}}.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from ...errors import PolicyError

try:
    import sqlalchemy
    from sqlalchemy import Column, ForeignKey, Integer, String, Table, Text
    from sqlalchemy import Connection as Connection
    from sqlalchemy import Engine as Engine
    from sqlalchemy.exc import ArgumentError as ArgumentError
    from sqlalchemy.exc import SQLAlchemyError as SQLAlchemyError
except ModuleNotFoundError:
    raise PolicyError(
        "a policy store needs SQLAlchemy, which is not installed: pip install 'unlearn-peft[serve]'"
    ) from None


sql = sqlalchemy
SCHEMA_VERSION = 3  # 2 has no changes and no indexes, 1 no trusted keys either; the first edit adds what is missing
_CELLS = ("tenant", "name", "strength", "pem")
_TRIES = 5
_MAX_CHANGES = 1000  # a reader that missed more reads everything anew
_NEAR = 20  # names that are read for "did you mean"
_USERS = 6  # tenants that are read to tell who forgets an adapter

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
    sql.Index("unlearn_forgets_adapter", "adapter"),
)  # fmt: skip
KEYS = Table(
    "unlearn_keys", _metadata,
    Column("digest", String(64), primary_key=True),
    Column("tenant", ForeignKey(TENANTS.c.name), nullable=False),
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


class Changed(NamedTuple):
    """What a reader must read anew."""

    tenants: set[str]
    adapters: set[str]


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
        for index in (index for table in _metadata.tables.values() for index in table.indexes):
            index.create(connection, checkfirst=True)
        connection.execute(sql.update(STATE).values(schema_version=SCHEMA_VERSION))
    return state._replace(schema_version=SCHEMA_VERSION)


def note_change(
    connection: Connection, state: State, tenant: str | None, adapter: str | None, row: Mapping[str, Any]
) -> None:
    """Add a row to the history, and tell readers what changed; neither tenant nor adapter: everything."""
    connection.execute(sql.insert(HISTORY).values(revision=state.revision, **row))
    changed = {"revision": state.revision, "token": state.token, "tenant": tenant, "adapter": adapter}
    connection.execute(sql.insert(CHANGES).values(changed))


def changes_between(connection: Connection, old: State, new: State) -> Changed | None:
    """Return what changed from one state of the store to another; None: everything may have."""
    count = new.revision - old.revision + 1
    if not 1 < count <= _MAX_CHANGES or old.schema_version < SCHEMA_VERSION:
        return None
    between = CHANGES.c.revision.between(old.revision, new.revision)
    rows = connection.execute(sql.select(CHANGES).where(between).order_by(CHANGES.c.revision)).all()
    if len(rows) != count or rows[0].token != old.token:  # a backup was put back: `old` never led to `new`
        return None
    if any(row.tenant is None and row.adapter is None for row in rows[1:]):
        return None
    return Changed({row.tenant for row in rows[1:]} - {None}, {row.adapter for row in rows[1:]} - {None})


def read_history(connection: Connection, limit: int | None) -> list[dict[str, Any]]:
    """Return the rows of the history, the newest first."""
    rows = connection.execute(sql.select(HISTORY).order_by(HISTORY.c.revision.desc()).limit(limit))
    return [dict(row) for row in rows.mappings()]


def tenant_names(connection: Connection) -> list[str]:
    """Return all tenants' names, sorted by the database."""
    return list(connection.scalars(sql.select(TENANTS.c.name).order_by(TENANTS.c.name)))


def count_tenants(connection: Connection) -> int:
    """Return how many tenants there are."""
    return connection.scalar(sql.select(sql.func.count()).select_from(TENANTS)) or 0


def read(connection: Connection, state: State) -> dict[str, Any]:
    """Return the whole content."""
    return {"adapters": read_adapters(connection), "tenants": read_tenants(connection, state)}


def read_part(connection: Connection, state: State, tenant: str | None, adapter: str | None) -> dict[str, Any]:
    """Return what an edit of a tenant, an adapter or both needs of the content.

    In place of one that does not exist, names like it are under "near"; without a tenant, some that forget the adapter
    are read.
    """
    near = list[str]()
    if tenant is None:
        users = sql.select(FORGETS.c.tenant).where(FORGETS.c.adapter == adapter).order_by(FORGETS.c.tenant)
        tenants = read_tenants(connection, state, connection.scalars(users.limit(_USERS)))
    else:
        tenants = read_tenants(connection, state, [tenant])
        near += [] if tenants else _near(connection, TENANTS, tenant)
    names = {name for entry in tenants.values() for name in entry["forget"]}
    adapters = read_adapters(connection, names if adapter is None else names | {adapter})
    if adapter is not None and adapter not in adapters:
        near += _near(connection, ADAPTERS, adapter)
    return {"adapters": adapters, "tenants": tenants, "near": near}


def read_adapters(connection: Connection, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return adapters by name; None: all."""
    query = sql.select(ADAPTERS).order_by(ADAPTERS.c.name)
    rows = connection.execute(query if names is None else query.where(ADAPTERS.c.name.in_(list(names))))
    return {row.name: {"path": row.path, "sha256": row.sha256} for row in rows}


def read_tenants(
    connection: Connection, state: State, names: Iterable[str] | None = None, digest: str | None = None
) -> dict[str, Any]:
    """Return tenants by name; with `digest`, the sha256 of a key in hex, that key's tenant; None of both: all.

    Raises:
        PolicyError: a row refers to no tenant, which the database should have refused.
    """
    some: dict[str, Any] = {} if names is None else {"names": list(names)}
    some |= {} if digest is None else {"digest": digest}
    tenants: dict[str, Any] = {}
    try:
        for row in connection.execute(_tenant_rows(next(iter(some), None), state.schema_version > 1), some):
            if row.kind == 0:
                tenants[row.tenant] = {"forget": {}, "keys": []}
            elif row.kind == 1:
                tenants[row.tenant]["forget"][row.name] = row.strength
            elif row.kind == 2:
                tenants[row.tenant]["keys"].append(row.name)
            else:
                tenants[row.tenant].setdefault("trusted_keys", {})[row.name] = row.pem
    except KeyError as error:
        raise PolicyError(f"the store is damaged: it holds rows of a tenant {error} that is not there") from None
    return tenants


def write(connection: Connection, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Change the tables from one content, or part of it, to another: only the rows that differ."""
    old, new = _rows(before), _rows(after)
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


@cache
def _tenant_rows(some: str | None, trusted: bool) -> Any:
    """Return one query for tenants, their sets, keys and trusted keys; of "names", of the one of a "digest", or of all.

    One, since each takes longer on its way than in the database.
    """
    columns = [
        (TENANTS.c.name, sql.null(), sql.null(), sql.null()),
        (FORGETS.c.tenant, FORGETS.c.adapter, FORGETS.c.strength, sql.null()),
        (KEYS.c.tenant, KEYS.c.digest, sql.null(), sql.null()),
        (TRUSTED.c.tenant, TRUSTED.c.name, sql.null(), TRUSTED.c.pem),
    ]
    types = (String, String, sql.Double, Text)
    owner = sql.select(KEYS.c.tenant).where(KEYS.c.digest == sql.bindparam("digest"))
    wanted: Any = owner if some == "digest" else sql.bindparam("names", expanding=True)
    parts = []
    for kind, row in enumerate(columns[: 4 if trusted else 3]):
        cells: list[Any] = [
            sql.cast(cell, type_).label(name) for cell, type_, name in zip(row, types, _CELLS, strict=True)
        ]
        part = sql.select(sql.literal_column(str(kind)).label("kind"), *cells)
        parts.append(part.where(row[0].in_(wanted)) if some else part)
    return sql.union_all(*parts).order_by("kind", "tenant", "name")


def _near(connection: Connection, table: Table, name: str) -> list[str]:
    """Return a few names that begin like this one: a range, so that the index is enough."""
    start = name[:2]
    query = sql.select(table.c.name).where(table.c.name >= start, table.c.name < start + "zzz")
    return list(connection.scalars(query.order_by(table.c.name).limit(_NEAR)))


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
