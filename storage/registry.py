"""The registry: a database for facts, a folder for bytes, and one object that keeps them in step.

Bytes are on disk before a row names them, and a row is committed before anybody is told.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from pomona.errors import BlobWriteError, ConfigError, RegistryError
from pomona.failpoints import reach
from pomona.settings import AdapterName
from pomona.storage import (
    audit,
    certificates,
    ledger,
    publishing,
    rounds,
    submissions,
    versions,
)
from pomona.storage.certificates import Certificate, NewCertificate
from pomona.storage.engine import SessionLock, copy_database, writing
from pomona.storage.learned import NewLearned
from pomona.storage.quarantine import quarantine
from pomona.storage.reader import RegistryReader, Result
from pomona.storage.records import (
    Client,
    LedgerEntry,
    NewImport,
    NewSubmission,
    NewVersion,
    Reservation,
    Round,
    Run,
    RunState,
    Submission,
    Version,
)
from pomona.storage.retrying import until_done

_WRITERS = 8  # blobs that are written at once

_ADAPTER_NAME = TypeAdapter(AdapterName)


class Registry(RegistryReader):
    """Adapters, their versions, and the runs that made them.

    Every method raises RegistryUnavailable when the database cannot be used.

    Attributes:
        blobs: The bytes.
    """

    def add_base_model(self, sha256: str, name: str, source: str) -> None:
        """Make a base model known; one that is known keeps its first name."""
        self._write(lambda c: rounds.add_base_model(c, sha256, name=name, source=source))

    def start_run(
        self, *, run_id: str, adapter: str, base_sha256: str, settings_json: str, learns: bool = False
    ) -> Run:
        """Begin a run, or take up again one of the same id, adapter, base model and settings.

        Args:
            run_id: The run.
            adapter: Name of the adapter that it publishes.
            base_sha256: Hash of its base model.
            settings_json: Its settings, as text.
            learns: It learns task after task: goes on from what was learned, and from nothing else.

        Raises:
            ConfigError: The adapter's name is malformed.
            BaseModelError: The base model was not added.
            VersionConflict: Another run has that id, or the adapter's versions are of the other kind.
        """
        check_name(adapter)
        facts = {"adapter": adapter, "base_sha256": base_sha256, "settings_json": settings_json}
        return self._write(lambda c: rounds.start_run(c, run_id=run_id, learns=learns, **facts))

    def finish_run(self, run_id: str, state: RunState, reason: str = "") -> Run:
        """Record how a run ended."""
        return self._write(lambda c: rounds.finish_run(c, run_id, state, reason))

    def enrol_client(self, run_id: str, *, name: str, rank: int, num_examples: int, excluded: str = "") -> Client:
        """Record a client, or what it says now if it enrolled before.

        Args:
            run_id: The run.
            name: Name of the client.
            rank: The LoRA rank it can train.
            num_examples: Size of its training set.
            excluded: Why it takes no part, ``""`` when it does.
        """
        return self._write(
            lambda c: rounds.enrol_client(c, run_id, name=name, rank=rank, num_examples=num_examples, excluded=excluded)
        )

    def set_initial_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Record the scores before the first round."""
        self._write(lambda c: rounds.set_initial_metrics(c, run_id, metrics))

    def open_round(self, run_id: str, number: int, *, parent: str | None, cohort: Sequence[str]) -> Round:
        """Open a round, open a failed one again, or return the one that is open already, with its own cohort.

        Args:
            run_id: The run.
            number: From 1.
            parent: Reference of the version that clients train on.
            cohort: Names of the clients that are asked.

        Raises:
            VersionConflict: The round is committed, or is open on another parent.
        """
        return self._write(lambda c: rounds.open_round(c, run_id, number, parent=parent, cohort=cohort))

    def freeze_round(self, run_id: str, number: int) -> Round:
        """Let an open round take no more updates; its version is made of those accepted by now, also after a crash.

        Raises:
            VersionConflict: The round is closed already.
        """
        return self._write(lambda c: rounds.freeze_round(c, run_id, number))

    def fail_round(self, run_id: str, number: int, reason: str) -> Round:
        """Close an open round without a version."""
        return self._write(lambda c: rounds.fail_round(c, run_id, number, reason))

    def record_submission(self, new: NewSubmission) -> Submission:
        """Record a client's answer; when this returns, it is on disk.

        The same client, nonce and bytes recorded again return the first receipt, whatever its status.

        Raises:
            BlobWriteError: The payload of an accepted one could not be written; there is no row.
            VersionConflict: It is accepted, but the round is closed, the client has another accepted update
                in it, or the nonce was used before.
        """
        (recorded,) = self.record_submissions([new])
        if isinstance(recorded, RegistryError):
            raise recorded
        return recorded

    def record_submissions(self, new: Sequence[NewSubmission]) -> list[Submission | RegistryError]:
        """Record several answers in one transaction; when this returns, each that has a receipt is on disk.

        Each is recorded as :meth:`record_submission` would, one after the other, or has the error in its place that
        this would have raised, and the others are recorded all the same.

        Raises:
            RegistryUnavailable: The database cannot be used; none was recorded.
        """
        hashes = [hashlib.sha256(each.payload).hexdigest() for each in new]
        known = self._read(lambda c: submissions.receipts(c, list(zip(new, hashes, strict=True))))
        stored = self._keep_all(known, new)
        missing = [place for place, each in enumerate(stored) if each is None]
        if missing:
            pairs = [(new[place], hashes[place]) for place in missing]
            for place, each in zip(missing, self._write(lambda c: submissions.insert(c, pairs)), strict=True):
                stored[place] = each
                if isinstance(each, Submission) and each.status == "accepted":
                    reach("submission-recorded")
        return [each for each in stored if each is not None]

    def publish_round(self, new: NewVersion) -> Version:
        """Publish the result of an open round as the next version; when this returns, it is on disk.

        Raises:
            BlobWriteError: The payload could not be written; nothing was published.
            BaseModelError: It was not made on the run's base model.
            VersionConflict: The round is closed already, or the adapter's newest version is not the one expected.
        """
        sha256 = self.blobs.put(new.payload)
        reach("version-blob-written")
        return self._write(lambda c: publishing.publish_round(c, new, sha256))

    def publish_import(self, new: NewImport) -> Version:
        """Publish an adapter that no run made, with its base model; when this returns, it is on disk.

        Raises:
            ConfigError: The adapter's name is malformed.
            BlobWriteError: The payload could not be written; nothing was published.
            VersionConflict: The adapter's newest version is not the one expected.
        """
        check_name(new.adapter)
        sha256 = self.blobs.put(new.payload)
        return self._write(lambda c: publishing.publish_import(c, new, sha256))

    def publish_learned(
        self, new: NewLearned, *, certificate: NewCertificate | None = None, quarantined: Sequence[str] = ()
    ) -> Version:
        """Publish what was learned of a task or is left after a request to forget; when this returns, it is on disk.

        A certificate is recorded in the same transaction, and names the new version; the versions ``quarantined`` are
        put into quarantine in it too, and their aliases point at the new one.

        Raises:
            ConfigError: The adapter's name is malformed.
            BlobWriteError: The payload could not be written; nothing was published.
            AdapterNotFound: There is no such parent, or no such version to put into quarantine.
            VersionConflict: The adapter's newest version is not the one expected.
        """
        check_name(new.adapter)
        sha256 = self.blobs.put(new.payload)
        reach("version-blob-written")
        return self._write(
            lambda c: publishing.publish_learned(c, new, sha256, certificate=certificate, quarantined=quarantined)
        )

    def quarantine(self, refs: Sequence[str], reason: str, *, instead: str | None = None) -> list[Version]:
        """Keep versions from being exported, used or pointed at; their aliases move to ``instead``, or are removed."""
        return self._write(lambda c: quarantine(c, refs, reason, instead=instead))

    def record_certificate(self, new: NewCertificate, *, quarantined: Sequence[str] = ()) -> Certificate:
        """Record how a request to forget was met, chained by the audit log; AdapterNotFound if it names what is not.

        The versions ``quarantined`` are put into quarantine for its reason in the same transaction.
        """

        def record(connection: sa.Connection) -> Certificate:
            if quarantined:
                quarantine(connection, quarantined, new.reason)
            return certificates.record(connection, new)

        return self._write(record)

    def withdraw(self, client: str, reason: str) -> int:
        """Let no update of a client count any more, and delete their bytes; return how many updates there were."""
        hashes = self._write(lambda c: submissions.withdraw(c, client, reason))
        self.blobs.remove_unnamed(hashes, named=self.named_blobs, grace_s=0.0)
        return len(hashes)

    def set_alias(self, name: str, alias: str, version: int) -> Version:
        """Point an alias at a version, whether or not it pointed elsewhere, and return the version.

        Raises:
            ConfigError: The alias is malformed.
            AdapterNotFound: There is no such version.
        """
        return self._write(lambda c: versions.set_alias(c, name, alias, version))

    def remove_alias(self, name: str, alias: str) -> None:
        """Delete an alias; the version stays."""
        self._write(lambda c: versions.remove_alias(c, name, alias))

    def set_tag(self, ref: str, key: str, value: str) -> Version:
        """Attach a tag to a version, replacing one of the same key, and return the version."""
        return self._write(lambda c: versions.set_tag(c, ref, key, value))

    def reserve_release(self, new: Reservation, *, expected_head: str) -> LedgerEntry:
        """Write that a release under differential privacy is about to be made; when this returns, it is spent.

        Raises:
            VersionConflict: The population's ledger has grown since its head was ``expected_head``.
            RegistryError: That attempt has a row already.
        """
        return self._write(lambda c: ledger.reserve(c, new, expected_head=expected_head))

    def settle_release(self, reserved: LedgerEntry, *, release_sha256: str | None) -> LedgerEntry:
        """Write how a reserved release ended: with these bytes, or with none.

        Raises:
            RegistryError: It was not reserved, or ended otherwise.
        """
        return self._write(lambda c: ledger.settle(c, reserved, release_sha256=release_sha256))

    def log_event(self, event: str, subject: str, **details: object) -> None:
        """Add a record to the audit log of what was done beside the database."""
        self._write(lambda c: audit.append(c, event, subject, **details))

    @contextmanager
    def lock(self, run_id: str) -> Iterator[Callable[[], bool]]:
        """Yield what takes the lock of a run on PostgreSQL, which machines may share, and tells whether it is ours.

        It is to be asked now and then: the lock goes with its connection, and is then taken again if it can be. On
        SQLite there is none, and everybody gets it: all who share the database share a folder, and can lock files.
        """
        lock = SessionLock(self._engine, f"run {run_id}")
        try:
            yield lambda: until_done(lock.take, patience_s=self._patience_s)
        finally:
            lock.release()

    def copy_database(self, target: Path) -> None:
        """Copy the database of a registry on SQLite, as it is at one moment, to a new file.

        Raises:
            ConfigError: It is PostgreSQL, which has its own tools.
        """
        copy_database(self._engine, target, blobs=self.blobs.root)

    def _keep_all(
        self, known: Sequence[Submission | None], new: Sequence[NewSubmission]
    ) -> list[Submission | RegistryError | None]:
        """Put on disk what is not known yet, some at once: the file system then writes its journal once for them."""
        stored: list[Submission | RegistryError | None] = list(known)
        places = [place for place, each in enumerate(known) if each is None]
        if len(places) <= 1:
            kept = [self._keep(new[place]) for place in places]
        else:
            with ThreadPoolExecutor(_WRITERS) as writers:
                kept = list(writers.map(self._keep, [new[place] for place in places]))
        for place, error in zip(places, kept, strict=True):
            stored[place] = error
        return stored

    def _keep(self, new: NewSubmission) -> BlobWriteError | None:
        """Put the bytes of an accepted update on disk; return why that did not work."""
        if new.status != "accepted":
            return None
        reach("submission-received")
        try:
            self.blobs.put(new.payload)
        except BlobWriteError as error:
            return error
        reach("submission-blob-written")
        return None

    def _write(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run ``work`` in a transaction, again where it came to nothing.

        The connection can break between a commit and the word of it. Whether there was a commit is then read from the
        audit log: it has the record that the transaction ended with, or has it not.
        """
        ended: tuple[tuple[int, str], Result] | None = None

        def attempt() -> Result:
            nonlocal ended
            with writing(self._engine) as connection:
                audit.wait_for_turn(connection)
                if ended is not None and audit.holds(connection, ended[0]):
                    return ended[1]
                result = work(connection)
                ended = audit.head(connection), result
            return result

        return until_done(attempt, patience_s=self._patience_s)


def check_name(adapter: str) -> None:
    """Do nothing if an adapter can have that name.

    Raises:
        ConfigError: It cannot.
    """
    try:
        _ADAPTER_NAME.validate_python(adapter)
    except ValidationError as error:
        raise ConfigError(
            f"expected an adapter name of letters, digits and ._- that begins with a letter or digit, got {adapter!r}"
        ) from error
