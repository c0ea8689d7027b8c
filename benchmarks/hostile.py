"""What a hostile client costs another tenant: its answers and /healthz, alone and beside each attack, in one run.

    python benchmarks/hostile.py [--adapter out/harry_potter] [--seconds 20] [--only NAME ...] [--output FILE]

A server with its default limits serves two tenants on loopback. One asks the same question again and again, 16 tokens,
and somebody asks for /healthz five times a second; a client in a process of its own runs one of ATTACKS in a loop
meanwhile, from its own address, with another tenant's key or none. A line for each: milliseconds of /healthz, the
median and the 95th of 100; of an answer alone, measured just before, and beside the attack; the ratio of the two
medians; what the hostile client got, by status; the server's memory in MB. Only ratios mean anything. `--page` writes
the table into docs/serving.md.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Thread

import httpx
from readme import put

from unlearn_peft.files.atomic import atomic_file
from unlearn_peft.serve.policy.policy import key_digest

ROOT = Path(__file__).parent.parent
KEYS = {"other": "uf-other", "hostile": "uf-hostile"}
QUESTION, MODEL = "Name the author of the Harry Potter books.", "HuggingFaceTB/SmolLM2-135M-Instruct"
HOSTILE = "127.0.0.2"  # the hostile client's own address: those who share one share its connections
MEGABYTE = 990_000  # what the server takes of a body


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ROOT / "out" / "harry_potter", help="both tenants forget it")
    parser.add_argument("--seconds", type=float, default=20, help="of each attack")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, metavar="NAME", default=list(ATTACKS),
                        help=f"of {', '.join(ATTACKS)}; all by default")  # fmt: skip
    parser.add_argument("--output", type=Path, help="write the figures here too, as JSON")
    parser.add_argument("--page", action="store_true", help="write the table into docs/serving.md")
    args = parser.parse_args()
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder), two_tenants(args.adapter), "--base", "demo") as (address, process),
    ):
        for name in args.only:
            found[name] = one = measure(address, ATTACKS[name], args.seconds)
            one["mb"] = round(resident(process.pid) / 1e6)
            print(name, json.dumps(one), file=sys.stderr, flush=True)
    printed = table(found)
    print(printed)
    if args.output:
        with atomic_file(args.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
    if args.page:
        put(ROOT / "docs" / "serving.md", "hostile", printed)


def two_tenants(adapter):
    entry = {"forget": {"hp": 1.0}}
    tenants = {name: {**entry, "keys": [key_digest(key)]} for name, key in KEYS.items()}
    return {"adapters": {"hp": {"path": str(adapter.absolute())}}, "tenants": tenants}


class server:
    """The command that users run, with a policy; ends it with SIGTERM."""

    def __init__(self, folder, policy, *options):
        (folder / "policy.yaml").write_text(json.dumps(policy))  # JSON is YAML
        self.log = folder / "log"
        command = [sys.executable, "-m", "unlearn_peft.cli", "serve", "--port", "0",
                   "--policy", str(folder / "policy.yaml"), *options]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self):
        while not (ready := re.search(r"serving .* at http://([\d.]+):(\d+)/v1", self.log.read_text())):
            if self.process.poll() is not None:
                sys.exit(f"the server ended:\n{self.log.read_text()}")
            time.sleep(0.2)
        return (ready[1], int(ready[2])), self.process

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def measure(address, attack, seconds):
    """Return the milliseconds of answers alone, beside an attack and of /healthz then, and the attacker's statuses."""
    over, healthz, url = multiprocessing.Event(), [], f"http://{address[0]}:{address[1]}"
    ours, theirs = multiprocessing.Pipe()

    def probe():
        with httpx.Client(base_url=url, timeout=120) as client:
            while not over.wait(0.2):
                healthz.append(timed(lambda: client.get("/healthz").raise_for_status()))

    def answers(seconds):
        took, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            took.append(timed(lambda: ask(client)))
        return quantiles(took)

    hostile, prober = multiprocessing.Process(target=run, args=(attack, address, over, theirs)), Thread(target=probe)
    with httpx.Client(base_url=url, timeout=600) as client:
        while "active_answers 0.0" not in client.get("/metrics").text:  # those of the last attack
            time.sleep(0.1)
        ask(client)  # warm
        alone = answers(seconds / 2)
        hostile.start()
        time.sleep(1)
        prober.start()
        beside = answers(seconds)
    over.set()
    prober.join()
    got = ours.recv()
    hostile.join()
    return {"healthz": quantiles(healthz), "alone": alone, "beside": beside, "got": got}


def ask(client):
    head = {"Authorization": f"Bearer {KEYS['other']}", "Content-Type": "application/json"}
    client.post("/v1/chat/completions", content=body(), headers=head).raise_for_status()


# ---- the hostile client ----


