"""Whose adapters are taken: trusted public keys, and signatures checked against the bytes that were read.

Keys come in from PEM files, folders or YAML; `Trust.check` compares what a trusted key signed with the digests of what
was read, so that nothing can be exchanged between the look at the signature and the use. Signatures are OpenSSF
`model-signing`'s, which does the cryptography (extra `trust`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import TrustError, refuse, safe_repr
from ..files.untrusted import MAX_JSON_BYTES, strict_json

SIGNATURE = "model.sig"
UNSIGNED = (SIGNATURE, ".gitattributes")  # the Hub adds the second to every repository; nothing here reads it
SIGNABLE = ("adapter_model.safetensors", "adapter_config.json", "forget.json", "README.md", "LICENSE")
SIGNABLE_ENDINGS = (".png", ".svg")  # plots: no code
NEEDED = SIGNABLE[:2]
_STATEMENT, _PREDICATE = "https://in-toto.io/Statement/v1", "https://model_signing/signature/v1.0"
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"
_MAX_KEY_BYTES = 1_000_000


class Identity(NamedTuple):
    """Who signs with Sigstore instead of a key: an identity such as a mail address, and who vouches for it."""

    identity: str
    issuer: str


@dataclass(frozen=True)
class Trust:
    """Trusted signers by name, and whether a signature is needed.

    Attributes:
        signers: a public key in PEM, or a Sigstore `Identity`, by the name that is told to people.
        required: refuse adapters without a signature. If not, those are taken; one that is there must hold anyway.
    """

    signers: Mapping[str, bytes | Identity]
    required: bool = True
    _known: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # what has been checked before

    @classmethod
    def read(cls, *places: str | Path, required: bool = True) -> Trust:
        """Read trusted signers.

        Args:
            places: PEM files with public keys; folders of `.pub` and `.pem` files; or YAML files, a table of names
                and what they stand for: a PEM file's path (relative to the YAML file), the PEM itself, or
                `{identity: ..., issuer: ...}` for Sigstore.
            required: see the class.

        Raises:
            TrustError: naming the place that holds no usable key.
        """
        signers: dict[str, bytes | Identity] = {}
        for place in map(Path, places):
            if place.is_dir():
                files = sorted(file for file in place.iterdir() if file.suffix in (".pub", ".pem"))
                read = [pair for file in files for pair in _read_pem(file).items()]
                found = dict(read)
                if len(found) < len(read):
                    raise TrustError(
                        f"two files in {place} have the same name, but for their ending: rename one of them"
                    )
            elif place.suffix in (".yaml", ".yml"):
                found = _read_yaml(place)
            else:
                found = dict(_read_pem(place))
            if not found:
                raise TrustError(
                    f"no public key in {place}: expected .pub or .pem files as `unlearn-peft keys new` makes"
                )
            for name, signer in found.items():
                if signers.setdefault(name, signer) != signer:
                    raise TrustError(f"two trusted signers are called '{name}': rename one of them")
        if required and not signers:
            raise TrustError("a signature is required, but nobody is trusted: name keys (--trusted-keys)")
        return cls(signers, required)

    @property
    def version(self) -> str:
        """A digest that is equal if and only if signers and `required` are."""
        lines = [f"{name}={signer!r}" for name, signer in sorted(self.signers.items())]
        return hashlib.sha256("\n".join([str(self.required), *lines]).encode()).hexdigest()

    def check(self, bundle: Any) -> str | None:
        """Return who signed a `Bundle` that was read before, None if nobody did and nobody has to.

        Raises:
            AdapterError: see `problems`.
        """
        problems, signer = self.problems(bundle.files, bundle.signature)
        if problems:
            refuse(f"the adapter {bundle.path} is not to be trusted", problems)
        return signer

    def problems(self, files: Mapping[str, str], signature: bytes | None) -> tuple[list[str], str | None]:
        """Compare what was read with what was signed.

        Args:
            files: name -> sha256 of everything in the adapter's directory but what `UNSIGNED` names.
            signature: what `model.sig` holds; None: there is none.

        Returns:
            what is wrong, and who signed it (None: nobody, or something is wrong).
        """
        if signature is None:
            wrong = f"it has no signature ({SIGNATURE}), and one is required: `unlearn-peft sign` makes one"
            return ([wrong] if self.required else []), None
        key = hashlib.sha256(repr((sorted(files.items()), hashlib.sha256(signature).hexdigest())).encode()).hexdigest()
        if key in self._known:
            return [], self._known[key]
        try:
            signed = claimed(signature)
        except ValueError as error:
            return [f"its signature cannot be read ({error})"], None
        problems = differences(files, signed)
        signer = next((name for name, one in self.signers.items() if _signed_by(signature, one) == signed), None)
        if signer is None:
            trusted = ", ".join(map(safe_repr, list(self.signers)[:5])) or "nobody"
            problems.append(f"its signature is by none of the trusted keys ({trusted})")
        if problems or signer is None:
            return problems, None
        self._known[key] = signer
        return [], signer


def differences(files: Mapping[str, str], signed: Mapping[str, str]) -> list[str]:
    """Return how files (name -> sha256) differ from what was signed, and what may not be signed at all."""
    problems = []
    for name in sorted(files.keys() | signed.keys()):
        if name in files and not _signable(name):
            problems.append(
                f"{safe_repr(name)} has no place in a signed adapter: expected {', '.join(SIGNABLE)} or plots"
            )
        elif name not in files:
            problems.append(f"{safe_repr(name)} was signed, but is missing")
        elif name not in signed:
            problems.append(f"{safe_repr(name)} was not signed: it was added later")
        elif files[name] != signed[name]:
            problems.append(f"{name} is not the file that was signed (its sha256 differs)")
    return problems + [f"its signature does not cover {name}" for name in NEEDED if name not in signed]


def need_model_signing() -> None:
    """Tell how to install what signs and verifies, where it is missing.

    Raises:
        TrustError: if it is.
    """
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise TrustError(
            f"signatures need OpenSSF's model-signing ({error}): pip install 'unlearn-peft[trust]'"
        ) from None


def public_pem(data: bytes, where: str) -> bytes:
    """Return a public key in PEM as model-signing takes it, one of the NIST curves, written in one form.

    Raises:
        TrustError: saying what it is instead.
    """
    need_model_signing()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TrustError(f"{where} holds no public key in PEM: expected what `unlearn-peft keys new` makes") from None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
        raise TrustError(f"{where} holds another kind of key, expected an elliptic curve's: P-256, P-384 or P-521")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _signable(name: str) -> bool:
    return "/" not in name and (name in SIGNABLE or name.endswith(SIGNABLE_ENDINGS))


def _read_pem(path: Path) -> dict[str, bytes | Identity]:
    """Return the public keys of a PEM file, by its name (and a number, where there are several)."""
    text = _read(path)
    if "PRIVATE KEY" in text:
        raise TrustError(f"{path} holds a private key: those sign, and stay secret. Name the public one (.pub) instead")
    keys = [_BEGIN + part.partition(_END)[0] + _END + "\n" for part in text.split(_BEGIN)[1:]]
    if not keys:
        raise TrustError(f"{path} holds no public key in PEM: expected what `unlearn-peft keys new` makes")
    names = [path.stem if n == 0 else f"{path.stem} {n + 1}" for n in range(len(keys))]
    return {name: public_pem(key.encode(), str(path)) for name, key in zip(names, keys, strict=True)}


def _read_yaml(path: Path) -> dict[str, bytes | Identity]:
    import yaml

    try:
        table = yaml.safe_load(_read(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise TrustError(f"{path} is no YAML ({type(error).__name__})") from None
    if not isinstance(table, dict):
        raise TrustError(f"{path} holds {type(table).__name__}, expected a table: NAME: KEY.pub")
    found: dict[str, bytes | Identity] = {}
    for name, value in table.items():
        where = f"{path}: {safe_repr(name)}"
        if isinstance(value, dict) and value.keys() == {"identity", "issuer"}:
            found[str(name)] = Identity(str(value["identity"]), str(value["issuer"]))
        elif isinstance(value, str) and "-----BEGIN" in value:
            if "PRIVATE KEY" in value:
                raise TrustError(f"{where} is a private key: those sign, and stay secret. Give the public one")
            found[str(name)] = public_pem(value.encode(), where)
        elif isinstance(value, str):
            keys = list(_read_pem(path.parent / value).values())
            if len(keys) > 1:
                raise TrustError(f"{where}: {value} holds {len(keys)} keys, expected one")
            found[str(name)] = keys[0]
        else:
            raise TrustError(f"{where} is {safe_repr(value)}, expected a PEM file, a PEM, or identity and issuer")
    return found


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_KEY_BYTES).decode("utf-8")
    except OSError as error:
        raise TrustError(f"the trusted keys {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise TrustError(f"{path} is no text: expected public keys in PEM, or YAML") from None


def claimed(signature: bytes) -> dict[str, str]:
    """Return which files a signature says that it covers, name -> sha256. Who signed it is another question.

    Raises:
        ValueError: if it is none of model-signing's, or covers files in another way than whole and by sha256.
    """
    if len(signature) > MAX_JSON_BYTES:
        raise ValueError("it is too large")
    try:
        whole = strict_json(signature)
        envelope, material = whole["dsseEnvelope"], whole["verificationMaterial"]
        if "publicKey" in material and not material["publicKey"].get("hint"):
            raise ValueError("it does not say by which key: expected one of model-signing 1.1 or later")
        statement = strict_json(base64.b64decode(envelope["payload"], validate=True))
        predicate = statement["predicate"]
        kinds = statement["_type"], statement["predicateType"], len(envelope["signatures"])
        if kinds != (_STATEMENT, _PREDICATE, 1):
            raise ValueError("expected one signature of model-signing 1.0 or later")
        if (how := predicate["serialization"])["method"] != "files" or how["hash_type"] != "sha256":
            raise ValueError("expected the sha256 of whole files")
        found = {one["name"]: one["digest"] for one in predicate["resources"] if one["algorithm"] == "sha256"}
        if len(found) != len(predicate["resources"]) or not all(
            isinstance(text, str) for pair in found.items() for text in pair
        ):
            raise ValueError("expected each file once, with its sha256")
    except (KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
        raise ValueError(f"it is none of model-signing's, {type(error).__name__}") from None
    return found


@lru_cache(maxsize=256)
def _signed_by(signature: bytes, signer: bytes | Identity) -> dict[str, str] | None:
    """Return what a signature covers (name -> sha256) as model-signing reads it, None if it is not this signer's."""
    need_model_signing()
    # the key's own verifiers, and not model_signing.verifying, which hashes the directory again: what was read counts
    from model_signing._signing import sign_ec_key, sign_sigstore, sign_sigstore_pb

    verifier: Any
    with tempfile.TemporaryDirectory(prefix="unlearn_peft_") as folder:  # the library reads files only
        file, key = Path(folder) / SIGNATURE, Path(folder) / "key.pub"
        file.write_bytes(signature)
        if isinstance(signer, Identity):
            try:
                verifier = sign_sigstore.Verifier(identity=signer.identity, oidc_issuer=signer.issuer)
            except Exception as error:  # whatever the network, the TUF client or a cache raises
                why = f"Sigstore's own keys cannot be had ({type(error).__name__}): it needs the network"
                raise TrustError(why) from None
        else:
            key.write_bytes(signer)
            verifier = sign_ec_key.Verifier(key)
        read: Any = sign_sigstore.Signature if isinstance(signer, Identity) else sign_sigstore_pb.Signature
        try:
            manifest = verifier.verify(read.read(file))
        except Exception:  # ValueError, InvalidSignature, pydantic's, Sigstore's own: it is not this signer's
            return None
    return {one.identifier: one.digest.digest_hex for one in manifest.resource_descriptors()}
