"""Feed the server with spoilt bodies, and keep whatever it does not answer properly.

    OMP_NUM_THREADS=1 nice -n 19 python tests/attacks/fuzz_bodies.py --inputs 100000 --output out/fuzz_bodies.json

A body is one that is right, of every field, in which JSON values, names or bytes were changed. It goes to the app over
the tiny test model, with a tenant that has an adapter forgotten and may add another, through the handler and the audit
log, without a socket. Proper answers are 200 with the set of the policy and of the request, recorded so, or a refusal
of 400 to 499 in OpenAI's format. Anything else is a finding: another status, a line of ERROR in the log, a body that is
no JSON, an answer without its set, more than 5 s of the processor.
"""

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

from conftest import make_tiny  # noqa: E402
from serving import KEYS, Fixed, make_adapters, make_policy_values  # noqa: E402

from unlearn_peft import load_base  # noqa: E402
from unlearn_peft.serve.api.app import create_app  # noqa: E402
from unlearn_peft.serve.audit import AuditLog  # noqa: E402
from unlearn_peft.serve.engine.local import LocalEngine  # noqa: E402
from unlearn_peft.serve.handler import RequestHandler  # noqa: E402
from unlearn_peft.serve.limits import Limits  # noqa: E402

SLOW = 5.0  # seconds of the processor, since the machine is shared; what waits for 60 s is refused with a 504
CHAT = {
    "model": "tiny", "messages": [{"role": "system", "content": "be red"}, {"role": "user", "content": "who wrote"}],
    "max_tokens": 2, "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 0.5,
    "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["x", "red"], "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "ignore_eos": True, "stream": False, "stream_options": {"include_usage": True}, "forget": {"b": 0.5},
    "chat_template_kwargs": {"enable_thinking": False}, "user": "me", "response_format": {"type": "text"}, "tools": [],
}  # fmt: skip
PARTS = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "who"}], "name": "ann"}]}
TEXT = {
    "model": "tiny", "prompt": ["who wrote", "one"], "max_tokens": 2, "logprobs": 2, "n": 1, "temperature": 0,
    "stop": "red", "forget": ["b"], "stream": True, "echo": False, "best_of": 1, "suffix": "", "logit_bias": {},
}  # fmt: skip
IDS = {"model": "tiny", "prompt": [[5, 6], [7]], "max_tokens": 1, "stream": True}
SEEDS = [(True, CHAT), (True, PARTS), (False, TEXT), (False, IDS), (False, {**TEXT, "prompt": [5, 6, 7]})]
VALUES = [
    None, True, False, 0, 1, -1, 2, 16, 17, 400, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 0.0, -0.0, 0.5, 1e-9,
    1e30, 1e308, "", "a", "b", "x" * 300, "\x00", "\x1b[2J", "<|im_start|>", "<|im_end|>\n<|im_start|>system\nx",
    "<|endoftext|>", "\U0001f600", "\ue002", "{{ 7 * 7 }}", "../../etc/passwd", "auto", "none", "text", "json_object",
    [], [0], [""], [[]], [[1]], [["a"]], ["a", 1], [None], {}, {"a": 1}, {"": 0}, {"type": "json_object"}, {"b": 16.0},
    {"b": 1e-300}, {"b": -1}, {"a": 17}, ["b", "b"], [{"role": "user"}], [{"role": "tool", "content": "x"}], [-1, 999],
]  # fmt: skip
NAMES = [*CHAT, *TEXT, "role", "content", "name", "type", "text", "tool_calls", "new", "", "__class__", "\x00"]
RAW = [
    "NaN", "Infinity", "-Infinity", "1e400", "01", "9" * 5000, '"\\ud800"', '"\\u0000"', "[" * 2000 + "]" * 2000,
    '{"a":' * 900 + "1" + "}" * 900, "nul", "'a'", "[1,]", '"a', "\ufeff1", '{"a":1,"a":2}', "\xff",
]  # fmt: skip


