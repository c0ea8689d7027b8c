"""What is read from and written to the tables of a policy store. Content is the plain mapping that a policy's YAML has,
too: {"adapters": {name: ...}, "tenants": {name: ...}}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ...errors import PolicyError
from . import schema
from .schema import ADAPTERS, CHANGES, FORGETS, HISTORY, KEYS, MAY_ADD, TENANTS, TRUSTED, Connection, State, Table, sql

_ADAPTER = ADAPTERS.c.keys()[1:]
_KEY = ("name", "expires", "scopes")  # columns of a key's settings
_CELLS = {
    "tenant": sql.String, "name": sql.String, "strength": sql.Double, "text": sql.Text, "key_name": sql.String,
    "expires": sql.String, "scopes": sql.Text,
}  # fmt: skip
_KINDS = {1: 3, 2: 4, 3: 4}  # of rows of tenants in older schema versions, see `_tenant_rows`
_MAX_CHANGES = 1000  # a reader that missed more reads everything anew
_NEAR = 20  # names that are read for "did you mean"
_USERS = 6  # tenants that are read to tell who forgets an adapter, and as many who may add it


@dataclass(frozen=True)
class Change:
    """One row of the history."""

    revision: int
    at: str  # UTC, ISO 8601
    who: str
    action: str
    what: dict[str, Any]
    why: str


class Changed(NamedTuple):
    """What a reader must read anew."""

    tenants: set[str]
    adapters: set[str]


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
    if not 1 < count <= _MAX_CHANGES or old.schema_version < 3:
        return None
    between = CHANGES.c.revision.between(old.revision, new.revision)
    rows = connection.execute(sql.select(CHANGES).where(between).order_by(CHANGES.c.revision)).all()
    if len(rows) != count or rows[0].token != old.token:  # a backup was put back: `old` never led to `new`
        return None
    if any(row.tenant is None and row.adapter is None for row in rows[1:]):
        return None
    return Changed({row.tenant for row in rows[1:]} - {None}, {row.adapter for row in rows[1:]} - {None})


def read_history(connection: Connection, limit: int | None) -> list[Change]:
    """Return the rows of the history, the newest first."""
    rows = connection.execute(sql.select(HISTORY).order_by(HISTORY.c.revision.desc()).limit(limit))
    return [Change(**row) for row in rows.mappings()]


def tenant_names(connection: Connection, after: str = "", limit: int | None = None) -> list[str]:
    """Return tenants' names, sorted by the database: those behind one, at most `limit`."""
    query = sql.select(TENANTS.c.name).where(TENANTS.c.name > after).order_by(TENANTS.c.name)
    return list(connection.scalars(query.limit(limit)))


def count_tenants(connection: Connection) -> int:
    """Return how many tenants there are."""
    return connection.scalar(sql.select(sql.func.count()).select_from(TENANTS)) or 0


def read(connection: Connection, state: State) -> dict[str, Any]:
    """Return the whole content."""
    return {"adapters": read_adapters(connection, state), "tenants": read_tenants(connection, state)}


def read_part(connection: Connection, state: State, tenant: str | None, adapter: str | None) -> dict[str, Any]:
    """Return what an edit of a tenant, an adapter or both needs of the content.

    In place of one that does not exist, names like it are under "near"; without a tenant, some that forget the adapter
    or may add it are read.
    """
    near = list[str]()
    if tenant is None:
        users = list[str]()
        for table in (FORGETS, MAY_ADD):  # an edit has made both
            query = sql.select(table.c.tenant).where(table.c.adapter == adapter).order_by(table.c.tenant)
            users += connection.scalars(query.limit(_USERS))
        tenants = read_tenants(connection, state, set(users))
    else:
        tenants = read_tenants(connection, state, [tenant])
        near += [] if tenants else _near(connection, TENANTS, tenant)
    names = {name for entry in tenants.values() for name in adapters_of(entry)}
    adapters = read_adapters(connection, state, names if adapter is None else names | {adapter})
    if adapter is not None and adapter not in adapters:
        near += _near(connection, ADAPTERS, adapter)
    return {"adapters": adapters, "tenants": tenants, "near": near}


def adapters_of(entry: Mapping[str, Any]) -> set[str]:
    """Return the adapters that a tenant's entry names."""
    return {*entry["forget"], *entry.get("may_add", {})}


