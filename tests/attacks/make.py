"""Make hostile adapters: each a good one, spoilt in one way. Nothing in them does harm: what would run touches a file.

    python tests/attacks/make.py FOLDER      write them all, to try other programs on them
    python tests/attacks/make.py --table     write the table in docs/security.md

`ATTACKS` says for each what `read_bundle` must answer: a text that stands in its error, or None where the adapter is
taken because it does no harm. `FITTED` are taken by `read_bundle`, which knows no base, and refused by `attach`.
`ARCHIVES` are for whatever unpacks archives; nothing here does.
"""

import json
import os
import re
import struct
import sys
from pathlib import Path

from spoil import (
    ARCHIVES,
    CONFIG,
    CONFIG_VALUES,
    FIRST,
    MANIFEST,
    SECOND,
    SIGNATURE,
    WEIGHTS,
    beside,
    config,
    config_text,
    entry,
    filled,
    good_tensors,
    header,
    in_hub_cache,
    instead,
    instead_of_weights,
    linked,
    make_good,
    manifest,
    many_tensors,
    pack,
    pickled,
    plug,
    raw,
    renamed,
    sparse,
    table_of,
    tensor,
)

# ---- the table: name -> (how to spoil, what is told) ----

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HUGE = pack({"a": {"dtype": "F32", "shape": [4, 200_000_000], "data_offsets": [0, 3_200_000_000]}}, b"")
HUGE_BASE = pack({"a.weight": {"dtype": "F32", "shape": [4, 75_000_000], "data_offsets": [0, 1_200_000_000]}}, b"")
BOMBS = ["(a+)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", ".*" * 20 + "x", "(?:x*)*y", "(.|.)*\\1", "(" * 3000, "x{9}" * 600]
ATTACKS = {
    # code
    "a pickle instead of the weights": (instead_of_weights("adapter_model.bin", pickled), "a pickle can run code"),
    "a pickle under the weights' name": (raw(WEIGHTS, pickled), "truncated or no safetensors"),
    "a pickle beside the weights": (beside("adapter_model.bin", pickled), "'adapter_model.bin' lies beside"),
    "a pickle as config": (raw(CONFIG, pickled), "no UTF-8"),
    "a zip that escapes, as weights": (raw(WEIGHTS, ARCHIVES["zip, parent folder"]), "truncated or no safetensors"),
    "a tar that escapes, as weights": (raw(WEIGHTS, ARCHIVES["tar, through a link"]), "no safetensors"),
    "auto_mapping: a class of subprocess": (
        config(auto_mapping={"base_model_class": "Popen", "parent_library": "subprocess"}), "'auto_mapping' is",
    ),
    "auto_mapping: a module beside": (
        config(auto_mapping={"base_model_class": "run", "parent_library": "evil"}), "'auto_mapping' is",
    ),
    "auto_mapping: code from the Hub": (
        config(auto_mapping={"base_model_class": "A", "parent_library": "transformers_modules.evil"}),
        "'auto_mapping' is",
    ),
    "auto_mapping: a list": (config(auto_mapping=["evil"]), "'auto_mapping' is"),
    "auto_mapping: transformers' own": (
        config(auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}),
        None,
    ),
    "megatron_core: a module": (config(megatron_core="evil", megatron_config={"a": 1}), "'megatron_core' is 'evil'"),
    "peft_type: a path to code": (config(peft_type="evil.Config"), "peft_type is 'evil.Config'"),
    "peft_type: an expression": (config(peft_type="__import__('evil')"), "peft_type is"),
    "peft_type: a list": (config(peft_type=["LORA"]), "peft_type is ['LORA']"),
    "an unknown field with a path to code": (config(custom_module="evil:run"), "'custom_module' is unknown"),
    "the manifest's objective: a path to code": (manifest(recipe={"objective": {"name": "evil:run"}}), None),
    # sizes
    "weights: nothing": (raw(WEIGHTS, b""), "truncated or no safetensors"),
    "weights: three bytes": (raw(WEIGHTS, b"abc"), "truncated or no safetensors"),
    "header: of no length": (header(lambda t: b"", length=0), "truncated or no safetensors"),
    "header: longer than the file": (header(lambda t: None, length=10**6), "truncated or no safetensors"),
    "header: of 2^63 bytes": (header(lambda t: None, length=2**63), "truncated or no safetensors"),
    "header: of 2^64 - 1 bytes": (header(lambda t: None, length=2**64 - 1), "truncated or no safetensors"),
    "header: of 100 MB": (sparse(WEIGHTS, 10**8 + 8, struct.pack("<Q", 10**8)), "header of 100,000,000 bytes"),
    "header: cut short": (header(lambda t: None, length=100), "damaged safetensors header"),
    "weights: cut short": (lambda folder: os.truncate(folder / WEIGHTS, 700), "is truncated: its header promises"),
    "weights: more than promised": (header(lambda t: None, more=bytes(8)), "holds more than its tensors"),
    "weights: a terabyte of nothing": (sparse(WEIGHTS, 1 << 40), "bytes, more than the"),
    "config: a terabyte of nothing": (sparse(CONFIG, 1 << 40), "bytes, more than the"),
    "weights: three gigabytes of nothing": (sparse(WEIGHTS, len(HUGE) + 3_200_000_000, HUGE), "machine's memory"),
    "base weight: more than a gigabyte of nothing": (
        sparse(WEIGHTS, len(HUGE_BASE) + 1_200_000_000, HUGE_BASE), "weights of a base and no LoRA",
    ),
    "rank: 10^12 in the config": (config(r=10**12), "rank r is 1000000000000"),
    "rank: 10^30 in the config": (config(r=10**30), "rank r is"),
    "rank: 2^20 in the config": (config(r=1 << 20), "its config says 1048576"),
    "rank: 10^12 in rank_pattern": (config(rank_pattern={"q_proj": 10**12}), "'rank_pattern' gives"),
    "rank: 10^12 in the header": (entry(shape=[10**12, 32]), "takes 128,000,000,000,000 bytes"),
    "rank: a product over 2^64 in the header": (entry(shape=[2**40, 2**40]), "bytes, but its offsets give"),
    "rank: a product that is 512 modulo 2^64": (entry(shape=[2**62, 2**62, 128]), "bytes, but its offsets give"),
    "tensors: 150 000 tiny ones": (many_tensors(150_000), "more than 1,000,000 values"),
    "tensors: 90 000 tiny ones": (many_tensors(90_000), "'t0' is no LoRA weight"),
    "tensors: none": (raw(WEIGHTS, pack({}, b"")), "holds no tensors"),
    "tensors: only metadata": (raw(WEIGHTS, pack({"__metadata__": {"a": "b"}}, b"")), "holds no tensors"),
    "JSON: 3.9 MB of empty lists": (raw(CONFIG, b'{"a":[' + b"[]," * 1_300_000 + b"[]]}"), "1,000,000 values"),
    "JSON: 3.9 MB of one text": (raw(CONFIG, b'{"peft_type":"' + b"a" * 3_900_000 + b'"}'), "peft_type is 'aaa"),
    "JSON: 5 MB of blanks": (raw(CONFIG, b" " * 5_000_000), "bytes, more than the"),
    "JSON: a number of 5000 digits": (config_text('"r": 4', '"r": ' + "9" * 5000), "more than 70 digits"),
    "JSON: a key of a megabyte": (config(**{"a" * 1_000_000: True}), "is unknown"),
    # the header's table
    "header: no JSON": (header(lambda t: b"not JSON"), "damaged safetensors header"),
    "header: a list": (header(lambda t: b"[]"), "expected a JSON object"),
    "header: no UTF-8": (header(lambda t: b'{"\xff":1}'), "no UTF-8"),
    "header: deep": (header(lambda t: DEEP), "nested deeper"),
    "header: a tensor twice": (
        header(lambda t: (json.dumps(t)[:-1] + "," + json.dumps(t)[1:]).encode()), "stands twice",
    ),
    "header: no shape": (header(lambda t: t[FIRST].pop("shape") and None), "expected dtype, shape and data_offsets"),
    "header: one field too many": (entry(code="evil:run"), "expected dtype, shape and data_offsets"),
    "header: an entry that is a text": (header(lambda t: t.update({FIRST: "a"})), "expected dtype, shape and"),
    "header: metadata that is no text": (header(lambda t: t.update(__metadata__={"a": {"b": 1}})), "no table of texts"),
    "offsets: overlapping": (header(lambda t: t[SECOND].update(data_offsets=[508, 1020])), "overlap at byte"),
    "offsets: all the same": (
        header(lambda t: [e.update(data_offsets=[0, 512]) for e in t.values()] and None), "overlap at byte",
    ),
    "offsets: with a hole": (
        header(lambda t: [e.update(data_offsets=[o + 8 for o in e["data_offsets"]]) for e in t.values()] and None),
        "leave a hole at byte 0",
    ),
    "offsets: backwards": (entry(data_offsets=[512, 0]), "offsets give it -512"),
    "offsets: beyond the file": (entry(data_offsets=[10**15, 10**15 + 512]), "leave a hole"),
    "offsets: negative": (entry(data_offsets=[-512, 0]), "whole numbers"),
    "offsets: fractions": (entry(data_offsets=[0.0, 512.0]), "whole numbers"),
    "offsets: true and false": (entry(data_offsets=[False, True]), "whole numbers"),
    "offsets: three": (entry(data_offsets=[0, 512, 1024]), "whole numbers"),
    "offsets: in another order than the names": (
        header(lambda t: dict(reversed(list(t.items())))), None,
    ),
    "shape: negative": (entry(shape=[-4, -32]), "whole numbers"),
    "shape: nested": (entry(shape=[[4], 32]), "whole numbers"),
    "shape: a text": (entry(shape="4,32"), "whole numbers"),
    "shape: a hundred dimensions": (entry(shape=[1] * 98 + [4, 32]), "whole numbers"),
    "shape: a size of 0": (tensor("F32", (0, 32)), "expected no size to be 0"),
    "shape: three dimensions": (tensor("F32", (2, 2, 32)), "expected (r, in) and (out, r)"),
    "shape: none (one number)": (tensor("F32", ()), "expected (r, in) and (out, r)"),
    **{
        f"dtype: {dtype}": (tensor(dtype, (4, 32)), f"has dtype '{dtype}'")
        for dtype in ("I64", "I8", "BOOL", "F8_E4M3", "C64", "F33", "f32")
    },
    "dtype: a number": (entry(dtype=32), "has dtype 32"),
    "dtype: two in one pair": (tensor("F64", (4, 32)), None),
    # names
    **{
        f"tensor's name: {what}": (renamed(name), "holds a tensor named")
        for what, name in {
            "parent folders": "../../../etc/passwd.lora_{}.weight", "a path": "/etc/passwd.lora_{}.weight",
            "two dots": "base_model..model.lora_{}.weight", "control characters": "\x1b[2J\x07.lora_{}.weight",
            "line breaks": "a\nerror: b.lora_{}.weight", "a null byte": "a\0b.lora_{}.weight",
            "blanks": " .lora_{}.weight",
            "a thousand letters": "a" * 1000 + ".lora_{}.weight", "another alphabet": "m\u043edel.lora_{}.weight",
            "from right to left": "\u202emodel.lora_{}.weight", "a regular expression": "(a+)+$.lora_{}.weight",
        }.items()
    },
    "tensor's name: nothing": (tensor("F32", (1,), name=""), "holds a tensor named ''"),
    "tensor's name: an alien": (tensor("F32", (1,), name="evil"), "'evil' is no LoRA weight"),
    "tensor's name: one half of a pair": (
        tensor("F32", (32, 4), name="x.lora_B.weight"), "'x': lora_A and lora_B have shapes None and (32, 4)",
    ),
    "tensor's name: two for one module": (
        lambda folder: (folder / WEIGHTS).write_bytes(pack(*table_of({
            **good_tensors(), **{k.removeprefix("base_model.model."): v for k, v in good_tensors().items()}
        }))), "two tensors are for the module",
    ),
    # numbers
    **{
        f"numbers: {value} in {dtype}": (filled(value, dtype), "holds NaN or infinity")
        for dtype in ("F64", "F32", "F16", "BF16") for value in (float("nan"), float("inf"), -float("inf"))
    },
    **{
        f"numbers: {value:g} in {dtype}": (filled(value, dtype), "holds a number of size")
        for dtype, value in (("F64", 1e300), ("F32", 3e38), ("F32", 1.1e4), ("BF16", 3e38), ("F16", 6e4))
    },
    **{
        f"numbers: {value:g} in {dtype} (denormal)": (filled(value, dtype), None)
        for dtype, value in (("F64", 5e-324), ("F32", 1e-40), ("F16", 6e-8), ("BF16", 1e-40))
    },
    **{
        f"lora_alpha: {text[:30]}": (config_text('"lora_alpha": 8', f'"lora_alpha": {text}'), told)
        for text, told in {
            "NaN": "which is no number", "Infinity": "which is no number", "-Infinity": "which is no number",
            "1e400": "too large", "-1e400": "too large", '"8"': "lora_alpha is '8'", "true": "lora_alpha is True",
            "null": "lora_alpha is None", "[8]": "lora_alpha is", "1e30": "lora_alpha is 1e+30",
            "1" + "0" * 60: "lora_alpha is 1000", "1e6": "is scaled by 2.5e+05",
        }.items()
    },
    "alpha_pattern: 1e30": (config(alpha_pattern={"q_proj": 1e30}), "'alpha_pattern' gives 'q_proj' 1e+30"),
    "alpha_pattern: a text": (config(alpha_pattern="q_proj"), "'alpha_pattern' is 'q_proj'"),
    **{
        f"r: {value!r}": (config(r=value), "rank r is") for value in (0, -1, 4.0, True, "4", None, [4])
    },
    "rank_pattern: a list": (config(rank_pattern=["q_proj"]), "'rank_pattern' is"),
    "rank_pattern: 0": (config(rank_pattern={"q_proj": 0}), "'rank_pattern' gives"),
    # regular expressions
    **{
        f"{field}: {bomb[:30]}": (config(**{field: bomb}), None)
        for field in ("target_modules", "exclude_modules", "layers_pattern") for bomb in BOMBS
    },
    **{
        f"{field}: {bomb[:30]}": (config(**{field: {bomb: 4}}), told)
        for field, told in (("rank_pattern", None), ("alpha_pattern", "'alpha_pattern' has the key"))
        for bomb in BOMBS
    },
    "target_modules: a bomb in a list": (config(target_modules=["q_proj", "(a+)+$"]), None),
    "target_modules: no names": (config(target_modules={"q_proj": 1}), "expected names"),
    "target_modules: an innocent expression": (config(target_modules=r".*\.(?:q|v)_proj"), None),
    "layers_to_transform: names": (config(layers_to_transform=["0"]), "'layers_to_transform' is"),
    # what changes the effect, where only PEFT would know how
    **{
        f"{field}: {value!r}": (config(**{field: value}), f"'{field}' is")
        for field, value in (
            ("use_dora", True), ("use_dora", 1), ("modules_to_save", {"lm_head": 1}), ("bias", "all"),
            ("target_parameters", ["x"]), ("layer_replication", [[0, 1]]), ("alora_invocation_tokens", [1]),
            ("trainable_token_indices", [0]), ("init_lora_weights", "pissa"), ("use_rslora", "yes"),
            ("task_type", "EVIL"), ("base_model_name_or_path", ["a"]), ("base_model_name_or_path", "\x1b[2J"),
            ("revision", {"a": 1}),
        )
    },
    # JSON
    "JSON: nothing": (raw(CONFIG, b""), "is not readable JSON"),
    "JSON: null": (raw(CONFIG, b"null"), "expected a JSON object"),
    "JSON: r twice": (config_text('"r": 4', '"r": 4, "r": 8'), "the key 'r' stands twice"),
    "JSON: a key twice, inside": (config_text('_pattern": {}', '_pattern": {"a": 1, "a": 2}'), "stands twice"),
    "JSON: a key twice, spelt otherwise": (config_text('"r": 4', '"r": 4, "\\u0072": 8'), "the key 'r' stands twice"),
    "JSON: 100 000 levels": (raw(CONFIG, DEEP), "nested deeper"),
    "JSON: 40 levels": (config_text("{}", "[" * 40 + "]" * 40), "nested deeper"),
    "JSON: 100 000 levels, in the manifest": (raw(MANIFEST, DEEP), "nested deeper"),
    "JSON: Latin-1": (raw(CONFIG, '{"é": 1}'.encode("latin-1")), "no UTF-8"),
    "JSON: UTF-16": (raw(CONFIG, lambda: json.dumps(CONFIG_VALUES).encode("utf-16")), "no UTF-8"),
    "JSON: a byte order mark": (raw(CONFIG, lambda: json.dumps(CONFIG_VALUES).encode("utf-8-sig")), "BOM"),
    "JSON: half a surrogate pair": (config_text('"tiny"', '"\\ud800"'), "surrogates not allowed"),
    "JSON: an overlong encoding": (raw(CONFIG, b'{"\xc0\xaf": 1}'), "no UTF-8"),
    # the manifest
    "manifest: nothing in it": (raw(MANIFEST, b"{}"), "has schema version None"),
    "manifest: version '1'": (manifest(schema_version="1"), "has schema version '1'"),
    "manifest: version true": (manifest(schema_version=True), "has schema version True"),
    "manifest: version 99": (manifest(schema_version=99), "has schema version 99"),
    "manifest: a wrong digest": (manifest(files={WEIGHTS: "0" * 64}), "is not the file that was saved"),
    "manifest: digests that are numbers": (manifest(files={WEIGHTS: 0}), "something else than digests"),
    "manifest: files are a list": (manifest(files=[WEIGHTS]), "'files' is"),
    "manifest: files with ..": (manifest(files={"../../../etc/passwd": "0" * 64}), None),
    "manifest: base is a list": (manifest(base=["tiny"]), "'base' is"),
    "manifest: base without a text": (manifest(base={"name": 1}), "'base.name' is 1"),
    "manifest: fingerprint is a text": (manifest(base={"fingerprint": "a"}), "'base.fingerprint' is 'a'"),
    "manifest: history is a text": (manifest(history={"steps": "a"}), "'history.steps' is 'a'"),
    # what is no plain file
    **{
        f"{name}: {what}": (linked(name, target), told)
        for name in (WEIGHTS, CONFIG, MANIFEST, SIGNATURE)
        for what, target, told in (
            ("a link to /etc/passwd", "/etc/passwd", "outside of its folder"),
            ("a link to ../", lambda folder: Path("..") / folder.name / ".." / "elsewhere", "outside of its folder"),
            ("a link to /dev/zero", "/dev/zero", "outside of its folder"),
            ("a link to /proc/self/environ", "/proc/self/environ", "outside of its folder"),
            ("a link to itself", lambda folder: folder / "loop", "link"),
        )
    },
    **{
        f"{name}: a pipe": (instead(name, os.mkfifo), "is a pipe, expected a plain file")
        for name in (WEIGHTS, CONFIG, MANIFEST, SIGNATURE)
    },
    f"{WEIGHTS}: a socket": (instead(WEIGHTS, plug), "is a socket, expected a plain file"),
    f"{WEIGHTS}: a folder": (instead(WEIGHTS, Path.mkdir), "is a folder, expected a plain file"),
    f"{CONFIG}: a folder": (instead(CONFIG, Path.mkdir), "is a folder, expected a plain file"),
    f"{WEIGHTS}: a link within the folder": (
        lambda folder: ((folder / WEIGHTS).rename(folder / "a"), (folder / WEIGHTS).symlink_to("a")), None,
    ),
    "the Hub's cache: links to blobs": (in_hub_cache, None),
    "1001 files": (lambda folder: [(folder / f"{n}.txt").touch() for n in range(1001)], "more than 1000 files"),
}  # fmt: skip
HERE = "base_model.model."
FITTED = {
    "a module that the base has not": (
        renamed(HERE + "model.layers.99.self_attn.q_proj.lora_{}.weight"), "does not exist",
    ),
    "a module of Python's own": (renamed(HERE + "__class__.__init__.lora_{}.weight"), "does not exist"),
    "a module that is a weight": (renamed(HERE + "model.norm.weight.lora_{}.weight"), "does not exist"),
    "a module that is not linear": (renamed(HERE + "model.norm.lora_{}.weight"), "has shape (32,)"),
    "the embeddings": (renamed(HERE + "model.embed_tokens.lora_{}.weight"), "is no linear layer"),
    "the whole model": (renamed(HERE + "model.lora_{}.weight"), "is no linear layer"),
    "a base weight that is another": (
        tensor("F32", (32, 32), name=HERE + "model.layers.0.self_attn.q_proj.base_layer.weight"), "it differs from",
    ),
    "a base weight that was trained": (
        tensor("F32", (32,), name=HERE + "model.norm.modules_to_save.default.weight"), "it differs from",
    ),
    "a base weight of another size": (tensor("F32", (401, 32), name=HERE + "lm_head.weight"), "of shape (401, 32)"),
    "a base weight of no module": (tensor("F32", (4,), name="evil.weight"), "no weight of this base"),
    "another size": (tensor("F32", (4, 31)), "has shape (32, 32) in the base"),
    "another base's fingerprint": (manifest(base={"fingerprint": {"weights": "0" * 64}}), "the base's weights is not"),
}  # fmt: skip


