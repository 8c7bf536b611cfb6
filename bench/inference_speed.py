"""Files to scores by several full-size members: ours beside what a user would run instead.

    python bench/inference_speed.py --rounds 5 --images 16 --output runs/inference_speed
    python bench/inference_speed.py --precision bf16,int8,auto --ours tune --output runs/inference_speed
    python bench/inference_speed.py --device cuda --images 1024 --output runs/inference_speed

The members are the five listed backbones at full size with random weights (timing does not depend on them), made
here, exported by `python cli.py export --member ... --uncertified`, and kept in --output with every measurement, so
that an interrupted run goes on. Nothing is downloaded. It needs the packages of manyeyes[demo], 6 GB of disk and
12 GB of memory (20 GB for int8, which also takes nncf where it is installed); --device cuda needs torch and
onnxruntime-gpu with their CUDA libraries (manyeyes[cuda] or torch's).

Every side lives in a process of its own, loads once, and the sides take turns, a pass over all files each:
  pipelines    five transformers pipelines in turn, each the faster of one image a call and batched, dtype as saved
  onnxruntime  the same graphs as ONNX Runtime fp32 sessions in turn, with transformers' processors, batched as above
  compiled     (cuda) torch.compile at --precision with our own decoding
  ours CHOICE PRECISION  infer --bundle, for each of --ours (auto, tune, or RUNTIME[:BATCH]) at each of --precision;
               tune measures for minutes first, and at precision auto takes the fastest of those the bundle may run
int8 files (calibrated on the photographs, no layer kept in fp32 but the last) are for speed alone: members with
random weights prove nothing about int8, and what runs in int8 here has no certificate.
Not timed against the others: our members alone beside a product of two 4096-cubed matrices in the same precision
(the roof), and pipelines with processors that resize as ours do, whose scores must agree with ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import full_size  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from inference_peers import Job, peak_mib, start  # noqa: E402

from ensemble.core import artifacts  # noqa: E402
from ensemble.core.parallel import available_cores  # noqa: E402
from ensemble.core.preprocess_config import PreprocessConfig  # noqa: E402
from ensemble.images.decode import decode  # noqa: E402
from ensemble.images.preprocess import to_pixels  # noqa: E402
from export.bundle import bundle as bundles  # noqa: E402
from export.bundle import int8  # noqa: E402
from export.bundle.low_precision_files import read_layers  # noqa: E402
from export.runtimes import capabilities, devices  # noqa: E402
from export.runtimes.settings import ON_CPU, PRECISIONS  # noqa: E402

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
LIBRARIES = ("torch", "transformers", "timm", "onnxruntime-gpu", "onnxruntime", "openvino", "nncf")
TOLERANCE = 5e-3  # of p, at fp32 and the same resize
Lines = list[dict[str, Any]]


def machine(options: argparse.Namespace) -> str:
    """Hardware and libraries, in one line each."""
    name, known = devices.processor()
    flags = [flag for flag in FLAGS if flag in (known or ())]
    gpu = f"{torch.cuda.get_device_name()}, " if options.device == "cuda" else ""
    versions = []
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{library} {metadata.version(library)}")
    return f"{gpu}{name} ({', '.join(flags) or 'no flags known'}), {available_cores()} cores\n{', '.join(versions)}"


def make_bundle(options: argparse.Namespace, classifiers: dict[str, Path]) -> Path:
    """The members' bundle, exported by the command that users have, once."""
    bundle = options.output / f"bundle-{artifacts.json_sha256(sorted(classifiers))[:8]}"
    if not (bundle / "bundle.json").is_file():
        members = [f"--member={name}={folder}" for name, folder in classifiers.items()]
        command = [sys.executable, str(ROOT / "cli.py"), "export", *members, "--bundle", str(bundle), "--uncertified"]
        subprocess.run(command, check=True)
    return bundle


class Side:
    """A running process of inference_peers.py; `tell` has it make one pass."""

    def __init__(self, job: Job, log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                start(job), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.log = log
        self.loaded = self._answer()

    def tell(self) -> dict[str, Any]:
        """One pass; its answer."""
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"ended with exit code {self.process.wait()}; its last words are in {self.log}")
        return json.loads(line)


