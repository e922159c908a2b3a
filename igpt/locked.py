"""Locked models: the files of a model folder as one file in the age format (age-encryption.org), opened in memory only.

Inside is a plain tar, so `age --decrypt model.age | tar x` opens it too, and `tar c ... | age ...` makes one.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from contextlib import suppress
from getpass import getpass
from pathlib import Path, PurePosixPath
from typing import Any

from tokenizer_vq.base import UserError, complaint

HEAD, BY_PASSPHRASE = b"age-encryption.org/v1\n", b"-> scrypt "  # how all begin, and how it goes on for some
PASSPHRASE, IDENTITY = "IGPT_PASSPHRASE", "IGPT_IDENTITY"  # names in the environment


def is_locked(path: Path) -> bool:
    """Whether a file begins as locked ones do. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return file.read(len(HEAD)) == HEAD


def lock(files: dict[str, bytes], recipients: list[Any]) -> bytes:
    """The files, by their names, as one that the recipients can open; without any, who knows the passphrase can."""
    with tarfile.open(fileobj=(plain := io.BytesIO()), mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if recipients:
        return bytes(_pyrage().encrypt(plain.getvalue(), recipients))
    return bytes(_pyrage().passphrase.encrypt(plain.getvalue(), _passphrase("the new file", twice=True)))


def unlock(path: Path) -> dict[str, bytes]:
    """The files inside a locked one, by their names; nothing is written. Raises UserError where the passphrase, or the
    secret key in the file that IGPT_IDENTITY names, does not open it, and where it was changed."""
    age = _pyrage()
    sentence = f"{path} cannot be unlocked, another passphrase or key is wanted, or the file is cut or altered"
    with complaint(sentence, age.DecryptError, age.IdentityError, OSError, RuntimeError, tarfile.TarError):
        if not (data := path.read_bytes() if path.is_file() else b"").startswith(HEAD):
            raise UserError(f"there is no locked model at {str(path)!r}")
        if data.startswith(HEAD + BY_PASSPHRASE):
            plain = age.passphrase.decrypt(data, _passphrase(str(path)))
        elif named := os.environ.get(IDENTITY):
            words = Path(named).expanduser().read_text(encoding="utf-8", errors="replace").split()
            keys = [age.x25519.Identity.from_str(word) for word in words if word.startswith("AGE-SECRET-KEY-")]
            plain = age.decrypt(data, keys)
        else:
            raise UserError(f"{path} is locked for the owner of a key: --identity FILE or {IDENTITY} is wanted")
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            parts = {str(PurePosixPath(part.name)): part for part in tar if part.isreg() and not part.issparse()}
            return {name: tar.extractfile(part).read() for name, part in parts.items()}  # type: ignore[union-attr]


def recipient(key: str) -> Any:
    """Whom a public key stands for. Raises UserError where it is none."""
    with complaint(f"{key!r:.99} is no public key of age, as age1... is one", _pyrage().RecipientError, UnicodeError):
        return _pyrage().x25519.Recipient.from_str(key)


def _passphrase(what: str, twice: bool = False) -> str:
    """That in the environment, or what is typed on the terminal."""
    if given := os.environ.get(PASSPHRASE):
        return given.encode(errors="replace").decode()
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError(f"{what} wants a passphrase: on a terminal, or in {PASSPHRASE}")
    with suppress(EOFError):
        given = getpass(f"Passphrase of {what}: ")
        if given and (not twice or getpass("The same again: ") == given):
            return given
    raise UserError(f"{what} wants a passphrase{', twice the same' * twice}")


def _pyrage() -> Any:
    try:
        import pyrage
    except ImportError as error:
        raise UserError("locked models want the package pyrage: pip install pyrage") from error
    return pyrage
