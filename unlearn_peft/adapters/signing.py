"""Making keys and signatures: `model.sig` beside an adapter's files, by OpenSSF `model-signing`; trust.py checks them.

A signature covers every other file of the directory, also the card and the plots: people read and believe them. After
any change of a file the adapter must be signed again.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import AdapterError, OutputError, TrustError, refuse
from ..files.atomic import atomic_file
from ..files.untrusted import list_files, sha256_of
from .bundle import Bundle
from .read import read_bundle
from .trust import SIGNATURE, UNSIGNED, Trust, claimed, differences, need_model_signing, public_pem

logger = logging.getLogger(__name__)


def new_key(path: str | Path, password: str | None = None) -> tuple[Path, Path]:
    """Make a key pair on the curve P-256: `PATH.pem`, which signs and stays secret, and `PATH.pub` for others.

    A `password` encrypts the private key.

    Raises:
        OutputError: if one of the files exists already, or cannot be written.
    """
    need_model_signing()
    from cryptography.hazmat.primitives import serialization as write
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    encryption = write.BestAvailableEncryption(password.encode()) if password else write.NoEncryption()
    private = key.private_bytes(write.Encoding.PEM, write.PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(write.Encoding.PEM, write.PublicFormat.SubjectPublicKeyInfo)
    files = Path(f"{path}.pem"), Path(f"{path}.pub")
    if existing := [str(file) for file in files if file.exists()]:
        raise OutputError(f"{' and '.join(existing)} exists already: choose another name, keys are never overwritten")
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file, data, mode in ((files[0], private, 0o600), (files[1], public, 0o644)):
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(data)
    except OSError as error:
        raise OutputError(f"cannot write {error.filename} ({error.strerror}): choose another place") from None
    return files


def sign(path: str | Path, key: str | Path, *, password: str | None = None) -> Path:
    """Check an adapter and sign it with a private key; returns the signature's path. An earlier one is replaced.

    The key is a PEM file on one of the curves P-256, P-384 and P-521; `password` decrypts it.

    Raises:
        AdapterError: if the adapter is refused, or the directory holds a file that has no place in an adapter.
        TrustError: if the key cannot be used.
        OutputError: if the signature cannot be written.
    """
    need_model_signing()
    public = _public_of(Path(key), password)
    secret = password.encode() if password else None  # in bytes: the library needs it so, whatever its types say
    signature = _sign(Path(path), lambda config: config.use_elliptic_key_signer(private_key=Path(key), password=secret))
    Trust({"the key": public}).check(read_bundle(path))
    return signature


def sign_with_sigstore(path: str | Path, *, identity_token: str | None = None) -> Path:
    """Check an adapter and sign it with an identity of Sigstore instead of a key; needs the network.

    `identity_token` is an OpenID Connect token; without it the environment's is used (as in CI), or a browser opened.

    Raises:
        AdapterError: see `sign`.
        TrustError: if Sigstore cannot be reached, or does not sign.
    """
    need_model_signing()
    options = {"identity_token": identity_token, "use_ambient_credentials": identity_token is None}
    signature = _sign(Path(path), lambda config: config.use_sigstore_signer(**options))
    read_bundle(path)
    return signature


def verify(path: str | Path, trust: Trust) -> Bundle:
    """Read an adapter that must be signed by one of the trusted signers, see `Bundle.signed_by`.

    Raises:
        AdapterError: naming everything that is wrong with it.
    """
    return read_bundle(path, trust=Trust(trust.signers))


def _sign(path: Path, use_signer: Callable[[Any], Any]) -> Path:
    from model_signing import hashing, signing

    read_bundle(path)
    digests = {name: sha256_of(path / name) for name in list_files(path) if name not in UNSIGNED}
    if problems := differences(digests, digests):
        refuse(f"the adapter {path} is not signed", problems, "Move away what does not belong there")
    config: Any = signing.Config()  # type: ignore[no-untyped-call]
    hashes: Any = hashing.Config()  # type: ignore[no-untyped-call]
    config.set_hashing_config(hashes.set_ignored_paths(paths=UNSIGNED, ignore_git_paths=False))
    try:
        use_signer(config)
        with tempfile.TemporaryDirectory(prefix="unlearn_peft_") as elsewhere:  # a file in `path` would be signed, too
            config.sign(path, Path(elsewhere) / SIGNATURE)
            signature = (Path(elsewhere) / SIGNATURE).read_bytes()
        if claimed(signature) != digests:
            raise AdapterError(f"the adapter {path} changed while it was signed: it is not signed, try again")
        with atomic_file(path / SIGNATURE) as temporary:
            temporary.write_bytes(signature)
    except (AdapterError, OutputError):
        raise
    except Exception as error:  # the libraries' own, of many kinds
        raise TrustError(f"{path} could not be signed ({type(error).__name__}: {error})") from error
    return path / SIGNATURE


def _public_of(path: Path, password: str | None) -> bytes:
    """Return a private key's public half."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        data = path.read_bytes()
        if os.name == "posix" and path.stat().st_mode & 0o077:
            logger.warning("the private key %s can be read by other users: chmod 600 %s", path, path)
        key = serialization.load_pem_private_key(data, password.encode() if password else None)
    except OSError as error:
        raise TrustError(f"the key {path} cannot be read ({error.strerror})") from None
    except TypeError:
        needs = "is encrypted: give its password" if not password else "is not encrypted: leave the password out"
        raise TrustError(f"the key {path} {needs}") from None
    except (ValueError, UnsupportedAlgorithm):
        why = "it is damaged, or the password is wrong" if password else "or it is damaged"
        raise TrustError(f"{path} holds no private key in PEM, {why}: see `unlearn-peft keys new`") from None
    encoding, spki = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return public_pem(key.public_key().public_bytes(encoding, spki), str(path))
