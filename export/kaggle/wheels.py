"""Collect, by pip, the wheels of manyeyes and of all it needs to score, for another Python and platform."""

import base64
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name, parse_wheel_filename

from ensemble.core.errors import UnavailableError

ROOT = Path(__file__).resolve().parents[2]
OWN_PACKAGE = "manyeyes"
PLATFORM = re.compile(r"manylinux_2_(\d{1,2})_(x86_64|aarch64)")
LEGACY_TAGS = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # PEP 600
MAX_ROUNDS = 5  # of pip download; the first one usually finds all
# pip's messages without a network, where it also ends with "No matching distribution"
NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|NameResolutionError|ProxyError|Failed to establish|Network is unreachable", re.I
)
NO_WHEEL = re.compile(r"No matching distribution found for ([^\s(]+)")


@dataclass(frozen=True)
class WheelTarget:
    """The Python, such as "3.12", and the platform, such as "manylinux_2_28_x86_64", that the wheels must run on."""

    python: str
    platform: str

    def platforms(self) -> list[str]:
        """The platform and all older ones, whose wheels run there too, newest first."""
        match = PLATFORM.fullmatch(self.platform)
        if match is None or int(match[1]) < min(LEGACY_TAGS):  # no wheel has an older tag
            raise UnavailableError(
                f"--platform {self.platform}: write manylinux_2_MINOR_x86_64 (or aarch64), the glibc that is there, "
                "2.5 or newer, such as manylinux_2_28_x86_64"
            )
        newest, machine = int(match[1]), match[2]
        names = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, min(LEGACY_TAGS) - 1, -1)]
        return names + [f"{old}_{machine}" for minor, old in LEGACY_TAGS.items() if minor <= newest]

    def environment(self) -> dict[str, str]:
        """The values of environment markers (PEP 508) there."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.platform.partition("_2_")[2].partition("_")[2],
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


def collect_wheels(folder: Path, target: WheelTarget, gpu: bool) -> list[Path]:
    """Fill `folder` with our own wheel and every wheel that scoring needs on the target; returns them, sorted.

    `pip download` evaluates environment markers for the Python that runs it. So the requirements that hold on
    the target are computed here, and those that pip left out are requested by name in another round. gpu:
    onnxruntime-gpu with its CUDA libraries, else the much smaller onnxruntime. UnavailableError where pip, an
    index or a wheel is missing. (`uv pip compile --python-platform` does the same but needs uv.)
    """
    if (ROOT / "pyproject.toml").is_file():  # a source tree
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
        (own,) = folder.glob(f"{OWN_PACKAGE}-*.whl")
    else:
        own = pack_installed(OWN_PACKAGE, folder)
    info = _metadata(own)
    if target.python not in Requirement(f"python{info['Requires-Python']}").specifier:
        raise UnavailableError(f"--python {target.python}: manyeyes needs Python {info['Requires-Python']}")
    extras = ("", "cuda") if gpu else ("",)
    requirements = [_without_marker(requirement) for requirement in _active_requirements(info, extras, target)]
    if not gpu:
        requirements = [text.replace("onnxruntime-gpu", "onnxruntime") for text in requirements]
    roots = [Requirement(text) for text in requirements]
    for _ in range(MAX_ROUNDS):
        with tempfile.TemporaryDirectory(dir=folder) as downloads:
            _download(requirements, Path(downloads), target)
            wheels = {parse_wheel_filename(wheel.name)[0]: wheel for wheel in Path(downloads).glob("*.whl")}
            needed, missing = _closure(roots, wheels, target)
            if not missing:
                for name in needed:
                    shutil.move(wheels[name], folder)
                return sorted(folder.glob("*.whl"))
        requirements = [*requirements, *missing]
    raise UnavailableError(f"pip does not find {', '.join(missing)}; add them to {folder} by hand")


def pack_installed(name: str, folder: Path) -> Path:
    """Repack an installed pure Python package as a wheel."""
    distribution = metadata.distribution(name)
    excluded = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    files = [
        (file.as_posix(), file.read_binary())
        for file in distribution.files or []
        if ".." not in file.parts and file.suffix != ".pyc" and file.name not in excluded
    ]
    info = next(path.partition("/")[0] for path, _ in files if path.endswith(".dist-info/METADATA"))
    hashes = [base64.urlsafe_b64encode(sha256(data).digest()).rstrip(b"=").decode() for _, data in files]
    lines = [f"{path},sha256={hash},{len(data)}" for hash, (path, data) in zip(hashes, files, strict=True)]
    lines.append(f"{info}/RECORD,,")
    wheel = folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in [*files, (f"{info}/RECORD", "\n".join([*lines, ""]).encode())]:
            archive.writestr(path, data)
    return wheel


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _active_requirements(info: Message, extras: Sequence[str], target: WheelTarget) -> Iterator[Requirement]:
    """The requirements in a wheel's metadata whose markers hold on the target, with these extras ("" for none)."""
    for text in info.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        environments = ({**target.environment(), "extra": extra} for extra in extras)
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def _closure(
    roots: Sequence[Requirement], wheels: Mapping[NormalizedName, Path], target: WheelTarget
) -> tuple[set[NormalizedName], list[str]]:
    """The names of the wheels that `roots` need on the target, transitively, and requirements without a wheel."""
    seen: set[tuple[NormalizedName, str]] = set()
    missing: list[str] = []
    pending = list(roots)
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in ("", *requirement.extras)} - seen
        seen |= new
        if name in wheels:
            for _, extra in sorted(new):
                pending += _active_requirements(_metadata(wheels[name]), [extra], target)
        elif new:
            missing.append(_without_marker(requirement))
    return {name for name, _ in seen}, missing


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(path).decode("utf-8"))


def _download(requirements: Sequence[str], folder: Path, target: WheelTarget) -> None:
    platforms = [part for platform in target.platforms() for part in ("--platform", platform)]
    versions = ["--python-version", target.python, "--implementation", "cp"]
    try:
        _pip("download", "--only-binary=:all:", *versions, *platforms, "--dest", str(folder), *requirements)
    except UnavailableError as error:
        if package := NO_WHEEL.search(str(error)):
            raise UnavailableError(
                f"no wheel of {package[1]} for Python {target.python} on {target.platform}; give another --python or "
                "--platform"
            ) from None
        raise


def _pip(*arguments: str) -> None:
    """Run this Python's pip. UnavailableError, one line, where it is missing or fails."""
    if importlib.util.find_spec("pip") is None:
        raise UnavailableError("this Python has no pip to collect wheels with; run: python -m ensurepip")
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-input"]
    # without a network, each of pip's retries takes half a minute
    environment = {"PIP_RETRIES": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603 (no shell)
    if done.returncode == 0:
        return
    if NO_NETWORK.search(done.stderr):
        raise UnavailableError("pip reaches no package index: wheels are collected over the network, once")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()[-1:]
    raise UnavailableError(f"pip {arguments[0]} failed: {' '.join(errors)}")
