"""What one request may upload. `serve --max-images` and `--max-mb` change the first two limits."""

from dataclasses import dataclass

MAX_UPLOAD_IMAGES = 50  # images in one request
MAX_UPLOAD_MB = 20  # megabytes (10^6 bytes) in one request, all its images together
MAX_WAITING_REQUESTS = 32  # requests at work or waiting; further ones are refused (503)
UPLOAD_TIMEOUT_SECONDS = 120  # time that a client has to send its images


@dataclass(frozen=True)
class UploadLimits:
    """Images and megabytes (10^6 bytes) of one request, and the number of requests at work or waiting."""

    images: int = MAX_UPLOAD_IMAGES
    megabytes: float = MAX_UPLOAD_MB
    waiting: int = MAX_WAITING_REQUESTS

    @property
    def body_bytes(self) -> int:
        """The largest body of a request: its images, and 1 kB for the header of each."""
        return int(self.megabytes * 1_000_000) + 1000 * self.images
