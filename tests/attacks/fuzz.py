"""Feed `read_bundle` with spoilt adapters for as long as it takes, and keep whatever it does not answer properly.

    nice -n 19 python tests/attacks/fuzz.py --inputs 1000000 --output out/fuzz.json

Seeds are small adapters of every kind. An input is a seed in which bytes, the header's table, JSON values (by the
format's own grammar), numbers of tensors or a signature were changed. Proper answers are a `Bundle`, whose deltas are
then put beside a layer and must give finite numbers, or an `AdapterError` with a text that can be printed. Anything
else is a finding: another exception, an input over 2 s, or an adapter taken for signed that is not what was signed.
"""

import argparse
import base64
import hashlib
import json
import logging
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from unlearn_peft.adapters.read import read_bundle
from unlearn_peft.adapters.signing import new_key, sign
from unlearn_peft.adapters.trust import Trust
from unlearn_peft.errors import AdapterError
from unlearn_peft.inference.multi_lora import AdapterBatch, LoadedAdapter, WeightedAdapter

WEIGHTS, CONFIG, MANIFEST, SIGNATURE = "adapter_model.safetensors", "adapter_config.json", "forget.json", "model.sig"
SLOW = 2.0  # seconds for one input; the machine is shared
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**63, -(2**63), 2**64, 10**69, 0.0, -0.0, 1.5, 1e30, -1e30, 1e308,
    5e-324, "", "a", "..", "../../etc/passwd", "/etc/passwd", "os.system", "mypkg.evil:run", "(a+)+$", "(.*)*x",
    ".*" * 8, "[", "\x00", "\x1b[2J", "\xe9", "\U0001f600", "LORA", "DENSE_HEAD", "IA3", "F32", "BF16", "F16", "F64",
    "I8", "F8_E4M3", "C64", "BOOL", [], [0], [1, 2], [2, 4], ["a"], [["a"]], {}, {"a": 1}, {"q": 2}, {"q": {"q": 2}},
    {"parent_library": "os"},
]  # fmt: skip
RAW = [
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "01", "+1", ".5", "1e", "9" * 80, "9" * 5000, '"\\ud800"',
    '"\\udfff"', '"\\u0000"', "[" * 20 + "]" * 20, "[" * 40 + "]" * 40, "[" * 5000 + "]" * 5000,
    '{"a":' * 2000 + "1" + "}" * 2000, "[" * 300, '{"a":1,"a":2}', "nul", "'a'", "/**/1", "[1,]", '"a', "\ufeff1",
]  # fmt: skip
KEYS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_pattern", "layers_to_transform", "auto_mapping", "megatron_core", "megatron_config", "peft_type",
    "task_type", "modules_to_save", "bias", "base_model_name_or_path", "revision", "init_lora_weights", "new_field",
    "schema_version", "files", "base", "history", "metrics", "stack_of", "dtype", "shape", "data_offsets",
    "__metadata__", "fingerprint", "name",
]  # fmt: skip
NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e4, 1.0001e4, 3.4e38, 1e-38, 1e-45, -0.0, 0.0, 5e8]