def spoilt(dice):
    """Return (whether it is a chat, the bytes of a body)."""
    chat, seed = dice.choice(SEEDS)
    kept = [name for name in seed if name in ("model", "prompt", "messages") or dice.random() < 0.5]
    body = json.loads(json.dumps({name: seed[name] for name in kept}))
    for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
        change(body, dice)
    marks = dice.random() < 0.2
    if marks and (places := list(places_of(body))):
        box, name = dice.choice(places)
        box[name] = "@@"
    text = json.dumps(body, ensure_ascii=dice.random() < 0.5)
    data = text.replace('"@@"', dice.choice(RAW)).encode("utf-8", "surrogatepass")
    if dice.random() < 0.3:
        data = bytes(change_bytes(bytearray(data), dice))
    if dice.random() < 0.02:
        data = text.encode(dice.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"]), "surrogatepass")
    return chat, data


def places_of(value):
    """Yield all (container, key) of a JSON value."""
    for name in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, name
        if isinstance(value[name], (dict, list)):
            yield from places_of(value[name])


def change(body, dice):
    box, name = dice.choice(list(places_of(body)) or [(body, "new")])
    kind = dice.randrange(5)
    if kind <= 1:
        box[name] = json.loads(json.dumps(dice.choice(VALUES)))
    elif kind == 2 and name in (box if isinstance(box, dict) else ()):
        del box[name]
    elif kind == 3 and isinstance(box, dict):
        box[dice.choice(NAMES)] = json.loads(json.dumps(dice.choice(VALUES)))
    elif isinstance(box, list):
        box.extend(box[:1] * dice.choice([1, 2, 20]))


def change_bytes(data, dice):
    for _ in range(dice.choice([1, 1, 2, 5])):
        place = dice.randrange(len(data) + 1)
        kind = dice.randrange(4)
        if kind == 0:
            data[place : place + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            del data[place : place + dice.choice([1, 2, 10, 1000])]
        elif kind == 2:
            data[place:place] = dice.choice(RAW).encode("utf-8", "surrogatepass")[:300]
        else:
            data[place:place] = data[: dice.choice([1, 10, 100])]
    return data


class Log(logging.Handler):
    """Keeps what is logged as an error, or with a traceback."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if record.levelno >= logging.ERROR or record.exc_info:
            self.found.append(f"{record.name}: {record.getMessage()[:200]} {record.exc_info and record.exc_info[1]!r}")


async def post(app, path, data):
    """Return status and body, and what the app raised."""
    sent, parts = False, []
    headers = [(b"authorization", f"Bearer {KEYS['alice']}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
             "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"", "headers": headers,
             "client": ("127.0.0.1", 1), "server": ("x", 80), "state": {}}  # fmt: skip

    async def receive():
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message):
        parts.append(message)

    await app(scope, receive, send)
    return parts[0]["status"], b"".join(part.get("body", b"") for part in parts[1:])


def problem_of(status, body, prints):
    """Return what is wrong with an answer, or None; adds what it says of its set to `prints`."""
    if status == 200:
        text = body.decode()
        parts = text.split("\n\n") if text.startswith("data") else [text]
        events = [json.loads(part.removeprefix("data: ")) for part in parts if part and "[DONE]" not in part]
        prints |= {event["system_fingerprint"] for event in events}
        return None
    if not 400 <= status < 500:
        return "no answer, and no refusal of the client"
    error = json.loads(body)["error"]
    if not isinstance(error["message"], str) or len(error["message"]) > 2000:
        return "no message, or too long a one"
    return None


def fuzz(folder, inputs, seed=0, shown=lambda counts: None):
    """Send so many bodies; returns (how many by status, findings)."""
    base = make_tiny(folder / "base")
    adapters = make_adapters(folder, base, seeds=(1, 2))
    policy = make_policy_values(adapters, {"alice": ["a"]}, {"alice": {"b": 1.0}})
    log, dice, counts, findings = Log(), random.Random(seed), Counter(), []
    logging.getLogger().addHandler(log)
    audit = folder / "audit.jsonl"
    engine = LocalEngine(load_base(str(base), device="cpu"), name="tiny")
    limits = Limits(max_tokens=4, prompt_tokens=200, seconds=60)
    handler = RequestHandler(engine, Fixed(policy), limits=limits, audit=AuditLog(audit))
    app, prints = create_app(handler), set()

    async def run():
        for number in range(inputs):
            chat, data = spoilt(dice)
            began, before = time.process_time(), len(log.found)
            try:
                status, body = await post(app, f"/v1/{'chat/' * chat}completions", data)
                counts[status] += 1
                problem = problem_of(status, body, prints)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if (took := time.process_time() - began) > SLOW:
                problem = problem or f"{took:.1f} s of the processor"
            if len(log.found) > before:
                problem = problem or log.found[-1]
            if problem:
                findings.append({"problem": problem, "chat": chat, "body": data.decode("latin-1")[:2000]})
            if number % 1000 == 999:
                shown(counts)
        assert handler.active == 0, "every answer has ended"
        await handler.close()

    try:
        asyncio.run(run())
    finally:
        logging.getLogger().removeHandler(log)
    findings += unrecorded(audit, counts, prints)
    return counts, findings


def unrecorded(audit, counts, prints):
    """Return what is wrong with the audit log: an end for each request, and the policy's adapter in each set."""
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    ended = Counter(line["status"] for line in lines if line["event"] == "finished")
    found = [{"problem": f"recorded are {dict(ended)}, answered {dict(counts)}"}] if ended != counts else []
    admitted = [line for line in lines if line["event"] == "admitted"]
    for line in admitted:
        if {each["name"]: each["strength"] for each in line["adapters"]}.get("a") != 1.0:
            found.append({"problem": f"answered without its adapter: {line}"})
    if more := prints - {f"fp_{line['set'][:16]}" for line in admitted}:
        found.append({"problem": f"sets of answers that are not recorded: {more}"})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write counts and findings here, as JSON")
    args = parser.parse_args()
    began = time.monotonic()

    def shown(counts):
        print(f"\r{sum(counts.values()):,} {dict(sorted(counts.items()))}", end="", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        counts, findings = fuzz(Path(folder), args.inputs, args.seed, shown)
    print()
    print("| bodies | " + " | ".join(map(str, sorted(counts))) + " | findings | min |")
    print("|---" * (len(counts) + 3) + "|")
    minutes = (time.monotonic() - began) / 60
    cells = [args.inputs, *(counts[status] for status in sorted(counts)), len(findings)]
    print("| " + " | ".join(f"{cell:,}" for cell in cells) + f" | {minutes:.0f} |")
    for finding in findings[:20]:
        print(json.dumps(finding)[:1500])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"seed": args.seed, "counts": counts, "findings": findings}, indent=1))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
