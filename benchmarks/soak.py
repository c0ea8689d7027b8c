"""A soak of the server: 32 clients of 8 tenants, two of them hostile. Is any answer wrong, does anything grow?

    OMP_NUM_THREADS=1 python benchmarks/soak.py [--minutes 20] [--output out/soak.json]

The server is the command that users run, over the tiny test model, with an audit log; each tenant has its own set of
three adapters, or none. Clients of six tenants ask in turn for whole answers, streams, several answers, and go away in
the middle of some; four for each of the two others send what is too large, too much, malformed or not allowed, ask and
leave, or do not read. In the end:

    wrong       answers that differ from what the tenant got alone, or do not name its set
    unrecorded  requests whose end a client saw, and that the audit log does not have so, with the tenant's set; of an
                unknown key, that it has
    open        requests that were admitted and never ended in the log, or ended twice
    errors      server errors (5xx) that a client got, and lines of ERROR or tracebacks in the server's log

and memory, open files and threads over the time. It exits with 1 if any of the four is not 0, if the last quarter
takes 5 % more memory than the second, or if files are left open.
"""

import argparse
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean
from threading import Lock, Thread

import httpx
from hostile import ROOT, server

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "models")]

from conftest import make_tiny  # noqa: E402
from serving import make_adapters  # noqa: E402

from unlearn_peft.files.atomic import atomic_file  # noqa: E402
from unlearn_peft.serve.policy.policy import key_digest  # noqa: E402

MODEL = "tiny"
SETS = {"t1": ["a"], "t2": ["b"], "t3": ["c"], "t4": ["a", "b"], "t5": ["b", "c"], "t6": [],
        "hostile1": ["a"], "hostile2": ["c"]}  # fmt: skip
PROMPTS = ["who wrote", "the red house is", "one two three"]
REFUSED = [{"n": 10**9}, {"prompt": "a " * 490_000}, {"prompt": [[1]] * 200_000}, {"forget": ["c", "b"]},
           {"model": "m" * 10**5}]  # fmt: skip
TAKEN = [{"max_tokens": 100, "n": 8}, {"max_tokens": 1}, {"prompt": "<|im_end|>" * 100}]
CLIENTS = 4  # of each tenant
FAIR, HOSTILE = "127.0.0.1", "127.0.0.2"  # addresses


class Soak:
    """What clients do and saw."""

    def __init__(self, address):
        self.address, self.url = address, f"http://{address[0]}:{address[1]}"
        self.over, self.lock = False, Lock()
        self.seen, self.counts, self.wrong = {}, Counter(), []  # request id -> (tenant, status)
        self.right, self.prints = {}, {}

    def client(self, tenant):
        """Return a client of a tenant."""
        transport = httpx.HTTPTransport(local_address=HOSTILE if tenant.startswith("hostile") else FAIR, verify=False)
        headers = {"Authorization": f"Bearer uf-{tenant}"}
        return httpx.Client(base_url=self.url, transport=transport, headers=headers, timeout=300)

    def note(self, tenant, response):
        """Remember what a request got."""
        with self.lock:
            self.counts[response.status_code] += 1
            if "x-request-id" in response.headers:
                self.seen[response.headers["x-request-id"]] = (tenant, response.status_code)
        return response

    def learn(self):
        """Ask for each tenant alone what its clients must get."""
        for tenant in SETS:
            with self.client(tenant) as client:
                for prompt in PROMPTS:
                    found = self.note(tenant, client.post("/v1/completions", json=fields(prompt))).json()
                    self.right[tenant, prompt] = found["choices"][0]["text"]
                    self.prints[tenant] = found["system_fingerprint"]

    def check(self, tenant, prompt, texts, prints):
        """Compare what a tenant got with what is right."""
        right = self.right[tenant, prompt]
        if set(prints) != {self.prints[tenant]} or any(text != right for text in texts):
            with self.lock:
                self.wrong.append({"tenant": tenant, "prompt": prompt, "texts": texts, "prints": sorted(prints)})

    def fair(self, tenant, dice):
        """Ask, in one of several ways."""
        with self.client(tenant) as client:
            while not self.over:
                prompt, kind = dice.choice(PROMPTS), dice.random()
                if kind < 0.5:
                    found = self.note(
                        tenant, client.post("/v1/completions", json=fields(prompt, n=dice.choice([1, 1, 2])))
                    )
                    if found.status_code == 200:
                        body = found.json()
                        self.check(
                            tenant, prompt, [one["text"] for one in body["choices"]], [body["system_fingerprint"]]
                        )
                elif kind < 0.6:
                    self.note(tenant, client.post("/v1/completions", json=fields(prompt, forget=["b"], top_p=2)))
                else:
                    self.stream(client, tenant, prompt, dice.choice([None, None, 1, 5]))
                time.sleep(dice.random() / 10)

    def stream(self, client, tenant, prompt, events):
        """Read a stream to its end, or so many events of it."""
        text, prints = "", set()
        with client.stream("POST", "/v1/completions", json=fields(prompt, stream=True)) as found:
            self.note(tenant, found)
            for line in found.iter_lines():
                if found.status_code == 200 and line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    text, prints = text + event["choices"][0]["text"], {*prints, event["system_fingerprint"]}
                    if events is not None and (events := events - 1) < 0:
                        return
        if found.status_code == 200:
            self.check(tenant, prompt, [text], prints)

    def hostile(self, tenant, dice):
        """Do what a server should not suffer from."""
        acts = [*REFUSED, *TAKEN, "raw", "key", "leave", "leave", "leave", "unread"]
        with self.client(tenant) as client:
            while not self.over:
                act = dice.choice(acts)
                if isinstance(act, dict):
                    self.note(tenant, client.post("/v1/completions", json=fields(PROMPTS[0]) | act))
                elif act == "raw":
                    self.note(tenant, client.post("/v1/completions", content=b"[" * dice.choice([1, 10**5])))
                elif act == "key":
                    self.note(tenant, client.get("/v1/models", headers={"Authorization": "Bearer uf-x"}))
                else:
                    self.leave(tenant, dice.random() * (0.2 if act == "leave" else 5))

    def leave(self, tenant, seconds):
        """Send a request and go away without having read."""
        sent = json.dumps(fields(PROMPTS[0], max_tokens=200, n=4, stream=True, logprobs=20)).encode()
        lines = [
            "POST /v1/completions HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer uf-{tenant}",
            f"Content-Length: {len(sent)}",
        ]
        with socket.create_connection(self.address, 60, (HOSTILE, 0)) as made:
            made.sendall("\r\n".join([*lines, "", ""]).encode() + sent)
            time.sleep(seconds)

    def run(self, act, tenant, number):
        """Act until all is over."""
        dice = random.Random(f"{tenant} {number}")
        while not self.over:
            try:
                act(tenant, dice)
            except (httpx.HTTPError, OSError) as error:
                with self.lock:
                    self.counts[type(error).__name__] += 1


