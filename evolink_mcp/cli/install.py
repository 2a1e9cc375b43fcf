"""`evolink-mcp install`: add this server to the configuration of MCP hosts, and remove it again.

A record in the journal folder keeps the file's content from before the installation. If the file is still as the
installation wrote it, `--undo` restores this content. Otherwise `--undo` removes only this server from the text, so that
later edits stay.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evolink_mcp.app.key_store import KeyStore, KeyStoreUnusable
from evolink_mcp.app.settings import KEY_IN_STORE, Settings
from evolink_mcp.cli.arguments import Namespace
from evolink_mcp.cli.config_text import Insertion, Unparsable, toml_tables, value_at, without
from evolink_mcp.cli.host_config import KEY_VARIABLE, SERVER_NAME, server_value
from evolink_mcp.cli.host_files import HOST_FILES, HostFile, Machine
from evolink_mcp.sanitize import harmless

FILE_BYTES_MAX = 32 << 20
# The file can contain the API key.
NEW_FILE_MODE = 0o600
NEW_FOLDER_MODE = 0o700
HIDDEN_KEY = "(your key)"
RESTART = "Restart the MCP host. Then ask it: Make a picture of a red fox in the snow."


class InstallProblem(Exception):
    """One host cannot be changed. The message is one line and names the file."""


@dataclass(frozen=True, slots=True)
class Console:
    """The terminal. `ask` and `ask_secret` are None if no person can answer."""

    print: Callable[[str], None]
    print_error: Callable[[str], None]
    ask: Callable[[str], str] | None = None
    ask_secret: Callable[[str], str] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """The installation in one file.

    `backup` is the name of the copy from before; None if the file did not exist. `sha256` is the file's hash after the
    installation, None if the user changed the file before a repeated installation. `server_sha256` is the hash of the
    server's value. `folders` are new folders.
    """

    host: str
    path: tuple[str, ...]
    backup: str | None
    sha256: str | None
    server_sha256: str
    prefix: str
    suffix: str
    is_new_table: bool
    folders: tuple[str, ...]
    has_stored_key: bool


@dataclass(frozen=True, slots=True)
class Change:
    """The new content of a host's file. Without `content` the file will be deleted.

    `before` is the current content; None if the file does not exist. After an undo, `record` is None.
    """

    host: HostFile
    file: Path
    before: bytes | None
    content: bytes | None
    record: Record | None
    description: str


class Installer:
    """Plans and applies changes of the configuration files of one machine."""

    def __init__(self, machine: Machine, data_dir: Path, command: str, args: Sequence[str]) -> None:
        self._machine = machine
        self._folder = data_dir / "install"
        self._command = command
        self._args = list(args)

    def hosts(self, names: Sequence[str]) -> list[HostFile]:
        """Return the named hosts, without names those of this machine. Raises InstallProblem for an unknown name."""
        known = {host.host: host for host in HOST_FILES}
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            similar = difflib.get_close_matches(unknown, known, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"the hosts are {', '.join(known)}"
            raise InstallProblem(f"unknown host {harmless(unknown, 40)}; {hint}")
        if names:
            return [known[name] for name in dict.fromkeys(names)]
        return [host for host in HOST_FILES if host.is_present(self._machine)]

    def file(self, host: HostFile) -> Path:
        """Return the configuration file of a host."""
        return host.file(self._machine)

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Keep a second installation away. Raises InstallProblem if one is running."""
        try:
            _make_folders(self._folder)
            # Two installations at the same time would overwrite each other's record.
            with FileLock(self._folder / "lock", timeout=0):
                yield
        except Timeout:
            raise InstallProblem("another evolink-mcp install is running") from None
        except OSError as error:
            raise InstallProblem(f"{self._folder}: {error.strerror}") from None

    def installed_hosts(self, names: Sequence[str]) -> list[tuple[HostFile, Path]]:
        """Return each host and file of the records, only those with a name in `names` if it has any."""
        hosts = {host.host: host for host in HOST_FILES}
        return [
            (hosts[record.host], Path(file))
            for file, record in self._records().items()
            if record.host in hosts and (not names or record.host in names)
        ]

    def has_stored_key(self) -> bool:
        """Whether an installed server reads its key from the key store."""
        return any(record.has_stored_key for record in self._records().values())

    def plan(self, host: HostFile, key: str | None) -> Change | str:
        """Return the change that installs the server, or the reason why nothing will change.

        `key` is the value of EVOLINK_API_KEY in the configuration: a key, "keyring", or None to write none.

        Raises:
            InstallProblem: the file cannot be read or parsed.
        """
        file = host.file(self._machine)
        target = _target_of(file)
        before = _read(file, target)
        text = _decode(file, before or b"")
        with _errors_of(file):
            values = host.syntax.parse(text)
        inner = value_at(values, host.inner_table) if host.inner_table else None
        table = host.inner_table if host.inner_table and isinstance(inner, dict) and "type" not in inner else host.table
        path = (*table, SERVER_NAME)
        record = self._records().get(str(file))
        current = value_at(values, path)
        env = {} if key is None else {KEY_VARIABLE: key}
        server = server_value(host.host, self._command, self._args, env)
        if current is not None:
            if record is None:
                return f"has a server “{SERVER_NAME}” that this command did not write. It stays unchanged"
            # A call without a key must not remove the key of the installed server.
            if _same(current, server) or key is None:
                return "is up to date"
            if _hash_of(current) != record.server_sha256:
                return f"has a server “{SERVER_NAME}” that you changed. It stays; --undo removes it"
            text = self._without_server(host, file, text, record)
        insertion = self._insert(host, file, text, path, server)
        content = insertion.text.encode()
        is_untouched = record is not None and record.sha256 == _sha256(before or b"")
        if record is not None and current is not None:
            backup, folders = record.backup, record.folders
            # After an edit of the user, --undo must not restore the whole file.
            content_hash = _sha256(content) if is_untouched else None
        else:
            backup = None if before is None else f"{host.host}-{secrets.token_hex(4)}"
            content_hash = _sha256(content)
            folders = tuple(str(folder) for folder in _missing_folders(target.parent))
        # The command prints the plan, so the plan must not contain the key.
        shown = server_value(host.host, self._command, self._args, dict.fromkeys(env, HIDDEN_KEY))
        if key == KEY_IN_STORE:
            shown = server
        return Change(
            host,
            file,
            before,
            content,
            Record(
                host.host,
                path,
                backup,
                content_hash,
                _hash_of(server),
                insertion.prefix,
                insertion.suffix,
                insertion.is_new_table,
                folders,
                key == KEY_IN_STORE,
            ),
            _shown(path, shown),
        )

    def plan_undo(self, host: HostFile, file: Path) -> Change | str:
        """Return the change that removes the server again, or the reason why nothing will change.

        Raises:
            InstallProblem: the file cannot be read or parsed.
        """
        record = self._records()[str(file)]
        before = _read(file, _target_of(file))
        if before is None:
            self._forget(file)
            return "does not exist any more"
        original = self._original(record)
        if _sha256(before) == record.sha256:
            return Change(host, file, before, original, None, "restores the content from before the installation")
        text = _decode(file, before)
        with _errors_of(file):
            values = host.syntax.parse(text)
        if value_at(values, record.path) is None:
            self._forget(file)
            return f"has no server “{SERVER_NAME}” any more"
        text = self._without_server(host, file, text, record)
        is_empty = text.strip() in ("", "{}")
        # Nothing of the user is in the file, so the installation made all of it.
        if is_empty and (original is None or not original.strip()):
            return Change(host, file, before, original, None, "restores the content from before the installation")
        return Change(
            host, file, before, text.encode(), None, f"removes the server “{SERVER_NAME}” and keeps your edits"
        )

    def apply(self, change: Change) -> None:
        """Write the file. Keep the old content first. Raises InstallProblem; the file is unchanged then."""
        target = _target_of(change.file)
        records = self._records()
        record = change.record
        old = records.get(str(change.file))
        try:
            if record is not None:
                # The copy and the record come first, so that --undo works after a crash at any moment.
                if record.backup is not None and (old is None or old.backup != record.backup):
                    _write_new(self._folder / record.backup, change.before or b"", NEW_FILE_MODE)
                self._save({**records, str(change.file): record})
                _make_folders(target.parent)
            # The host may have written its file while the user read the question.
            if _read(change.file, target) != change.before:
                raise InstallProblem(f"{change.file}: another program changed the file at the same time. Try again")
            if change.content is None:
                target.unlink()
            else:
                _replace_content(target, change.content)
        except (OSError, InstallProblem) as error:
            self._save(records)
            if record is not None and (old is None or old.backup != record.backup):
                self._delete_backup(record)
            if isinstance(error, InstallProblem):
                raise
            raise InstallProblem(f"{change.file}: {error.strerror}. The file is unchanged") from None
        if record is None:
            self._forget(change.file)
            if change.content is None and old is not None:
                _remove_folders(old.folders)
        elif old is not None and old.backup != record.backup:
            self._delete_backup(old)

    def backup_of(self, change: Change) -> Path | None:
        """Return the copy of the file from before the installation."""
        record = change.record
        return self._folder / record.backup if record is not None and record.backup is not None else None

    def _insert(
        self, host: HostFile, file: Path, text: str, path: tuple[str, ...], server: dict[str, Any]
    ) -> Insertion:
        with _errors_of(file):
            # The syntax works on text, so the values before and after are compared.
            insertion = host.syntax.add(text, path, server)
            values = host.syntax.parse(insertion.text)
            is_exact = value_at(values, path) == server and without(values, path) == without(
                host.syntax.parse(text), path
            )
        if not is_exact:
            raise InstallProblem(f"{file}: the server cannot be added without another change. The file is unchanged")
        return insertion

    def _without_server(self, host: HostFile, file: Path, text: str, record: Record) -> str:
        with _errors_of(file):
            shorter = host.syntax.remove(text, record.path, record.prefix, record.suffix, record.is_new_table)
            values = host.syntax.parse(shorter)
            is_exact = value_at(values, record.path) is None and without(values, record.path) == without(
                host.syntax.parse(text), record.path
            )
        if not is_exact:
            raise InstallProblem(f"{file}: the server cannot be removed without another change. The file is unchanged")
        return shorter

    # --- the records ---

    def _records(self) -> dict[str, Record]:
        file = self._folder / "installed.json"
        try:
            data = json.loads(file.read_text("utf-8"))
            return {name: _record_of(fields) for name, fields in data.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise InstallProblem(f"{file}: the record of installations is damaged. Rename the file") from None

    def _save(self, records: Mapping[str, Record]) -> None:
        content = json.dumps({name: asdict(record) for name, record in records.items()}, indent=2).encode()
        _replace_content(self._folder / "installed.json", content)

    def _forget(self, file: Path) -> None:
        records = self._records()
        record = records.pop(str(file))
        self._save(records)
        self._delete_backup(record)

    def _delete_backup(self, record: Record) -> None:
        if record.backup is not None:
            (self._folder / record.backup).unlink(missing_ok=True)

    def _original(self, record: Record) -> bytes | None:
        if record.backup is None:
            return None
        backup = self._folder / record.backup
        try:
            return backup.read_bytes()
        except OSError as error:
            raise InstallProblem(f"{backup}: {error.strerror}. Remove the server with an editor") from None


def run_install(
    options: Namespace, settings: Settings, installer: Installer, key_store: KeyStore, console: Console
) -> int:
    """Plan, show, ask and write. Return the exit code: 0, 1 if one host failed, 2 for a wrong call."""
    if options.store_key:
        return _delete_key(key_store, console) if options.undo else _only_store_key(settings, key_store, console)
    try:
        hosts = installer.hosts(options.hosts)
        with installer.lock():
            if options.undo:
                return _undo(options, installer, key_store, console)
            if not hosts:
                console.print_error(
                    "no MCP host found on this machine; name one, for example: evolink-mcp install codex"
                )
                return 1
            return _install(hosts, options, settings, installer, key_store, console)
    except InstallProblem as problem:
        console.print_error(str(problem))
        return 2


def _install(
    hosts: Iterable[HostFile],
    options: Namespace,
    settings: Settings,
    installer: Installer,
    key_store: KeyStore,
    console: Console,
) -> int:
    is_in_store = settings.key_text is not None and settings.key_text.lower() == KEY_IN_STORE
    key, problem = _key_of(settings, console)
    if problem:
        console.print_error(problem)
        return 2
    uses_store = key is not None and not options.key_in_file and (is_in_store or key_store.problem() is None)
    if is_in_store and options.key_in_file:
        console.print_error("EVOLINK_API_KEY is “keyring”: set it to the key to write the key into a file")
        return 2
    value = KEY_IN_STORE if uses_store else key
    places = [(host, installer.file(host)) for host in hosts]
    failures, changes = _collect(places, console, lambda host, _: installer.plan(host, value))
    new_key = key if uses_store and not is_in_store else None
    if not changes:
        # The files contain “keyring” already, so only the key in the key store changes.
        if new_key is not None and installer.has_stored_key():
            return _store_key(new_key, key_store, console) or int(failures > 0)
        return int(failures > 0)
    if value is None:
        console.print("Without a key only the free tools work. Set EVOLINK_API_KEY and run this command again.")
    elif not uses_store:
        console.print("The configuration files will contain the key. Programs of your user can read it there.")
    else:
        console.print("The key is in the key store of the system. The configuration files contain only “keyring”.")
    if not _is_confirmed(options, console):
        return 2
    # Before the files, because a configuration with “keyring” needs a stored key.
    if new_key is not None and _store_key(new_key, key_store, console):
        return 1
    failures += _apply(changes, installer, console)
    console.print(RESTART)
    return int(failures > 0)


def _key_of(settings: Settings, console: Console) -> tuple[str | None, str | None]:
    """Return the key of the environment or of the person at the terminal, and the reason why it is unusable."""
    problem = settings.with_stored_key().key_problem
    if settings.key_text is not None or console.ask_secret is None:
        return settings.key_text, problem
    question = "EvoLink API key, from https://evolink.ai/dashboard/keys (input is hidden): "
    key = console.ask_secret(question).strip() or None
    return key, replace(settings, key_text=key).key_problem


def _only_store_key(settings: Settings, key_store: KeyStore, console: Console) -> int:
    key, problem = _key_of(settings, console)
    if key is None or problem or key.lower() == KEY_IN_STORE:
        console.print_error(problem or "set EVOLINK_API_KEY to the key, or type it at a terminal")
        return 2
    return _store_key(key, key_store, console)


def _delete_key(key_store: KeyStore, console: Console) -> int:
    try:
        key_store.delete()
    except KeyStoreUnusable as error:
        console.print_error(f"the key stays in the key store of the system: {error}")
        return 1
    console.print("The key store of the system has no EvoLink key any more.")
    return 0


def _store_key(key: str, key_store: KeyStore, console: Console) -> int:
    try:
        key_store.save(key)
    except KeyStoreUnusable as error:
        console.print_error(f"{error}; --key-in-file writes the key into the configuration")
        return 1
    console.print("The key store of the system has the key.")
    return 0


def _undo(options: Namespace, installer: Installer, key_store: KeyStore, console: Console) -> int:
    had_stored_key = installer.has_stored_key()
    failures, changes = _collect(installer.installed_hosts(options.hosts), console, installer.plan_undo)
    if not changes and not failures:
        console.print("Nothing to undo.")
    if changes:
        if not _is_confirmed(options, console):
            return 2
        failures += _apply(changes, installer, console)
    # Another host may still read the key store.
    if had_stored_key and not installer.has_stored_key():
        failures += _delete_key(key_store, console)
    return int(failures > 0)


def _collect(
    places: Iterable[tuple[HostFile, Path]], console: Console, plan: Callable[[HostFile, Path], Change | str]
) -> tuple[int, list[Change]]:
    """Plan each host and print the plan. Return the number of failures, and the changes."""
    failures = 0
    changes: list[Change] = []
    for host, file in places:
        try:
            change = plan(host, file)
        except InstallProblem as problem:
            console.print_error(f"{host.title}: {problem}")
            failures += 1
            continue
        if isinstance(change, str):
            console.print(f"{host.title}: {file} {change}.")
            continue
        changes.append(change)
        console.print(f"{host.title}: {file}\n  {change.description.replace(chr(10), chr(10) + '  ')}")
    return failures, changes


def _is_confirmed(options: Namespace, console: Console) -> bool:
    if options.yes:
        return True
    if console.ask is None:
        console.print_error("nothing was changed: add --yes, because there is no terminal for the question")
        return False
    if console.ask("Change these files? [y/N] ").strip().lower() in ("y", "yes"):
        return True
    console.print("Nothing was changed.")
    return False


def _apply(changes: Iterable[Change], installer: Installer, console: Console) -> int:
    failures = 0
    for change in changes:
        try:
            installer.apply(change)
        except InstallProblem as problem:
            console.print_error(f"{change.host.title}: {problem}")
            failures += 1
            continue
        backup = installer.backup_of(change)
        console.print(f"{change.host.title}: done." + (f" The old file is {backup}" if backup else ""))
    return failures


def _shown(path: tuple[str, ...], server: Mapping[str, Any]) -> str:
    if path[0] == "mcp_servers":
        return toml_tables(path, server)
    return f'adds to {".".join(path[:-1])}: "{path[-1]}": {json.dumps(server, ensure_ascii=False)}'


def _record_of(fields: dict[str, Any]) -> Record:
    path = tuple(fields.pop("path"))
    folders = tuple(fields.pop("folders"))
    return Record(**fields, path=path, folders=folders)


# --- files ---


@contextlib.contextmanager
def _errors_of(file: Path) -> Generator[None]:
    """Name the file in an error of its content."""
    try:
        yield
    except Unparsable as error:
        raise InstallProblem(f"{file}: {error}. The file is unchanged") from None


def _target_of(file: Path) -> Path:
    """Return the file at the end of all links, so that a link stays a link."""
    try:
        return file.resolve()
    except (OSError, RuntimeError):
        raise InstallProblem(f"{file}: the link leads to itself") from None


def _read(file: Path, target: Path) -> bytes | None:
    try:
        with target.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstallProblem(f"{file}: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise InstallProblem(f"{file}: larger than {FILE_BYTES_MAX >> 20} MiB. The file is unchanged")
    return content


def _decode(file: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        position = content.count(b"\n", 0, error.start) + 1
        raise InstallProblem(f"{file}: line {position}: not UTF-8. The file is unchanged") from None


def _replace_content(target: Path, content: bytes) -> None:
    """Replace the content in one step. Keep mode and owner of an existing file. A new file has mode 0600."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        status = target.stat()
    except FileNotFoundError:
        status = None
    try:
        # The replacement needs only a writable folder, but the user protected this file.
        if status is not None and not os.access(target, os.W_OK):
            raise PermissionError(13, "the file is not writable")
        _write_new(temporary, content, NEW_FILE_MODE)
        if status is not None and os.name == "posix":
            # With sudo the new file would belong to root, and the host could not write it.
            if status.st_uid != os.geteuid() or status.st_gid != temporary.stat().st_gid:
                os.chown(temporary, status.st_uid, status.st_gid)
            temporary.chmod(status.st_mode & 0o7777)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_new(file: Path, content: bytes, mode: int) -> None:
    # O_EXCL follows no planted link. Without O_BINARY Windows would change the line ends.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    with open(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        # A power cut after the replacement must not leave an empty file.
        os.fsync(stream.fileno())


def _missing_folders(folder: Path) -> list[Path]:
    """Return the folders that do not exist, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _make_folders(folder: Path) -> None:
    for path in reversed(_missing_folders(folder)):
        # With `parents` Python ignores the mode for the parent folders.
        path.mkdir(mode=NEW_FOLDER_MODE, exist_ok=True)


def _remove_folders(folders: Iterable[str]) -> None:
    """Remove folders that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_of(server: object) -> str:
    return _sha256(json.dumps(server, sort_keys=True).encode())


def _same(current: object, server: object) -> bool:
    return _hash_of(current) == _hash_of(server)