def read_adapters(connection: Connection, state: State, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return adapters by name; None: all."""
    columns = list(ADAPTERS.c)[: 3 if state.schema_version < 5 else None]
    query = sql.select(*columns).order_by(ADAPTERS.c.name)
    rows = connection.execute(query if names is None else query.where(ADAPTERS.c.name.in_(list(names)))).mappings()
    return {row["name"]: {**dict.fromkeys(_ADAPTER), **{k: v for k, v in row.items() if k != "name"}} for row in rows}


def read_tenants(connection: Connection, state: State, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return tenants by name; None: all.

    Raises:
        PolicyError: a row refers to no tenant, which the database should have refused.
    """
    some = {} if names is None else {"names": list(names)}
    return _tenants(connection.execute(_tenant_rows(next(iter(some), None), state.schema_version), some))


def find_tenant(
    connection: Connection, state: State, tenant: str | None, digest: str | None
) -> tuple[State, dict[str, Any]]:
    """Return the store's state and the tenant of a name or, with `digest`, of the sha256 of a key in hex, in one
    statement. It looks for what schema version `state` has: if the returned state is another, the tenant means nothing.

    Raises:
        PolicyError: see `read_tenants`.
    """
    some = {"names": [tenant]} if digest is None else {"digest": digest}
    of_store, *rows = connection.execute(_tenant_rows(next(iter(some)), state.schema_version, with_state=True), some)
    found = State(int(of_store.text), int(of_store.strength), of_store.name)
    return found, _tenants(rows) if found == state else {}


def _tenants(rows: Iterable[Any]) -> dict[str, Any]:
    tenants: dict[str, Any] = {}
    try:
        for row in rows:
            if row.kind == 0:
                tenants[row.tenant] = {"forget": {}, "keys": {}}
                if row.text is not None:
                    tenants[row.tenant]["quotas"] = json.loads(row.text)
                if row.strength == 0:
                    tenants[row.tenant]["prefix_cache"] = False
            elif row.kind == 1:
                tenants[row.tenant]["forget"][row.name] = row.strength
            elif row.kind == 2:
                scopes = None if row.scopes is None else tuple(filter(None, row.scopes.split(",")))
                settings = {"name": row.key_name, "expires": row.expires, "scopes": scopes}
                tenants[row.tenant]["keys"][row.name] = settings
            elif row.kind == 3:
                tenants[row.tenant].setdefault("trusted_keys", {})[row.name] = row.text
            else:
                tenants[row.tenant].setdefault("may_add", {})[row.name] = row.strength
    except KeyError as error:
        raise PolicyError(f"the store is damaged: it holds rows of a tenant {error} that is not there") from None
    return tenants


def write_uses(connection: Connection, uses: Mapping[str, str]) -> None:
    """Note when keys were last used, by their sha256; those that are no more are left out."""
    of_key = sql.update(KEYS).where(KEYS.c.digest == sql.bindparam("key"))
    connection.execute(
        of_key.values(used=sql.bindparam("time")), [{"key": key, "time": time} for key, time in sorted(uses.items())]
    )


def read_uses(connection: Connection, state: State, tenant: str) -> dict[str, str]:
    """Return when a tenant's keys were last used, by their sha256, where that is known."""
    if state.schema_version < 5:
        return {}
    rows = connection.execute(sql.select(KEYS.c.digest, KEYS.c.used).where(KEYS.c.tenant == tenant))
    return {row.digest: row.used for row in rows if row.used}


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
def _tenant_rows(some: str | None, schema_version: int, with_state: bool = False) -> Any:
    """Return one query for tenants, their sets, keys and so on; of "names", of the one of a "digest", or of all; the
    state of the store before them.

    One, since each takes longer on its way than in the database.
    """
    null = sql.null()
    settings, quotas = ([KEYS.c[name] for name in _KEY], TENANTS.c.quotas) if schema_version >= 5 else ([], null)
    columns: list[tuple[Any, ...]] = [
        (TENANTS.c.name, null, TENANTS.c.prefix_cache if schema_version >= 6 else null, quotas),
        (FORGETS.c.tenant, FORGETS.c.adapter, FORGETS.c.strength),
        (KEYS.c.tenant, KEYS.c.digest, null, null, *settings),
        (TRUSTED.c.tenant, TRUSTED.c.name, null, TRUSTED.c.pem),
        (MAY_ADD.c.tenant, MAY_ADD.c.adapter, MAY_ADD.c.strength),
    ]
    owner = sql.select(KEYS.c.tenant).where(KEYS.c.digest == sql.bindparam("digest"))
    wanted: Any = owner if some == "digest" else sql.bindparam("names", expanding=True)
    of_store = schema.STATE.c
    parts = [_cells(-1, (null, of_store.token, of_store.revision, of_store.schema_version))] if with_state else []
    for kind, row in enumerate(columns[: _KINDS.get(schema_version)]):
        part = _cells(kind, row)
        parts.append(part.where(row[0].in_(wanted)) if some else part)
    return sql.union_all(*parts).order_by("kind", "tenant", "name")


def _cells(kind: int, row: tuple[Any, ...]) -> Any:
    cells = zip((*row, *[sql.null()] * len(_CELLS)), _CELLS.items(), strict=False)
    labelled: list[Any] = [sql.cast(cell, type_).label(name) for cell, (name, type_) in cells]
    return sql.select(sql.literal_column(str(kind)).label("kind"), *labelled)


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
        TENANTS: {
            (name,): {
                "quotas": json.dumps(quotas) if (quotas := entry.get("quotas")) else None,
                "prefix_cache": None if entry.get("prefix_cache", True) else 0,
            }
            for name, entry in tenants.items()
        },
        FORGETS: _strengths(tenants, "forget"),
        MAY_ADD: _strengths(tenants, "may_add"),
        KEYS: {
            (digest,): {"tenant": tenant, **_key_row(key)}
            for tenant, entry in tenants.items()
            for digest, key in entry["keys"].items()
        },
        TRUSTED: {
            (tenant, name): {"pem": pem}
            for tenant, entry in tenants.items()
            for name, pem in (entry.get("trusted_keys") or {}).items()
        },
    }


def _key_row(key: Mapping[str, Any]) -> dict[str, Any]:
    scopes = key.get("scopes")
    return {**{name: key.get(name) for name in _KEY}, "scopes": None if scopes is None else ",".join(scopes)}


def _strengths(tenants: Mapping[str, Any], field: str) -> dict[tuple[str, ...], dict[str, Any]]:
    return {
        (tenant, name): {"strength": strength}
        for tenant, entry in tenants.items()
        for name, strength in entry.get(field, {}).items()
    }


def _by_key(table: Table, key: tuple[str, ...]) -> list[Any]:
    return [column == value for column, value in zip(table.primary_key.columns, key, strict=True)]