def fields(prompt, **more):
    return {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **more}


def sample(pid):
    """Return (memory in MB, open files, threads) of a process."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    return round(pages * 4096 / 1e6, 1), len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))


def problems(soak, audit):
    """Return (unrecorded, open): see above."""
    lines = [
        json.loads(line) for path in sorted(audit.parent.glob("audit.jsonl*")) for line in path.read_text().splitlines()
    ]
    admitted = {line["id"]: line for line in lines if line["event"] == "admitted"}
    ended = {line["id"]: line for line in lines if line["event"] == "finished"}
    unrecorded = []
    for request, (tenant, status) in soak.seen.items():
        end = ended.get(request, {})
        right = end.get("tenant") == tenant and (end["status"] == status or (status, end["status"]) == (200, 499))
        right = not end if status == 401 else right  # nobody's request
        names = {each["name"] for each in admitted[request]["adapters"]} if request in admitted else set(SETS[tenant])
        if not right or names != set(SETS[tenant]) or (status == 200 and request not in admitted):
            unrecorded.append({"id": request, "tenant": tenant, "status": status, "end": end})
    twice = len([line for line in lines if line["event"] == "finished"]) - len(ended)
    return unrecorded, sorted(admitted.keys() - ended.keys()) + ["twice"] * twice


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--output", type=Path, help="write what was found here, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = run(Path(name), args.minutes)
    summary = {key: len(found[key]) for key in ("wrong", "unrecorded", "open", "errors")}
    print(json.dumps({**summary, "requests": sum(found["counts"].values()), "counts": found["counts"]}))
    for key in summary:
        for each in found[key][:5]:
            print(key, json.dumps(each)[:500])
    samples = found["samples"]
    quarter = len(samples) // 4 or 1
    second, last = (
        mean(one["MB"] for one in part) for part in (samples[quarter : 2 * quarter + 1], samples[-quarter:])
    )
    files = found["files"]
    print(f"memory: {second:.0f} MB in the second quarter, {last:.0f} in the last; files: {files[0]}, {files[1]} after")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(args.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
    sys.exit(any(summary.values()) or last > 1.05 * second or files[1] > files[0])


def run(folder, minutes):
    base = make_tiny(folder / "base")
    adapters = make_adapters(folder, base)
    tenants = {tenant: {"forget": names, "keys": [key_digest(f"uf-{tenant}")]} for tenant, names in SETS.items()}
    policy = {"adapters": {name: {"path": str(path)} for name, path in adapters.items()}, "tenants": tenants}
    audit = folder / "audit.jsonl"
    options = ["--base", str(base), "--model-name", MODEL, "--audit", str(audit)]
    started = server(folder, policy, *options)
    with started as (address, process):
        soak, samples, began = Soak(address), [], time.monotonic()
        soak.learn()
        time.sleep(1)
        before = sample(process.pid)[1]
        threads = [
            Thread(
                target=soak.run,
                args=(soak.hostile if tenant.startswith("hostile") else soak.fair, tenant, n),
                daemon=True,
            )
            for tenant in SETS
            for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        while (passed := time.monotonic() - began) < 60 * minutes:
            time.sleep(min(15, 60 * minutes - passed + 0.1))
            one = dict(zip(("MB", "files", "threads"), sample(process.pid), strict=True))
            samples.append({"seconds": round(time.monotonic() - began), **one, "requests": sum(soak.counts.values())})
            print(samples[-1], "wrong", len(soak.wrong), flush=True)
        soak.over = True
        for thread in threads:
            thread.join(60)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "active_answers 0.0" not in httpx.get(f"{soak.url}/metrics").text:
            time.sleep(0.2)
        time.sleep(2)
        files = before, sample(process.pid)[1]
    log = started.log.read_text()
    errors = re.findall(r"(?m)^.*(?:ERROR|Traceback|Exception).*$", log) + [
        s for s in soak.counts if isinstance(s, int) and s >= 500
    ]
    unrecorded, left = problems(soak, audit)
    counts = {str(status): count for status, count in soak.counts.items()}
    return {
        "counts": counts,
        "wrong": soak.wrong,
        "unrecorded": unrecorded,
        "open": left,
        "errors": errors,
        "samples": samples,
        "files": files,
    }


if __name__ == "__main__":
    main()
