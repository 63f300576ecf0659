"""Where the platform's own secrets are, and are not."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from anyio import to_thread
from pydantic import SecretStr
from sqlalchemy import text

from app.auth import keys
from app.auth.jwks import DEVELOPMENT_ISSUER
from app.checklist.findings import Item, Verdict, failed, judged, passed, warned
from app.checklist.ground import CHECKOUT, Ground
from app.embedded.demo import ENV_FILE, read_env
from app.errors import ConfigurationError
from app.keyring import Keyring
from app.settings import Settings

_SECONDS: Final = 4
# Shorter ones stand in ordinary text by chance.
_LEAST: Final = 8
_OUR_KEY: Final = re.compile(r"\bbh_[0-9A-Za-z]{12}_[0-9A-Za-z]{46}\b")
# Our own keys, a private key in a file of its own, and those of the providers that people use most.
_SHAPES: Final = (
    r"bh_[0-9A-Za-z]{12}_[0-9A-Za-z]{46}|^-----BEGIN [A-Z ]*PRIVATE KEY-----|AKIA[0-9A-Z]{16}"
    r"|sk-(proj-|ant-)?[A-Za-z0-9_]{40,}|BULKHEAD_(ROOT|AUDIT)_KEYS=[a-z0-9_-]+:[A-Za-z0-9_-]{43}"
)
_KNOWN: Final = ("ls-files", "--error-unmatch")
_IGNORED: Final = ("check-ignore", "--quiet")
_PLACEHOLDER: Final = re.compile(r"(?i)(change.?me|secret|password|example|placeholder|your.?key|sk-xxx+|x{6,}|test)")
_FILES: Final = ("machine.env", "platform.env", ENV_FILE, "development-issuer.pem", "postgres/secret")
_LIVING: Final = text("select count(*) from api_keys where lookup = any(:lookups) and revoked_at is null")
_TRUSTED: Final = text("select count(*) from issuers where issuer = :issuer")
_STORED_MODELS: Final = text("select count(*) from model_endpoints where is_enabled")


def values(settings: Settings) -> Iterator[str]:
    """Every secret of the settings, without what stands around it."""
    fields = ((name, getattr(settings, name)) for name in type(settings).model_fields)
    for name, field in fields:
        if isinstance(field, SecretStr):
            yield from _cores(name, field.get_secret_value())


def _cores(name: str, value: str) -> Iterator[str]:
    if name.endswith("_url"):
        yield urlsplit(value).password or ""
    elif name.endswith("_keys"):
        yield from (entry.strip().partition(":")[2] for entry in value.split(","))
    elif name.endswith("_headers"):
        yield from (pair.partition("=")[2].strip() for pair in value.split(","))
    else:
        yield value


async def _versioned(ground: Ground) -> Verdict:
    return await to_thread.run_sync(_search, ground, abandon_on_cancel=True)


def _search(ground: Ground) -> Verdict:
    if not (ground.checkout / ".git").exists():
        return passed("The program does not lie in a checkout.")
    known = {value for value in (*values(ground.settings), *_demo_keys(ground.settings)) if len(value) >= _LEAST}
    try:
        found = _grep(ground.checkout, ("-F",), "\n".join(sorted(known))) if known else set()
        shaped = {name for name in _grep(ground.checkout, ("-E",), _SHAPES) if _is_key(ground.checkout / name)}
    except (OSError, subprocess.SubprocessError):
        return warned("git does not say what is under version control.", "Install git, or run this where it is.")
    faults = [f"a configured secret stands in {name}" for name in sorted(found)]
    faults += [f"what looks like a key stands in {name}" for name in sorted(shaped - found)]
    return judged(faults[:10], f"{len(known)} secrets and the usual shapes of keys: in no file under version control.")


def _grep(checkout: Path, how: tuple[str, ...], patterns: str) -> set[str]:
    """The files whose text, as it is or as it is to be committed, matches. No pattern is in an argument list."""
    found: set[str] = set()
    for where in ((), ("--cached",)):
        done = _git(checkout, "grep", "-I", "-l", *where, *how, "-f", "-", text=patterns)
        if done.returncode > 1:
            raise subprocess.SubprocessError
        found |= set(done.stdout.splitlines())
    return found


def _is_key(path: Path) -> bool:
    """One of ours has a checksum: documents may show its shape."""
    content = path.read_text(errors="replace") if path.is_file() else ""
    others = re.search(_SHAPES.partition("|")[2], content, re.MULTILINE)
    return others is not None or any(keys.parse(match[0]) for match in _OUR_KEY.finditer(content))


def _git(checkout: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    # A checkout may name programs that git starts for whoever asks: what is another's is not asked, but for our own,
    # whose program runs here anyway.
    safe = ("-c", "core.fsmonitor=false", "-c", f"safe.directory={CHECKOUT}")
    command = [shutil.which("git") or "git", *safe, "-C", str(checkout), *arguments]
    environment = {"PATH": os.defpath, "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent"}
    return subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SECONDS,
        check=False,
        env=environment,
    )


async def _env_file(ground: Ground) -> Verdict:
    return await to_thread.run_sync(_judge_env_file, ground, abandon_on_cancel=True)


def _judge_env_file(ground: Ground) -> Verdict:
    path = ground.env_file
    if not path.exists():
        return passed("There is none.")
    faults = [] if _is_private(path) else ["others on this machine can read .env"]
    folder = path.resolve().parent
    if (folder / ".git").exists():
        is_known, is_ignored = (_git(folder, *words, path.name).returncode for words in (_KNOWN, _IGNORED))
        if is_known == 0:
            faults.append(".env is under version control")
        elif is_ignored == 1:
            faults.append(".env is not ignored: the next commit may take it")
        elif not faults and is_ignored != 0:
            return warned("git does not say whether .env is under version control.")
    return judged(faults, "It is its owner's alone, and not under version control.")


def _is_private(path: Path) -> bool:
    return not stat.S_IMODE(path.stat().st_mode) & 0o077


async def _required(ground: Ground) -> Verdict:
    settings = ground.settings
    if settings.root_keys is None:
        return failed("BULKHEAD_ROOT_KEYS is not set.")
    try:
        Keyring.parse(settings.root_keys.get_secret_value(), source="BULKHEAD_ROOT_KEYS")
    except ConfigurationError as error:
        return failed(error.detail)
    has_model = settings.model_api_key is not None or (ground.answering is not None and bool(ground.answering.models))
    if not has_model and not (await ground.database.rows("platform", _STORED_MODELS))[0][0]:
        return failed("There is no credential of any model.")
    placeholders = [name for name in ("model_api_key", "metrics_token") if _is_placeholder(getattr(settings, name))]
    faults = [f"BULKHEAD_{name.upper()} is a placeholder" for name in placeholders]
    return judged(faults, "Root keys and a model's credential are set, and no placeholders.")


def _is_placeholder(value: SecretStr | None) -> bool:
    return value is not None and _PLACEHOLDER.fullmatch(value.get_secret_value()) is not None


async def _defaults(ground: Ground) -> Verdict:
    faults = [f"the password of the role {role} can be guessed" for role in _weak_roles(ground)]
    if faults:
        return failed("; ".join(faults), "Give each database role a password of its own, of 32 random characters.")
    lookups = [key.lookup for text_ in _demo_keys(ground.settings) if (key := keys.parse(text_))]
    living = (await ground.database.rows("platform", _LIVING, lookups=lookups))[0][0]
    trusted = (await ground.database.rows("platform", _TRUSTED, issuer=DEVELOPMENT_ISSUER))[0][0]
    found = [f"{living} keys of demo.env are valid"] if living else []
    found += [f"{trusted} tenants trust the development issuer"] if trusted else []
    is_open = ground.is_open or not ground.is_demo
    return judged(found, "No credential of the demo is valid.", worst=failed if is_open else warned)


def _weak_roles(ground: Ground) -> Iterator[str]:
    for url in (ground.urls.app, ground.urls.platform, ground.urls.sealer):
        parts = urlsplit(url)
        password = parts.password
        if password is not None and (password == parts.username or _PLACEHOLDER.fullmatch(password)):
            yield parts.username or ""


def _demo_keys(settings: Settings) -> list[str]:
    """What the demo has written down for its clients."""
    return [value for value in read_env(settings.data_dir / ENV_FILE).values() if keys.parse(value)]


async def _private_files(ground: Ground) -> Verdict:
    folder = ground.settings.data_dir
    if not folder.is_dir():
        return failed("There is no data directory.")
    faults = ["anybody can write to the data directory"] if folder.stat().st_mode & 0o002 else []
    own = [folder / name for name in _FILES if (folder / name).exists()]
    faults += [f"others can read {path.name}" for path in own if not _is_private(path)]
    return judged(faults, f"{len(own)} files of secrets are their owner's alone.")


ITEMS: Final = (
    Item(
        "keys-not-in-git",
        (1,),
        "No secret stands in a file under version control",
        "Take the text out, change the secret wherever it is used, and rewrite the history where it was pushed.",
        _versioned,
        is_local=True,
    ),
    Item(
        "env-file",
        (1,),
        ".env is private and not committed",
        "chmod 600 .env; git rm --cached .env; keep .env in .gitignore.",
        _env_file,
        is_local=True,
    ),
    Item(
        "required-keys",
        (1,),
        "The required keys are set",
        "Set BULKHEAD_ROOT_KEYS (`bulkhead root-key`) and BULKHEAD_MODEL_API_KEY.",
        _required,
    ),
    Item(
        "default-credentials",
        (1,),
        "No credential of the demo is valid",
        "Start on an empty database with `bulkhead serve`; a demo is for one machine. Else revoke these keys and delete"
        " the issuer.",
        _defaults,
    ),
    Item(
        "private-files",
        (1,),
        "Files of secrets are their owner's alone",
        "chmod 600 these files, and chmod 700 the data directory.",
        _private_files,
    ),
)
