"""Addresses of the two stores: understood or refused, made absolute, compared, and shown without their secrets."""

from __future__ import annotations

import difflib
import os
import re
import stat
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from caltech_sweep import paths
from caltech_sweep.errors import UsageError

SQLITE = "sqlite:///"
_WEB = ("http", "https")
_DRIVERS = {  # of each kind of database: those of SQLAlchemy that wait for an answer
    "sqlite": ("pysqlite",),
    "postgresql": ("psycopg", "psycopg2", "psycopg2cffi", "pg8000"),
    "mysql": ("pymysql", "mysqldb", "mysqlconnector", "mariadbconnector"),
    "mssql": ("pyodbc", "pymssql"),
}
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_MEANT = {
    "postgres": "postgresql",
    "psql": "postgresql",
    "pgsql": "postgresql",
    "mariadb": "mysql",
    "sqlite3": "sqlite",
}
_DATABRICKS = ("databricks", "databricks-uc", "uc")
_ENDINGS = (".db", ".sqlite", ".sqlite3", ".db3")
_LOCATION = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::(?P<port>.*))?")
_LOCAL = re.compile(r"localhost|127(\.\d+){3}|\[?::1\]?|/.*", re.I)
_FURTHER = ("options", "service", "unix_socket", "odbc_connect")  # that may name a schema, or the place itself
_LONGEST = 200  # characters of an address in a sentence


@dataclass(frozen=True)
class Kind:
    """One of the two stores: its name, the option that gives it, its usual file, and how a server is written."""

    name: str
    option: str
    file: Path
    server: str
    web: bool  # it may be a tracking server


TRACKING = Kind("tracking store", "--tracking-uri", paths.MLFLOW_DB, "http://HOST:PORT", True)
STUDIES = Kind("study store", "--storage", paths.OPTUNA_DB, "postgresql://USER:PASSWORD@HOST:PORT/DATABASE", False)


class _NotUnderstoodError(Exception):
    """What follows the address in the sentence that refuses it."""


# -- secrets -----------------------------------------------------------------------------------------------------------

_USER = re.compile(r"(?<=://)([^\s'\"<>]*)@")
_PARAMETER = re.compile(
    r"((?:^|(?<=[^\w-]))[\w-]*(?:password|passwd|pwd|token|secret|credential|signature|key|sig)=)([^&;,\s'\"<>]*)", re.I
)
_HEADER = re.compile(r"\b(Basic|Bearer) [\w+/=.~-]{6,}")
_SHORTEST = 3  # characters of what is looked for without its surroundings


def _secrets_of(address: str) -> list[str]:
    """Return an address's secrets as drivers may tell them: whole, decoded, and cut where a reader may cut them."""
    users = [user.partition(":")[2] or user for user in _USER.findall(address)]
    found = users + [value for _, value in _PARAMETER.findall(address)]
    found += [unquote(secret) for secret in found]
    parts = {part for secret in found for part in (secret, *re.split(r"[/:@?#&%]", secret)) if len(part) >= _SHORTEST}
    return sorted(parts, key=len, reverse=True)


def hide_secrets(text: str, address: str = "") -> str:
    """Return an address, or a sentence with addresses in it, without users, passwords, tokens and keys.

    What a sentence tells of ``address`` is hidden even where it is cut out of it, as in a driver's own words.
    """
    text = _USER.sub("***@", text)
    text = _PARAMETER.sub(r"\1***", _HEADER.sub(r"\1 ***", text))
    for secret in _secrets_of(address):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    return text


def _shown(address: str) -> str:
    """Return something that was meant as an address, all of it, without secrets and not too long."""
    head, separator, rest = address.partition("://") if "://" in address.partition("@")[0] else ("", "", address)
    if "@" in rest:
        rest = f"***@{rest.rpartition('@')[2]}"
    text = hide_secrets(f"{head}{separator}{rest}")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


# -- what an address means ---------------------------------------------------------------------------------------------


def read(text: str, kind: Kind, source: str = "") -> str:
    """Return an address with an absolute path, since MLflow and SQLAlchemy resolve relative ones again.

    Raises UsageError for one that is not understood; ``source`` is where it was given, if not by its option.
    """
    try:
        return _understood(text, kind)
    except _NotUnderstoodError as error:
        raise UsageError(f"{source or kind.option}: {_shown(text)!r} {error}") from None


