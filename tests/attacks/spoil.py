"""Ways to spoil a good adapter: each is a function of its directory. Nothing in them does harm."""

import io
import json
import os
import pickle
import socket
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np

WEIGHTS, CONFIG, MANIFEST, SIGNATURE = "adapter_model.safetensors", "adapter_config.json", "forget.json", "model.sig"
CANARY = "UNLEARN_PEFT_TEST_CANARY"  # the environment variable that names the file to touch
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "C64": 8,
    "F33": 4,
    "f32": 4,
}
Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
FIRST, SECOND = Q.format(0, "A"), Q.format(0, "B")
CONFIG_VALUES = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
    "bias": "none", "base_model_name_or_path": "tiny", "auto_mapping": None, "use_rslora": False, "rank_pattern": {},
    "alpha_pattern": {},
}  # fmt: skip
MANIFEST_VALUES = {"schema_version": 1, "base": {"name": "tiny", "fingerprint": {}}, "recipe": {}, "metrics": {}}


class Evil:
    """A pickle that would touch the canary."""

    def __reduce__(self):
        return os.system, (f'touch "${CANARY}"',)


def table_of(tensors):
    """Return the header's table and the bytes for tensors given as name -> (dtype, shape, bytes)."""
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return header, body


def pack(header, body, length=None):
    """Return a safetensors file, whatever is in it."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def numbers(shape, seed=0, dtype="<f4"):
    """Return the bytes of small random numbers."""
    return (np.random.default_rng(seed).normal(size=shape) * 0.05).astype(dtype).tobytes()


def good_tensors():
    """Return the tensors of a LoRA on the tests' tiny model."""
    shapes = {"A": (4, 32), "B": (32, 4)}
    return {
        Q.format(layer, side): ("F32", shape, numbers(shape, layer))
        for layer in (0, 1)
        for side, shape in shapes.items()
    }


def make_good(folder):
    """Write an adapter that is taken."""
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(pack(*table_of(good_tensors())))
    (folder / CONFIG).write_text(json.dumps(CONFIG_VALUES))
    (folder / MANIFEST).write_text(json.dumps(MANIFEST_VALUES))
    return folder


# ---- ways to spoil it: each returns a function of the folder ----


def raw(name, data):
    """The file is these bytes."""
    return lambda folder: (folder / name).write_bytes(data() if callable(data) else data)


def config(**values):
    """The config has these values."""
    return raw(CONFIG, lambda: json.dumps({**CONFIG_VALUES, **values}).encode())


def config_text(old, new):
    """The config's text is changed."""
    return raw(CONFIG, lambda: json.dumps(CONFIG_VALUES).replace(old, new, 1).encode("utf-8", "surrogatepass"))


def manifest(**values):
    """The manifest has these values."""
    return raw(MANIFEST, lambda: json.dumps({**MANIFEST_VALUES, **values}).encode())


def header(change, length=None, more=b""):
    """The header's table is changed: `change` edits it, or returns another (bytes, too)."""

    def spoil(folder):
        table, body = table_of(good_tensors())
        changed = change(table)
        (folder / WEIGHTS).write_bytes(pack(table if changed is None else changed, body + more, length))

    return spoil


def entry(**values):
    """The first tensor's entry in the header has these values."""
    return header(lambda table: table[FIRST].update(values))


def tensor(dtype, shape, data=None, name=FIRST):
    """One tensor is this."""

    def spoil(folder):
        size = SIZES[dtype] * int(np.prod(shape))
        tensors = {**good_tensors(), name: (dtype, shape, bytes(size) if data is None else data)}
        (folder / WEIGHTS).write_bytes(pack(*table_of(tensors)))

    return spoil


def filled(value, dtype="F32"):
    """The first pair of tensors is full of one number."""

    def spoil(folder):
        kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
        with np.errstate(all="ignore"):
            if dtype == "BF16":
                one = np.array([value], "<f4").view("<u4") >> 16
                data = one.astype("<u2").tobytes() * 128
            else:
                data = np.full(128, value).astype(kinds[dtype]).tobytes()
        tensors = good_tensors()
        tensors[FIRST] = (dtype, (4, 32), data)
        tensors[Q.format(0, "B")] = (dtype, (32, 4), data)
        (folder / WEIGHTS).write_bytes(pack(*table_of(tensors)))

    return spoil


def renamed(name):
    """The first pair of tensors has another name; `{}` stands for A and B."""

    def spoil(folder):
        tensors = good_tensors()
        for side in "AB":
            tensors[name.format(side)] = tensors.pop(Q.format(0, side))
        (folder / WEIGHTS).write_bytes(pack(*table_of(tensors)))

    return spoil


def sparse(name, size, head=b""):
    """The file has this size, and takes no room on the disk."""

    def spoil(folder):
        with (folder / name).open("wb") as stream:
            stream.write(head)
            stream.truncate(size)

    return spoil


def linked(name, target):
    """The file is a link."""

    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        where = target(folder) if callable(target) else target
        (folder / name).symlink_to(where)

    return spoil


def instead(name, make):
    """In the file's place is something else."""

    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def plug(path):
    """Make a socket, by a short name: their paths may not be long."""
    with socket.socket(socket.AF_UNIX) as one:
        before = os.getcwd()
        os.chdir(path.parent)
        try:
            one.bind(path.name)
        finally:
            os.chdir(before)


def in_hub_cache(folder):
    """Lay the adapter out as huggingface_hub's cache does: links from snapshots/COMMIT to blobs."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG, MANIFEST):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../..") / "blobs" / name)
    return snapshot


def many_tensors(count):
    """So many tensors of one number each."""

    def spoil(folder):
        table = ",".join(
            f'"t{n}":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * n},{4 * n + 4}]}}' for n in range(count)
        )
        (folder / WEIGHTS).write_bytes(pack(b"{" + table.encode() + b"}", bytes(4 * count)))

    return spoil


def beside(name, data):
    """Another file lies beside."""
    return lambda folder: (folder / name).write_bytes(data() if callable(data) else data)


def pickled():
    """A pickle that would touch the canary."""
    return pickle.dumps(Evil())


def instead_of_weights(name, data):
    """Another file lies there instead of the weights."""

    def spoil(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(data())

    return spoil


# ---- archives ----


def zip_of(*names):
    """Return a zip with files of these names."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "escaped")
    return stream.getvalue()


def tar_of(*members):
    """Return a tar with (name, kind, link) members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 7 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"escaped") if kind == tarfile.REGTYPE else None)
    return stream.getvalue()


ARCHIVES = {
    "zip, parent folder": lambda: zip_of("../escaped"),
    "zip, absolute": lambda: zip_of("/tmp/unlearn_peft_escaped"),
    "zip, backslashes": lambda: zip_of("..\\escaped"),
    "tar, parent folder": lambda: tar_of(("../escaped", tarfile.REGTYPE, "")),
    "tar, absolute": lambda: tar_of(("/tmp/unlearn_peft_escaped", tarfile.REGTYPE, "")),
    "tar, through a link": lambda: tar_of(("out", tarfile.SYMTYPE, ".."), ("out/escaped", tarfile.REGTYPE, "")),
    "tar, hard link to elsewhere": lambda: tar_of((CONFIG, tarfile.LNKTYPE, "../../../../etc/passwd")),
    "tar, a link as weights": lambda: tar_of((WEIGHTS, tarfile.SYMTYPE, "/etc/passwd")),
    "tar, a pipe": lambda: tar_of((WEIGHTS, tarfile.FIFOTYPE, "")),
    "tar, a device": lambda: tar_of((WEIGHTS, tarfile.CHRTYPE, "")),
}
