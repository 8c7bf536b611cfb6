"""The run folder: where things lie, and how they are written so that a kill loses nothing.

This is the only code that knows the layout. JSON, Parquet, safetensors and ONNX; no pickle.
"""

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from ensemble.core.errors import ArtifactError
from ensemble.core.log import Log

FORMAT_VERSION = 1


def dataset_path(run: Path) -> Path:
    """One row an image, shared by every member of the run."""
    return run / "dataset.parquet"


def members_path(run: Path) -> Path:
    """Finished members, a folder each."""
    return run / "members"


def member_path(run: Path, name: str) -> Path:
    """The folder of one finished member."""
    return members_path(run) / name


def work_path(run: Path, name: str) -> Path:
    """Where a member is trained before it is moved to `member_path`."""
    return run / "work" / name


def beside_work_path(run: Path, name: str, kind: str) -> Path:
    """A file about a member's training that outlives its work folder: kind "lock", "log" or "JOB.events"."""
    return work_path(run, f".{name}.{kind}")


def logs_path(run: Path) -> Path:
    """What trackers such as TensorBoard write of the members' training."""
    return run / "logs"


def stacker_path(run: Path) -> Path:
    """The stacker fitted on the run's members."""
    return run / "stacker.json"


def external_path(folder: Path, name: str) -> Path:
    """In a run or a bundle: scores of a member that was trained elsewhere."""
    return folder / "externals" / f"{name}.parquet"


def bundle_path(run: Path) -> Path:
    """All that inference needs."""
    return run / "bundle"


def audit_path(run: Path) -> Path:
    """What the audit found in the run's data."""
    return run / "audit.json"


def canonical_path(run: Path) -> Path:
    """How the run's images are made canonical as they are read; absent if they are not."""
    return run / "canonical.json"


def evaluation_path(run: Path, name: str) -> Path:
    """The folder of one evaluation: scores.parquet, and evaluation.json, which is written last."""
    return run / "evaluations" / name


def safe_name(text: str) -> str:
    """`text` as a folder's name that every file system takes; never empty, never hidden."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._-")[:60] or "unnamed"


def cache_path() -> Path:
    """The user's folder for what can be computed again; MANYEYES_CACHE moves it."""
    if own := os.environ.get("MANYEYES_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyeyes"


def list_members(run: Path, names: tuple[str, ...] = ()) -> list[str]:
    """The finished members of a run, by name, or the given ones of them.

    Raises ArtifactError if there is none, or if a folder lacks the marker that is written last.
    """
    folder = members_path(run)
    present = sorted(p.name for p in folder.glob("[!.]*") if p.is_dir())
    chosen = list(dict.fromkeys(names)) or present
    if not chosen:
        raise ArtifactError(f"no members in {run}; train them first: python cli.py train-all recipes/ --run {run}")
    for name in chosen:
        if name not in present:
            raise ArtifactError(f"no member {name!r} in {run}; it has: {', '.join(present) or 'none'}")
        if not (folder / name / "member.json").is_file():
            raise ArtifactError(
                f"member {name!r} in {run} is not complete (no member.json); run train-all again, or remove the folder"
            )
    return chosen


def read_json(path: Path, missing: str, versions: Sequence[int] = (FORMAT_VERSION,)) -> dict[str, Any]:
    """Read one of our JSON files, of one of these format versions; `missing` says what to do if it is not there."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # Python also reads NaN, Infinity and halves of characters, which cannot be written or hashed again
        json.dumps(values, allow_nan=False, ensure_ascii=False).encode()
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"no {path}; {missing}") from None
    except IsADirectoryError:
        raise ArtifactError(f"{path} is a folder, not a file; {missing}") from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path} is damaged (not JSON); {missing}") from None
    if not isinstance(values, dict) or values.get("format_version") not in versions:
        raise ArtifactError(f"{path} was written by another version of manyeyes; {missing}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON atomically, with `format_version` first: that of the values, if they have one."""
    text = json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_parquet(path: Path, missing: str) -> pd.DataFrame:
    """Read one of our Parquet files; `missing` says what to do if it is not there."""
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise ArtifactError(f"no {path}; {missing}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {missing}") from None


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write Parquet atomically."""
    with replacing(path) as temporary:
        frame.to_parquet(temporary, index=False)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block ends without error."""
    ensure_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    finally:
        with suppress(OSError):  # it was moved, or could never be made
            temporary.unlink()


@contextmanager
def file_lock(path: Path, held: str, remedy: str, wait_log: Log | None = None) -> Iterator[None]:
    """Hold a lock file in the block; ArtifactError with `held` where another process does, else with a `remedy`.

    wait_log: takes `held` instead, and the block waits for that process.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if wait_log is None:
                raise ArtifactError(held) from None
            wait_log(held)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ArtifactError(f"cannot lock {path}: {getattr(error, 'strerror', None) or error}; {remedy}") from None
    try:
        yield
    finally:
        lock.release()


def clear_unfinished(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; for a caller who knows that nobody else writes it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def replace_folder(new: Path, target: Path) -> None:
    """Move the folder `new` to `target`; what was there is deleted after the move.

    A kill in between leaves one of the two whole, never a mixture; `restore_folder` finds it.
    """
    ensure_folder(target.parent)
    old = _set_aside(target)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    except OSError as error:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise ArtifactError(f"cannot move {new} to {target}: {error.strerror}; make room or rights there") from None
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Put back what a killed `replace_folder` had set aside; for a caller who is about to replace `target`."""
    if not target.exists() and _set_aside(target).is_dir():
        os.replace(_set_aside(target), target)


def _set_aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def ensure_folder(folder: Path) -> None:
    """Make a folder, or raise ArtifactError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make {folder}: {error.strerror}; choose another place") from None


def ensure_writable(folder: Path) -> None:
    """Fail now, not after hours of work, where a folder cannot be written."""
    ensure_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot write in {folder}: {error.strerror}; choose another place") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def json_sha256(values: Any) -> str:
    """SHA-256 of a value as canonical JSON (sorted keys, no spaces), in hex."""
    return sha256(json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def frame_sha256(frame: pd.DataFrame, columns: list[str]) -> str:
    """SHA-256 of the rows sorted by id, in hex; the order and the file format do not enter."""
    digest = sha256()
    rows = frame[columns].sort_values("id", kind="stable").astype(object)
    for row in rows.where(rows.notna(), None).itertuples(index=False, name=None):
        digest.update(json.dumps(row, ensure_ascii=False, default=float).encode())
        digest.update(b"\n")
    return digest.hexdigest()