def add_int8(bundle: Path, photos: Path) -> None:
    """int8 files for members that lack one, allowed without a certificate; a run that was left goes on here."""
    files = sorted(photos.glob("*.jpg"))
    for name in bundles.read_contents(bundle)["members"]:
        values = bundles.read_contents(bundle)  # as the member before left it
        entry = values["members"][name]
        if "int8" in entry:
            continue
        source, by = bundle / entry["file"], int8.quantizer(symmetric=False)
        print(f"{name}: quantizing {source.stat().st_size >> 20} MiB with {by}, {len(files)} photographs", flush=True)
        preprocess_config, started = PreprocessConfig.from_dict(entry["contract"]), time.monotonic()
        pixels = np.concatenate([to_pixels(decode(file), preprocess_config)[:1] for file in files])
        target = f"members/{name}.int8.onnx"
        int8.write_int8(source, bundle / target, pixels, read_layers(source)[-1].nodes)
        print(f"{name}: {time.monotonic() - started:.0f} s, {peak_mib()} MiB of memory at most so far", flush=True)
        entries = {**values["members"], name: {**entry, "int8": target, "made": {"int8": {"by": by}}}}
        ready = [each for each in entries if "int8" in entries[each]]
        may = {f"{runtime} int8": {"members": ready, "certified": False} for runtime in ON_CPU}
        bundles.write_bundle(bundle, entries, (), values["precisions"] | may)


def jobs(options: argparse.Namespace, classifiers: dict[str, Path], bundle: Path, photos: Path) -> dict[str, Job]:
    """What takes turns, by name."""
    wanted = {"pipelines": ("pipelines", ""), "onnxruntime": ("onnxruntime", "")}
    if options.device == "cuda":
        wanted["compiled"] = ("compiled", "")
    wanted |= {"shares": ("shares", options.ours[0]), "pipelines pil": ("pipelines pil", "")}
    folders = {name: str(folder) for name, folder in classifiers.items()}
    common = (folders, str(bundle), str(photos), options.device)
    work = {name: Job(side, *common, options.precision[0], choice) for name, (side, choice) in wanted.items()}
    ours = {
        f"ours {choice} {precision}": Job("ours", *common, precision, choice)
        for precision in options.precision
        for choice in options.ours
    }
    return {name: job for name, job in (work | ours).items() if job.side in options.sides}


def measure(options: argparse.Namespace, work: dict[str, Job], bundle: Path) -> Lines:
    """The lines of this very comparison in results.jsonl; a round that lacks a side is measured again whole."""
    path, content = options.output / "results.jsonl", artifacts.file_sha256(bundle / "bundle.json")
    key = artifacts.json_sha256([[vars(job) for job in work.values()], content, machine(options)])
    text = path.read_text() if path.is_file() else ""
    lines = [line for line in map(json.loads, text.splitlines()) if line["key"] == key]

    def missing(names: Iterable[str]) -> list[int]:
        done = {(line["side"], line["round"]) for line in lines}
        needed = {(name, number) for name in names for number in rounds(name, options)}
        return sorted({number for _, number in needed - done})

    sides: dict[str, Side] = {}
    for name, job in work.items() if missing(work) else ():
        with told(name):
            sides[name] = Side(job, options.output / "sides.log")
            print(f"{name}: loaded in {sides[name].loaded['loaded']:.0f} s; {sides[name].loaded['said']}", flush=True)
    for number in missing(sides):
        for name in [name for name in sides if number in rounds(name, options)]:
            side = sides.pop(name)
            with told(name):
                line = {"key": key, "side": name, "round": number, "said": side.loaded["said"], **side.tell()}
                sides[name] = side
                lines.append(line)
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"round {number + 1}, {name}: {line['seconds']:.2f} s", flush=True)
    for side in sides.values():
        side.close()
    return lines


@contextmanager
def told(name: str) -> Iterator[None]:
    """A side that fails is left out, and said so."""
    try:
        yield
    except RuntimeError as error:
        print(f"{name}: failed: {error}", flush=True)


def rounds(name: str, options: argparse.Namespace) -> range:
    """Which rounds a side takes part in."""
    return range(1 if name == "pipelines pil" else options.rounds)


def report(options: argparse.Namespace, lines: Lines, bundle: Path) -> None:
    """The tables."""
    first = f"ours {options.ours[0]} {options.precision[0]}"
    of = {name: {x["round"]: x for x in lines if x["side"] == name} for name in dict.fromkeys(x["side"] for x in lines)}
    print(f"\n{machine(options)}")
    print(
        f"{options.members} members, {options.images} JPEGs of {' and '.join(f'{w}x{h}' for w, h in full_size.SIZES)}, "
        f"{options.rounds} alternating rounds, {options.device}; files to scores\n"
    )
    if "int8" in options.precision:
        print("int8: for speed alone, without a certificate: random weights prove nothing about its scores\n")
    if first not in of:
        print(f"{first} was not measured")
        return
    print(f"{'side':24}{'seconds':>9}{'CPU s':>9}{'images/s':>10}{'peak MiB':>10}   against {first} (lowest..highest)")
    for name, found in of.items():
        if name in ("shares", "pipelines pil"):
            continue
        seconds = statistics.median(line["seconds"] for line in found.values())
        work = statistics.median(line["cpu_seconds"] for line in found.values())
        ratios = [line["seconds"] / of[first][n]["seconds"] for n, line in found.items() if n in of[first]]
        said = found[min(found)]["said"]
        peak = max(line["peak_mib"] for line in found.values())
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else "-"
        print(f"{name:24}{seconds:9.2f}{work:9.2f}{options.images / seconds:10.2f}{peak:10d}   {ratio:24} {said}")
    if "shares" in of:
        shares(of["shares"], bundle)
    agreement(of, first)


