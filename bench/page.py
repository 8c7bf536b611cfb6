"""How fast a running page answers, and whether clients at once get their own answers.

    python cli.py serve --bundle DIR &
    python bench/page.py photo.jpg [--url http://127.0.0.1:7860] [--clients 20] [--seconds 60]

Each client sends its own crop of the photograph, over and over, and compares the answer with
the one that this crop got alone.
"""

import argparse
import io
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
from PIL import Image

WARM_UP, ROUNDS = 2, 10


def crops(path: str, count: int) -> list[bytes]:
    image = Image.open(path).convert("RGB")
    width, height = image.width // 2, image.height // 2
    found = []
    for number in range(count):
        left, top = width * number // count, height * number // count
        buffer = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


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

    with ThreadPoolExecutor(options.clients) as pool:
        counts = list(pool.map(repeat, range(options.clients)))
    answers, mixed, errors = (sum(column) for column in zip(*counts, strict=True))
    print(f"{options.clients} clients, {len(set(alone))} different answers, {options.seconds:g} s: ", end="")
    print(f"{answers} answers (the fewest to a client {min(counts)[0]}), {mixed} mixed up, {errors} errors")


if __name__ == "__main__":
    main()
