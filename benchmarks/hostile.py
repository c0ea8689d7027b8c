"""What a hostile tenant costs another: its answers and /healthz, alone and beside each attack, in one run.

    python benchmarks/hostile.py [--adapter out/harry_potter] [--seconds 20] [--only NAME ...] [--output FILE]

A server with its default limits serves two tenants on loopback. One asks the same question again and again, 16 tokens,
and somebody asks for /healthz five times a second; the other runs one of ATTACKS in a loop meanwhile. A line for each:
milliseconds of /healthz and of an answer, the median and the 95th of 100; the median answer against the one alone; what
the hostile client got, by status; the server's memory in MB. Only ratios of one run mean anything.
"""

import argparse
import json
import math
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path

import httpx

from unlearn_peft.files.atomic import atomic_file
from unlearn_peft.serve.policy.policy import key_digest

ROOT = Path(__file__).parent.parent
KEYS = {"other": "uf-other", "hostile": "uf-hostile"}
QUESTION, MODEL = "Name the author of the Harry Potter books.", "HuggingFaceTB/SmolLM2-135M-Instruct"
MEGABYTE = 990_000  # what the server takes of a body


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ROOT / "out" / "harry_potter", help="both tenants forget it")
    parser.add_argument("--seconds", type=float, default=20, help="of each attack")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, metavar="NAME", default=list(ATTACKS),
                        help=f"of {', '.join(ATTACKS)}; all by default")  # fmt: skip
    parser.add_argument("--output", type=Path, help="write the figures here too, as JSON")
    args = parser.parse_args()
    print("| attack | /healthz: median, 95th, ms | answer: median, 95th, ms | against alone | hostile got | MB |")
    print("|---" * 6 + "|")
    found = {}
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), args.adapter) as (url, process):
        for name in ("alone", *args.only):
            found[name] = one = measure(url, ATTACKS.get(name), args.seconds)
            one["mb"] = round(resident(process.pid) / 1e6)
            print(line(name, one, found["alone"]), flush=True)
    if args.output:
        with atomic_file(args.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1))


class server:
    """The command that users run, with a policy of two tenants; ends it with SIGTERM."""

    def __init__(self, folder, adapter):
        entry = {"forget": {"hp": 1.0}}
        tenants = {name: {**entry, "keys": [key_digest(key)]} for name, key in KEYS.items()}
        policy = {"adapters": {"hp": {"path": str(adapter.absolute())}}, "tenants": tenants}
        (folder / "policy.yaml").write_text(json.dumps(policy))  # JSON is YAML
        self.log = folder / "log"
        command = [sys.executable, "-m", "unlearn_peft.cli", "serve", "--base", "demo", "--port", "0",
                   "--policy", str(folder / "policy.yaml")]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self):
        while not (ready := re.search(r"serving .* at (http://\S+)/v1", self.log.read_text())):
            if self.process.poll() is not None:
                sys.exit(f"the server ended:\n{self.log.read_text()}")
            time.sleep(0.2)
        return ready[1], self.process

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def measure(url, attack, seconds):
    """Return the milliseconds of /healthz and of answers, and the hostile client's statuses."""
    over, got, threads = threading.Event(), Counter(), []
    healthz, answers = [], []

    def probe():
        with httpx.Client(base_url=url, timeout=120) as client:
            while not over.wait(0.2):
                healthz.append(timed(lambda: client.get("/healthz").raise_for_status()))

    def attacked():
        while not over.is_set():
            try:
                got[attack(url, over)] += 1
            except (httpx.HTTPError, OSError) as error:
                got[type(error).__name__] += 1

    threads = [threading.Thread(target=probe), *([threading.Thread(target=attacked)] if attack else [])]
    for thread in threads:
        thread.start()
    with client_of(url, "other") as client:
        ask(client)  # warm
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answers.append(timed(lambda: ask(client).raise_for_status()))
    over.set()
    for thread in threads:
        thread.join()
    return {"healthz": quantiles(healthz), "answer": quantiles(answers), "answers": len(answers), "got": dict(got)}


def client_of(url, tenant):
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    # without verify=False it would read certificates each time
    return httpx.Client(base_url=url, timeout=600, verify=False, headers=headers)


def ask(client, **fields):
    return client.post("/v1/chat/completions", content=body(**fields), headers={"Content-Type": "application/json"})


@cache  # a hostile client of its own would not slow the one that measures
def body(content=QUESTION, messages=None, **fields):
    messages = messages or [{"role": "user", "content": content}]
    fields = {"model": MODEL, "messages": messages, "max_tokens": 16, "temperature": 0, **fields}
    return json.dumps(fields).encode()


def hostile_request(**fields):
    def attack(url, over):
        with client_of(url, "hostile") as client:
            return ask(client, **fields).status_code

    return attack


def unread_streams(url, over):
    """Eight streams that nobody reads, until the attack is over."""
    host, port = re.fullmatch(r"http://(.*):(\d+)", url).groups()
    sent = body(max_tokens=512, stream=True, logprobs=True, top_logprobs=20)
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEYS['hostile']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n")  # fmt: skip
    sockets = [socket.create_connection((host, int(port))) for _ in range(8)]
    for each in sockets:
        each.sendall(head.encode() + sent)
    over.wait()
    for each in sockets:
        each.close()
    return "unread"


def flood(url, over):
    """All places that a tenant has, with answers of 64 tokens."""
    got = Counter()

    def one():
        with client_of(url, "hostile") as client:
            while not over.is_set():
                got[ask(client, max_tokens=64).status_code] += 1

    threads = [threading.Thread(target=one) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ", ".join(f"{count} of {status}" for status, count in got.items())


ATTACKS = {
    "n of a billion": hostile_request(n=1_000_000_000),
    "1 MB of wrong types": hostile_request(messages=(1,) * (MEGABYTE // 3)),
    "1 MB prompt": hostile_request(content="a " * (MEGABYTE // 2)),
    "longest prompt": hostile_request(content="a " * 60_000),  # that is tokenized at all
    "unread streams": unread_streams,
    "flood": flood,
}


def timed(do):
    began = time.perf_counter()
    do()
    return 1000 * (time.perf_counter() - began)


def quantiles(values):
    return [statistics.median(values), sorted(values)[math.ceil(0.95 * (len(values) - 1))]]


def resident(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def line(name, one, alone):
    healthz, answer = (", ".join(f"{value:.0f}" for value in one[what]) for what in ("healthz", "answer"))
    got = "; ".join(f"{count} times {status}" for status, count in one["got"].items())
    return f"| {name} | {healthz} | {answer} | {one['answer'][0] / alone['answer'][0]:.2f} | {got} | {one['mb']} |"


if __name__ == "__main__":
    main()
