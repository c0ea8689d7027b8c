"""The commands `push` and `pull` (adapters to and from a Hub or an archive), and `keys`, `sign` and `verify`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TrustError, printable
from .options import AdapterArgument, JsonOption, RequireOption, TrustedOption, trust_of

EndpointOption = Annotated[str | None, typer.Option(help="Another Hub. Default: HF_ENDPOINT, else huggingface.co.")]


def pull(
    source: Annotated[str, typer.Argument(help="hub:OWNER/NAME[@REVISION], https://...#sha256=..., archive, folder.")],
    output: Annotated[Path | None, typer.Option(help="The adapter directory. Default: in the cache.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the cache only. So does HF_HUB_OFFLINE=1.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow http:// and archives without #sha256=. Unsafe.")
    ] = False,
    max_size: Annotated[
        float, typer.Option(min=0.001, help="Limit in MB on all files of the adapter, unpacked.")
    ] = 1000,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Get an adapter from the Hub, a mirror or an archive.

    The folder is made after everything has been checked, and its path is
    printed; NAME.source.json beside it has the source with its commit:

      unlearn-peft pull hub:acme/forgets-hp --output out/hp

      unlearn-peft pull hub:acme/forgets-hp@0d1c2b3a... --offline

      unlearn-peft pull https://example.org/hp.tar.gz#sha256=9f86d081...

      unlearn-peft generate --adapter $(unlearn-peft pull hp.tar.gz) --prompt ...

    An interrupted download is resumed. Only the files of an adapter are
    taken: weights, config, manifest, card, plots, licence, signature.
    """
    from ..adapters.hub.pull import pull as pull_

    pulled = pull_(
        source, output, offline=offline or None, trust=trust_of(trusted_keys, require_signature), insecure=insecure,
        max_bytes=int(max_size * 1e6), endpoint=endpoint,
    )  # fmt: skip
    _print_result(pulled, str(pulled.path), as_json)


def push(
    adapter: AdapterArgument,
    target: Annotated[str, typer.Argument(help="hub:OWNER/NAME[@BRANCH], an archive (.tar, .tar.gz), or a folder.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
    trusted_keys: TrustedOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Put an adapter onto the Hub, or into an archive.

    Prints the source to pull, with the commit or the archive's sha256. The
    token is that of HF_TOKEN or `hf auth login`. The card and manifest have
    no forget row, but everybody sees the name of a repository or folder:

      unlearn-peft push out/hp hub:acme/forgets-hp

      unlearn-peft push out/hp hp.tar.gz
    """
    from ..adapters.hub.push import push as push_

    pushed = push_(
        adapter, target, private=not public, message=message, endpoint=endpoint,
        trust=trust_of(trusted_keys, require_signature),
    )  # fmt: skip
    source = pushed.source + (f"#sha256={pushed.sha256}" if pushed.sha256 else "")
    _print_result(pushed, source, as_json)


def _print_result(result: Any, line: str, as_json: bool) -> None:
    """Print a line for the next command to use, and the other facts to stderr; or all of them as JSON."""
    if as_json:
        print(json.dumps({**asdict(result), "path": str(result.path)}))
        return
    facts = [("commit", result.commit), ("sha256 of the archive", result.sha256), ("signed by", result.signed_by)]
    for name, value in [("identity", result.identity), *facts]:
        if value:
            print(printable(f"{name}: {value}", lines=False), file=sys.stderr)
    print(line)


keys = typer.Typer(no_args_is_help=True, help="Make keys to sign adapters with.")


@keys.command("new")
def new(
    name: Annotated[Path, typer.Argument(help="Their path without ending, e.g. ~/keys/me")],
    password: Annotated[
        bool, typer.Option("--password", help="Ask for a password, and encrypt the private key with it.")
    ] = False,
) -> None:
    """Make a key pair: NAME.pem to sign with, NAME.pub for those who trust you.

      unlearn-peft keys new ~/keys/me --password

      unlearn-peft sign out/hp --key ~/keys/me.pem

    Send NAME.pub over a channel where nobody can replace it, and not together
    with the adapter: who can change one there can change both.
    """
    from ..adapters.signing import new_key

    secret = typer.prompt("password", hide_input=True, confirmation_prompt=True, err=True) if password else None
    private, public = new_key(name, secret)
    print(f"private key: {private} (keep it secret)\npublic key: {public} (for --trusted-keys)")


def sign(
    adapter: AdapterArgument,
    key: Annotated[Path | None, typer.Option(help="A private key, as `unlearn-peft keys new` makes it.")] = None,
    password: Annotated[
        str | None,
        typer.Option(envvar="UNLEARN_PEFT_KEY_PASSWORD", help="The key's; prompted for if needed.", hidden=True),
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
    model-signing, whose own tools verify it too. Sign again after any change
    to a file (`eval --card` makes one). The password of an encrypted key is
    prompted for, or taken from UNLEARN_PEFT_KEY_PASSWORD.
    """
    from ..adapters.signing import sign as sign_
    from ..adapters.signing import sign_with_sigstore

    if (key is None) != sigstore:
        raise TrustError("give either --key KEY.pem (see `unlearn-peft keys new`) or --sigstore")
    if key is None:
        path = sign_with_sigstore(adapter, identity_token=identity_token)
    else:
        if password is None and key.is_file() and b"ENCRYPTED" in key.read_bytes():
            password = typer.prompt(f"password of {key}", hide_input=True, err=True)
        path = sign_(adapter, key, password=password)
    print(f"signed: {path}")


def verify(
    adapter: AdapterArgument,
    trusted_keys: TrustedOption = None,
    identity: Annotated[
        str | None, typer.Option(help="Who signed with Sigstore: an e-mail address or a workflow.")
    ] = None,
    issuer: Annotated[str | None, typer.Option(help="Who vouches for --identity: an OpenID Connect issuer.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that an adapter is what someone you trust has signed.

    If it is not, all reasons are printed, and the exit code is 2.

      unlearn-peft verify out/hp --trusted-keys me.pub

      unlearn-peft verify out/hp --trusted-keys keys/

      unlearn-peft verify out/hp --trusted-keys trusted.yaml

    A YAML file lists keys, and identities of Sigstore:

      alice: alice.pub

      release: {identity: release@example.org, issuer: https://accounts.google.com}

    The other commands check the same with --require-signature --trusted-keys
    KEYS (or $UNLEARN_PEFT_TRUSTED_KEYS and $UNLEARN_PEFT_REQUIRE_SIGNATURE=1),
    on the very bytes that they then use.
    """
    from ..adapters.signing import verify as verify_
    from ..adapters.trust import Identity, Trust

    if (identity is None) != (issuer is None):
        raise TrustError("give --identity (who signed) and --issuer (who vouches for that) together")
    trust = Trust.read(*(trusted_keys or ()), required=False)
    if identity and issuer:
        trust = Trust({**trust.signers, identity: Identity(identity, issuer)})
    if not trust.signers:
        raise TrustError("nobody to trust: give --trusted-keys KEYS, or --identity and --issuer")
    bundle = verify_(adapter, trust)
    if as_json:
        print(json.dumps({"path": str(bundle.path), "signed_by": bundle.signed_by, "files": dict(bundle.files)}))
    else:
        print(printable(f"signed by {bundle.signed_by}: {', '.join(sorted(bundle.files))}", lines=False))
        if bundle.base_weights:
            print(f"it {bundle.carried}, compared when attached")
