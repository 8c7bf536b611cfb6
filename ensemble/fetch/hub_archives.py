"""Images out of tar.gz archives on the Hub, whole or in parts, read while they arrive."""

import io
import math
from collections.abc import Sequence

from ensemble.core.errors import DataError
from ensemble.data.archives import DamagedArchiveError, Tally, printable, read_tar
from ensemble.fetch.hub_stream import BrokenPartError, Part, PartStream, kept_file, list_archives
from ensemble.fetch.output_folder import require_room
from ensemble.fetch.quotas import Job, file_filter, file_label, pinned_commit


def fetch_archives(job: Job, limit: int) -> bool:
    """Fetch from the archives of a source, one after the other; whether all were read to their end."""
    commit = pinned_commit(job)
    found = list_archives(job.source.hub, commit, job.source.path)
    finished = set(job.state.get("finished", ()))
    todo = {name: parts for name, parts in found.items() if name not in finished}
    if math.isinf(sum(job.quotas.values())):
        packed = sum(part.size for parts in todo.values() for part in parts)
        require_room(job.store.folder, 2 * packed)  # the archive and its images
    for name, parts in todo.items():
        prefix = name.rpartition("/")[2] + "/" if len(found) > 1 else ""
        if not _read(job, commit, name, parts, prefix):
            return False
        if not job.left_out:
            finished.add(name)
            job.remember(finished=sorted(finished))
            for part in parts:
                kept_file(job.store.partial, part).unlink(missing_ok=True)
    return True


def _read(job: Job, commit: str, name: str, parts: Sequence[Part], prefix: str) -> bool:
    """Take images of one archive; whether it was read to its end."""
    with PartStream(job.source.hub, commit, parts, job.store.partial, job.received) as stream:
        suspects = _Suspects(stream)
        wants = file_filter(job, prefix)

        def wanted(member: str) -> bool:
            suspects.note(printable(prefix + member))
            return wants(member)

        try:
            for member, data in read_tar(io.BufferedReader(stream, 1 << 16), wanted, job.tally):
                label = file_label(job.source, member, Tally())
                if label is not None:
                    job.take(prefix + member, label, data)
                if job.full:
                    return False
        except BrokenPartError as error:
            raise DataError(_broken(job, suspects, str(error))) from None
        except DamagedArchiveError as error:
            if stream.verified < len(parts):
                part = stream.discard_current()
                raise DataError(_broken(job, suspects, f"{part.path} is broken ({error})")) from None
            raise DataError(
                f"{name} ends too early or is damaged at its source, perhaps for want of a last part ({error}); "
                f"{len(job.store.rows)} images before that are kept"
            ) from None
    return True


class _Suspects:
    """Names of the members that may hold bytes of the part that is being read and not yet verified."""

    def __init__(self, stream: PartStream) -> None:
        self._stream, self._verified = stream, 0
        self.names: list[str] = []

    def note(self, name: str) -> None:
        if self._stream.verified != self._verified:
            self._verified = self._stream.verified
            del self.names[:-1]  # the last one may reach over into the part that has begun
        self.names.append(name)


def _broken(job: Job, suspects: _Suspects, problem: str) -> str:
    before = len(job.store.rows)
    job.store.drop(suspects.names)
    kept = len(job.store.rows)
    return (
        f"{problem}; what was kept of it is deleted, {before - kept} images that touch it are taken back, "
        f"{kept} before it are kept; run the same command again to download it anew"
    )