def _understood(text: str, kind: Kind) -> str:
    if not text.strip():
        raise _NotUnderstoodError(f"is empty; leave it out for {kind.file}, or write a file or {kind.server}")
    if text != text.strip() or not text.isprintable():
        raise _NotUnderstoodError("has a space at an end or a character that cannot be printed; remove it")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _file(_path(text, kind), kind)
    scheme = scheme.lower()
    database, _, driver = scheme.partition("+")
    if scheme in _WEB:
        return _web(scheme, rest, kind)
    if database not in _DRIVERS:
        raise _unknown(scheme, rest, kind)
    if driver and driver not in _DRIVERS[database]:
        near = difflib.get_close_matches(driver, _DRIVERS[database], 1, 0.8)
        better = f"{database}+{near[0]}" if near else database
        raise _NotUnderstoodError(f"names a driver that cannot be used; write {_shown(f'{better}://{rest}')}")
    return _sqlite(rest, kind) if database == "sqlite" else _server(database, driver, rest)


def _unknown(scheme: str, rest: str, kind: Kind) -> _NotUnderstoodError:
    """Return what is wrong with an address of no kind that a store has."""
    if scheme == "file":
        return _folders(rest, kind)
    if scheme in _DATABRICKS:
        return _databricks(kind)
    known = [*(_WEB if kind.web else ()), *_DRIVERS]
    database = scheme.partition("+")[0]
    near = [_MEANT[database]] if database in _MEANT else difflib.get_close_matches(database, known, 1)
    if near:
        slashes = "/" if near[0] == "sqlite" and not rest.startswith("/") else ""
        better = _shown(f"{near[0]}://{slashes}{rest}")
        return _NotUnderstoodError(f"is of a kind that is not known; did you mean {better}?")
    kinds = ", ".join(f"{name}://" for name in known)
    return _NotUnderstoodError(f"is of a kind that is not known; it may start with {kinds}, or be a file")


def _folders(place: str, kind: Kind) -> _NotUnderstoodError:
    file = Path(place) if place.endswith(_ENDINGS) else Path(place) / kind.file.name
    return _NotUnderstoodError(
        f"names a folder of files, which cannot be a store; name a database file, such as {_shown(str(file))}"
    )


def _databricks(kind: Kind) -> _NotUnderstoodError:
    return _NotUnderstoodError(
        f"means Databricks, which is not supported; write {kind.server}, or a file such as {kind.file}"
    )


def _path(text: str, kind: Kind) -> str:
    """Return what is no address as the path of a file; refuse what was meant as an address."""
    first, lower = text.partition("/")[0], text.lower()
    word, colon, rest = text.partition(":")
    word = word.lower()
    if lower in _DATABRICKS or (":" in first and word in _DATABRICKS):
        raise _databricks(kind)
    if ":" not in first:
        if first not in ("", ".", "..") and first[0] != "~" and not lower.endswith(_ENDINGS):
            _refuse_word(text, kind)
        return text
    if word == "file":
        raise _folders(rest, kind)
    database = word.partition("+")[0]
    database = _MEANT.get(database, database)
    if database == "sqlite":
        raise _NotUnderstoodError(f"has too few slashes; write {_shown(SQLITE + re.sub('^/+', '/', rest))}")
    if database in (*_WEB, *_DRIVERS):
        raise _NotUnderstoodError(f"has too few slashes; write {_shown(f'{database}://' + rest.lstrip('/'))}")
    numbered = re.fullmatch(r"(\[.+\]|[^:]+):[0-9]+", first.rpartition("@")[2])
    server = _shown(f"http://{text}") if kind.web and numbered else kind.server
    raise _NotUnderstoodError(
        f"does not say what kind of store it is; write {server} for a server, or ./ in front of it for a file"
    )


def _refuse_word(text: str, kind: Kind) -> None:
    """Refuse a word that is no address, unless a file or a folder has its name."""
    if not _mode(Path(text)):
        raise _NotUnderstoodError(
            f"is neither the address of a server, such as {kind.server}, nor the name of a file that is there or ends "
            "in .db; put ./ in front of it if it is a file"
        )


def _mode(file: Path) -> int:
    """Return what the system says a path is, or 0 where there is nothing."""
    try:
        return file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no file can have this name"
        raise _NotUnderstoodError(f"cannot be reached ({why}); choose another place") from None


