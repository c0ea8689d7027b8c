"""The files in recipes/serve that operators copy: their options, metrics and codes exist, what must be writable is."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
import yaml
from serving import client, make_policy_values, running

from unlearn_peft import load_base
from unlearn_peft.serve.engine.base import EngineStats
from unlearn_peft.serve.engine.local import LocalEngine
from unlearn_peft.serve.limits import Limits
from unlearn_peft.serve.metrics import Metrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "serve"
METRIC = re.compile(r"unlearn_peft_\w+")
OF_PROMETHEUS = {"job", "instance", "le"}  # labels that the server does not set itself


def unit():
    """The systemd unit's settings, each with all of its values."""
    text = re.sub(r"\\\n", " ", (FOLDER / "unlearn-peft.service").read_text())
    found = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def expressions():
    """Every query of the dashboard and the alerts."""
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return queries, [rule["expr"] for group in rules for rule in group["rules"]]


def metrics_of_the_server():
    """Series that a server has -> their labels."""
    metrics = Metrics(lambda: EngineStats(*range(len(fields(EngineStats)))))
    for counter in (metrics.requests, metrics.tokens, metrics.refusals, metrics.canary):
        counter.labels(*counter._labelnames)
    return {
        sample.name: set(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_each_metric_and_label_that_is_queried_exists_and_each_metric_is_shown():
    known, (dashboard, alerts) = metrics_of_the_server(), expressions()
    for query in (*dashboard, *alerts):
        named = METRIC.findall(query)
        assert named or query.startswith("up{"), query
        assert not set(named) - known.keys(), query
        labels = set().union(OF_PROMETHEUS, *(known[name] for name in named))
        used = re.findall(r"(\w+)=~?\"", query) + re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query)))
        assert not set(used) - labels, query
    shown = {re.sub("_(bucket|sum|count)$", "", name) for query in dashboard for name in METRIC.findall(query)}
    assert shown == {re.sub("_(bucket|sum|count)$", "", name) for name in known}


def test_each_metric_that_is_queried_is_on_the_page_of_a_running_server(tiny_folder):
    engine = LocalEngine(load_base(str(tiny_folder), device="cpu"), name="tiny")
    engine.scheduler.step_times.rows_within = lambda times: 2 * times  # not known before there were different steps
    with running(engine, make_policy_values({}, {"alice": []})) as (_, url):
        assert client(url).completions.create(model="tiny", prompt="x", max_tokens=2).choices
        assert httpx.get(f"{url}/v1/models").status_code == 401
        page = httpx.get(f"{url}/metrics").text
    named = {name for query in sum(expressions(), []) for name in METRIC.findall(query)}
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    without = {name: re.sub("_(bucket|sum|count)$", "", name) for name in named}
    assert len(named) > 10 and not [n for n in named if n not in kinds and kinds.get(without[n]) != "histogram"]


def test_each_code_of_an_alert_is_one_that_the_server_gives():
    source = "".join(path.read_text() for path in (ROOT / "unlearn_peft" / "serve").rglob("*.py"))
    codes = "|".join(re.findall(r'code=~?"([^"]*)"', " ".join(expressions()[1]))).split("|")
    assert len(codes) >= 6 and all(f'code="{code}"' in source for code in codes)


@pytest.fixture(scope="module")
def options():
    command = [sys.executable, "-m", "unlearn_peft.cli", "serve", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}).stdout
    return set(re.findall(r"--[a-z-]+", shown))


def test_the_unit_has_options_that_exist_and_may_write_where_it_does(options):
    settings = unit()
    arguments = shlex.split(settings["ExecStart"][0])
    assert arguments[1] == "serve" and {a for a in arguments if a.startswith("--")} <= options
    assert settings["ProtectSystem"] == ["strict"] and settings["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    folders = {"StateDirectory": "/var/lib/", "LogsDirectory": "/var/log/", "CacheDirectory": "/var/cache/"}
    writable = [root + settings[name][0] + "/" for name, root in folders.items()]
    paths = re.findall(r"/var/[\w/.-]+", settings["ExecStart"][0] + settings["Environment"][0])
    assert len(paths) == 4 and all(any(path.startswith(folder) for folder in writable) for path in paths)
    assert float(settings["TimeoutStopSec"][0]) > Limits().drain_seconds + 2


def test_the_compose_file_has_options_that_exist_and_may_write_where_it_does(options):
    file = compose()
    server = file["services"]["server"]
    command = [argument.partition("=") for argument in server["command"]]
    assert {name for name, *_ in command if name.startswith("--")} <= options
    writable = [mount.split(":")[1] for mount in server["volumes"] if not mount.endswith(":ro")]
    paths = [value for *_, value in command if value.startswith("/")] + list(server["environment"].values())
    assert len(paths) == 5 and all(any(path.startswith(folder + "/") for folder in writable) for path in paths)
    for service in file["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert "ports" not in server, "only the proxy is reached from outside"
    assert float(server["stop_grace_period"].rstrip("s")) > Limits().drain_seconds + 2
    assert all(path in file["configs"]["caddyfile"]["content"] for path in ("/metrics", "/readyz", "/healthz"))
    assert {mount.split(":")[0] for s in file["services"].values() for mount in s["volumes"]} - {"./adapters"} == set(
        file["volumes"]
    )
