"""Detached Ed25519 signatures of packs: 64 bytes in PACK.sig, which ``openssl pkeyutl -verify -rawin`` checks, too.

Needs ``cryptography``, the optional extra ``patune[sign]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.configs.pack_files import read_bounded, write_whole
from patune.errors import DocumentError, InvalidValueError, PatuneError

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE_B = 64  # RFC 8032
MAX_KEY_B = 16 * 2**10  # an Ed25519 key in PEM has 119 bytes; comments may stand around it


def signature_path(pack: Path) -> Path:
    """Where a pack's signature is: beside it, with ``.sig`` behind its name."""
    return pack.with_name(pack.name + ".sig")


def make_keys(private: Path) -> Path:
    """Write a new private key, which only its owner can read, and its public key beside it; returns the latter's path.

    Raises:
        InvalidValueError: a file is there already, or cannot be written.
        PatuneError: ``cryptography`` is not installed.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = private.with_name(private.name + ".pub")
    if public.exists() or public.is_symlink():
        raise InvalidValueError(
            f"The public key cannot be written to {public}: a file is there. Name another one, or move that one away."
        )
    key = Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    told = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_whole(private, secret, "private key", mode=0o600, fresh=True)
    write_whole(public, told, "public key", fresh=True)
    return public


def load_signer(private: Path) -> Ed25519PrivateKey:
    """The private key of a file.

    Raises:
        DocumentError: the file is not an unencrypted Ed25519 private key in PEM.
        PatuneError: ``cryptography`` is not installed.
    """
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = read_bounded(private, "private key", MAX_KEY_B)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DocumentError(f"{private} is no private key: {_plain(error)}.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DocumentError(f"{private} is a key of another kind; allowed: Ed25519.")
    return key


def write_signature(pack: Path, data: bytes, signer: Ed25519PrivateKey) -> Path:
    """Sign the content of a pack file; returns the path of the signature.

    Raises:
        InvalidValueError: the signature cannot be written.
    """
    path = signature_path(pack)
    write_whole(path, signer.sign(data), "signature")
    return path


def check_signature(pack: Path, data: bytes, public: Path) -> None:
    """Refuse the content of a pack file that the holder of a key has not signed.

    Raises:
        DocumentError: the signature is absent, not one, or of another content or key; or the public key cannot be read.
        PatuneError: ``cryptography`` is not installed.
    """
    _require_cryptography()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    pem = read_bounded(public, "public key", MAX_KEY_B)
    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DocumentError(f"{public} is no public key: {_plain(error)}.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise DocumentError(f"{public} is a key of another kind; allowed: Ed25519.")
    path = signature_path(pack)
    if not path.exists():
        raise DocumentError(
            f"{pack} is not signed: there is no {path}. Whoever made the pack runs `patune sign`; the two go together."
        )
    signature = read_bounded(path, "signature", MAX_KEY_B)
    try:
        key.verify(signature, data)
    except InvalidSignature:
        size = "" if len(signature) == SIGNATURE_B else f" It has {len(signature)} bytes."
        raise DocumentError(
            f"{path} is not the signature of {pack} by the holder of {public}: the pack was changed, or another key signed it.{size}"
        ) from None


def _plain(error: Exception) -> str:
    """The first sentence of a library's message, which goes on about its internals."""
    return str(error).split(".")[0].split("\n")[0][:200]


def _require_cryptography() -> None:
    try:
        import cryptography.exceptions  # noqa: F401
    except ImportError:
        raise PatuneError(
            "Signatures need the package `cryptography`, which is not installed. Run: pip install 'patune[sign]'"
        ) from None
