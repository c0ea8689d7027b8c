"""The commands `push` and `pull`, and `keys`, `sign` and `verify`: adapters to and from others, and whose they are."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TrustError
from .options import JsonOption, RequireOption, TrustedOption, trust_of

EndpointOption = Annotated[str | None, typer.Option(help="Another Hub. Default: HF_ENDPOINT, else huggingface.co.")]


def pull(
    source: Annotated[str, typer.Argument(help="hub:OWNER/NAME[@REVISION], https://...#sha256=..., archive, folder.")],
    output: Annotated[Path | None, typer.Option(help="The adapter directory. Default: in the cache.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask no server: the cache only. So does HF_HUB_OFFLINE=1.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow http:// and archives without #sha256=. Unsafe.")
    ] = False,
    max_size: Annotated[float, typer.Option(min=0.001, help="MB, for all files of the adapter, unpacked.")] = 1000,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Get an adapter from the Hub, a mirror or an archive.

    The folder appears when everything has been checked, and its path is
    printed; NAME.source.json beside it says where it is from, with the commit:

      unlearn-peft pull hub:acme/forgets-hp --output out/hp

      unlearn-peft pull hub:acme/forgets-hp@0d1c2b3a... --offline

      unlearn-peft pull https://example.org/hp.tar.gz#sha256=9f86d081...

      unlearn-peft generate --adapter $(unlearn-peft pull hp.tar.gz) --prompt ...

    A broken download goes on where it broke. Only an adapter's own files are
    taken: weights, config, manifest, card, plots, licence, signature.
    """
    from ..adapters.hub.pull import pull as pull_

    pulled = pull_(
        source, output, offline=offline or None, trust=trust_of(trusted_keys, require_signature), insecure=insecure,
        max_bytes=int(max_size * 1e6), endpoint=endpoint,
    )  # fmt: skip
    _tell(pulled, as_json)
    if not as_json:
        print(pulled.path)


def push(
    adapter: Annotated[Path, typer.Argument(help="The adapter directory.")],
    target: Annotated[str, typer.Argument(help="hub:OWNER/NAME[@BRANCH], an archive (.tar, .tar.gz), or a folder.")],
    public: Annotated[bool, typer.Option("--public", help="A repository made now is for all to see.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Put an adapter onto the Hub, or into an archive.

    What is printed is what to pull: with the commit, or the archive's sha256.
    A token is taken from HF_TOKEN or `hf auth login`. The card and manifest
    hold no forget row, but the name of a repository or folder is seen by all:

      unlearn-peft push out/hp hub:acme/forgets-hp

      unlearn-peft push out/hp hp.tar.gz
    """
    from ..adapters.hub.push import push as push_

    pushed = push_(
        adapter, target, private=not public, message=message, endpoint=endpoint,
        trust=trust_of(trusted_keys, require_signature),
    )  # fmt: skip
    _tell(pushed, as_json)
    if not as_json:
        print(pushed.source + (f"#sha256={pushed.sha256}" if pushed.sha256 else ""))


def _tell(pulled: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(pulled), "path": str(pulled.path)}))
        return
    facts = [("commit", pulled.commit), ("sha256 of the archive", pulled.sha256), ("signed by", pulled.signed_by)]
    for name, value in [("identity", pulled.identity), *facts]:
        if value:
            print(f"{name}: {value}", file=sys.stderr)


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
    from ..adapters.signing import new_key

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
    from ..adapters.signing import sign as sign_
    from ..adapters.signing import sign_with_sigstore

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
    from ..adapters.signing import verify as verify_
    from ..adapters.trust import Identity, Trust

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
