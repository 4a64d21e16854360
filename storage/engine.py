"""The connection to the database: everything that differs between SQLite and PostgreSQL is here.

SQLite runs with a write-ahead log and full synchronisation. A writing transaction takes the write lock at its
start, because one that begins by reading can be refused later without waiting.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from pomona.errors import ConfigError, RegistryDamaged, RegistryUnavailable

BUSY_TIMEOUT_S = 30.0

# SQLSTATEs: a lost contest; and besides, what ends when the server has started, or has a connection to spare
_CONTESTS = {"40001", "40P01"}
_PASSING = {"53300", "55P03", "57P01", "57P02", "57P03", *_CONTESTS}
_TAKEN = "23505"
_TAKEN_SQLITE = {sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY}
_DAMAGED_SQLITE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_POSTGRESQL_LIMITS = {"connect_timeout": 10, "tcp_user_timeout": 30_000}  # s, ms; libpq itself waits for ever

_WRITES = "pomona_writes"


def sqlite_url(path: Path, *, read_only: bool) -> str:
    """Return the URL of a SQLite file.

    A log-keeping database in a folder that cannot be written can only be read as an unchanging file.
    """
    if not read_only:
        return f"sqlite:///{path}"
    log = path.with_name(path.name + "-wal")
    unchanging = not os.access(path.parent, os.W_OK) and not log.exists()
    return sa.URL.create(
        "sqlite",
        database=path.absolute().as_uri(),
        query={"uri": "true", "mode": "ro"} | ({"immutable": "1"} if unchanging else {}),
    ).render_as_string(hide_password=False)


def create_engine(url: str, *, read_only: bool) -> sa.Engine:
    """Return an engine; nothing is connected yet.

    Raises:
        ConfigError: The URL is malformed or names a database that is not supported.
        RegistryUnavailable: The driver is not installed.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            "the registry URL cannot be read; expected postgresql://user@host/database or sqlite:///path"
        ) from error
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    match parsed.get_backend_name():
        case "sqlite":
            engine = sa.create_engine(parsed)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            if read_only:
                event.listen(engine, "connect", _refuse_writes)
            return engine
        case "postgresql":
            return _create_postgresql(parsed, read_only=read_only)
        case other:
            raise ConfigError(f"expected a registry URL of sqlite or postgresql, got {other!r}")


def _create_postgresql(url: sa.URL, *, read_only: bool) -> sa.Engine:
    options = {"postgresql_readonly": True} if read_only else {}
    limits = {name: value for name, value in _POSTGRESQL_LIMITS.items() if name not in url.query}
    try:
        return sa.create_engine(url, pool_pre_ping=True, execution_options=options, connect_args=limits)
    except ImportError as error:
        raise RegistryUnavailable("PostgreSQL needs its driver: pip install 'pomona[postgres]'") from error


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that sees one state of the database, however many statements it reads with.

    Raises:
        RegistryUnavailable: The database cannot be reached or read.
    """
    with database_errors(engine), engine.connect() as connection:
        if engine.dialect.name == "postgresql":  # whose transactions see what others commit meanwhile
            connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that is committed at the end, or leaves nothing.

    Raises:
        RegistryUnavailable: The database cannot be reached or written.
    """
    with database_errors(engine), engine.execution_options(**{_WRITES: True}).begin() as connection:
        yield connection


@contextmanager
def database_errors(engine: sa.Engine) -> Iterator[None]:
    """Turn what the driver raises into an error of the registry; broken constraints pass, they are answers.

    Raises:
        ConfigError: Text has half a surrogate pair, which no database takes.
        RegistryDamaged: The file of the database is none, or is broken.
        RegistryUnavailable: The database cannot be used for another reason.
    """
    try:
        yield
    except IntegrityError:
        raise
    except UnicodeEncodeError as error:
        letter = ord(error.object[error.start])
        raise ConfigError(f"expected text that a database can store, got U+{letter:04X} in {error.object!r}") from error
    except (DBAPIError, PoolTimeout) as error:
        cause = getattr(error, "orig", None) or error
        where = engine.url.render_as_string(hide_password=True)
        if _is_damaged(cause):
            raise RegistryDamaged(
                f"the file of the registry database {where} is damaged: {' '.join(str(cause).split())}; "
                "restore a backup of it by `pomona registry restore`"
            ) from error
        raise RegistryUnavailable(
            f"the registry database {where} cannot be used: {' '.join(str(cause).split())}; "
            "check that it runs, that it is not locked, and that it may be written",
            passing=_passes(error),
        ) from error


def lost_contest(error: BaseException | None) -> bool:
    """Return whether a transaction was undone for another's sake: it can be done again at once."""
    return _sqlstate(error) in _CONTESTS


