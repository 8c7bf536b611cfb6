"""Commands against the loopback Hub, in one child process: huggingface_hub reads HF_ENDPOINT once, when it is loaded.

Run as a script this is the child: each line of its input is a command of cli.py, or `-c` with a script and its
arguments as Python takes them; each line of its output what came of it.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hub_api import TOKEN

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SLEEP = 0.05  # seconds; the Hub here need not be spared as the real one is, which asks for whole seconds


@dataclass(frozen=True)
class Client:
    process: subprocess.Popen[str]
    home: Path

    def __call__(self, *arguments: object, **environment: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a command; environment: of it and of those after it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([list(map(str, arguments)), environment]) + "\n")
        self.process.stdin.flush()
        code, out, err = json.loads(self.process.stdout.readline())
        assert "Traceback" not in err, err
        return code, out, err


def environment(url: str, home: Path) -> dict[str, str]:
    """For a process that takes `url` for the Hub, logged in, with a cache of its own."""
    return {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }


@contextlib.contextmanager
def client(url: str, home: Path) -> Iterator[Client]:
    with subprocess.Popen(
        # huggingface_hub sends large files in a way that its HTTP client has since called by another name
        [sys.executable, "-W", "error", "-W", "ignore:Use 'content=:DeprecationWarning", __file__],
        env=environment(url, home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
    ) as process:
        yield Client(process, home)
        process.stdin.close()


def main() -> None:
    answers, sleep = sys.stdout, time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, LONGEST_SLEEP))
    from ensemble.core.errors import ManyeyesError

    for line in sys.stdin:
        arguments, changed = json.loads(line)
        os.environ.update(changed)
        out, err, code = io.StringIO(), io.StringIO(), -1
        script = arguments[1] if arguments[0] == "-c" else "import cli; cli.main()"
        sys.argv = ["-c", *arguments[2:]] if arguments[0] == "-c" else ["cli.py", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(script, {})  # noqa: S102 of these tests alone
                code = 0
            except ManyeyesError as error:
                code = 1
                print(f"{type(error).__name__}: {error}", file=err)
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
        print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)


if __name__ == "__main__":
    main()
