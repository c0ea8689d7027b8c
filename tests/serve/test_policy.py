"""A policy in YAML: what is taken, what is refused and how it is told; the file under changes; keys and sets."""

import hashlib
import json
import logging
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_peft.errors import PolicyError
from unlearn_peft.serve.policy import yaml_file as policy_file
from unlearn_peft.serve.policy.policy import NotAllowed, Policy, key_digest, make_policy, new_key
from unlearn_peft.serve.policy.store import open_policy
from unlearn_peft.serve.policy.yaml_file import PolicyFile, dump_policy, parse_policy, read_policy

KEY = "uf-not-to-be-seen-anywhere"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
GOOD = f"""
adapters:
  hp: {{path: adapters/hp, sha256: {"AB" * 32}}}
  news: {{path: /srv/news}}
tenants:
  acme: {{forget: [hp], keys: [{DIGEST}]}}
  globex: {{forget: {{hp: 0.5, news: 2}}}}
  plain: {{forget: []}}
"""


def policy_of(text, folder="/etc/policies"):
    return parse_policy(text.encode(), "policy.yaml", Path(folder))


def put(path, text):
    """Replace a file as a whole."""
    path.with_name("new").write_text(text)
    os.replace(path.with_name("new"), path)


def with_tenants(count):
    return "adapters: {a: {path: a}}\ntenants:\n" + "".join(f"  t{n}: {{forget: [a]}}\n" for n in range(count))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "policy.yaml").write_text(GOOD)
    return tmp_path / "policy.yaml"


def test_what_a_policy_says():
    policy = policy_of(GOOD)
    assert policy.adapters["hp"].path == "/etc/policies/adapters/hp" and policy.adapters["hp"].sha256 == "ab" * 32
    assert policy.adapters["news"].path == "/srv/news" and policy.adapters["news"].sha256 is None
    assert policy.forget_of("acme") == {"hp": 1.0}
    assert policy.forget_of("globex") == {"hp": 0.5, "news": 2.0}
    assert policy.forget_of("plain") == {}
    assert policy.tenant_of(KEY) == "acme"
    assert policy.tenant_of(DIGEST) is policy.tenant_of("") is policy.tenant_of("\ud800é") is None


def test_a_request_adds_and_never_takes_away():
    policy = policy_of(GOOD.replace("forget: [hp]", "forget: [hp], may_add: [news]"))
    assert policy.forget_of("acme", ["news"]) == {"hp": 1.0, "news": 1.0}
    assert policy.forget_of("acme", {"news": 0.25, "hp": 0.1}) == {"hp": 1.0, "news": 0.25}
    assert policy.forget_of("globex", {"hp": 0.1, "news": 2}) == {"hp": 0.5, "news": 2.0}, "nothing is added by that"
    assert policy.forget_of("globex") == {"hp": 0.5, "news": 2.0}, "what requests add does not stay"
    for extra in ({"hp": 0}, {"hp": -1}, {"hp": float("nan")}, {"hp": float("inf")}, {"hp": 10**400}, {"hp": True},
                  {"hp": "1"}, {"hp": None}, ["nws"], [1], [["hp"]], "hp", 5, None):  # fmt: skip
        with pytest.raises(PolicyError) as told:
            policy.forget_of("acme", extra)
    for tenant, extra in (("acme", {"news": 1.01}), ("acme", {"hp": 1.01}), ("globex", ["hp"]), ("plain", ["hp"]),
                          ("plain", ["nws"])):  # fmt: skip
        with pytest.raises(NotAllowed, match=f"requests of tenant '{tenant}' may add ") as told:
            policy.forget_of(tenant, extra)
        assert ("'news'" in str(told.value)) == (tenant == "acme"), "the adapters of others are not told"
    with pytest.raises(PolicyError, match="unknown tenant 'acm'"):
        policy.forget_of("acm")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds nothing"),
        ("- a", "holds a list"),
        ("adapters: {}", "'tenants' is missing"),
        ("tenants: {}", "'adapters' is missing"),
        ("adapters: {}\ntenant: {}", "unknown key 'tenant' (did you mean 'tenants'?)"),
        ("adapters: {}\ntenants: {acme: {forgt: []}}", "unknown key 'tenants.acme.forgt' (did you mean 'forget'?)"),
        ("adapters: {}\ntenants: {acme: {forget: [], may_add: [hp]}}", "tenant 'acme' may add 'hp', which is not"),
        ("adapters: {}\ntenants: {acme: {keys: []}}", "'tenants.acme.forget' is missing (write [] for nothing)"),
        ("adapters: {}\ntenants: {acme: {forget: }}", "'tenants.acme.forget': expected adapters as [hp, news]"),
        ("adapters: {}\ntenants: {acme: }", "'tenants.acme': expected a mapping, found nothing"),
        ("adapters: {}\ntenants: {acme: {forget: [hp]}}", "tenant 'acme' forgets 'hp', which is not among"),
        ("adapters: {hpp: {path: x}}\ntenants: {acme: {forget: [hp]}}", "(did you mean 'hpp'?)"),
        ("adapters: {a: {path: x}}\ntenants: {t: {forget: [a, a]}}", "'a' is named twice"),
        ("adapters: {a: {path: x}}\ntenants: {t: {forget: {a: 0}}}", "'tenants.t.forget.a': the strength is 0"),
        ("adapters: {a: {path: x}}\ntenants: {t: {forget: {a: -0.5}}}", "the strength is -0.5"),
        ("adapters: {a: {path: x}}\ntenants: {t: {forget: {a: .nan}}}", "the strength is nan"),
        ("adapters: {a: {path: x}}\ntenants: {t: {forget: {a: .inf}}}", "the strength is inf"),
        ("adapters: {a: {path: x}}\ntenants: {t: {forget: {a: yes}}}", "expected a strength"),
        (f"adapters: {{a: {{path: x}}}}\ntenants: {{t: {{forget: {{a: 1{'0' * 400}}}}}}}", "the strength is 1000"),
        (f"adapters: {{a: {{path: x}}}}\ntenants: {{t: {{forget: {{a: 1{'0' * 5000}}}}}}}", "not valid YAML"),
        ("adapters: {a: {path: ''}}\ntenants: {}", "'adapters.a.path': expected the path"),
        ('adapters: {a: {path: "x\\0y"}}\ntenants: {}', "'adapters.a.path': expected the path"),
        ("adapters: {a: x}\ntenants: {}", "'adapters.a': expected a mapping, found a str"),
        ("adapters: {a: {path: x, sha256: abc}}\ntenants: {}", "'adapters.a.sha256': expected a sha256"),
        ("adapters: {}\ntenants: {a b: {forget: []}}", "'a b' is no name"),
        ("adapters: {}\ntenants: {a..b: {forget: []}}", "'a..b' is no name"),
        ("adapters: {}\ntenants: {.: {forget: []}}", "'.' is no name"),
        ("adapters: {}\ntenants: {ä: {forget: []}}", "'ä' is no name"),
        ("adapters: {../x: {path: x}}\ntenants: {}", "'../x' is no name"),
        ('adapters: {}\ntenants: {"a\\n": {forget: []}}', "is no name"),
        (f"adapters: {{}}\ntenants: {{{'x' * 65}: {{forget: []}}}}", "is no name"),
        ("adapters: {}\ntenants: {7: {forget: []}}", "expected text (put it in quotes), found a int"),
        ("adapters: {}\ntenants: {no: {forget: []}}", "expected text (put it in quotes), found a bool"),
        ("adapters: {}\nadapters: {}\ntenants: {}", "line 2, column 1: 'adapters' is given twice"),
        ("adapters: {}\ntenants:\n  t: {forget: []}\n  't': {forget: []}", "line 4, column 3: 't' is given twice"),
        ("x: &x {forget: []}\nadapters: {}\ntenants: {t: {<<: *x}}", "'<<' is not taken here"),
        ("adapters: {}\ntenants: {t: &t {forget: *t}}", "this alias stands for too much"),
        ("adapters: !!python/object/apply:os.system [true]\ntenants: {}", "could not determine a constructor"),
        ("adapters: [", "not valid YAML: line 1"),
        ("adapters: 2001-99-99", "not valid YAML: a date or number"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ("\ud800", "not valid YAML"),
        ("#" * 17_000_000, "more than 16 MB"),
        (f"adapters: {{}}\ntenants: {{t: {{forget: [], keys: [{DIGEST}]}}, u: {{forget: [], keys: [{DIGEST}]}}}}",
         "tenants 't' and 'u' have the same key"),
    ],
)  # fmt: skip
def test_what_is_refused(text, told):
    with pytest.raises(PolicyError) as refused:
        parse_policy(text.encode("utf-8", "surrogatepass"), "policy.yaml", Path("/"))
    assert told in str(refused.value) and "policy.yaml" in str(refused.value)
    assert len(str(refused.value)) < 1000 and DIGEST not in str(refused.value)


def test_all_that_is_wrong_is_told_at_once_and_no_key_is():
    with pytest.raises(PolicyError) as refused:
        policy_of(f"adapters: {{a: {{path: x, sha256: {KEY}}}}}\ntenants: {{t: {{forget: {{a: {KEY}, b c: 1}},"
                  f"keys: [{KEY}]}}, u: {{forget: {KEY}, keys: {KEY}}}, v: {KEY}}}")  # fmt: skip
    for place in ("adapters.a.sha256", "t.forget.a", "t.forget.b c", "t.keys", "u.forget", "u.keys", "tenants.v"):
        assert f"{place}'" in str(refused.value)
    assert KEY not in str(refused.value)


def test_versions_are_equal_if_and_only_if_the_content_is():
    policy = policy_of(GOOD)
    rewritten = json.dumps({name: dict(reversed(part.items())) for name, part in policy.dump().items()})
    assert policy_of(rewritten) == policy and policy_of(rewritten).version == policy.version
    others = [policy_of(GOOD.replace(*change)) for change in (
        ("[hp]", "[news]"), ("hp: 0.5", "hp: 0.25"), (DIGEST, "c" * 64), ("AB" * 32, "AC" * 32), ("plain", "plainer"),
        ("/srv/news", "/srv/old"))]  # fmt: skip
    assert len({policy.version, *(other.version for other in others)}) == 7


names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
strengths = st.floats(min_value=0, exclude_min=True, max_value=16)


@given(
    st.dictionaries(names, st.dictionaries(names, strengths, max_size=3), max_size=3),
    st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), unique=True, max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_what_is_written_reads_back_the_same(forget, keys):
    values = {"adapters": {name: {"path": f"/x/{name}"} for sets in forget.values() for name in sets},
              "tenants": {name: {"forget": sets} for name, sets in forget.items()}}  # fmt: skip
    for tenant in list(values["tenants"].values())[:1]:
        tenant["keys"] = keys
    policy = make_policy(values, "x")
    again = policy_of(dump_policy(policy))
    assert again == policy and again.version == policy.version


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_text_is_read_or_refused(data):
    """Whatever bytes: a policy or a PolicyError, nothing else."""
    text = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(text)))
        text[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=5))
    try:
        parse_policy(bytes(text), "policy.yaml", Path("/"))
    except PolicyError as error:
        assert DIGEST not in str(error)


@pytest.mark.parametrize("secret", [new_key(), DIGEST], ids=["key", "digest"])
@pytest.mark.parametrize("tenants", ["t: {{forget: [{}]}}", "{}: {{}}", "{0}: {{forget: []}}, {0}: {{forget: []}}"])
def test_a_key_in_the_place_of_a_name_is_not_quoted(secret, tenants):
    text = f"adapters: {{}}\ntenants: {{{tenants.format(secret)}}}"
    with pytest.raises(PolicyError, match="<a key>") as refused:
        parse_policy(text.encode(), "policy.yaml", Path("/"))
    assert secret not in str(refused.value)


def test_a_key_is_found_by_its_digest_and_not_by_trying_all():
    """All keys compared one by one took 142 ms of a server's event loop with 100,000 of them."""
    keys = [new_key() for _ in range(20)]
    assert len(set(keys)) == 20 and all(key.startswith("uf-") and len(key) == 46 for key in keys)
    tenants = {f"t{n}": {"forget": {}, "keys": [key_digest(k) for k in keys[2 * n : 2 * n + 2]]} for n in range(10)}
    policy = make_policy({"adapters": {}, "tenants": tenants}, "x")
    assert [policy.tenant_of(key) for key in keys] == [f"t{n // 2}" for n in range(20)]

    class Digests(str):
        compared = 0

        def __eq__(self, other):
            Digests.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    many = Policy({}, {}, "", {Digests(f"{n:064x}"): "t" for n in range(10_000)} | {key_digest("uf-known"): "known"})
    Digests.compared = 0
    assert many.tenant_of("uf-known") == "known" and many.tenant_of("uf-other") is None and Digests.compared < 10


def test_a_changed_file_is_read_again_and_a_bad_one_is_not_taken(file, caplog):
    caplog.set_level(logging.INFO, logger="unlearn_peft")
    source = open_policy(str(file))
    first = source.current()
    assert source.current() is first and source.problem is None
    put(file, GOOD.replace("[hp]", "[hp, news]"))
    second = source.current()
    assert second.forget_of("acme") == {"hp": 1.0, "news": 1.0} and source.current() is second
    caplog.clear()
    for bad, told in ((GOOD + "x: 1", "unknown key 'x'"), ("", "holds nothing"), (GOOD[:-30], "not valid YAML")):
        put(file, bad)
        for _ in range(3):
            assert source.current() is second and told in source.problem
    file.unlink()
    assert source.current() is second and source.current() is second and "No such file" in source.problem
    file.mkdir()
    assert source.current() is second and "no regular file" in source.problem
    file.rmdir()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 5, "each problem is logged once"
    assert DIGEST not in caplog.text
    file.write_text(GOOD)
    assert source.current() == first and source.problem is None