def shares(found: dict[int, dict[str, Any]], bundle: Path) -> None:
    """Each member alone against the roof of the same round."""
    entries = json.loads((bundle / "bundle.json").read_text())["members"]
    roof = statistics.median(line["roof"] for line in found.values())
    print(
        f"\nOur members alone, without decoding; the roof is {roof:.0f} GFLOP/s (median), a 4096-cubed product in torch"
    )
    print(f"{'member':24}{'GFLOP':>9}{'images/s':>10}{'GFLOP/s':>10}   share of the roof (lowest..highest)")
    for name, entry in entries.items():
        seconds = statistics.median(line["members"][name] for line in found.values())
        each = [entry["gflop"] / line["members"][name] / line["roof"] for line in found.values()]
        share = f"{statistics.median(each):.0%} ({min(each):.0%}..{max(each):.0%})"
        print(f"{name:24}{entry['gflop']:9.1f}{1 / seconds:10.2f}{entry['gflop'] / seconds:10.0f}   {share}")


def agreement(of: dict[str, dict[int, dict[str, Any]]], first: str) -> None:
    """Largest differences of p: a benchmark that compares unequal work is worthless."""
    own = of[first][min(of[first])]["p"]
    spread = ", ".join(f"{name} {np.std(values):.4f}" for name, values in own.items())
    print(f"\nLargest difference of p to {first}; p's own standard deviation over the images: {spread}")
    for name, found in of.items():
        if name in (first, "shares"):
            continue
        theirs = found[min(found)]["p"]
        each = {n: float(np.abs(np.subtract(theirs[n], own[n][: len(theirs[n])])).max()) for n in own}
        text = ", ".join(f"{member} {value:.1e}" for member, value in each.items())
        print(f"  {name:24} {max(each.values()):.1e}   ({text})")
        if name == "pipelines pil" and max(each.values()) > TOLERANCE:
            print(f"  NOT EQUAL WORK: pipelines that resize as ours do differ by more than {TOLERANCE:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", default="full", help="full, quick, or names of: " + ", ".join(full_size.KINDS))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", help=f"some of {', '.join(PRECISIONS)}, auto  [default: bf16 if it is fast]")
    parser.add_argument("--ours", default="auto", help="some of auto, tune, RUNTIME[:BATCH]; ratios are to the first")
    parser.add_argument("--sides", default="pipelines,onnxruntime,compiled,ours,shares,pipelines pil")
    parser.add_argument("--output", type=Path, default=Path("runs/inference_speed"))
    options = parser.parse_args()
    options.ours, options.sides = options.ours.split(","), options.sides.split(",")
    fast = options.device == "cuda" or devices.NATIVE_BF16 & (devices.processor()[1] or set())
    options.precision = (options.precision or ("bf16" if fast else "fp32")).split(",")
    if unknown := set(options.precision) - {*PRECISIONS, "auto"}:
        parser.error(f"unknown precisions: {', '.join(sorted(unknown))}")
    if options.precision[0] in ("int8", "auto"):
        parser.error("name a precision that torch multiplies in first, such as bf16,int8: the roof is measured at it")
    if "int8" in options.precision and options.device == "cuda":
        parser.error("int8 here is for CPUs: leave out --device cuda")
    if "int8" in options.precision and (lacking := capabilities.available().unsupported.get(("onnxruntime", "int8"))):
        parser.error(lacking)
    os.environ.setdefault("MANYEYES_CACHE", str(options.output.absolute() / "cache"))
    sets = {"full": full_size.FULL, "quick": full_size.QUICK}
    names = list(sets.get(options.members, options.members.split(",")))
    if unknown := set(names) - set(full_size.KINDS):
        parser.error(f"unknown members: {', '.join(sorted(unknown))}; there are {', '.join(full_size.KINDS)}")
    folder = options.output / "classifiers"
    classifiers = {name: full_size.write_classifier(folder / name, full_size.KINDS[name]) for name in names}
    photos = options.output / f"photos-{options.images}"
    full_size.write_photos(photos, options.images)
    bundle = make_bundle(options, classifiers)
    if "int8" in options.precision:
        add_int8(bundle, photos)
    report(options, measure(options, jobs(options, classifiers, bundle, photos), bundle), bundle)


if __name__ == "__main__":
    main()