def is_taken(error: IntegrityError) -> bool:
    """Return whether there is a row already with what must be unique; no other constraint is broken by being second."""
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", None) in _TAKEN_SQLITE
    return _sqlstate(error) == _TAKEN


def _is_damaged(cause: BaseException) -> bool:
    code = getattr(cause, "sqlite_errorcode", None) or 0
    return code & 0xFF in _DAMAGED_SQLITE  # the rest says in what way


def _passes(error: DBAPIError | PoolTimeout) -> bool:
    if isinstance(error, PoolTimeout) or error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", None) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
    state = _sqlstate(error)
    unreached = state is None and isinstance(error, OperationalError)  # no server was there to give one
    return unreached or state in _PASSING or (state or "").startswith("08")


def _sqlstate(error: BaseException | None) -> str | None:
    return getattr(getattr(error, "orig", None), "sqlstate", None)


class SessionLock:
    """One of PostgreSQL's advisory locks. It belongs to one connection, and is free again when that breaks.

    On SQLite there is none, and everybody gets it.

    Args:
        engine: The database.
        name: Of what is locked.
    """

    def __init__(self, engine: sa.Engine, name: str) -> None:
        self._engine = engine
        self._number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        self._connection: sa.Connection | None = None

    def take(self) -> bool:
        """Take the lock without waiting, or make sure that it is still ours; tell whether it is.

        Raises:
            RegistryUnavailable: The database cannot be reached.
        """
        if self._engine.dialect.name != "postgresql" or self._alive():
            return True
        with database_errors(self._engine), ExitStack() as unless_taken:
            connection = self._engine.connect()
            unless_taken.callback(_end_session, connection)
            connection.execution_options(isolation_level="AUTOCOMMIT")
            if connection.scalar(sa.select(sa.func.pg_try_advisory_lock(self._number))):
                unless_taken.pop_all()
                self._connection = connection
        return self._connection is not None

    def release(self) -> None:
        """Let go of it."""
        if self._connection is not None:
            _end_session(self._connection)
            self._connection = None

    def _alive(self) -> bool:
        if self._connection is None:
            return False
        try:
            self._connection.execute(sa.select(1))
        except SQLAlchemyError:
            self.release()
            return False
        return True


def _end_session(connection: sa.Connection) -> None:
    connection.invalidate()  # a closed session has no locks; a pooled one would
    connection.close()


def keep_log(engine: sa.Engine) -> None:
    """Switch SQLite to a write-ahead log, which readers and one writer can share; elsewhere do nothing."""
    if engine.dialect.name == "sqlite":
        with database_errors(engine), engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            if raw is not None:
                raw.cursor().execute("PRAGMA journal_mode = WAL")


def copy_database(engine: sa.Engine, target: Path, *, blobs: Path) -> None:
    """Copy a SQLite database to a new file, as it is at one moment, while others may write.

    Args:
        engine: The database.
        target: The file to create.
        blobs: The folder that belongs to the database, for the message.

    Raises:
        ConfigError: It is PostgreSQL.
        RegistryUnavailable: The database cannot be read, or the copy not be written.
    """
    if engine.dialect.name != "sqlite":
        raise ConfigError(
            "a registry on PostgreSQL is backed up by PostgreSQL's own tools: first `pg_dump --format=custom`, then a "
            f"copy of the folder {blobs}; in this order every row of the dump has its blob, which is written before it"
        )
    with database_errors(engine), engine.connect() as connection, closing(sqlite3.connect(target)) as copy:
        source = connection.connection.dbapi_connection
        assert isinstance(source, sqlite3.Connection)
        try:
            source.backup(copy)
        except sqlite3.Error as error:
            raise RegistryUnavailable(f"cannot copy the registry database to {target}: {error}") from error


@contextmanager
def without_foreign_keys(engine: sa.Engine) -> Iterator[sa.Engine]:
    """Lend an engine on which SQLite does not enforce foreign keys, so that a migration can rebuild a table.

    They cannot be switched off within a transaction, and dropping the old table would empty those that refer to it.
    Elsewhere it is the same engine.
    """
    if engine.dialect.name != "sqlite":
        yield engine
        return
    lent = sa.create_engine(engine.url, poolclass=sa.NullPool)
    event.listen(lent, "connect", _prepare_sqlite)
    event.listen(lent, "connect", _ignore_foreign_keys)
    event.listen(lent, "begin", _begin_sqlite)
    try:
        yield lent
    finally:
        lent.dispose()


def _ignore_foreign_keys(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    connection.cursor().execute("PRAGMA foreign_keys = OFF")


def _prepare_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver would otherwise leave DDL outside transactions
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}",
        "foreign_keys = ON",
        "synchronous = FULL",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _refuse_writes(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    connection.cursor().execute("PRAGMA query_only = ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
