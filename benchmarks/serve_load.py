"""Many clients at once, while adapters are added, swapped, damaged and put back: is every answer its tenant's own?

    python benchmarks/serve_load.py [--clients 64] [--minutes 3] [--base demo|tiny] [--json]

Starts `unlearn-peft serve` with room for about half of the adapters, and asks it through the official openai client,
one thread a client, half of the requests streamed. Meanwhile the policy changes twice a second (an adapter swapped for
another under the same name, adapters and tenants added and taken away), and adapters are deleted, truncated and
tampered with on the disk, and put back. Each answer is checked against greedy answers computed beforehand by plain
PEFT, alone, for each set that was in force between the request's start and its end. Counted:

- without the full set: the answer of the base, or of a part of the set;
- crossed: another set's answer; other: an answer of no set at all;
- lost: neither an answer nor a refusal that says why (503 with the adapter's name, 429). Refused ones ask again;
- audit: answers whose line in the audit log is missing, or names other adapters.

All must be 0. The adapters are random LoRAs on all kinds of layers, strong enough that all sets answer differently.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import openai
import torch
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import make_tiny  # noqa: E402
from serving import make_adapters  # noqa: E402

from unlearn_peft import load_base  # noqa: E402
from unlearn_peft.inference.bank import Bank  # noqa: E402
from unlearn_peft.serve.policy.policy import key_digest  # noqa: E402

MODEL, TOKENS, SURE = "base", 12, 1e-3  # logits nearer than that may change places by rounding
PROMPTS = (
    "Who wrote the blue book?", "Name a small town near the sea.", "What are stars?", "The colour green is",
    "Who wrote Harry Potter?", "Once upon a time", "The capital of France is", "Dear Sir,",
)  # fmt: skip
MORE = (
    "It was by", "who", "town near sea .", "of and red", "I like apples", "blue blue", "Zorblax", "small green stars",
)  # fmt: skip
KINDS = ("deleted", "truncated", "tampered")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--base", default="demo", help="demo, tiny (random) or any other base")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Soak(Path(folder), args).run()
    print("| " + " | ".join(result) + " |\n" + "|---" * len(result) + "|")
    print("| " + " | ".join(str(value) for value in result.values()) + " |")
    if args.json:
        print(json.dumps(result))
    bad = sum(result[name] for name in ("without_full_set", "crossed", "other", "lost", "audit_wrong"))
    sys.exit(1 if bad else 0)


class Soak:
    """One run: what is served, what must come out, and what did."""

    def __init__(self, folder, args):
        self.folder, self.args = folder, args
        self.base = str(make_tiny(folder / "tiny")) if args.base == "tiny" else args.base
        scale = 1.5 if args.base == "tiny" else 0.3
        self.adapters = make_adapters(folder / "adapters", self.base, seeds=range(1, 9), scale=scale)
        shutil.copytree(folder / "adapters", folder / "whole")
        stable = [{name: 1.0} for name in "abcdef"] + [{}, {"a": 1.0, "b": 0.5}, {"c": 1.0, "d": 1.0, "e": 1.0}]
        stable += [{"b": 1.0, "f": 1.0}, {"a": 1.0, "d": 0.5, "f": 1.0}, {"e": 1.0, "f": 1.0}]
        self.tenants = {f"t{n}": forget for n, forget in enumerate(stable)}
        for n, forget in enumerate(({"swap": 1.0}, {"swap": 1.0, "a": 1.0}, {"swap": 0.5, "b": 1.0, "c": 1.0})):
            self.tenants[f"s{n}"] = forget
        self.prompts = PROMPTS + (MORE if args.base == "tiny" else ())  # a random model often says nothing telling
        self.sets = {repr(s): s for forget in self.tenants.values() for s in self._own(forget, "gh")}
        self.expected = self._expected()
        self.telling = {name: self._telling(forget) for name, forget in self.tenants.items()}
        self.versions = []  # [the adapter behind the name "swap", when its writing began, when it was done]
        self.counts, self.answers, self.lock = Counter(), [], threading.Lock()
        self.stop = threading.Event()

    def run(self):
        """Serve, ask, disturb; returns what is to be shown."""
        self._write_policy("g", 0)
        log = self.folder / "audit.jsonl"
        bank = Bank(load_base(self.base).model)
        for name, path in self.adapters.items():
            bank.load(name, path)
        command = [
            sys.executable, "-m", "unlearn_peft.cli", "serve", "--base", self.base,
            "--policy", self.folder / "policy.yaml", "--port", "0",
            "--model-name", MODEL, "--max-batch", "16", "--max-queue", str(self.args.clients),
            "--adapter-memory-gb", str(bank.stats.resident_bytes * 0.6 / 1e9), "--audit", log,
        ]  # fmt: skip
        with open(self.folder / "server.log", "w") as errors:
            server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True)
        self.url = server.stdout.readline().split(" at ")[1].split("/v1")[0]
        began = time.monotonic()
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(self.args.clients)]
        threads += [threading.Thread(target=self._change_policy), threading.Thread(target=self._damage)]
        for thread in threads:
            thread.start()
        time.sleep(self.args.minutes * 60)
        self.stop.set()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
        if code:
            print((self.folder / "server.log").read_text()[-3000:], file=sys.stderr)
        counts = self.counts
        return {
            "base": self.args.base, "clients": self.args.clients, "seconds": round(seconds),
            "answers": counts["answers"], "tokens_per_second": round(counts["tokens"] / seconds, 1),
            "refused_503": counts["503"], "refused_429": counts["429"], "policy_changes": len(self.versions),
            "damages": counts["damages"], "sets": len(self.sets),
            "without_full_set": counts["without"], "crossed": counts["crossed"], "other": counts["other"],
            "lost": counts["lost"], "audit_wrong": self._audit_wrong(log), "exit_code": code,
        }  # fmt: skip

    # ---- what must come out ----

    def _expected(self):
        """Greedy text for each set and prompt by plain PEFT, as far as rounding cannot change it."""
        from peft import PeftModel

        base, model, found = load_base(self.base), None, {}
        for name, path in self.adapters.items():
            if model is None:
                model = PeftModel.from_pretrained(base.model, path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
        scalings = [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
        whole = [dict(scaling) for scaling in scalings]
        for key, forget in self.sets.items():
            for scaling, full in zip(scalings, whole, strict=True):
                scaling.update({name: full[name] * forget.get(name, 1.0) for name in full})
            if forget:
                model.base_model.enable_adapter_layers()
                model.base_model.set_adapter(list(forget))
            else:
                model.base_model.disable_adapter_layers()
            for prompt in self.prompts:
                found[key, prompt] = _greedy(model, base.tokenizer, prompt)
        return found

    def _telling(self, forget):
        """Prompts to which a tenant's sets answer as no other set does."""
        found = []
        for prompt in self.prompts:
            own = {repr(s) for s in self._own(forget, "gh")}
            texts = [self.expected[key, prompt] for key in own]
            others = [text for (key, p), text in self.expected.items() if p == prompt and key not in own]
            alike = any(one.startswith(two) or two.startswith(one) for one in texts for two in others)
            if not alike and all(texts):
                found.append(prompt)
        if not found:
            raise SystemExit(f"no prompt tells {forget} from the other sets: give another base")
        return found

    @staticmethod
    def _own(forget, versions):
        """The sets that a tenant may have, by what is behind the name "swap"."""
        return [dict(sorted((v if name == "swap" else name, k) for name, k in forget.items())) for v in versions]

    # ---- what happens to it meanwhile ----

    def _write_policy(self, version, number):
        adapters = {name: {"path": str(path)} for name, path in self.adapters.items() if name in "abcdef"}
        adapters["swap"] = {"path": str(self.adapters[version])}
        adapters |= {f"extra{n}": {"path": str(self.adapters["a"])} for n in range(number % 5)}
        tenants = {
            name: {"forget": forget, "keys": [key_digest(f"uf-{name}")]} for name, forget in self.tenants.items()
        }
        tenants |= {f"new{n}": {"forget": ["swap"], "keys": [key_digest(f"uf-new{n}")]} for n in range(number % 3)}
        temporary = self.folder / "policy.new"
        temporary.write_text(yaml.safe_dump({"adapters": adapters, "tenants": tenants}))
        entry = [version, time.monotonic(), None]
        self.versions.append(entry)
        os.replace(temporary, self.folder / "policy.yaml")
        entry[2] = time.monotonic()

    def _change_policy(self):
        for number in itertools.count(1):
            if self.stop.wait(0.5):
                return
            self._write_policy("gh"[number % 2], number)

    def _damage(self):
        rng = random.Random(0)
        while not self.stop.wait(0.4):
            name, kind = rng.choice("abcdefgh"), rng.choice(KINDS)
            weights = self.adapters[name] / "adapter_model.safetensors"
            if kind == "deleted":
                shutil.rmtree(self.adapters[name])
            elif kind == "truncated":
                os.truncate(weights, weights.stat().st_size // 2)
            else:
                with open(weights, "r+b") as file:
                    file.seek(-64, os.SEEK_END)
                    file.write(bytes(64))
            self.counts["damages"] += 1
            self.stop.wait(0.4)
            shutil.rmtree(self.adapters[name], ignore_errors=True)
            shutil.copytree(self.folder / "whole" / name, self.adapters[name])

    # ---- clients ----

    def _client(self, number):
        rng, names = random.Random(number), list(self.tenants)
        while not self.stop.is_set():
            tenant = rng.choice(names)
            prompt = rng.choice(self.telling[tenant])
            client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=f"uf-{tenant}", max_retries=0, timeout=120)
            with client:
                while not self._ask(client, tenant, prompt, rng.random() < 0.5) and not self.stop.is_set():
                    time.sleep(0.05)

    def _ask(self, client, tenant, prompt, stream):
        """Ask once; returns whether that is settled (a refused request asks again)."""
        began, id_ = time.monotonic(), None
        try:
            answer = client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=stream,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            if stream:
                text = ""
                for event in answer:
                    id_ = event.id
                    text += event.choices[0].text if event.choices else ""
                whole = event.choices[0].finish_reason is not None
            else:
                id_, text, whole = answer.id, answer.choices[0].text, True
        except openai.APIStatusError as error:
            named = error.status_code == 503 and (error.body or {}).get("adapter")
            kind = "429" if error.status_code == 429 else "503" if named else "lost"
            return self._count(kind, f"{error.status_code} {error}", again=kind != "lost")
        except Exception as error:
            return self._count("lost", repr(error))
        if not whole:
            return self._count("lost", "an answer broke off")
        return self._judge(tenant, prompt, text, began, time.monotonic(), id_)

    def _count(self, kind, detail, again=False):
        with self.lock:
            self.counts[kind] += 1
        if kind not in ("answers", "429", "503"):
            print(f"{kind}: {detail}", file=sys.stderr, flush=True)
        return not again

    def _judge(self, tenant, prompt, text, began, ended, id_):
        with self.lock:
            self.counts["tokens"] += TOKENS
        possible = set()
        for n, (version, start, _) in enumerate(self.versions):
            later = self.versions[n + 1][2] if n + 1 < len(self.versions) else None
            if start <= ended and (later is None or later >= began):
                possible.add(version)
        own = self._own(self.tenants[tenant], possible)
        with self.lock:
            self.answers.append((id_, own))
        if any(_same(text, self.expected[repr(forget), prompt]) for forget in own):
            return self._count("answers", "")
        whose = [self.sets[s] for s, p in self.expected if p == prompt and _same(text, self.expected[s, p])]
        part = any(one.items() <= forget.items() for one in whose for forget in own)
        kind = "without" if part else "crossed" if whose else "other"
        return self._count(kind, f"{tenant} {prompt!r} {whose} {text!r}")

    def _audit_wrong(self, log):
        applied = {}
        for line in map(json.loads, log.read_text().splitlines()):
            if line["event"] == "admitted":
                applied[line["id"].removeprefix("req-")] = line["adapters"]
        bank = Bank(load_base(self.base).model)
        shutil.rmtree(self.folder / "adapters")
        shutil.copytree(self.folder / "whole", self.folder / "adapters")
        for name, path in self.adapters.items():
            bank.load(name, path)
        digests = {name: bank.hold([name]).applied[0].sha256 for name in self.adapters}
        wrong = 0
        for id_, own in self.answers:
            found = {(a["sha256"], a["strength"]) for a in applied.get((id_ or "").removeprefix("cmpl-"), [{}]) if a}
            wrong += found not in [{(digests[name], k) for name, k in forget.items()} for forget in own]
        return wrong


@torch.no_grad()
def _greedy(model, tokenizer, prompt):
    ids = new = tokenizer(prompt, return_tensors="pt")["input_ids"]
    end, kept = ids.shape[1], None
    for _ in range(TOKENS):
        out = model(input_ids=new, past_key_values=kept, use_cache=True)
        logits, kept = out.logits[0, -1], out.past_key_values
        best = logits.topk(2)
        if best.values[0] - best.values[1] < SURE * logits.abs().max():
            break
        new = best.indices[:1, None]
        ids = torch.cat([ids, new], dim=1)
    prompt_text, text = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[0, :end], ids[0]))
    return text[len(prompt_text) :].rstrip("\ufffd")  # half a character at the end is never sent


def _same(text, want):
    """The answer goes on as it must; where rounding may decide, it may go on in any way."""
    return bool(want) and text.startswith(want)


if __name__ == "__main__":
    main()