def seeds():
    """Return seeds, each a dict of files."""
    generator = torch.Generator().manual_seed(0)

    def random_tensor(shape, dtype=torch.float32):
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    def lora(dtype=torch.float32, names=("m.q", "head"), r=2):
        return {
            f"base_model.model.{name}.lora_{side}.weight": random_tensor(shape, dtype)
            for name in names
            for side, shape in (("A", (r, 4)), ("B", (6, r)))
        }

    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q", "head"],
        "bias": "none", "use_rslora": False, "base_model_name_or_path": "tiny", "auto_mapping": None,
        "megatron_core": "megatron.core",
    }  # fmt: skip
    ranks = {**config, "r": 3, "rank_pattern": {"q": 2, "^head": 2}, "alpha_pattern": {"m.q": 1.5}, "use_rslora": True}
    dense = {"peft_type": "DENSE_HEAD", "target_modules": ["head"], "base_model_name_or_path": "tiny"}
    head = {"base_model.model.head.dense_head_delta": random_tensor((6, 4))}
    found = []
    for values, tensors in (
        (config, lora()),
        (ranks, lora(torch.bfloat16)),
        (config, lora(torch.float16)),
        (dense, head),
    ):
        files = {
            WEIGHTS: save(tensors, {"format": "pt"}),
            CONFIG: json.dumps(values).encode(),
            "README.md": b"# a card\n",
        }
        manifest = {
            "schema_version": 1, "metrics": {"best_step": 3, "forget_loss": 2.5},
            "base": {"name": "tiny", "fingerprint": {"config": "ab", "weights": "cd", "tokenizer": None}},
            "recipe": {"objective": {"name": "mypkg.losses:mine"}},
            "history": {"steps": [{"step": 1, "forget_loss": 1.0}], "evaluations": []},
            "data_digests": {"key": "k", "hmac_sha256": {"forget": "x"}},
        }  # fmt: skip
        found.append(dict(files))
        found.append({**files, MANIFEST: json.dumps(manifest).encode()})
        noted = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        found.append({**files, MANIFEST: json.dumps({**manifest, "files": noted}).encode()})
    return found


def of_bytes(draw, data):
    """Change bytes of a file anywhere."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.5 else draw.randrange(min(len(data), 400) + 1)
        kind = draw.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B, 0x7D, 0x2C, 0x3A, draw.randrange(256)))
        elif kind == 2:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 2, 8))))
        elif kind == 3:
            del data[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at:at] = data[at : at + draw.choice((1, 8, 64))]
        else:
            near = draw.randrange(2 * len(data) + 1)
            number = draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data), max(len(data) - 8, 0), near))
            at = 0 if draw.random() < 0.7 else at  # where a safetensors file says how long its header is
            data[at : at + 8] = number.to_bytes(8, "little")
    return bytes(data)


def places(value, found=None, depth=0):
    """Return all (container, key) of a JSON value."""
    found = [] if found is None else found
    if isinstance(value, (dict, list)) and depth < 8:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            places(value[key], found, depth + 1)
    return found


def of_json(draw, values):
    """Change values of a JSON object; returns its text."""
    text = None
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        where, key = draw.choice(places(values) or [(values, "r")])
        kind = draw.randrange(8)
        if kind <= 2:
            where[key] = json.loads(json.dumps(draw.choice(VALUES)))
        elif kind == 3:
            where.pop(key) if isinstance(where, dict) else where.clear()
        elif kind == 4 and isinstance(where, dict):
            where[draw.choice(KEYS)] = json.loads(json.dumps(draw.choice(VALUES)))
        elif kind == 5 and isinstance(where, dict):
            where[draw.choice((*map(str, VALUES[:45]), str(key) + "x", "../" + str(key), "\ud800"))] = where.pop(key)
        elif kind == 6 and isinstance(where[key], (int, float)):
            where[key] = where[key] + draw.choice((-1, 1, 8, -8, 0.5, 2**40))
        else:
            where[key] = "@raw@"
            text = draw.choice(RAW)
        if not values:
            break
    done = json.dumps(values)
    if text is not None:
        done = done.replace('"@raw@"', text)
    if draw.random() < 0.05 and len(done) > 2:  # a key that stands twice
        first = re.search(r'"[^"]*": *[^,{}\[\]]+', done)
        done = done[0] + (first[0] + ", " if first else "") + done[1:]
    return done.encode("utf-8", "surrogatepass")


def of_header(draw, data):
    """Change a safetensors file's table of tensors."""
    length = int.from_bytes(data[:8], "little")
    header = of_json(draw, json.loads(data[8 : 8 + length]))
    body = data[8 + length :]
    if draw.random() < 0.1:
        body += bytes(draw.choice((1, 4, 8, 64)))
    if draw.random() < 0.1:
        header += b" " * draw.choice((1, 7, 8))
    stated = len(header) if draw.random() < 0.9 else draw.choice((0, 1, len(header) + 1, 2**40, 2**63))
    return stated.to_bytes(8, "little") + header + body


