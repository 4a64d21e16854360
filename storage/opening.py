"""Open a registry: find its folder and its database, create or migrate what is not there yet."""

import os
from pathlib import Path

from platformdirs import user_data_path

from pomona.errors import RegistryUnavailable
from pomona.storage import schema
from pomona.storage.blobs import BlobStore
from pomona.storage.engine import create_engine, sqlite_url
from pomona.storage.registry import Registry


def default_home() -> Path:
    """Return the registry's folder: ``POMONA_HOME``, or the user's data folder."""
    home = os.environ.get("POMONA_HOME")
    return Path(home) if home else user_data_path("pomona")


def open_registry(
    home: Path | None = None,
    *,
    url: str | None = None,
    read_only: bool = False,
    create: bool = True,
    patience_s: float = 0.0,
) -> Registry:
    """Open a registry, create it where there is none, and migrate it where it is older.

    Args:
        home: Folder of ``registry.db`` and ``blobs``; by default :func:`default_home`.
        url: Database to use instead of ``registry.db``; by default ``POMONA_REGISTRY_URL``.
        read_only: Create, migrate and write nothing.
        create: Create a registry where there is none.
        patience_s: How long the database may be away, once it is open, before a method raises; what it does meanwhile
            it does once.

    Raises:
        RegistryUnavailable: The database or the folder cannot be used, or there is no registry and none is created.
        RegistryDamaged: The file of the database is broken.
        SchemaTooNew: A newer package wrote it; nothing was changed.
    """
    home = home or default_home()
    url = url or os.environ.get("POMONA_REGISTRY_URL") or None
    _prepare_home(home, needs_file=url is None and (read_only or not create), read_only=read_only)
    engine = create_engine(url or sqlite_url(home / "registry.db", read_only=read_only), read_only=read_only)
    try:
        lock = home / "registry.lock" if engine.dialect.name == "sqlite" else None
        schema.prepare(engine, lock=lock, read_only=read_only, create=create)
    except BaseException:
        engine.dispose()
        raise
    blobs = BlobStore(home / "blobs", read_only=read_only)
    if not read_only:
        blobs.remove_leftovers()
    return Registry(engine, blobs, patience_s=patience_s)


def _prepare_home(home: Path, *, needs_file: bool, read_only: bool) -> None:
    if needs_file and not (home / "registry.db").is_file():
        raise RegistryUnavailable(
            f"there is no registry in {home}; a run creates it, or name another folder by --home or POMONA_HOME"
        )
    if read_only:
        return
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryUnavailable(f"cannot create the registry's folder {home}: {error.strerror}") from error