def make(folder):
    """Write all hostile adapters; returns name -> (path, what is told)."""
    made = {}
    for number, (name, (spoil, told)) in enumerate({**ATTACKS, **FITTED}.items()):
        path = make_good(folder / f"{number:03}")
        other = spoil(path)
        if name.endswith("a link to itself"):
            (path / "loop").symlink_to("loop")
        made[name] = (other if isinstance(other, Path) else path, told)
    return made


def table():
    """Return the table of docs/security.md, in Markdown."""
    lines = ["| hostile adapter | what `read_bundle` says |", "|---|---|"]
    for name, (_, told) in ATTACKS.items():
        lines.append(f"| {_cell(name)} | {'taken: it does no harm' if told is None else 'refused: ' + _cell(told)} |")
    for name, (_, told) in FITTED.items():
        lines.append(f"| {_cell(name)} | taken; `attach` refuses: {_cell(told)} |")
    return "\n".join(lines)


def _cell(text):
    return "`" + ascii(text)[1:-1].replace("\\\\", "\\").replace("|", "\\|") + "`"


def main():
    """Run from the command line."""
    if sys.argv[1:] == ["--table"]:
        page = Path(__file__).parents[2] / "docs" / "security.md"
        text = page.read_text()
        block = f"<!-- attacks -->\n{len(ATTACKS) + len(FITTED)} hostile adapters:\n\n{table()}\n<!-- /attacks -->"
        page.write_text(re.sub("<!-- attacks -->.*<!-- /attacks -->", lambda _: block, text, flags=re.DOTALL))
    elif len(sys.argv) == 2:
        for name, (path, _) in make(Path(sys.argv[1])).items():
            print(f"{path}: {ascii(name)}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
