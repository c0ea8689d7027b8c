"""Adapters to and from a stand-in of the Hub, mirrors, archives: pinned, resumed, checked, and hostile ones refused."""

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import threading

import pytest
from fake_hub import Running

from unlearn_peft import read_bundle
from unlearn_peft.adapters.hub.archive import pack
from unlearn_peft.adapters.hub.pull import pull
from unlearn_peft.adapters.hub.push import push
from unlearn_peft.adapters.hub.sources import parse
from unlearn_peft.errors import AdapterError, OutputError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "acme/forgets"


@pytest.fixture(scope="module")
def running():
    server = Running()
    yield server
    server.stop()


@pytest.fixture
def hub(running, monkeypatch, tmp_path):
    hub = running.hub
    for part in (hub.repositories, hub.branches, hub.lies, hub.asked, hub.mirror):
        part.clear()
    hub.large.clear()
    hub.large.add(WEIGHTS)
    hub.url = running.url
    monkeypatch.setenv("UNLEARN_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # what the tests' environment forbids huggingface_hub
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
    template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    return hub


@pytest.fixture
def adapter(tiny, make_adapter):
    path = make_adapter(tiny, "a")
    (path / "README.md").write_text("# A card\n")
    return path


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def nothing_left(tmp_path):
    """No adapter's folder has appeared anywhere."""
    return [
        p.parent.name for p in tmp_path.rglob(CONFIG) if p.parent.name != "a" and not p.parent.name.startswith(".")
    ] == []


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_branch_is_resolved_and_the_commit_written_down(hub, adapter, tmp_path):
    commit = hub.commit(NAME, files_of(adapter))
    got = pull(f"hub:{NAME}", tmp_path / "got")
    assert got.commit == commit and got.path == tmp_path / "got"
    assert files_of(got.path) == files_of(adapter) and read_bundle(got.path).identity == read_bundle(adapter).identity
    noted = json.loads((tmp_path / "got.source.json").read_text())
    assert noted["commit"] == commit and noted["source"] == f"hub:{NAME}" and WEIGHTS in noted["files"]
    later = hub.commit(NAME, {**files_of(adapter), "README.md": b"# New\n"})
    assert pull(f"hub:{NAME}", tmp_path / "got").commit == later
    assert (tmp_path / "got" / "README.md").read_text() == "# New\n"
    assert pull(f"hub:{NAME}@{commit}", tmp_path / "old").commit == commit
    assert (tmp_path / "old" / "README.md").read_text() == "# A card\n"


def test_what_is_in_the_cache_is_not_asked_for_again_and_comes_offline(hub, adapter, monkeypatch):
    commit = hub.commit(NAME, files_of(adapter))
    with pytest.raises(AdapterError, match="not in the cache"):
        pull(f"hub:{NAME}", offline=True)
    path = pull(f"hub:{NAME}").path
    hub.asked.clear()
    assert pull(f"hub:{NAME}", offline=True).commit == commit and pull(f"hub:{NAME}@{commit}").path == path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull(f"hub:{NAME}").path == path and hub.asked == []
    with pytest.raises(AdapterError, match="not in the cache"):
        pull(f"hub:{NAME}@other")


def test_only_an_adapters_files_are_taken(hub, adapter):
    more = {
        "evil.py": b"1/0",
        "adapter_model.bin": b"pickle",
        "optimizer.pt": b"x",
        ".gitattributes": b"a",
        "sub/x.png": b"x",
    }
    hub.commit(NAME, {**files_of(adapter), **more})
    assert set(files_of(pull(f"hub:{NAME}").path)) == set(files_of(adapter))
    assert not [path for _, path, *_ in hub.asked if any(name in path for name in more)]


def test_a_cut_download_goes_on_where_it_broke(hub, adapter):
    hub.commit(NAME, files_of(adapter))
    hub.lies["cut once"] = 50
    pulled = pull(f"hub:{NAME}")
    assert files_of(pulled.path) == files_of(adapter)
    assert {asked for _, _, asked, _ in hub.asked if asked} == {"bytes=50-"}


def test_a_download_goes_on_in_the_next_process_and_nothing_appears_before(hub, adapter, tmp_path):
    hub.commit(NAME, files_of(adapter))
    hub.large.add(CONFIG)
    hub.lies["cut"] = 40
    with pytest.raises(AdapterError, match="the same command goes on from there"):
        pull(f"hub:{NAME}", tmp_path / "got")
    assert nothing_left(tmp_path)
    hub.lies.clear()
    hub.asked.clear()
    assert files_of(pull(f"hub:{NAME}", tmp_path / "got").path) == files_of(adapter)
    assert hub.asked[2][2] or hub.asked[1][2]  # the first file was gone on with
    assert not list(tmp_path.rglob("*.part"))


def test_a_server_without_range_is_read_from_the_beginning(hub, adapter):
    hub.commit(NAME, files_of(adapter))
    hub.lies.update({"cut once": 50, "no range": True})
    assert files_of(pull(f"hub:{NAME}").path) == files_of(adapter)


def test_a_token_goes_to_the_hub_and_not_to_others(hub, adapter, running):
    hub.commit(NAME, files_of(adapter))
    elsewhere = running.url.replace("127.0.0.1", "localhost")
    hub.lies["redirect"] = f"{elsewhere}/elsewhere/x"
    with pytest.raises(AdapterError, match="status 404"):
        pull(f"hub:{NAME}", token="hf_secret")
    tokens = {path.split("/")[1]: token for _, path, _, token in hub.asked}
    assert tokens["api"] == "Bearer hf_secret" and tokens["elsewhere"] is None


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def entry(change):
    def lie(answer):
        for sibling in answer["siblings"]:
            if sibling["rfilename"] == WEIGHTS:
                change(sibling, answer)
        return answer

    return lie


HOSTILE = {
    "another body": ({"body": flip}, "not the file that was promised"),
    "longer body": ({"body": lambda data: data + b"x" * 9}, "expected at most"),
    "shorter body": ({"body": lambda data: data[:-9]}, "not the file that was promised"),
    "always cut": ({"cut": 40}, "broke off"),
    "to http": ({"redirect": "http://example.org/x"}, "is not HTTPS"),
    "to a file": ({"redirect": "file:///etc/passwd"}, "no address of a web server"),
    "in a circle": ({"redirect": "/acme/forgets/resolve/main/adapter_config.json"}, "redirects more than"),
    "compressed": ({"headers": {"content-encoding": "gzip"}}, "compressed though"),
    "terabytes": ({"info": entry(lambda s, _: s["lfs"].update(size=1 << 42))}, "is too large"),
    "negative size": ({"info": entry(lambda s, _: s["lfs"].update(size=-1))}, "no usable answer"),
    "no digest": ({"info": entry(lambda s, _: (s.pop("lfs"), s.pop("blobId")))}, "no usable answer"),
    "commit with a path": ({"info": lambda a: {**a, "sha": "../../../evil"}}, "no usable answer"),
    "another commit": ({"info": lambda a: {**a, "sha": "f" * 40}}, "gives commit"),
    "twice": ({"info": entry(lambda s, a: a["siblings"].append(s) if len(a["siblings"]) < 9 else None)}, "twice"),
    "no weights": ({"info": entry(lambda s, _: s.update(rfilename="../" + WEIGHTS))}, f"no {WEIGHTS}"),
    "a list": ({"info": lambda a: [a]}, "no usable answer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_hub_is_refused_and_nothing_appears(hub, adapter, tmp_path, name):
    commit = hub.commit(NAME, files_of(adapter))
    lies, told = HOSTILE[name]
    hub.lies.update(lies)
    with pytest.raises(AdapterError, match=told):
        pull(f"hub:{NAME}" + (f"@{commit}" if name == "another commit" else ""), tmp_path / "got")
    assert nothing_left(tmp_path) and not (tmp_path / "got").exists()
    hub.lies.clear()
    assert pull(f"hub:{NAME}", tmp_path / "got").commit == commit  # it was not remembered


def test_a_spoilt_adapter_on_an_honest_hub_is_refused(hub, adapter, tmp_path):
    hub.commit(NAME, {**files_of(adapter), CONFIG: b'{"peft_type": "IA3"}'})
    with pytest.raises(AdapterError, match=f"hub:{NAME}.*peft_type is 'IA3'"):
        pull(f"hub:{NAME}", tmp_path / "got")
    assert nothing_left(tmp_path)


def test_what_was_changed_in_the_cache_is_refused(hub, adapter):
    hub.commit(NAME, files_of(adapter))
    path = pull(f"hub:{NAME}").path
    (path / WEIGHTS).write_bytes(flip((path / WEIGHTS).read_bytes()))
    with pytest.raises(AdapterError, match="not what was pulled into it"):
        pull(f"hub:{NAME}")


def test_too_large_is_told_before_anything_is_downloaded(hub, adapter):
    hub.commit(NAME, files_of(adapter))
    with pytest.raises(AdapterError, match="is too large"):
        pull(f"hub:{NAME}", max_bytes=1000)
    assert not [path for _, path, *_ in hub.asked if "/resolve/" in path]


def test_a_signature_can_be_required(hub, adapter, tmp_path):
    from unlearn_peft.adapters.signing import new_key, sign
    from unlearn_peft.adapters.trust import Trust

    private, public = new_key(tmp_path / "me")
    hub.commit(NAME, files_of(adapter))
    trust = Trust.read(public)
    with pytest.raises(AdapterError, match="has no signature"):
        pull(f"hub:{NAME}", tmp_path / "got", trust=trust)
    sign(adapter, private)
    hub.commit(NAME, files_of(adapter))
    assert pull(f"hub:{NAME}", tmp_path / "got", trust=trust).signed_by == "me"
    hub.commit(NAME, {**files_of(adapter), "README.md": b"# Not mine\n"})
    with pytest.raises(AdapterError, match="README.md is not the file that was signed"):
        pull(f"hub:{NAME}", tmp_path / "other", trust=trust)
    assert not (tmp_path / "other").exists()


def test_push_sends_an_adapters_files_and_tells_the_commit(hub, adapter, tmp_path):
    (adapter / "notes.txt").write_text("the forget rows are ...")
    pushed = push(adapter, f"hub:{NAME}", token="hf_x")
    assert pushed.source == f"hub:{NAME}@{pushed.commit}" and hub.private is True
    sent = hub.repositories[NAME][pushed.commit]
    assert sent == {name: data for name, data in files_of(adapter).items() if name != "notes.txt"}
    assert files_of(pull(pushed.source, tmp_path / "back").path) == sent
    (adapter / CONFIG).write_text("{")
    with pytest.raises(AdapterError, match="not readable JSON"):
        push(adapter, f"hub:{NAME}", token="hf_x")


# --- archives, mirrors, folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz"])
def test_an_archive_comes_back_as_it_was_and_is_the_same_each_time(hub, adapter, tmp_path, ending):
    pushed = push(adapter, str(tmp_path / f"x{ending}"))
    again = push(adapter, str(tmp_path / f"y{ending}"))
    assert pushed.sha256 == again.sha256
    got = pull(str(tmp_path / f"x{ending}"), tmp_path / "got")
    assert files_of(got.path) == files_of(adapter) and got.sha256 == pushed.sha256
    assert pull(str(tmp_path / f"x{ending}")).path.is_dir()


def test_folders(hub, adapter, tmp_path):
    push(adapter, str(tmp_path / "there"))
    assert files_of(pull(str(tmp_path / "there"), tmp_path / "back").path) == files_of(adapter)
    assert pull(str(adapter)).path == adapter
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="something else"):
        pull(str(adapter), tmp_path / "mine")


def mirrored(hub, adapter, tmp_path):
    pack(adapter, tmp_path / "x.tar.gz")
    data = hub.mirror["x.tar.gz"] = (tmp_path / "x.tar.gz").read_bytes()
    return f"{hub.url}/mirror/x.tar.gz", hashlib.sha256(data).hexdigest()


def test_a_mirror_with_a_digest(hub, adapter, tmp_path):
    url, digest = mirrored(hub, adapter, tmp_path)
    hub.lies["cut once"] = 100
    got = pull(f"{url}#sha256={digest}", tmp_path / "got")
    assert files_of(got.path) == files_of(adapter) and got.sha256 == digest
    hub.asked.clear()
    assert pull(f"{url}#sha256={digest}", offline=True).sha256 == digest and not hub.asked


def test_mirrors_that_are_not_to_be_had(hub, adapter, tmp_path):
    url, digest = mirrored(hub, adapter, tmp_path)
    for name, told in (
        (url, "has no digest"), (f"{url}#sha256={'0' * 64}", "not the file that was promised"),
        (f"{url}#sha256=12", "is no digest"), (f"{url}x#sha256={digest}", "status 404"),
        (f"http://example.org/x.tar.gz#sha256={digest}", "is not HTTPS"),
        (f"https://me:pw@example.org/x.tar.gz#sha256={digest}", "password"),
        (f"http://127.0.0.1:9/x.tar.gz#sha256={digest}", "cannot be reached"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=told):
            pull(name)
    with pytest.raises(AdapterError, match="expected at most"):
        pull(f"{url}#sha256={digest}", max_bytes=100)
    with pytest.raises(AdapterError, match="no server may be asked"):
        pull(f"{url}#sha256={digest}", offline=True)
    hub.lies["redirect"] = "http://example.org/x"
    with pytest.raises(AdapterError, match="is not HTTPS"):
        pull(f"{url}#sha256={digest}")
    hub.lies.clear()
    assert nothing_left(tmp_path)
    assert pull(url, insecure=True).sha256 == digest


ODD_REDIRECTS = {
    "file:///etc/passwd": "no address of a web server", "data:,x": "no address",
    "ftp://127.0.0.1/x": "no address of a web server", "http://169.254.169.254/x": "is not HTTPS",
    "http://a:b@127.0.0.1/x": "password", "http://[": "no address", "http://127.0.0.1:99999/": "no address",
    "http://127.0.0.1/%0d%0aX: y\x7f": "no address|cannot be reached", "": "names no address",
    "https://": "no address of a web server", "http://\xff.example/": "is not HTTPS",
    "https://xn--a.example/": "is no address",
}  # fmt: skip


@pytest.mark.parametrize("location", ODD_REDIRECTS)
def test_odd_redirects_are_told(hub, adapter, tmp_path, location):
    url, digest = mirrored(hub, adapter, tmp_path)
    hub.lies["redirect"] = location
    with pytest.raises(AdapterError, match=ODD_REDIRECTS[location]):
        pull(f"{url}#sha256={digest}")
    assert nothing_left(tmp_path)


def test_a_range_that_is_refused_ends_in_an_error(hub, adapter, tmp_path):
    url, digest = mirrored(hub, adapter, tmp_path)
    hub.lies["status"] = 416
    with pytest.raises(AdapterError, match="status 416, expected a file"):
        pull(f"{url}#sha256={digest}")
    hub.lies.clear()
    assert pull(f"{url}#sha256={digest}").sha256 == digest


def test_a_server_that_drips_is_given_up_and_gone_on_with(hub, adapter, monkeypatch):
    monkeypatch.setattr("unlearn_peft.adapters.hub.download._WINDOW_SECONDS", 0.5)
    hub.commit(NAME, files_of(adapter))
    hub.lies["drip"] = 0.05
    with pytest.raises(AdapterError, match=r"sends \d+ bytes/s, expected at least 1,000 over 0.5 s: stopped"):
        pull(f"hub:{NAME}")
    hub.lies.clear()
    hub.asked.clear()
    assert files_of(pull(f"hub:{NAME}").path) == files_of(adapter)
    assert any(asked for _, _, asked, _ in hub.asked)  # it went on where it was


def test_a_head_that_drips_is_given_up(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("unlearn_peft.adapters.hub.download._HEAD_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                while not done.wait(0.1):
                    connection.sendall(b"y")

        done = threading.Event()
        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(AdapterError, match="no whole head of a response within 0.5 s"):
            pull(f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz#sha256={'0' * 64}")
        done.set()


def tar(entries, path, mode="w"):
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for name, change in entries:
            info = tarfile.TarInfo(name)
            data = b"x"
            if isinstance(change, bytes):
                data = change
            elif change:
                change(info)
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def as_type(kind, target=""):
    def change(info):
        info.type, info.linkname = kind, target

    return change


ESCAPES = {
    "absolute": ([("/tmp/evil.png", None)], "no place in an adapter"),
    "dots": ([("../evil.png", None)], "no place in an adapter"),
    "dots below": ([("a/../../evil.png", None)], "no place in an adapter"),
    "backslash": ([("..\\evil.png", None)], "no place in an adapter"),
    "symlink": ([(WEIGHTS, as_type(tarfile.SYMTYPE, "/etc/passwd"))], "a symbolic link"),
    "hard link": ([(WEIGHTS, as_type(tarfile.LNKTYPE, "/etc/passwd"))], "a hard link"),
    "link to a folder": ([("a", as_type(tarfile.SYMTYPE, "/tmp")), ("a/evil.png", None)], "a symbolic link"),
    "device": ([(WEIGHTS, as_type(tarfile.CHRTYPE))], "a device"),
    "pipe": ([(WEIGHTS, as_type(tarfile.FIFOTYPE))], "a pipe"),
    "folder above": ([("../up", as_type(tarfile.DIRTYPE))], "holds the folder"),
    "code": ([("evil.py", None)], "no place in an adapter"),
    "pickle": ([("adapter_model.bin", None)], "no place in an adapter"),
    "two folders": ([("a/" + CONFIG, None), ("b/" + WEIGHTS, None)], "several folders"),
    "twice": ([(CONFIG, None), (CONFIG, None)], "twice"),
    "many": ([(f"p{n}.png", None) for n in range(101)], "more than 100 entries"),
    "large config": ([(CONFIG, b" " * 5_000_000)], "expected at most"),
    "nothing": ([], "holds no files"),
    "long name": ([("a" * 150 + ".png", None)], "no place in an adapter"),
    "terminal codes": ([("\x1b[2Jx.png", None)], "no place in an adapter"),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_hostile_archive_is_refused_and_writes_nothing(hub, tmp_path, name):
    entries, told = ESCAPES[name]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match=told):
        pull(str(tar(entries, tmp_path / "x.tar.gz", "w:gz")), tmp_path / "got")
    after = {p for p in tmp_path.rglob("*") if p.is_file()} - set(before)
    assert after == {tmp_path / "x.tar.gz"}


def bomb(tmp_path):
    """A gigabyte of zeros in a megabyte."""
    info = tarfile.TarInfo(WEIGHTS)
    info.size = 1 << 30
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(info.tobuf())
        for _ in range(64):
            out.write(b"\0" * (1 << 20))
    return path


def pax(tmp_path):
    """A header that says that its text is of 900 MB: tarfile would read it as a whole."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 900_000_000
    (tmp_path / "pax.tar").write_bytes(info.tobuf() + b"\0" * 20_000)
    return tmp_path / "pax.tar"


def cut(tmp_path, adapter):
    pack(adapter, tmp_path / "x.tar.gz")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "x.tar.gz").read_bytes()[:-500])
    return tmp_path / "cut.tar.gz"


def text(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"no tar" * 500)
    return tmp_path / "t.tar"


def test_bombs_and_damage_are_refused_soon(hub, adapter, tmp_path):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = (
        (bomb(tmp_path), {"max_bytes": 10_000_000}, "expected at most"), (bomb(tmp_path), {}, "cut short|damaged"),
        (pax(tmp_path), {}, "absurd size"), (cut(tmp_path, adapter), {}, "damaged"), (text(tmp_path), {}, "damaged"),
    )  # fmt: skip
    for path, how, told in cases:
        with pytest.raises(AdapterError, match=told):
            pull(str(path), tmp_path / "got", **how)
    assert nothing_left(tmp_path) and not (tmp_path / "got").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


# --- names and commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["hub:", "hub:acme", "hub:../x", "hub:a/b/c", "hub:a/..", "hub:acme/x@../y", "hub:acme/x@a b", "ftp://x/y", "s3:x",
     "https://x/y#md5=1"],
)  # fmt: skip
def test_names_that_mean_nothing(name):
    with pytest.raises(AdapterError):
        parse(name)


@pytest.mark.long
def test_the_commands(hub, adapter, tmp_path):
    import os

    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}

    def call(*arguments):
        command = [sys.executable, "-m", "unlearn_peft.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    pushed = call("push", adapter, f"hub:{NAME}")
    assert pushed.returncode == 0, pushed.stderr
    pulled = call("pull", pushed.stdout.strip(), "--output", tmp_path / "got")
    assert pulled.returncode == 0 and pulled.stdout.strip() == str(tmp_path / "got"), pulled.stderr
    assert f"commit: {pushed.stdout.strip().rpartition('@')[2]}" in pulled.stderr
    assert files_of(tmp_path / "got") == files_of(adapter)
    shutil.rmtree(tmp_path / "cache")
    refused = call("pull", f"hub:{NAME}", "--offline")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr
