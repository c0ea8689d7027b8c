"""Signed adapters: what holds, and all that does not. Sigstore needs the network and is not called."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import logits, make_tiny

from unlearn_peft import Bank, attach, attached, load_base, merge, read_bundle, stack, unlearn
from unlearn_peft.adapters.signing import new_key, sign, verify
from unlearn_peft.adapters.trust import SIGNATURE, Identity, Trust
from unlearn_peft.errors import AdapterError, OutputError, TrustError
from unlearn_peft.evaluate import compare

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: new_key(folder / name) for name in ("alice", "bob")}


@pytest.fixture(scope="session")
def signed_once(keys, tiny_folder, tmp_path_factory):
    """An adapter as training writes it, with card, manifest and curves, signed by alice."""
    from conftest import FORGET, RETAIN

    path = tmp_path_factory.mktemp("signed") / "adapter"
    unlearn(
        load_base(str(tiny_folder)), forget=FORGET, retain=RETAIN, steps=2, eval_every=1, own_answers=0, warmup_steps=0,
        anchor_batch=2, objective={"forget_ceiling": 15, "stop_when": None}, output=str(path), quiet=True,
    )  # fmt: skip
    sign(path, keys["alice"][0])
    return path


@pytest.fixture
def signed(signed_once, tmp_path):
    return shutil.copytree(signed_once, tmp_path / "signed")


@pytest.fixture
def alice(keys):
    return Trust.read(keys["alice"][1])


def refused(path, trust, *told):
    with pytest.raises(AdapterError) as error:
        read_bundle(path, trust=trust)
    assert all(word in str(error.value) for word in told), str(error.value)


FILES = ("adapter_model.safetensors", "adapter_config.json", "forget.json", "README.md", "curves.png", "model.sig")


def test_a_signed_adapter_is_taken(signed, tiny, alice):
    bundle = read_bundle(signed, trust=alice)
    assert bundle.signed_by == "alice" and sorted(bundle.files) == sorted(set(FILES) - {SIGNATURE})
    assert verify(signed, alice).signed_by == alice.check(bundle) == "alice"
    assert attach(tiny, signed, trust=alice) and attached(tiny)
    bank = Bank(tiny.model, tiny.tokenizer, trust=alice)
    bank.load("it", signed)
    with bank.hold(["it"]) as held:
        assert held.applied[0].signed_by == "alice" and held.applied[0].different_base == ()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_refused_wherever_it_is(signed, alice, name):
    content = (signed / name).read_bytes()
    spots = {0, 1, 7, 8, 9, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1}
    for spot in sorted(spots):
        for bit in (0, 6):
            changed = bytearray(content)
            changed[spot] ^= 1 << bit
            (signed / name).write_bytes(changed)
            told = ("signature",) if name == SIGNATURE else (f"{name} is not the file that was signed",)
            refused(signed, alice, *told)
    (signed / name).write_bytes(content)
    assert read_bundle(signed, trust=alice).signed_by == "alice"


def test_any_change_of_the_signature_is_refused_or_changes_nothing_that_counts(signed, alice):
    """Base64 and JSON have room for other spellings of the same; what is signed stays the same."""
    content = (signed / SIGNATURE).read_bytes()
    taken = 0
    for spot in range(0, len(content), 11):
        changed = bytearray(content)
        changed[spot] ^= 1
        (signed / SIGNATURE).write_bytes(changed)
        try:
            assert read_bundle(signed, trust=alice).files == read_bundle(signed).files
            taken += 1
        except AdapterError:
            pass
    assert taken < len(range(0, len(content), 11)) / 20


def test_another_key_no_signature_and_a_borrowed_one(signed, keys, alice, tiny, make_adapter):
    bob = Trust.read(keys["bob"][1])
    refused(signed, bob, "by none of the trusted keys ('bob')")
    other = make_adapter(tiny, "other")
    refused(other, alice, "has no signature")
    shutil.copy(signed / SIGNATURE, other / SIGNATURE)
    refused(
        other, alice, "adapter_model.safetensors is not the file", "adapter_config.json is not", "'forget.json' was"
    )
    sign(other, keys["bob"][0])
    refused(other, alice, "by none of the trusted keys")
    assert read_bundle(other, trust=Trust.read(keys["alice"][1], keys["bob"][1])).signed_by == "bob"


@pytest.mark.parametrize("name", ["evil.py", "optimizer.pt", "tokenizer.json", "README.md.exe", ".hidden", "x.png"])
def test_nothing_can_be_added(signed, alice, name):
    (signed / name).write_text("print('hello')")
    refused(signed, alice, f"'{name}' ")


def test_a_folder_or_a_link_cannot_be_added(signed, alice, tmp_path):
    (signed / "more").mkdir()
    refused(signed, alice, "'more' has no place")
    (signed / "more").rmdir()
    (tmp_path / "out.png").write_bytes(b"x")
    (signed / "out.png").symlink_to(tmp_path / "out.png")
    refused(signed, alice, "out.png")
    assert read_bundle(signed)  # without trust, what is not read does not matter


@pytest.mark.parametrize("name", ["README.md", "curves.png", "forget.json"])
def test_nothing_can_be_taken_away(signed, alice, name):
    (signed / name).unlink()
    refused(signed, alice, f"'{name}' was signed, but is missing")


def test_what_has_no_place_in_an_adapter_is_not_signed(signed, keys):
    (signed / "evil.py").write_text("")
    before = (signed / SIGNATURE).read_bytes()
    with pytest.raises(AdapterError, match="'evil.py' has no place"):
        sign(signed, keys["alice"][0])
    (signed / "evil.py").unlink()
    (signed / WEIGHTS).write_bytes(b"")
    with pytest.raises(AdapterError, match="truncated"):
        sign(signed, keys["alice"][0])
    assert (signed / SIGNATURE).read_bytes() == before


def test_a_signature_that_is_not_required_must_hold_if_it_is_there(signed, keys, tiny, make_adapter):
    lax = Trust.read(keys["alice"][1], required=False)
    assert read_bundle(make_adapter(tiny, "plain"), trust=lax).signed_by is None
    assert read_bundle(signed, trust=lax).signed_by == "alice"
    (signed / "README.md").write_text("buy this")
    refused(signed, lax, "README.md is not the file that was signed")
    assert read_bundle(signed).signed_by is None  # nobody asked


def test_everything_wrong_is_told_at_once(signed, alice, tmp_path):
    """Fingerprint, shapes, ranks, NaN, alien tensors, digests and signature, in one error."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(signed / WEIGHTS)
    names = sorted(name for name in tensors if "lora_A" in name)
    tensors[names[0]].fill_(float("nan"))
    tensors[names[1]] = torch.zeros(tensors[names[1]].shape[0], 7)
    tensors[names[2]] = tensors[names[2]].to(torch.float16)
    other = names[3].replace("lora_A", "lora_B")
    tensors[names[3]], tensors[other] = tensors[names[3]][:1].clone(), tensors[other][:, :1].clone()
    tensors["evil"] = torch.zeros(1)
    save_file(tensors, signed / WEIGHTS)
    strange = load_base(str(make_tiny(tmp_path / "strange", seed=3)))
    with pytest.raises(AdapterError) as error:
        attach(strange, signed, trust=alice)
    text = str(error.value)
    for told in (
        "NaN or infinity", "in the base, the adapter was made for", "its config says",
        "'evil' is no LoRA", "adapter_model.safetensors is not the file that was saved",
        "adapter_model.safetensors is not the file that was signed", "the base's weights is not the one",
    ):  # fmt: skip
        assert told in text, text
    bank = Bank(strange.model, strange.tokenizer, trust=alice)
    with pytest.raises(AdapterError) as same:
        bank.load("it", signed)
    assert str(same.value) == text and not attached(strange)


def test_what_was_verified_is_what_is_used(signed, alice, monkeypatch):
    """Files that are exchanged after they were read, before the signature is looked at."""
    import unlearn_peft.adapters.trust as module

    good, seen = (signed / WEIGHTS).read_bytes(), []
    deltas = read_bundle(signed).deltas
    look = module.claimed

    def exchange(signature):
        (signed / WEIGHTS).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        seen.append(1)
        return look(signature)

    monkeypatch.setattr(module, "claimed", exchange)
    bundle = read_bundle(signed, trust=Trust(alice.signers))
    assert seen and all(torch.equal(bundle.deltas[n].up, delta.up) for n, delta in deltas.items())
    refused(signed, Trust(alice.signers), "is not the file that was signed")


def test_tenants_with_keys_of_their_own(signed, keys, tmp_path, tiny):
    """A server reads once, for all; whether a tenant trusts who signed is asked of what was read."""
    alice, bob = (keys[name][1] for name in ("alice", "bob"))
    (tmp_path / "keys").mkdir()
    shutil.copy(bob, tmp_path / "keys" / "b.pub")
    (tmp_path / "acme.yaml").write_text(f"alice: {alice}\nbob: keys/b.pub\n")
    inline = "".join(f"  {line}\n" for line in bob.read_text().splitlines())
    (tmp_path / "globex.yaml").write_text(f"bob: |\n{inline}ci: {{identity: ci@example.org, issuer: https://x.org}}\n")
    acme, globex = Trust.read(tmp_path / "acme.yaml"), Trust.read(tmp_path / "globex.yaml")
    assert globex.signers["ci"] == Identity("ci@example.org", "https://x.org")
    assert acme.version == Trust.read(tmp_path / "acme.yaml").version != globex.version
    del globex.signers["ci"]  # needs the network
    bank = Bank(tiny.model, tiny.tokenizer)
    bank.load("it", signed)
    with bank.hold(["it"]) as held:
        bundle = held.parts[0].adapter.bundle
    (signed / WEIGHTS).unlink()  # what was read counts
    assert acme.check(bundle) == acme.check(bundle) == "alice"
    with pytest.raises(AdapterError, match="by none of the trusted keys"):
        globex.check(bundle)


def test_a_swapped_in_adapter_must_be_signed_too(signed, tiny, alice, make_adapter):
    bank = Bank(tiny.model, tiny.tokenizer, trust=alice)
    bank.load("it", signed)
    other = make_adapter(tiny, "other")
    with pytest.raises(AdapterError, match="has no signature"):
        bank.swap("it", other)
    with pytest.raises(AdapterError, match="has no signature"):
        bank.load("other", other)
    assert bank.known == ("it",)
    bank.hold(["it"]).release()


@pytest.mark.parametrize("call", ["stack", "merge", "compare", "attach"])
def test_every_way_in_asks_for_it(call, signed, tiny, alice, make_adapter, tmp_path):
    other = make_adapter(tiny, "other")
    calls = {
        "stack": lambda: stack([signed, other], tmp_path / "new", trust=alice),
        "merge": lambda: merge(tiny, [signed, other], tmp_path / "new", trust=alice),
        "compare": lambda: compare.compare(tiny, [other], [{"prompt": "a", "leak": []}], trust=alice),
        "attach": lambda: attach(tiny, signed, other, trust=alice),
    }
    plain = logits(tiny)
    with pytest.raises(AdapterError, match="has no signature"):
        calls[call]()
    assert not (tmp_path / "new").exists() and not attached(tiny) and torch.equal(logits(tiny), plain)


def test_keys_that_cannot_be_used(keys, tmp_path, signed):
    private, public = keys["alice"]
    assert private.stat().st_mode & 0o777 == 0o600 or os.name != "posix"
    with pytest.raises(OutputError, match="never overwritten"):
        new_key(private.with_suffix(""))
    with pytest.raises(TrustError, match="holds a private key"):
        Trust.read(private)
    with pytest.raises(TrustError, match="holds a private key"):
        Trust.read(private.parent)
    with pytest.raises(TrustError, match="no private key"):
        sign(signed, public)
    with pytest.raises(TrustError, match="cannot be read"):
        sign(signed, tmp_path / "none.pem")
    with pytest.raises(TrustError, match="cannot be read"):
        Trust.read(tmp_path / "none.pub")
    with pytest.raises(TrustError, match="nobody is trusted"):
        Trust.read()
    for text in ("hello", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "\udcff"):
        (tmp_path / "bad.pub").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(TrustError):
            Trust.read(tmp_path / "bad.pub")
    for text in ("[1, 2]", "a: 3", "a: none.pub", "a: [b]", "{", "a: {identity: x}"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(TrustError):
            Trust.read(tmp_path / "bad.yaml")


def test_other_kinds_of_keys(tmp_path):
    from cryptography.hazmat.primitives import serialization as write
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())):
        pem = key.public_key().public_bytes(write.Encoding.PEM, write.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / "other.pub").write_bytes(pem)
        with pytest.raises(TrustError, match="another kind of key"):
            Trust.read(tmp_path / "other.pub")


def test_an_encrypted_key(signed, tmp_path):
    private, public = new_key(tmp_path / "carol", "correct horse")
    for password in (None, "wrong"):
        with pytest.raises(TrustError):
            sign(signed, private, password=password)
    sign(signed, private, password="correct horse")
    assert verify(signed, Trust.read(public)).signed_by == "carol"
    assert b"ENCRYPTED" in private.read_bytes()


def test_a_changed_card_says_that_it_is_to_be_signed_again(signed, keys, alice, caplog):
    from unlearn_peft.adapters.card import put_evaluation

    put_evaluation(signed, "## Evaluation\n\nfine")
    assert "no longer holds: sign it again" in caplog.text
    refused(signed, alice, "README.md is not", "forget.json is not")
    sign(signed, keys["alice"][0])
    assert read_bundle(signed, trust=alice).signed_by == "alice"


def test_signatures_are_model_signings_own(signed, keys):
    """Its own verifier takes ours, and ours takes what it signs."""
    import model_signing

    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys["alice"][1]).verify(
        signed, signed / SIGNATURE
    )
    (signed / SIGNATURE).unlink()
    model_signing.signing.Config().use_elliptic_key_signer(private_key=keys["bob"][0]).sign(signed, signed / SIGNATURE)
    assert verify(signed, Trust.read(keys["bob"][1])).signed_by == "bob"


def test_a_different_base_is_loud_and_stays_visible(signed, tmp_path, caplog):
    other = load_base(str(make_tiny(tmp_path / "other", seed=9)))
    bank = Bank(other.model, other.tokenizer)
    with pytest.raises(AdapterError, match="the base's weights"):
        bank.load("it", signed)
    bank.load("it", signed, allow_different_base=True)
    assert "UNSAFE" in caplog.text and "differs in its weights" in caplog.text
    with bank.hold(["it"]) as held:
        assert held.applied[0].different_base == ("weights",)
        assert held.parts[0].adapter.different_base == ("weights",)


def test_without_the_library_it_is_said_what_to_install(signed, alice, monkeypatch):
    import unlearn_peft.adapters.trust as module

    monkeypatch.setitem(sys.modules, "model_signing", None)
    module._signed_by.cache_clear()
    with pytest.raises(TrustError, match=r"pip install 'unlearn-peft\[trust\]'"):
        read_bundle(signed, trust=Trust(alice.signers))
    assert read_bundle(signed)


def test_sigstore_is_asked_for_the_identity(signed, monkeypatch):
    """Without a network, only what is asked of the library: it reads the bundle, and an identity is what is checked."""
    from model_signing._signing import sign_sigstore

    asked = []

    class Verifier:
        def __init__(self, **kwargs):
            asked.append(kwargs)

        def verify(self, signature):
            raise ValueError("not this identity's")

    monkeypatch.setattr(sign_sigstore, "Verifier", Verifier)
    trust = Trust({"ci": Identity("ci@example.org", "https://issuer.example")})
    refused(signed, trust, "by none of the trusted keys")
    assert asked == [{"identity": "ci@example.org", "oidc_issuer": "https://issuer.example"}]


def test_the_commands(signed, keys, tmp_path, run, tiny, make_adapter):
    plain = make_adapter(tiny, "plain")
    private, public = (str(path) for path in keys["alice"])
    code, out, err = run("keys", "new", tmp_path / "new" / "dave")
    assert code == 0 and (tmp_path / "new" / "dave.pub").is_file(), err
    assert run("verify", plain, "--trusted-keys", public)[0] == 2
    assert run("sign", plain)[0] == run("sign", plain, "--key", private, "--sigstore")[0] == 2
    code, out, err = run("sign", plain, "--key", private)
    assert code == 0 and "model.sig" in out, err
    code, out, _ = run("verify", plain, "--trusted-keys", public, "--json")
    assert code == 0 and json.loads(out)["signed_by"] == "alice"
    assert run("verify", plain)[0] == 2
    need = ("--require-signature", "--trusted-keys", public)
    code, out, err = run("inspect", plain, *need, "--json")
    assert code == 0 and json.loads(out)["signature"] == "alice", err
    for command in (
        ("inspect", signed), ("generate", "--adapter", signed, "--prompt", "hi"), ("compare", signed, "--prompt", "hi"),
        ("stack", signed, signed, "--output", tmp_path / "s"), ("merge", signed, "--output", tmp_path / "m"),
    ):  # fmt: skip
        (signed / "README.md").write_text("changed")
        code, out, err = run(*command, *need)
        assert code == 2 and err.startswith("error: ") and "README.md is not the file that was signed" in err, command
    assert run("inspect", plain, "--require-signature")[0] == 2


def test_from_a_signed_adapter_to_an_answer_and_a_flipped_byte_refused(signed, keys, run):
    need = ("--require-signature", "--trusted-keys", str(keys["alice"][1]))
    ask = ("generate", "--adapter", signed, "--prompt", "Who wrote the blue book?", "--max-new-tokens", "3", *need)
    code, out, err = run(*ask)
    assert code == 0 and "> Who wrote the blue book?" in out, err
    content = bytearray((signed / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / WEIGHTS).write_bytes(content)
    code, out, err = run(*ask)
    assert code == 2 and out == "" and "is not the file that was signed" in err
