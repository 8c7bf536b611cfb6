"""How fast a running page answers, whether clients at once get their own answers, and the memory it takes.

    python cli.py serve --bundle DIR &
    python bench/page.py photo.jpg --pid $! [--url http://127.0.0.1:7860] [--clients 20] [--seconds 60]

Each client sends its own crop of the photograph, over and over, and compares the answer with
the one that this crop got alone. With --pid, the server's peak memory (Linux) meanwhile, and while
one client sends the largest requests that the server's limits allow.
"""

import argparse
import io
import math
import os
import re
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
from PIL import Image

from ensemble.images.decode import MAX_PIXELS

WARM_UP, ROUNDS = 2, 10
MOST_PLAIN = 4  # a large image is decoded alone: more take time, not memory


def crops(path: str, count: int) -> list[bytes]:
    image = Image.open(path).convert("RGB")
    width, height = image.width // 2, image.height // 2
    found = []
    for number in range(count):
        left, top = width * number // count, height * number // count
        found.append(png(image.crop((left, top, left + width, top + height))))
    return found


def largest(limits: dict[str, float]) -> dict[str, list[bytes]]:
    """Requests at the limits of images and megabytes: noise, and plain images of the most pixels, in few bytes."""
    count, room = int(limits["images"]), limits["megabytes"] * 1e6 - 10_000 * limits["images"]
    side = math.isqrt(int(MAX_PIXELS))
    plain = png(Image.new("RGB", (side, side), (9, 99, 200)))
    return {
        "one image of all megabytes": [noise(room)],
        f"{count} images of all megabytes": [noise(room / count)] * count,
        f"images of {side} x {side}": [plain] * min(count, int(room / len(plain)), MOST_PLAIN),
    }


def noise(size: float) -> bytes:
    """A PNG of at most `size` bytes that does not compress."""
    side = math.isqrt(int(size * 0.99 / 3))
    return png(Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def peak(pid: int | None, title: str) -> Iterator[None]:
    """Prints the most memory that a process held meanwhile (VmHWM, set back before); Linux."""
    if pid is None:
        yield
        return
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    yield
    status = Path(f"/proc/{pid}/status").read_text()
    held = {key: int(value.split()[0]) / 1000 for key, value in re.findall(r"(Vm\w+):(.*kB)", status)}
    print(f"{title}: peak memory {held['VmHWM']:,.0f} MB, then {held['VmRSS']:,.0f} MB")


def ask(client: httpx2.Client, url: str, name: str, data: bytes) -> tuple[str, float, float]:
    """Name and target of the answer, and the seconds it took."""
    began = time.perf_counter()
    answer = client.post(f"{url}/api/score", files=[("images", (name, data))]).raise_for_status()
    (image,) = answer.json()["images"]
    return image["name"], image["target"], time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pid", type=int, help="the server's process")
    options = parser.parse_args()
    pictures = crops(options.photo, options.clients)
    with httpx2.Client(timeout=60) as client:
        alone = [ask(client, options.url, str(number), data)[1] for number, data in enumerate(pictures)]
        with open(options.photo, "rb") as file:
            whole = file.read()
        seconds = [ask(client, options.url, "photo", whole)[2] for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    print(f"one image: median {statistics.median(seconds):.3f} s, slowest {max(seconds):.3f} s")
    stop = time.monotonic() + options.seconds

    def repeat(number: int) -> tuple[int, int, int]:
        """Answers, those that were another's, and errors."""
        answers = mixed = errors = 0
        with httpx2.Client(timeout=120) as client:
            while time.monotonic() < stop:
                try:
                    name, target, _ = ask(client, options.url, str(number), pictures[number])
                except httpx2.HTTPError:
                    errors += 1
                    continue
                answers += 1
                mixed += name != str(number) or abs(target - alone[number]) > 1e-9
        return answers, mixed, errors

    with peak(options.pid, f"{options.clients} clients"), ThreadPoolExecutor(options.clients) as pool:
        counts = list(pool.map(repeat, range(options.clients)))
    answers, mixed, errors = (sum(column) for column in zip(*counts, strict=True))
    print(f"{options.clients} clients, {len(set(alone))} different answers, {options.seconds:g} s: ", end="")
    print(f"{answers} answers (the fewest to a client {min(counts)[0]}), {mixed} mixed up, {errors} errors")
    if options.pid is not None:
        send_largest(options.url, options.pid)


def send_largest(url: str, pid: int) -> None:
    with httpx2.Client(timeout=600) as client:
        limits = client.get(f"{url}/api/info").json()["limits"]
        for title, pictures in largest(limits).items():
            with peak(pid, f"{title} ({sum(map(len, pictures)) / 1e6:.1f} MB)"):
                answer = client.post(f"{url}/api/score", files=[("images", ("a.png", data)) for data in pictures])
                if errors := [image["error"] for image in answer.raise_for_status().json()["images"] if image["error"]]:
                    raise SystemExit(f"not scored: {errors[0]}")


if __name__ == "__main__":
    main()
