"""`unlearn-peft keys`, `sign` and `verify`: who made an adapter, and is it still what they made?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import JsonOption, TrustedOption
from .errors import TrustError

keys = typer.Typer(no_args_is_help=True, help="Make keys to sign adapters with.")


@keys.command("new")
def new(
    name: Annotated[Path, typer.Argument(help="Where to write them, without ending: ~/keys/me")],
    password: Annotated[
        bool, typer.Option("--password", help="Ask for a password, and encrypt the private key with it.")
    ] = False,
) -> None:
    """Make a key pair: NAME.pem signs, NAME.pub is for those who trust you.

      unlearn-peft keys new ~/keys/me --password

      unlearn-peft sign out/hp --key ~/keys/me.pem

    Give others NAME.pub by a way on which nobody can exchange it, not beside
    the adapter: whoever can change the one could change both.
    """
    from .adapters.signing import new_key

    secret = typer.prompt("password", hide_input=True, confirmation_prompt=True, err=True) if password else None
    private, public = new_key(name.expanduser(), secret)
    print(f"private key: {private} (keep it secret)\npublic key: {public} (for --trusted-keys)")


def sign(
    adapter: Annotated[Path, typer.Argument(help="The adapter directory.")],
    key: Annotated[Path | None, typer.Option(help="A private key, as `unlearn-peft keys new` makes it.")] = None,
    password: Annotated[
        str | None,
        typer.Option(envvar="UNLEARN_PEFT_KEY_PASSWORD", help="The key's; asked for where it is needed.", hidden=True),
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign with an identity instead of a key; needs the network.")
    ] = False,
    identity_token: Annotated[
        str | None, typer.Option(envvar="SIGSTORE_ID_TOKEN", help="For --sigstore; else a browser is opened.")
    ] = None,
) -> None:
    """Sign an adapter: every file in its directory, as it is now.

      unlearn-peft sign out/hp --key ~/keys/me.pem

    The signature is the file model.sig, in the format of OpenSSF's
    model-signing, whose own tools verify it, too. Whatever changes a file, as
    `eval --card` does, is to be followed by signing again. An encrypted key's
    password is asked for, or taken from UNLEARN_PEFT_KEY_PASSWORD.
    """
    from .adapters.signing import sign as sign_
    from .adapters.signing import sign_with_sigstore

    if (key is None) != sigstore:
        raise TrustError("sign with what? Give --key KEY.pem (see `unlearn-peft keys new`), or --sigstore, not both")
    if key is None:
        path = sign_with_sigstore(adapter, identity_token=identity_token)
    else:
        key = key.expanduser()
        if password is None and key.is_file() and b"ENCRYPTED" in key.read_bytes():
            password = typer.prompt(f"password of {key}", hide_input=True, err=True)
        path = sign_(adapter, key, password=password)
    print(f"signed: {path}")


def verify(
    adapter: Annotated[Path, typer.Argument(help="The adapter directory.")],
    trusted_keys: TrustedOption = None,
    identity: Annotated[
        str | None, typer.Option(help="Who signed with Sigstore: a mail address or a workflow.")
    ] = None,
    issuer: Annotated[str | None, typer.Option(help="Who vouches for --identity: an OpenID Connect issuer.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell whether an adapter is what someone you trust has signed.

    If it is not, all reasons are told, with exit code 2.

      unlearn-peft verify out/hp --trusted-keys me.pub

      unlearn-peft verify out/hp --trusted-keys keys/

      unlearn-peft verify out/hp --trusted-keys trusted.yaml

    A YAML file names keys, and identities of Sigstore:

      alice: alice.pub

      release: {identity: release@example.org, issuer: https://accounts.google.com}

    The other commands do the same with --require-signature --trusted-keys KEYS
    (or $UNLEARN_PEFT_TRUSTED_KEYS and $UNLEARN_PEFT_REQUIRE_SIGNATURE=1), on
    the very bytes that they then use.
    """
    from .adapters.signing import verify as verify_
    from .adapters.trust import Identity, Trust

    if (identity is None) != (issuer is None):
        raise TrustError("--identity and --issuer belong together: who signed, and who vouches for that")
    trust = Trust.read(*(trusted_keys or ()), required=False)
    if identity and issuer:
        trust = Trust({**trust.signers, identity: Identity(identity, issuer)})
    if not trust.signers:
        raise TrustError("whom do you trust? Give --trusted-keys KEYS, or --identity and --issuer")
    bundle = verify_(adapter, trust)
    if as_json:
        print(json.dumps({"path": str(bundle.path), "signed_by": bundle.signed_by, "files": dict(bundle.files)}))
    else:
        print(f"signed by {bundle.signed_by}: {', '.join(sorted(bundle.files))}")


def add_trust(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("sign")(sign)
    app.command("verify")(verify)
    app.add_typer(keys, name="keys")
