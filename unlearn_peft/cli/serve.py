"""The command `serve`: one base for many tenants, each with its own forget set."""

from __future__ import annotations

import gc
import importlib.util
import logging
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnlearnError
from . import options
from .serve_policy import TENANT, open_or_make_policy, prompt_format_of_all

if TYPE_CHECKING:
    from ..serve.engine.base import Engine


logger = logging.getLogger(__name__)
_ACCESS_LOGS = 10  # full files that are kept


def serve(
    context: typer.Context,
    base: options.BaseOption = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Which tenant forgets what: a .yaml file, a .db file (see `tenant`) or a database's URL."),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            help="Instead of a policy, to try it out: an adapter directory that requests may name; repeatable.",
        ),
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
    per_tenant: Annotated[
        int | None,
        typer.Option(min=1, help="Answers of one tenant that may run, wait or be on their way. Default: half of all."),
    ] = None,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Connections open at once. Fewer where `ulimit -n` allows fewer files.")
    ] = 1024,
    per_address: Annotated[
        int | None,
        typer.Option(min=1, help="Connections of one address, and new ones in 5 s. Default: 1/4; more behind a proxy."),
    ] = None,
    quota_requests: Annotated[
        str | None,
        typer.Option(metavar="N/minute", help="Requests of a tenant in a second, minute, hour or day."),
    ] = None,
    quota_tokens: Annotated[
        str | None,
        typer.Option(metavar="N/day", help="Its tokens, read and generated. `tenant quota` sets both for one."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Limit on the tokens of an answer.")] = 1024,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = 8192,
    max_body_bytes: Annotated[int, typer.Option(min=1)] = 1_000_000,
    max_seconds: Annotated[float, typer.Option(min=0.001, help="From a request's arrival until all is sent.")] = 300,
    kv_memory_gb: Annotated[
        float | None,
        typer.Option(
            min=0, help="Memory for keys and values. Default: what a full batch can need, at most half of what is free."
        ),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep what a tenant's prompts begin with, in what of that memory no answer needs.")
    ] = True,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time that running requests get after SIGTERM.")] = 30,
    adapter_memory_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Memory for adapters, at most half for what requests add. Default: no limit."),
    ] = None,
    audit: Annotated[
        Path | None, typer.Option(help="Record each request in this file (JSON lines); SIGHUP reopens it.")
    ] = None,
    audit_fsync: Annotated[bool, typer.Option(help="Call fsync after each line of it.")] = False,
    audit_prompts: Annotated[bool, typer.Option(help="Also record prompts and answers.")] = False,
    audit_optional: Annotated[bool, typer.Option(help="Answer even if the audit log cannot be written.")] = False,
    admin_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Change the policy over HTTP on this port; needs a store and --admin-keys."
        ),
    ] = None,
    admin_keys: Annotated[
        Path | None, typer.Option(help="Keys of the admin port, made by `unlearn-peft tenant admin-key`.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve /metrics on this port, and no longer on --port.")
    ] = None,
    admin_host: Annotated[str, typer.Option(help="Where both of these ports listen.")] = "127.0.0.1",
    ssl_certfile: Annotated[Path | None, typer.Option(help="TLS on --port and --admin-port: the certificates.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Their private key.")] = None,
    traces: Annotated[
        bool, typer.Option("--traces", help="A span for each request, by OTLP; OTEL_EXPORTER_OTLP_ENDPOINT says where.")
    ] = False,
    access_log: Annotated[
        Path | None,
        typer.Option(help="Write a JSON line for each response: key, address, path, status. Keeps ten full files."),
    ] = None,
    playground: Annotated[bool, typer.Option(help="A page to try it out, at /playground.")] = True,
    playground_offer: Annotated[
        list[str] | None,
        typer.Option(help="An adapter whose card each tenant's page shows (to try it: `tenant allow`); repeatable."),
    ] = None,
    playground_base: Annotated[
        bool, typer.Option("--playground-base", help="Let EVERY key see the base's answers there: nothing forgotten.")
    ] = False,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    quantize: options.QuantizeOption = None,
    allow_different_base: options.DifferentOption = False,
    trusted_keys: options.TrustedOption = None,
    require_signature: options.RequireOption = False,
) -> None:
    """Serve one base to many tenants, each with its own forget set.

    The server has OpenAI's API (chat, completions, streaming). Each tenant is
    recognised by its API key; the policy says what it forgets
    (docs/how-to/serve.md shows one):

      unlearn-peft serve --base demo --policy policy.yaml --audit audit.jsonl

    A request may forget more ("forget": {"acme": 1} in its body) if its tenant is allowed that, never less.
    If an adapter that it needs cannot be loaded and verified, it is refused
    (503), not answered without it. A set whose adapters undo each other is
    refused where the policy has probes (`tenant adapter --probes`). To try it
    out, without keys:

      unlearn-peft serve --base demo --adapter out/hp

    With --engine, vLLM servers generate (docs/how-to/vllm.md shows how to start
    them); tenants, policy, limits and audit stay here:

      unlearn-peft serve --policy policy.db --engine http://gpu1:8000,http://gpu2:8000
    """
    if missing := [
        name
        for name in ("fastapi", "uvicorn", "limits", "prometheus_client", "sqlalchemy")
        if not importlib.util.find_spec(name)
    ]:
        raise UnlearnError(f"the server needs {', '.join(missing)}: pip install 'unlearn-peft[serve]'")
    if (policy is None) == (not adapter):
        raise UnlearnError(
            "expected either --policy FILE, which says which tenant forgets what, or --adapter DIR, to try it out"
        )
    if engine is not None and policy is None:
        raise UnlearnError("--engine needs --policy, the one that the resolver inside vLLM has too")
    if (admin_port is None) != (admin_keys is None):
        raise UnlearnError("--admin-port and --admin-keys FILE go together: one without the other does nothing")
    if ssl_keyfile is not None and ssl_certfile is None:
        raise UnlearnError("--ssl-keyfile is the key of --ssl-certfile FILE: give that, too")
    tls: dict[str, Any] = {} if ssl_certfile is None else {"ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile}
    trust = options.trust_of(trusted_keys, require_signature)
    from ..serve.policy.entries import check_quota

    for option, quota in (("--quota-requests", quota_requests), ("--quota-tokens", quota_tokens)):
        try:
            check_quota(quota or "1/day")
        except ValueError as error:
            raise UnlearnError(f"{option} is {quota!r}: {error}") from None
    from ..serve.limits import LOOPBACK, Limits

    if policy is None and host not in LOOPBACK:
        raise UnlearnError(
            f"--adapter serves without keys, and --host {host} would let others in: give --policy FILE, or leave it out"
        )
    _on_hangup(signal.SIG_IGN)
    from ..serve.api.listening import listen
    from ..serve.api.loading import answering, tls_context
    from ..serve.api.server import HttpServer

    listening = listen(host, port)
    loading = context.with_resource(ExitStack())
    loading.enter_context(answering(listening, tls_context(ssl_certfile, ssl_keyfile)))
    admin_socket = None if admin_port is None else listen(admin_host, admin_port)
    metrics_socket = None if metrics_port is None else listen(admin_host, metrics_port)
    from ..serve.admin.app import create_admin_app
    from ..serve.admin.keys import read_admin_keys
    from ..serve.admin.side import create_metrics_app, running_beside
    from ..serve.api.app import create_app  # after that: these take seconds
    from ..serve.api.playground import Playground
    from ..serve.audit import AuditLog
    from ..serve.canary import idle_note
    from ..serve.engine.local import LocalEngine
    from ..serve.engine.threads import in_own_thread, switch_quickly
    from ..serve.handler import RequestHandler
    from ..serve.policy.store import PolicyStore
    from ..serve.tracing import Tracing

    bundles = in_own_thread(lambda: options.read_adapters(adapter, trust))
    source = open_or_make_policy(policy, bundles)
    now = source.current()
    admin: tuple[PolicyStore, Path] | None = None
    if admin_keys is not None:
        read_admin_keys(admin_keys)  # or say now what is wrong with it
        if not isinstance(source, PolicyStore):
            raise UnlearnError("--admin-port changes a store: give --policy FILE.db or a database's URL")
        admin = source, admin_keys
        if admin_host not in LOOPBACK and not tls:
            logger.warning("admin keys and the keys that are made cross the network in the clear: --ssl-certfile")
    if idle := [name for name, entry in now.adapters.items() if idle_note(name, entry)]:
        logger.warning(
            "the policy has a canary for %s, without effect: there are no probes at ADAPTER.probes.jsonl, and `probes` "
            "names none", ", ".join(idle[:8]) + " and others" * (len(idle) > 8),
        )  # fmt: skip
    log = None
    if audit is not None:
        log = AuditLog(audit, fsync=audit_fsync, prompts=audit_prompts, required=not audit_optional)
    access = None if access_log is None else AuditLog(access_log, keep=_ACCESS_LOGS, required=False, name="access")
    backend: Engine
    if engine is not None:
        from ..serve.vllm.engine import VllmEngine

        backend = VllmEngine(
            engine.split(","), options.base_of(base), name=model_name, seconds=max_seconds, trust=trust,
            prefix_cache=prefix_cache, prompt_format=prompt_format_of_all(now),
        )  # fmt: skip
    else:
        budget = None if adapter_memory_gb is None else int(adapter_memory_gb * 1e9)

        def load() -> LocalEngine:
            live = options.load(base, bundles, dtype, device, quantize)
            live.prompt_format = live.prompt_format or prompt_format_of_all(now)
            return LocalEngine(
                live, name=model_name, max_batch=max_batch, budget_bytes=budget, trust=trust,
                kv_bytes=None if kv_memory_gb is None else int(kv_memory_gb * 1e9), prefix_cache=prefix_cache,
                allow_different_base=allow_different_base,
            )  # fmt: skip

        backend = in_own_thread(load)
    limits = Limits(
        batch=max_batch, queue=max_queue, per_tenant=per_tenant, body_bytes=max_body_bytes,
        prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, seconds=max_seconds, drain_seconds=drain_seconds,
        connections=max_connections, per_address=per_address, quota_requests=quota_requests, quota_tokens=quota_tokens,
    )  # fmt: skip
    tracing = Tracing() if traces else None
    if tracing is not None:
        context.call_on_close(tracing.close)
    open_tenant = TENANT if policy is None else None
    page = Playground(playground_base, tuple(playground_offer or ())) if playground else None
    handler = RequestHandler(backend, source, limits=limits, audit=log, open_tenant=open_tenant, tracing=tracing)

    def hung_up(*_: Any) -> None:
        for one in (log, access):
            if one is not None:
                one.reopen()
        if trusted_keys:
            Thread(target=_read_trust_anew, args=(backend, trusted_keys, require_signature), daemon=True).start()

    _on_hangup(hung_up)

    def ready(url: str) -> None:
        who = (
            "anyone on this machine"
            if policy is None
            else f"{len(now.tenants)} tenant{'s' * (len(now.tenants) != 1)} of {policy}"
        )
        print(f"serving {backend.model} at {url}/v1 to {who}")
        for port_name, opened in (("admin port", admin_socket), ("metrics", metrics_socket)):
            if opened is not None:
                print(f"{port_name}: {admin_host}:{opened.getsockname()[1]}")
        if playground:
            print(f"playground: {url}/playground")
        print(f"adapters: {', '.join(list(now.adapters)[:8])}{' ...' if len(now.adapters) > 8 else ''}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when all is done
    loading.close()
    if admin is not None and admin_socket is not None:
        context.with_resource(running_beside(create_admin_app(*admin, log), admin_socket, **tls))
    if metrics_socket is not None:
        context.with_resource(running_beside(create_metrics_app(handler.metrics.text), metrics_socket))
    app = create_app(handler, page, access, metrics=metrics_port is None)
    switch_quickly()
    gc.collect()
    gc.freeze()  # what is there stays; looking through it for garbage would hold all up, for a quarter of a second
    HttpServer(app, ready=ready, **tls).run(sockets=[listening])


def _on_hangup(handler: Any) -> None:
    """Handle SIGHUP, which would end the process; there is none on Windows."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, handler)


def _read_trust_anew(engine: Engine, trusted_keys: list[Path], required: bool) -> None:
    """Let an engine trust the keys that lie there now; where they cannot be read, it goes on with those that it has."""
    try:
        trust = options.trust_of(trusted_keys, required)
    except UnlearnError as error:
        logger.error("the trusted keys stay as they were: %s", error)
        return
    assert trust is not None
    engine.set_trust(trust)
    logger.warning("trusted keys: %s", ", ".join(trust.signers))
