"""The command `serve`: one base for many tenants, each with what it must have forgotten."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UnlearnError
from .options import (
    BaseOption,
    DeviceOption,
    DifferentOption,
    DtypeOption,
    QuantizeOption,
    RequireOption,
    TrustedOption,
    base_of,
    load,
    trust_of,
)

if TYPE_CHECKING:
    from ..serve.engine.base import Engine
    from ..serve.policy.policy import Policy, PolicySource


_TENANT = "local"  # whoever asks, where there is no policy


def serve(
    base: BaseOption = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Who must have what forgotten: a .yaml file, a .db file (see `tenant`) or a database's URL."),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", help="Instead of a policy, to try it out: a directory that requests may name."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="URLs of vLLM servers that generate instead of this process, joined by commas."),
    ] = None,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: the base's name.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers generated at once.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; more get 429.")] = 64,
    per_tenant: Annotated[int | None, typer.Option(min=1, help="Answers that one tenant may have under way.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer.")] = 1024,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = 8192,
    max_body_bytes: Annotated[int, typer.Option(min=1)] = 1_000_000,
    max_seconds: Annotated[float, typer.Option(min=0.001, help="From a request's arrival to its end.")] = 300,
    drain_seconds: Annotated[float, typer.Option(min=0, help="That running requests get after SIGTERM.")] = 30,
    adapter_memory_gb: Annotated[
        float | None, typer.Option(min=0, help="Memory for adapters; those not in use go first. Default: no bound.")
    ] = None,
    audit: Annotated[Path | None, typer.Option(help="Record each request in this file (JSON lines).")] = None,
    audit_fsync: Annotated[bool, typer.Option(help="Wait for the disk at each line of it.")] = False,
    audit_prompts: Annotated[bool, typer.Option(help="Also record prompts and answers.")] = False,
    audit_optional: Annotated[bool, typer.Option(help="Answer even if the audit log cannot be written.")] = False,
    playground: Annotated[bool, typer.Option(help="A page to try it out, at /playground.")] = True,
    playground_offer: Annotated[
        list[str] | None, typer.Option(help="An adapter that every tenant's page shows, beside its own; repeatable.")
    ] = None,
    playground_base: Annotated[
        bool, typer.Option("--playground-base", help="Let EVERY key see the base's answers there: nothing forgotten.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    allow_different_base: DifferentOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Serve one base to many tenants, each with its own forget set.

    The server speaks OpenAI's API (chat, completions, streaming). Each tenant
    is known by its API key; the policy says what must be forgotten for it
    (docs/how-to/serve.md shows one):

      unlearn-peft serve --base demo --policy policy.yaml --audit audit.jsonl

    A request may have more forgotten ("forget": {"acme": 1} in its body), never
    less. If an adapter that it needs cannot be loaded and verified, it is
    refused (503), not answered without it. To try it out, without keys:

      unlearn-peft serve --base demo --adapter out/hp

    With --engine, vLLM servers generate (docs/how-to/vllm.md says how they are
    started); tenants, policy, limits and audit stay here:

      unlearn-peft serve --policy policy.db --engine http://gpu1:8000,http://gpu2:8000
    """
    if missing := [
        name for name in ("fastapi", "uvicorn", "prometheus_client", "sqlalchemy") if not importlib.util.find_spec(name)
    ]:
        raise UnlearnError(f"the server needs {', '.join(missing)}: pip install 'unlearn-peft[serve]'")
    if (policy is None) == (not adapter):
        raise UnlearnError(
            "expected either --policy FILE, which says who must have what forgotten, or --adapter DIR, to try it out"
        )
    if engine is not None and policy is None:
        raise UnlearnError("--engine needs --policy, the one that the resolver inside vLLM has too")
    trust = trust_of(trusted_keys, require_signature)
    from ..serve.limits import LOOPBACK

    if policy is None and host not in LOOPBACK:
        raise UnlearnError(
            f"--adapter serves without keys, and --host {host} would let others in: give --policy FILE, or leave it out"
        )
    from ..serve.api.app import create_app
    from ..serve.api.playground import Playground
    from ..serve.api.server import HttpServer, listen
    from ..serve.audit import AuditLog
    from ..serve.engine.local import LocalEngine
    from ..serve.limits import Limits

    listening = listen(host, port)
    source = _source(policy, adapter or [])
    now = source.current()
    log = None
    if audit is not None:
        log = AuditLog(audit, fsync=audit_fsync, prompts=audit_prompts, required=not audit_optional)
    generates: Engine
    if engine is not None:
        from ..serve.vllm.engine import VllmEngine

        generates = VllmEngine(
            engine.split(","), base_of(base, adapter), name=model_name, seconds=max_seconds, trust=trust
        )
    else:
        budget = None if adapter_memory_gb is None else int(adapter_memory_gb * 1e9)
        live = load(base, adapter, dtype, device, quantize, trust)
        generates = LocalEngine(
            live, name=model_name, max_batch=max_batch, budget_bytes=budget, trust=trust,
            allow_different_base=allow_different_base,
        )  # fmt: skip
    limits = Limits(
        batch=max_batch, queue=max_queue, per_tenant=per_tenant, body_bytes=max_body_bytes,
        prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, seconds=max_seconds, drain_seconds=drain_seconds,
    )  # fmt: skip
    open_tenant = _TENANT if policy is None else None
    page = Playground(playground_base, tuple(playground_offer or ())) if playground else None
    app = create_app(generates, source, limits=limits, audit=log, open_tenant=open_tenant, playground=page)

    def ready(url: str) -> None:
        who = (
            "anyone on this machine"
            if policy is None
            else f"{len(now.tenants)} tenant{'s' * (len(now.tenants) != 1)} of {policy}"
        )
        print(f"serving {generates.model} at {url}/v1 to {who}")
        if playground:
            print(f"playground: {url}/playground")
        print(f"adapters: {', '.join(list(now.adapters)[:8])}{' ...' if len(now.adapters) > 8 else ''}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when all is done
    HttpServer(app, ready=ready).run(sockets=[listening])


class FixedPolicy:
    """A policy that never changes."""

    problem: str | None = None

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def current(self) -> Policy:
        """Return it."""
        return self._policy


def _source(policy: str | None, adapters: list[Path]) -> PolicySource:
    from ..adapters.read import read_bundle
    from ..serve.policy.policy import make_policy
    from ..serve.policy.store import open_policy

    if policy is not None:
        return open_policy(policy)
    entries = {}
    for path in adapters:
        bundle = read_bundle(path)
        if bundle.name in entries:
            raise UnlearnError(f"two adapters are called '{bundle.name}': rename one's folder")
        entries[bundle.name] = {"path": str(path.absolute())}
    values = {"adapters": entries, "tenants": {_TENANT: {"forget": []}}}
    return FixedPolicy(make_policy(values, "--adapter"))
