"""Images out of tar.gz archives on the Hub, whole or split into parts, read while they arrive."""

import io
import math
from collections.abc import Sequence

from ensemble.core.errors import DataError, escape_control
from ensemble.data.archives import DamagedArchiveError, read_tar
from ensemble.fetch.fetch_job import FetchJob
from ensemble.fetch.hub_stream import ArchivePart, CorruptPartError, PartStream, list_archives, partial_file
from ensemble.fetch.output_folder import require_disk_space

BUFFER_BYTES = 1 << 16


def fetch_archives(job: FetchJob, limit: int) -> bool:
    """Fetch from the archives of a source, one after the other. Returns whether all were read to their end."""
    commit = job.pinned_commit()
    archives = list_archives(job.source.hub, commit, job.source.path)
    finished = set(job.state.get("finished", ()))
    remaining = {name: parts for name, parts in archives.items() if name not in finished}
    if math.isinf(sum(job.quotas.values())):
        packed_bytes = sum(part.size for parts in remaining.values() for part in parts)
        require_disk_space(job.output.folder, 2 * packed_bytes)  # the archive and its images
    for name, parts in remaining.items():
        prefix = name.rpartition("/")[2] + "/" if len(archives) > 1 else ""
        if not _read_archive(job, commit, name, parts, prefix):
            return False
        if not job.skipped_full:
            finished.add(name)
            job.update_state(finished=sorted(finished))
            for part in parts:
                partial_file(job.output.partial_folder, part).unlink(missing_ok=True)
    return True


def _read_archive(job: FetchJob, commit: str, name: str, parts: Sequence[ArchivePart], prefix: str) -> bool:
    """Store images of one archive. Returns whether it was read to its end."""
    with PartStream(job.source.hub, commit, parts, job.output.partial_folder, job.count_bytes) as stream:
        unverified: list[str] = []  # members that may hold bytes of the part whose SHA-256 is not checked yet
        verified = 0

        def needs(member: str) -> bool:
            nonlocal verified
            if stream.verified != verified:
                verified = stream.verified
                del unverified[:-1]  # the last member may extend into the next part
            unverified.append(escape_control(prefix + member))
            return job.needs_file(member, prefix)

        try:
            for member, data in read_tar(io.BufferedReader(stream, BUFFER_BYTES), needs, job.tally):
                job.store_file(member, data, prefix)
                if job.is_full:
                    return False
        except CorruptPartError as error:
            raise _remove_unverified(job, unverified, str(error)) from None
        except DamagedArchiveError as error:
            if stream.verified < len(parts):
                part = stream.discard_current()
                raise _remove_unverified(job, unverified, f"{part.path} is broken ({error})") from None
            raise DataError(
                f"{name} ends too early or is damaged at its source, perhaps for want of a last part ({error}); "
                f"{len(job.output.rows)} images before that are kept"
            ) from None
    return True


def _remove_unverified(job: FetchJob, unverified: Sequence[str], problem: str) -> DataError:
    """Remove the images that may come from a corrupt part; returns the error to raise."""
    before = len(job.output.rows)
    job.output.remove(unverified)
    remaining = len(job.output.rows)
    return DataError(
        f"{problem}; what was kept of it is deleted, {before - remaining} images that touch it are taken back, "
        f"{remaining} before it are kept; run the same command again to download it anew"
    )
