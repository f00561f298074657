"""Detached signatures: what was not signed by the holder of the key is refused before it is parsed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import dump, winner

from patune.configs import pack_import, signing
from patune.configs.packs import import_pack, pack_document, pack_text
from patune.errors import DocumentError, InvalidValueError, PatuneError

if TYPE_CHECKING:
    from pathlib import Path

    from patune.configs.store import Store


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    signing.make_keys(path)
    return path


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    path = tmp_path / "pack.json"
    path.write_text(pack_text(pack_document([winner()])))
    return path


def sign(pack: Path, key: Path) -> Path:
    return signing.write_signature(pack, pack.read_bytes(), signing.load_signer(key))


def public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


def test_a_signed_pack_is_taken_in(store: Store, pack: Path, key: Path) -> None:
    path = sign(pack, key)
    assert path == pack.with_name("pack.json.sig")
    assert len(path.read_bytes()) == 64
    report = import_pack(store, pack, public_key=public(key))
    assert (report.added + report.skipped, report.public_key) == (1, str(public(key)))


def test_only_its_owner_can_read_a_private_key(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert public(key).read_text().startswith("-----BEGIN PUBLIC KEY-----")
    assert public(key).stat().st_mode & 0o044


def test_keys_are_never_written_over(tmp_path: Path, key: Path) -> None:
    before = key.read_bytes(), public(key).read_bytes()
    with pytest.raises(InvalidValueError, match="a file is there"):
        signing.make_keys(key)
    key.unlink()
    with pytest.raises(InvalidValueError, match="public key cannot be written"):
        signing.make_keys(key)
    assert not key.exists()
    public(key).unlink()
    key.write_bytes(before[0])
    with pytest.raises(InvalidValueError, match=r"private key cannot be written to .*: a file is"):
        signing.make_keys(key)
    assert key.read_bytes() == before[0]
    assert not public(key).exists()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidValueError, match="a symbolic link"):
        signing.make_keys(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def refusal(store: Store, database: Path, pack: Path, public_key: Path) -> str:
    before = dump(database)
    with pytest.raises(DocumentError) as error:
        import_pack(store, pack, public_key=public_key)
    assert dump(database) == before
    return str(error.value)


def test_without_its_signature_a_pack_is_not_even_parsed(
    store: Store,
    database: Path,
    pack: Path,
    key: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def parse(*_: Any) -> None:
        raise AssertionError("a pack was parsed before its signature was checked")

    monkeypatch.setattr(pack_import, "parse_pack", parse)
    trusted = public(key)
    assert f"{pack} is not signed" in refusal(store, database, pack, trusted)
    path = sign(pack, key)
    good = path.read_bytes()

    other = tmp_path / "other"
    signing.make_keys(other)
    assert "another key signed it" in refusal(store, database, pack, public(other))
    for bad in (
        b"",
        good[:-1],
        good + b"\n",
        bytes(64),
        good[:10] + b"\0" + good[11:],
        b"x" * 2**15,
    ):
        path.write_bytes(bad)
        message = refusal(store, database, pack, trusted)
        assert "the pack was changed, or another key" in message or "larger than a sig" in message
    path.write_bytes(good)
    content = pack.read_bytes()
    for changed in (content + b" ", content.replace(b"50.0", b"49.0"), content[:-1], b""):
        pack.write_bytes(changed)
        assert "the pack was changed" in refusal(store, database, pack, trusted)
    pack.write_bytes(content)
    with pytest.raises(AssertionError, match="was parsed"):  # so the way there is open
        import_pack(store, pack, public_key=trusted)


def test_what_was_checked_is_what_is_parsed(
    store: Store, pack: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read once: what takes its place in between has no effect."""
    sign(pack, key)
    check = signing.check_signature

    def swap(*args: Any) -> None:
        check(*args)
        pack.write_text("{}")

    monkeypatch.setattr(signing, "check_signature", swap)
    report = import_pack(store, pack, public_key=public(key))
    assert report.added + report.skipped == 1


def test_what_is_no_key_is_named(tmp_path: Path, pack: Path, key: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    pem = serialization.Encoding.PEM
    ec = generate_private_key(SECP256R1())
    private, shared = tmp_path / "ec", tmp_path / "ec.pub"
    plain = serialization.NoEncryption()
    private.write_bytes(ec.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    shared.write_bytes(ec.public_key().public_bytes(pem, info))
    locked = tmp_path / "locked"
    secret = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(
        signing.load_signer(key).private_bytes(pem, serialization.PrivateFormat.PKCS8, secret)
    )
    sign(pack, key)
    with pytest.raises(DocumentError, match="ec is a key of another kind; allowed: Ed25519"):
        signing.load_signer(private)
    with pytest.raises(DocumentError, match=r"ec\.pub is a key of another kind; allowed: Ed25519"):
        signing.check_signature(pack, b"", shared)
    for path in (pack, public(key), locked):
        with pytest.raises(DocumentError, match=f"{path} is no private key"):
            signing.load_signer(path)
    for path in (pack, key):
        with pytest.raises(DocumentError, match=f"{path} is no public key"):
            signing.check_signature(pack, b"", path)
    with pytest.raises(DocumentError, match="there is no such private key file"):
        signing.load_signer(tmp_path / "none")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_checks_it_too(pack: Path, key: Path) -> None:
    path = sign(pack, key)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public(key)), "-rawin"]
    command += ["-in", str(pack), "-sigfile", str(path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    pack.write_bytes(pack.read_bytes() + b" ")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_without_the_package_the_way_to_it_is_named(
    pack: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    for call in (
        lambda: signing.load_signer(key),
        lambda: signing.make_keys(pack.with_name("k")),
        lambda: signing.check_signature(pack, b"", public(key)),
    ):
        with pytest.raises(PatuneError, match=r"Run: pip install 'patune\[sign\]'"):
            call()