def of_numbers(draw, data):
    """Write special numbers into the tensors."""
    length = int.from_bytes(data[:8], "little")
    data = bytearray(data)
    room = len(data) - 8 - length
    for _ in range(draw.choice((1, 2, 9))):
        value = torch.tensor([draw.choice(NUMBERS)])
        raw = value.to(draw.choice((torch.float32, torch.float16, torch.bfloat16))).view(torch.uint8).tolist()
        at = 8 + length + draw.randrange(room // len(raw)) * len(raw)
        data[at : at + len(raw)] = bytes(raw)
    return bytes(data)


def spoilt(draw, files):
    """Return a seed's files, changed."""
    files = dict(files)
    kind = draw.randrange(20)
    if kind == 0:
        files.pop(draw.choice(list(files)))
    elif kind == 1:
        files[draw.choice(("evil.py", "adapter_model.bin", SIGNATURE, MANIFEST, ".gitattributes", "x" * 200))] = b"{}"
    elif kind == 2:
        one, other = draw.choice(list(files)), draw.choice(list(files))
        files[one], files[other] = files[other], files[one]
    for _ in range(draw.choice((1, 1, 1, 2)) if kind > 2 else draw.randrange(2)):
        name = draw.choice(
            [name for name in (WEIGHTS, WEIGHTS, CONFIG, CONFIG, MANIFEST, SIGNATURE) if name in files] or [None]
        )
        if name is None:
            break
        how = draw.random()
        try:
            if name == WEIGHTS:
                files[name] = (of_bytes if how < 0.35 else of_header if how < 0.8 else of_numbers)(draw, files[name])
            elif how < 0.25:
                files[name] = of_bytes(draw, files[name])
            else:
                files[name] = of_json(draw, json.loads(files[name]))
        except (
            ValueError,
            IndexError,
            AttributeError,
            TypeError,
            KeyError,
            RecursionError,
        ):  # it was spoilt too much already
            files[name] = of_bytes(draw, files[name])
    return files


class Net(nn.Module):
    """What adapters of the seeds fit."""

    def __init__(self):
        super().__init__()
        self.m = nn.ModuleDict({"q": nn.Linear(4, 6, bias=False)})
        self.head = nn.Linear(4, 6, bias=False)


def sign_one(files, folder):
    """Sign a seed with a new key; returns the seed with its signature, and whom to trust."""
    new_key(folder / "key")
    (folder / "signed").mkdir()
    write(folder / "signed", {}, files)
    sign(folder / "signed", folder / "key.pem")
    return {**files, SIGNATURE: (folder / "signed" / SIGNATURE).read_bytes()}, Trust.read(
        folder / "key.pub", required=False
    )


def look(folder, net, x, trust, signed):
    """Read an adapter and use it; returns whether it was taken. `signed`: the digests that were signed."""
    try:
        bundle = read_bundle(folder, trust=trust)
        bundle.check_fits(
            net, known={"config": "ab", "weights": "cd"}, allow_different_base=len(bundle.digest) % 2 == 1
        )
    except AdapterError as error:
        text = str(error)
        text.encode()
        assert text and "Traceback" not in text and len(text) < 20_000, "an error that cannot be shown"
        assert all(char.isprintable() or char == "\n" for char in text), "an error with control characters"
        return False
    assert bundle.deltas and bundle.bytes > 0 and bundle.name
    assert (bundle.signed_by is not None) == (bundle.signature is not None), "a signature that nobody made"
    assert bundle.signature is None or bundle.files == signed, "something else than what was signed"
    adapter = LoadedAdapter.on(net, bundle)
    for sets in (
        [[WeightedAdapter(adapter, 1.0)]],
        [[WeightedAdapter(adapter, 1.0)], [], [], [WeightedAdapter(adapter, -2.0)], []],
    ):
        mix = AdapterBatch(sets)
        for name in bundle.deltas:
            output = torch.zeros(len(sets), 3, 6)
            with torch.no_grad():
                output = mix.add(name, x[: len(sets)], output)
            assert output is None or torch.isfinite(output).all(), "an adapter that was taken gives NaN or infinity"
            assert len(sets) == 1 or output is None or not output[1].any(), "a row without adapters was touched"
    return True


def fuzz(folder, inputs, seconds, seed, report=lambda counts: None):
    """Run; returns the counts. `folder` is written to all the time: best in memory."""
    draw, given, net, x = random.Random(seed), seeds(), Net(), torch.randn(5, 3, 4)
    with tempfile.TemporaryDirectory() as aside:
        files, trust = sign_one(given[2], Path(aside))
    signed = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != SIGNATURE}
    given += [files] * 2
    counts = {"inputs": 0, "taken": 0, "refused": 0, "findings": [], "slowest_s": 0.0, "seconds": 0.0, "seed": seed}
    for files in given:
        write(folder, {}, files)
        assert look(folder, net, x, trust, signed), "a seed is refused"
        write(folder, files, {})
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, lies = time.monotonic(), {}
    while counts["inputs"] < inputs and (counts["seconds"] < seconds or not seconds):
        files = spoilt(draw, given[draw.randrange(len(given))])
        write(folder, lies, files)
        lies = files
        start, finding = time.process_time(), None
        try:
            counts["taken" if look(folder, net, x, trust, signed) else "refused"] += 1
        except Exception as error:
            finding = "".join(traceback.format_exception(error)[-3:])
        spent = time.process_time() - start
        counts["inputs"] += 1
        counts["slowest_s"] = max(counts["slowest_s"], round(spent, 3))
        if finding or spent > SLOW:
            kept = {name: base64.b64encode(data).decode() for name, data in files.items() if len(data) < 100_000}
            counts["findings"].append({"error": finding or f"{spent:.1f} s", "files": kept})
            if len(counts["findings"]) >= 50:
                break
        counts["seconds"] = round(time.monotonic() - began, 1)
        counts["memory_growth_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
        if counts["inputs"] % 5000 == 0:
            report(counts)
    return counts


def write(folder, before, files):
    """Let the folder hold exactly these files."""
    for name in before.keys() - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        if before.get(name) is not data:
            (folder / name).write_bytes(data)


def tell(runs):
    """Write a table of runs into docs/security.md."""
    names = ("run", "seed", "inputs", "taken", "refused", "findings", "slowest input", "memory", "time")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, run in runs.items():
        lines.append(
            f"| {name} | {run['seed']} | {run['inputs']:,} | {run['taken']:,} | {run['refused']:,} | "
            f"{len(run['findings'])} | {1000 * run['slowest_s']:.0f} ms | +{run['memory_growth_mb']} MB | "
            f"{run['seconds'] / 60:.0f} min |"
        )
    page = Path(__file__).parents[2] / "docs" / "security.md"
    block = "<!-- fuzz -->\n" + "\n".join(lines) + "\n<!-- /fuzz -->"
    page.write_text(re.sub("<!-- fuzz -->.*<!-- /fuzz -->", lambda _: block, page.read_text(), flags=re.DOTALL))


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many, too; 0: do not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/fuzz.json"))
    parser.add_argument("--page", type=Path, nargs="+", help="write what these runs found into docs/security.md")
    given = parser.parse_args()
    if given.page:
        return tell({path.stem: json.loads(path.read_text()) for path in given.page})
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    given.output.parent.mkdir(parents=True, exist_ok=True)

    def report(counts):
        given.output.write_text(json.dumps(counts, indent=1))

    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz_", dir=memory if memory.is_dir() else None))
    try:
        counts = fuzz(folder, given.inputs, given.seconds, given.seed, report)
    finally:
        shutil.rmtree(folder)
    report({**counts, "done": True})
    print({**counts, "findings": [finding["error"] for finding in counts["findings"]]})
    sys.exit(1 if counts["findings"] else 0)


if __name__ == "__main__":
    main()