def test_a_file_that_is_gone_fails_closed(file, monkeypatch):
    """As a store that cannot be reached: the last policy for the grace, then nobody."""
    now = [policy_file.time.monotonic()]
    monkeypatch.setattr(policy_file.time, "monotonic", lambda: now[0])
    source = open_policy(str(file), grace=20)
    first = source.current()
    for kind in ("deleted", "a folder"):
        file.rename(file.with_name("aside"))
        if kind == "a folder":
            file.mkdir()
        for _ in range(6):
            now[0] += 3
            assert source.current() == first and source.problem
        now[0] += 6
        for _ in range(2):
            with pytest.raises(PolicyError, match="nobody is served until a valid one is there"):
                source.current()
        if kind == "a folder":
            file.rmdir()
        os.replace(file.with_name("aside"), file)
        now[0] += 1
        assert source.current() == first and source.problem is None
    put(file, "not a policy")
    now[0] += 100
    assert source.current() == first and source.problem, "a mistake in it is no order to stop"
    file.unlink()
    assert source.current() == first
    put(file, "not a policy")
    now[0] += 21
    with pytest.raises(PolicyError, match="holds a str.*nobody is served"):
        source.current()
    put(file, GOOD)
    assert source.current() == first


def test_a_file_that_cannot_be_used_at_first(tmp_path):
    for name, text, told in (("none.yaml", None, "No such file"), ("bad.yaml", "x", "holds a str")):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(PolicyError, match=told):
            open_policy(str(tmp_path / name))
    with pytest.raises(PolicyError, match=r"'policy.json' is no policy: expected a .yaml file"):
        open_policy("policy.json")


def test_changes_that_a_clock_might_hide(file):
    """Same size, same moment, written in place or renamed, or the same time stamp set by hand."""
    source = PolicyFile(file)
    for n in range(10):
        changed = GOOD.replace("hp: 0.5", f"hp: 0.{n}5")
        put(file, changed) if n % 2 else file.write_text(changed)
        assert source.current().forget_of("globex")["hp"] == float(f"0.{n}5")
    stamp = file.stat().st_mtime_ns
    file.write_text(GOOD.replace("hp: 0.5", "hp: 0.88"))
    os.utime(file, ns=(stamp, stamp))
    assert source.current().forget_of("globex")["hp"] == 0.88


def test_a_file_that_is_being_written_is_waited_for(tmp_path, monkeypatch):
    """Its beginning is a valid policy too, of fewer tenants: it must not be taken for the whole."""
    file = tmp_path / "policy.yaml"
    file.write_text(with_tenants(1))
    source = PolicyFile(file)
    beginning, *rest = with_tenants(4).splitlines(keepends=True)[-4:]
    file.write_text("adapters: {a: {path: a}}\ntenants:\n" + beginning)

    def write_on(_):
        with file.open("a") as stream:
            stream.write(rest.pop(0) if rest else "")

    monkeypatch.setattr(policy_file, "_SETTLE", 60)
    monkeypatch.setattr(policy_file.time, "sleep", write_on)
    assert len(source.current().tenants) == 4


def test_a_link_that_is_turned(tmp_path):
    """As Kubernetes mounts a ConfigMap: the folder is a link, and another folder is put under it."""
    for name, count in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.yaml").write_text(with_tenants(count))
    (tmp_path / "now").symlink_to("one")
    source = PolicyFile(tmp_path / "now" / "policy.yaml")
    assert len(source.current().tenants) == 1
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", tmp_path / "now")
    assert len(source.current().tenants) == 2


def test_many_threads_read_while_good_and_bad_files_come(tmp_path):
    """No reader ever sees a half file, an older policy after a newer one, or one older than the last whole file."""
    file = tmp_path / "policy.yaml"
    file.write_text(with_tenants(1))
    source, written, stop, failures = PolicyFile(file), [1], threading.Event(), []

    def read():
        newest = 0
        while not stop.is_set():
            floor = written[0]
            try:
                count = len(source.current().tenants)
            except Exception as error:
                failures.append(repr(error))
                return
            if count < max(floor, newest):
                failures.append(f"{count} tenants after {floor}, {newest}")
            newest = count

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    dice = random.Random(0)
    for count in range(2, 40):
        text = with_tenants(count)
        put(file, text)
        written[0] = count
        if count % 2:
            assert len(source.current().tenants) == count  # taken in, before the bad one comes
            bad = text[: dice.randrange(len(text))] + dice.choice(["{", "\0", "\nx: 1"])
            put(file, bad) if dice.random() < 0.5 else file.write_text(bad)
            assert len(source.current().tenants) == count
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    put(file, with_tenants(50))
    assert len(source.current().tenants) == 50


def test_the_example_in_the_recipes():
    policy = read_policy(Path(__file__).parents[2] / "recipes" / "serve" / "policy.yaml")
    assert policy.tenants and all(Path(adapter.path).is_absolute() for adapter in policy.adapters.values())
