"""Trusted public keys, and checks of an adapter's signature against the digests of the bytes that were read.

Nothing can be exchanged between check and use, as no file is read twice. Signatures are in the format of OpenSSF's
`model-signing` (extra `trust`), which does the cryptography.
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
UNSIGNED = (SIGNATURE, ".gitattributes")  # the Hub adds the second to every repository; it is never read here
SIGNABLE = ("adapter_model.safetensors", "adapter_config.json", "forget.json", "README.md", "LICENSE")
SIGNABLE_ENDINGS = (".png", ".svg")  # plots: no code
NEEDED = SIGNABLE[:2]
_STATEMENT, _PREDICATE = "https://in-toto.io/Statement/v1", "https://model_signing/signature/v1.0"
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"
_MAX_KEY_BYTES = 1_000_000


class Identity(NamedTuple):
    """A Sigstore signer: an identity such as a mail address, and the OpenID Connect issuer that vouches for it."""

    identity: str
    issuer: str


@dataclass(frozen=True)
class Trust:
    """Trusted signers by name, and whether a signature is required; one that is there must always be valid."""

    signers: Mapping[str, bytes | Identity]  # a public key in PEM, or an identity
    required: bool = True
    _verified: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # digest of all -> signer

    @classmethod
    def read(cls, *places: str | Path, required: bool = True) -> Trust:
        """Read trusted signers: PEM files with public keys, folders of `.pub` and `.pem` files, or YAML files.

        A YAML file holds a table of names, each for a PEM file's path (relative to the YAML file), the PEM itself, or
        `{identity: ..., issuer: ...}` of Sigstore.

        Raises:
            TrustError: naming the place that holds no usable key.
        """
        signers: dict[str, bytes | Identity] = {}
        for place in map(Path, places):
            if place.is_dir():
                files = sorted(file for file in place.iterdir() if file.suffix in (".pub", ".pem"))
                pairs = [pair for file in files for pair in _pem_file(file).items()]
                if len(dict(pairs)) < len(pairs):
                    raise TrustError(f"two files in {place} have the same name, but for their ending: rename one")
            else:
                pairs = list((_yaml_file if place.suffix in (".yaml", ".yml") else _pem_file)(place).items())
            if not pairs:
                raise TrustError(f"no public key in {place}: expected .pub or .pem files of `unlearn-peft keys new`")
            for name, signer in pairs:
                if signers.setdefault(name, signer) != signer:
                    raise TrustError(f"two trusted signers are called '{name}': rename one of them")
        if required and not signers:
            raise TrustError("a signature is required, but nobody is trusted: name keys (--trusted-keys)")
        return cls(signers, required)

    @property
    def version(self) -> str:
        """A digest of the signers and `required`."""
        lines = [f"{name}={signer!r}" for name, signer in sorted(self.signers.items())]
        return hashlib.sha256("\n".join([str(self.required), *lines]).encode()).hexdigest()

    def check(self, bundle: Any) -> str | None:
        """Return who signed a `Bundle` that was read before, None if it has no signature and needs none.

        Raises:
            AdapterError: see `problems`.
        """
        problems, signer = self.problems(bundle.files, bundle.signature)
        if problems:
            refuse(f"the adapter {bundle.path} is not to be trusted", problems)
        return signer

    def problems(self, files: Mapping[str, str], signature: bytes | None) -> tuple[list[str], str | None]:
        """Compare what was read with what was signed; return what is wrong, and the signer's name if nothing is.

        `files` is name -> sha256 of all in its directory but `UNSIGNED`, `signature` the bytes of `model.sig`.
        """
        if signature is None:
            problem = f"it has no signature ({SIGNATURE}), and one is required: `unlearn-peft sign` makes one"
            return ([problem] if self.required else []), None
        key = hashlib.sha256(repr((sorted(files.items()), hashlib.sha256(signature).hexdigest())).encode()).hexdigest()
        if key in self._verified:
            return [], self._verified[key]
        try:
            signed = claimed(signature)
        except ValueError as error:
            return [f"its signature cannot be read ({error})"], None
        problems = differences(files, signed)
        signer = next((name for name, who in self.signers.items() if _signed_by(signature, who) == signed), None)
        if signer is None:
            trusted = ", ".join(map(safe_repr, list(self.signers)[:5])) or "nobody"
            problems.append(f"its signature is by none of the trusted keys ({trusted})")
        if problems or signer is None:
            return problems, None
        self._verified[key] = signer
        return [], signer


def differences(files: Mapping[str, str], signed: Mapping[str, str]) -> list[str]:
    """Return how files (name -> sha256) differ from what was signed, and what may not be signed at all."""
    problems = []
    for name in sorted(files.keys() | signed.keys()):
        if name in files and not signable(name):
            expected = f"{', '.join(SIGNABLE)} or plots"
            problems.append(f"{safe_repr(name)} has no place in a signed adapter: expected {expected}")
        elif name not in files:
            problems.append(f"{safe_repr(name)} was signed, but is missing")
        elif name not in signed:
            problems.append(f"{safe_repr(name)} was not signed: it was added later")
        elif files[name] != signed[name]:
            problems.append(f"{name} is not the file that was signed (its sha256 differs)")
    return problems + [f"its signature does not cover {name}" for name in NEEDED if name not in signed]


def need_model_signing() -> None:
    """Raise a TrustError with the command that installs `model-signing`, if it is missing."""
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise TrustError(f"signatures need model-signing ({error}): pip install 'unlearn-peft[trust]'") from None


def public_pem(data: bytes, where: str) -> bytes:
    """Return a public key in one canonical PEM; a TrustError says what `where` holds instead of a usable one."""
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


def signable(name: str) -> bool:
    """Return whether a signed adapter may have a file of this name."""
    return "/" not in name and (name in SIGNABLE or name.endswith(SIGNABLE_ENDINGS))


def _pem_file(path: Path) -> dict[str, bytes | Identity]:
    """Return the public keys of a PEM file, named after the file (and numbered from the second on)."""
    keys = _pem_keys(_read(path), str(path))
    return {path.stem if n == 1 else f"{path.stem} {n}": key for n, key in enumerate(keys, 1)}


def _pem_keys(text: str, where: str) -> list[bytes]:
    if "PRIVATE KEY" in text:
        raise TrustError(f"{where} holds a private key: it signs, and must stay secret. Give the public one (.pub)")
    keys = [_BEGIN + part.partition(_END)[0] + _END + "\n" for part in text.split(_BEGIN)[1:]]
    if not keys:
        raise TrustError(f"{where} holds no public key in PEM: expected what `unlearn-peft keys new` makes")
    return [public_pem(key.encode(), where) for key in keys]


def _yaml_file(path: Path) -> dict[str, bytes | Identity]:
    from ..files.strict_yaml import parse_yaml

    try:
        table = parse_yaml(_read(path))
    except ValueError as error:
        raise TrustError(f"{path} is no YAML: {error}") from None
    if not isinstance(table, dict):
        raise TrustError(f"{path} holds {type(table).__name__}, expected a table: NAME: KEY.pub")
    signers: dict[str, bytes | Identity] = {}
    for name, value in table.items():
        where = f"{path}: {safe_repr(name)}"
        if isinstance(value, dict) and value.keys() == {"identity", "issuer"}:
            signers[str(name)] = Identity(str(value["identity"]), str(value["issuer"]))
        elif isinstance(value, str):
            keys = _pem_keys(value if "-----BEGIN" in value else _read(path.parent / value), where)
            if len(keys) > 1:
                raise TrustError(f"{where} has {len(keys)} keys, expected one")
            signers[str(name)] = keys[0]
        else:
            raise TrustError(f"{where} is {safe_repr(value)}, expected a PEM file, a PEM, or identity and issuer")
    return signers


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_KEY_BYTES).decode("utf-8")
    except OSError as error:
        raise TrustError(f"the trusted keys {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise TrustError(f"{path} is no text: expected public keys in PEM, or YAML") from None


def claimed(signature: bytes) -> dict[str, str]:
    """Return the files (name -> sha256) that a signature claims to cover, unverified; or raise a ValueError."""
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
        serialization, resources = predicate["serialization"], predicate["resources"]
        if serialization["method"] != "files" or serialization["hash_type"] != "sha256":
            raise ValueError("expected the sha256 of whole files")
        files = {file["name"]: file["digest"] for file in resources if file["algorithm"] == "sha256"}
        if len(files) != len(resources) or not all(isinstance(text, str) for pair in files.items() for text in pair):
            raise ValueError("expected each file once, with its sha256")
    except (KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
        raise ValueError(f"it is none of model-signing's, {type(error).__name__}") from None
    return files


@lru_cache(maxsize=256)
def _signed_by(signature: bytes, signer: bytes | Identity) -> dict[str, str] | None:
    """Return the files (name -> sha256) that a signature covers, None if it is not by this signer."""
    need_model_signing()
    # not model_signing.verifying, which would hash the directory again: the bytes that were read are what counts
    from model_signing._signing import sign_ec_key, sign_sigstore, sign_sigstore_pb

    verifier: Any
    with tempfile.TemporaryDirectory(prefix="unlearn_peft_") as folder:  # the library reads files only
        file, key = Path(folder) / SIGNATURE, Path(folder) / "key.pub"
        file.write_bytes(signature)
        if isinstance(signer, Identity):
            try:
                verifier = sign_sigstore.Verifier(identity=signer.identity, oidc_issuer=signer.issuer)
            except Exception as error:  # whatever the network, the TUF client or a cache raises
                raise TrustError(f"no keys from Sigstore ({type(error).__name__}): it needs the network") from None
        else:
            key.write_bytes(signer)
            verifier = sign_ec_key.Verifier(key)
        read: Any = sign_sigstore.Signature if isinstance(signer, Identity) else sign_sigstore_pb.Signature
        try:
            manifest = verifier.verify(read.read(file))
        except Exception:  # ValueError, InvalidSignature, pydantic's or Sigstore's own
            return None
    return {file.identifier: file.digest.digest_hex for file in manifest.resource_descriptors()}
