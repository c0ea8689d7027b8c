"""Keys and signatures: an adapter's directory -> `model.sig` beside its files, made by OpenSSF `model-signing`.

A signature covers every file of the directory but itself: the weights, the config and the manifest, and also the card
and the plots, which people read and believe. Whoever changes one of them, signs again.
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
from .trust import SIGNATURE, UNSIGNED, Trust, claimed, differences, need_model_signing

logger = logging.getLogger(__name__)


def new_key(path: str | Path, password: str | None = None) -> tuple[Path, Path]:
    """Make a key pair on the curve P-256: `PATH.pem`, which signs and stays secret, and `PATH.pub` for others.

    Args:
        path: without ending.
        password: to encrypt the private key with.

    Raises:
        OutputError: if one of the files exists already, or cannot be written.
    """
    need_model_signing()
    from cryptography.hazmat.primitives import serialization as write
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    how = write.BestAvailableEncryption(password.encode()) if password else write.NoEncryption()
    private = key.private_bytes(write.Encoding.PEM, write.PrivateFormat.PKCS8, how)
    public = key.public_key().public_bytes(write.Encoding.PEM, write.PublicFormat.SubjectPublicKeyInfo)
    files = Path(f"{path}.pem"), Path(f"{path}.pub")
    if there := [str(file) for file in files if file.exists()]:
        raise OutputError(f"{' and '.join(there)} exists already: choose another name, keys are never overwritten")
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file, data, mode in ((files[0], private, 0o600), (files[1], public, 0o644)):
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(data)
    except OSError as error:
        raise OutputError(f"cannot write {error.filename} ({error.strerror}): choose another place") from None
    return files


def sign(path: str | Path, key: str | Path, *, password: str | None = None) -> Path:
    """Sign an adapter with a private key; returns the signature's path. An earlier signature is replaced.

    Args:
        path: the adapter's directory; it is checked first, and nothing that has no place there is signed.
        key: a private key in PEM, on one of the curves P-256, P-384 and P-521.
        password: the key's, if it is encrypted.

    Raises:
        AdapterError: if the adapter is refused, or the directory holds something that has no place in an adapter.
        TrustError: if the key cannot be used.
        OutputError: if the signature cannot be written.
    """
    need_model_signing()
    public = _public_of(Path(key), password)

    def use_key(config: Any) -> None:  # the password in bytes: whatever its types say, the library needs it so
        config.use_elliptic_key_signer(private_key=Path(key), password=password.encode() if password else None)

    return _sign(Path(path), use_key, lambda bundle: Trust({"the key": public}).check(bundle))


def sign_with_sigstore(path: str | Path, *, identity_token: str | None = None) -> Path:
    """Sign an adapter with Sigstore, which needs the network: no key to keep, but an identity that others can look up.

    Args:
        path: as for `sign`.
        identity_token: an OpenID Connect token; without it, the environment's (as in CI), or a browser is opened.

    Raises:
        AdapterError: see `sign`.
        TrustError: if Sigstore cannot be reached, or does not sign.
    """
    need_model_signing()

    def use_sigstore(config: Any) -> None:
        config.use_sigstore_signer(identity_token=identity_token, use_ambient_credentials=identity_token is None)

    return _sign(Path(path), use_sigstore)


def verify(path: str | Path, trust: Trust) -> Bundle:
    """Read an adapter that must be signed by one of the trusted; returns it, with the signer's name in `signed_by`.

    Raises:
        AdapterError: naming everything that is wrong with it.
    """
    return read_bundle(path, trust=Trust(trust.signers))


def _sign(path: Path, choose: Callable[[Any], Any], check: Callable[[Bundle], Any] = lambda bundle: None) -> Path:
    from model_signing import hashing, signing

    read_bundle(path)
    names = [name for name in list_files(path) if name not in UNSIGNED]
    digests = {name: sha256_of(path / name) for name in names}
    if problems := differences(digests, digests):
        refuse(f"the adapter {path} is not signed", problems, "Move away what does not belong there")
    config: Any = signing.Config()  # type: ignore[no-untyped-call]
    how: Any = hashing.Config()  # type: ignore[no-untyped-call]
    config.set_hashing_config(how.set_ignored_paths(paths=UNSIGNED, ignore_git_paths=False))
    try:
        choose(config)
        with tempfile.TemporaryDirectory(prefix="unlearn_peft_") as elsewhere:  # all that lies in `path` is signed
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
    check(read_bundle(path))
    return path / SIGNATURE


def _public_of(path: Path, password: str | None) -> bytes:
    """Return the public half of a private key, in PEM."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

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
        what = "it, or the password is wrong" if password else "one"
        raise TrustError(
            f"{path} holds no private key in PEM, or not a whole {what}: see `unlearn-peft keys new`"
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise TrustError(f"{path} holds another kind of key, expected an elliptic curve's: see `unlearn-peft keys new`")
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
