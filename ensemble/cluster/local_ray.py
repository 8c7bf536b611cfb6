"""Starts Ray on this machine for one job: no other user can connect, and nothing of it is left. Imports Ray late."""

import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ensemble.core.errors import UnavailableError, error_line
from ensemble.core.parallel import available_cores

OBJECT_STORE_BYTES = 256 << 20  # tasks exchange little; what does not fit goes to disk
FOLDER_PREFIX = "manyeyes-ray-"  # of its folder in the folder for temporary files
LOCK_FILE = "held"  # in the folder, locked by its process
MAX_TEMPDIR_CHARACTERS = 8  # a longer folder for temporary files is replaced by /tmp
LOCK_GRACE_SECONDS = 60.0  # a new folder's lock is taken within this time
LOG_HINTS = re.compile(
    r"\s*(Last 0 lines|Please check).*", re.DOTALL
)  # Ray's hints at log files, which are gone by then
REMEDY = "name a cluster that runs with --address HOST:PORT"


@contextmanager
def private_token() -> Iterator[None]:
    """In the block, a token in the environment for a Ray that is started, so that no other user can connect.

    Without it Ray would store one in the home folder. Ray reads it when it is imported.
    """
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for Ray's logs and spilled objects, readable by this user alone; removed afterwards.

    Its path is short, since the path of a socket has at most 107 bytes. Folders of killed processes are removed.
    """
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= MAX_TEMPDIR_CHARACTERS else "/tmp"  # noqa: S108
    for old in Path(base).glob(f"{FOLDER_PREFIX}*"):
        _remove_unlocked(old)
    created = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
    try:
        with FileLock(created / LOCK_FILE):
            yield created
    finally:
        shutil.rmtree(created, ignore_errors=True)


def start(ray: Any, folder: Path) -> None:
    """Start Ray with this machine's cores, and connect; UnavailableError, with the reason, where that fails."""
    os.environ.setdefault(
        "RAY_worker_niceness", "0"
    )  # as without Ray: with its default of 15, other processes come first
    try:
        with silence_stderr():
            ray.init(
                "local",
                num_cpus=available_cores(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(
                    folder / "r"
                ),  # Ray makes its folder readable to all users: this one is inside a private one
            )
    except Exception as error:  # of many kinds: no memory, no ports, a path that is too long
        why = error_line(LOG_HINTS.sub("", str(error)))
        raise UnavailableError(f"Ray could not be started here: {why}; {REMEDY}") from None


@contextmanager
def silence_stderr() -> Iterator[None]:
    """In the block nothing is written to standard error, also not by C++: Ray reports there that it logs less."""
    original = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def _remove_unlocked(folder: Path) -> None:
    """Remove a folder that no process has locked, in any container; another user's cannot be removed, and stays."""
    with suppress(OSError, Timeout):
        if time.time() - folder.stat().st_mtime > LOCK_GRACE_SECONDS:
            with FileLock(folder / LOCK_FILE, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