def run(attack, address, over, result):
    """Run an attack until `over`, on as many connections as it names, with what the others leave of the processors."""
    os.nice(19)  # it would have a machine of its own
    got, (count, act) = Counter(), attack

    def one():
        connection = None
        while not over.is_set():
            try:
                connection = connection or socket.create_connection(address, 300, (HOSTILE, 0))
                status, connection = act(connection, over)
                got[status] += 1
            except OSError as error:
                got[type(error).__name__] += 1
                connection = None

    threads = [Thread(target=one, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    over.wait()
    for thread in threads:
        thread.join(1)
    result.send(dict(got))


def numbered(sent):
    """Write another number in place of NUMBER, so that no request begins like another."""
    return sent.replace(NUMBER, b"%08d" % next(NUMBERS))


def asking(sent, connections=1):
    """An attack that sends a request, and the next as soon as that is answered."""

    def act(connection, _):
        connection.sendall(numbered(sent))
        got = b""
        while b"\r\n\r\n" not in got:
            if not (part := connection.recv(65536)):
                return "closed", None
            got += part
        head, _, begun = got.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        rest = int(length[1]) - len(begun) if length else 0
        while rest > 0 and (part := connection.recv(min(rest, 65536))):
            rest -= len(part)
        if b"connection: close" in head:
            connection.close()
            connection = None
        return int(got[9:12]), connection

    return connections, act


def leaving(sent, connections, after=0):
    """An attack that goes away as soon as its request is sent, or after so many bytes of the answer."""

    def act(connection, _):
        connection.sendall(numbered(sent))
        left = after
        while left > 0 and (part := connection.recv(left)):
            left -= len(part)
        connection.close()
        return "left", None

    return connections, act


def staying(sent, connections):
    """An attack that never reads what it is sent."""

    def act(connection, over):
        connection.sendall(sent)
        over.wait()
        connection.close()
        return "unread", None

    return connections, act


def post(raw=None, key=KEYS["hostile"], **fields):
    content = body(**fields) if raw is None else raw
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {key}",
             "Content-Type: application/json", f"Content-Length: {len(content)}", "", ""]  # fmt: skip
    return "\r\n".join(lines).encode() + content


def get(path, *headers):
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def body(content=QUESTION, messages=None, **fields):
    messages = messages or [{"role": "user", "content": content}]
    fields = {"model": MODEL, "messages": messages, "max_tokens": 16, "temperature": 0, **fields}
    return json.dumps(fields).encode()


NUMBER, NUMBERS = b"00000000", itertools.count(1)
STOPS = [chr(97 + n) * 256 for n in range(16)]
HEADERS = [f"X-{n}: {'y' * 50}" for n in range(800)]  # 50 kB, what a head may have
ATTACKS = {  # name -> connections, what each does again and again
    "n of a billion": asking(post(n=1_000_000_000)),
    "1 MB of wrong types": asking(post(messages=(1,) * (MEGABYTE // 3))),
    "1 MB of brackets": asking(post(b"[" * MEGABYTE), 4),
    "1 MB prompt": asking(post(content="a " * (MEGABYTE // 2)), 4),
    "1 MB model name": asking(post(model="m" * MEGABYTE), 4),
    "longest prompt": asking(post(content="a " * 60_000), 4),  # that is tokenized at all
    "unread streams": staying(post(max_tokens=512, stream=True, logprobs=True, top_logprobs=20), 8),
    "flood": asking(post(max_tokens=64), 40),
    "flood of one token": asking(post(max_tokens=1), 40),
    "flood of 400-token prompts": asking(post(content="one " * 400, max_tokens=1), 40),
    "flood of prompts, none like another": asking(post(content=f"{NUMBER.decode()} {'one ' * 400}", max_tokens=1), 40),
    "flood of logprobs and stops": asking(post(max_tokens=64, n=8, logprobs=True, top_logprobs=20, stop=STOPS), 40),
    "flood of sampling": asking(post(max_tokens=64, n=8, temperature=1, top_p=0.9, presence_penalty=1), 40),
    "requests left at once": leaving(post(max_tokens=64), 8),
    "streams left at once": leaving(post(max_tokens=64, stream=True), 8, after=300),
    "long prompts left at once": leaving(post(content=f"{NUMBER.decode()} {'one ' * 400}", stream=True), 8, after=300),
    "unknown keys": asking(post(key="uf-nobody"), 40),
    "unknown pages": asking(get("/v1/nothing"), 40),
    "50 kB of headers": asking(get("/v1/models", *HEADERS), 40),
    "no HTTP": asking(b"x" * 100 + b"\r\n\r\n", 8),
    "metrics": asking(get("/metrics"), 40),
    "health": asking(get("/healthz"), 40),
    "connections left at once": leaving(b"", 8),
}


def timed(do):
    began = time.perf_counter()
    do()
    return 1000 * (time.perf_counter() - began)


def quantiles(values):
    return [statistics.median(values), sorted(values)[math.ceil(0.95 * (len(values) - 1))]]


def resident(pid):
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return 0


def table(found):
    head = ("attack", "/healthz, ms", "alone, ms", "beside it, ms", "ratio", "hostile got", "MB")
    lines = [head, ["---"] * len(head)]
    for name, one in found.items():
        times = [", ".join(f"{value:.0f}" for value in one[what]) for what in ("healthz", "alone", "beside")]
        got = "; ".join(f"{count} times {status}" for status, count in one["got"].items())
        lines.append([name, *times, f"{one['beside'][0] / one['alone'][0]:.2f}", got, str(one["mb"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