def _file(text: str, kind: Kind) -> str:
    """Return the address of the database in a file."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise _NotUnderstoodError("names the home folder of a user that is not on this machine; write the whole path")
    if name := paths.variable(expanded):
        raise _NotUnderstoodError(f"begins with a variable that no shell has replaced; write what {name} stands for")
    try:
        file = Path(re.sub("^/+", "/", expanded)).resolve()
    except (OSError, RuntimeError, ValueError):  # a link to itself
        raise _NotUnderstoodError("cannot be resolved to a file; choose another place") from None
    mode = _mode(file)
    if stat.S_ISDIR(mode) or text.endswith(("/", "/.", "/..")):
        inside = _shown(os.path.join(text, kind.file.name))
        raise _NotUnderstoodError(f"is a folder; name the database file in it, such as {inside}")
    if mode and not stat.S_ISREG(mode):
        raise _NotUnderstoodError("is not an ordinary file; name a database file")
    if "?" in str(file) or unquote(str(file)) != str(file):
        raise _NotUnderstoodError(
            "cannot be used, because ? and % are special characters in a database URL; leave out settings after a "
            "?, rename the folder, or choose another place"
        )
    return f"{SQLITE}{file}"


def _sqlite(rest: str, kind: Kind) -> str:
    if rest in ("", "/") or rest.lstrip("/").startswith(":memory:"):
        raise _NotUnderstoodError(f"is lost when the command ends; name a file, such as {SQLITE}{kind.file}")
    if not rest.startswith("/"):
        raise _NotUnderstoodError(f"has too few slashes; write {_shown(SQLITE + rest)}")
    if rest.startswith("/file:"):
        place = rest.removeprefix("/file:").partition("?")[0]
        raise _NotUnderstoodError(f"has an address within the address; write {_shown(SQLITE + place)}")
    return _file(rest[1:], kind)


def _location(rest: str) -> re.Match[str]:
    """Return host and port of what follows the ``://``, whatever a user or a password has in it."""
    found = _LOCATION.fullmatch(re.split(r"[/?#]", rest.rpartition("@")[2], maxsplit=1)[0])
    if found is None or re.search(r"\s", found["host"]):
        raise _NotUnderstoodError("has a host that is not understood; write HOST:PORT, an IPv6 address as [::1]:PORT")
    port = found["port"]
    if port is not None and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise _NotUnderstoodError("has a port that is not a number from 1 to 65535; correct what follows the host")
    return found


def _web(scheme: str, rest: str, kind: Kind) -> str:
    if not kind.web:
        raise _NotUnderstoodError(
            f"is a server of web pages, which holds no studies; name a database, such as {kind.server} or {kind.file} "
            f"(an MLflow server goes into {TRACKING.option})"
        )
    page, mark, after = rest.partition("#")
    if mark:
        how = f"write {_shown(f'{scheme}://' + page.rstrip('/?'))}" if "@" not in after else "a # in a password is %23"
        raise _NotUnderstoodError(f"is the address of a web page, since it has a # in it; {how}")
    if not _location(rest)["host"]:
        raise _NotUnderstoodError(f"names no host; write {kind.server}")
    return f"{scheme}://{rest}"


def _server(database: str, driver: str, rest: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    _location(rest)
    if database == "postgresql" and not driver:
        driver = next((name for name in ("psycopg", "psycopg2") if find_spec(name)), "")
        if not driver:
            raise _NotUnderstoodError("needs a driver: pip install 'caltech-sweep[postgresql]'")
    address = f"{database}{'+' if driver else ''}{driver}://{rest}"
    try:
        make_url(address)
    except (ArgumentError, ValueError):
        wanted = f"{database}://USER:PASSWORD@HOST:PORT/DATABASE"
        raise _NotUnderstoodError(f"is not understood; write {wanted}, with special characters as %XX") from None
    return address


# -- which store an address names --------------------------------------------------------------------------------------


def is_web(uri: str) -> bool:
    """Tell whether an address is that of a tracking server."""
    return uri.startswith(tuple(f"{scheme}://" for scheme in _WEB))


def identity(uri: str) -> str:
    """Return what is the same for all the addresses of one store: no driver, user or secret, one name of a host."""
    if uri.startswith(SQLITE):
        return uri
    if is_web(uri):
        plain = hide_secrets(uri).replace("***@", "").rstrip("/")
        return re.sub(r"(?<=://)(127\.0\.0\.1|\[::1\]|localhost)(?=[:/?]|$)", "localhost", plain, flags=re.I)
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    database = url.get_backend_name()
    given = {name: str(value) for name, value in url.query.items()}
    host = given.get("host") or url.host or "localhost"
    host = "localhost" if _LOCAL.fullmatch(host) else host.lower()
    port = given.get("port") or url.port or _PORTS[database]
    name = given.get("dbname") or url.database or url.username or ""
    further = [given.get(name, "") for name in _FURTHER]
    return f"{database}://{host}:{port}/{name}?{'&'.join(further)}"
