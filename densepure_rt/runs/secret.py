"""The secret of a run: agreed on at the start, kept beside the run, revealed at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.json_files import page, replaced, writing
from densepure_rt.keys import commitment, retire, seeded_secret, shared_key, stored_key
from densepure_rt.runs.layout import KEY, MANIFEST, REVEALED, SEAL, read_manifest
from densepure_rt.runs.ledger import NAME as LEDGER
from densepure_rt.runs.ledger import Ledger
from densepure_rt.runs.records import Manifest
from densepure_rt.runs.seal import refuse_broken_seal, seal


def kept_secret(run: Path, manifest: Manifest, all_readable: bool = True) -> bytes | None:
    """Return the secret that is kept beside a run or was revealed; None where there is neither.

    Raises EnvironmentFault for a key file that only its owner may read, unless `all_readable` is False.
    """
    for name in (KEY, REVEALED):
        try:
            if (secret := stored_key(run / name)) is not None:
                return secret
        except EnvironmentFault:
            if all_readable:
                raise
    revealed = manifest.provenance.revealed_secret
    return None if revealed is None else bytes.fromhex(revealed)


def secret_of(run: Path, manifest: Manifest) -> bytes:
    """Return what keys the noise of a run. Raises UsageError where that is not there, CheckFailed for another key."""
    if manifest.identity.public_seed is not None:
        return seeded_secret(manifest.identity.public_seed)
    found = kept_secret(run, manifest)
    if found is None:
        raise UsageError(
            f"the secret of the run in {run} is neither there nor revealed: its noise cannot be drawn again"
        )
    if commitment(found) != manifest.identity.secret_commitment:
        raise CheckFailed(f"the key in {run} is not the one that the run committed itself to")
    return found


def agreed_secret(path: Path | None, key: Path | None) -> bytes | None:
    """The secret of the run in this folder, or of a key file, which is made where there is none; None for neither.

    Raises UsageError when both are named and do not agree, and else as `secret_to_go_on` and `shared_key` do.
    """
    there = None if path is None else secret_to_go_on(path)
    if there is None:
        return None if key is None else shared_key(key)
    if key is not None and (named := stored_key(key)) != there:
        found = "is not there" if named is None else "holds another secret"
        raise UsageError(
            f"the key {key} {found}, and the run in {path} goes on with its own alone: leave `key` out, or choose "
            f"another folder with `out`"
        )
    return there


def secret_to_go_on(path: Path) -> bytes | None:
    """The secret of the run in this folder, or None where there is no such run or its seed is public.

    Raises UsageError when it was revealed, for then no new noise may be drawn with it, or when the file is no key.
    """
    with writing(path):
        revealed = (path / REVEALED).exists()
    if revealed:
        raise UsageError(
            f"the secret of the run in {path} has been revealed, so that no more noise may be drawn with it: start a "
            f"new run with another `out`"
        )
    return stored_key(path / KEY)


def reveal(path: Path, key: Path | None = None) -> str:
    """Make the secret of a run public: into its manifest, and the key file takes another name. The secret, hex.

    From then on anybody can draw the run's noise again, and no new noise is drawn with it. key: the file that the run
    was keyed with, which takes another name too. To be repeated when it was cut short.

    Raises UsageError where there is no secret to reveal, or `key` holds another one; CheckFailed when the folder was
    tampered with.
    """
    secret_to_reveal(path)  # before the ledger is opened, which writes to it
    with writing(path), Ledger(path / LEDGER) as ledger:
        manifest, secret = secret_to_reveal(path)
        if commitment(secret) != manifest.identity.secret_commitment:
            raise CheckFailed(f"{path / KEY} is not the key that the run committed itself to")
        sealed = (path / SEAL).exists()
        if sealed and manifest.provenance.revealed_secret is None:
            refuse_broken_seal(path, ledger)
        if key is not None:
            retire(key, secret)  # first, as below: what may be public is never drawn with again
        if (path / KEY).exists():
            (path / KEY).replace(path / REVEALED)
        provenance = replace(manifest.provenance, revealed_secret=secret.hex())
        replaced(path / MANIFEST, page(replace(manifest, provenance=provenance)))
        if sealed:
            seal(path, ledger)
    return secret.hex()


def secret_to_reveal(path: Path) -> tuple[Manifest, bytes]:
    """Return the manifest of a run and its secret. Raises UsageError where there is no secret to reveal."""
    manifest = read_manifest(path)
    secret = kept_secret(path, manifest)
    if secret is None:
        public = manifest.identity.public_seed is not None
        why = "its seed is public already" if public else f"{KEY} is missing"
        raise UsageError(f"the run in {path} has no secret to reveal: {why}")
    return manifest, secret
