"""A small ensemble, and a server that answers with one."""

import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import uvicorn
from helpers import PREPROCESS_CONFIG, ROOT, SCALES, STACKER
from pictures import encoded
from PIL import Image

from ensemble.core.metrics import sigmoid
from ensemble.models.runner import Runner
from export.inference.infer import Ensemble
from export.web import server as listen
from export.web.limits import UploadLimits
from export.web.server import make_app


def runner(name, scale, wait=lambda: None):
    def run(pixels):
        wait()
        return (scale * (pixels.mean(axis=(1, 2, 3), dtype=np.float64) / 255 - 0.5)).astype(np.float32)

    return Runner(name, PREPROCESS_CONFIG, run)


ENSEMBLE = Ensemble(
    tuple(runner(name, scale) for name, scale in SCALES.items()),
    replace(STACKER, threshold=0.6),
    "cpu",
    settings=(("one", "openvino bf16"), ("two", "openvino fp32")),
)


FILES = {"/": "text/html", "/page.js": "text/javascript", "/style.css": "text/css"}


def grey(brightness):
    return encoded(Image.new("RGB", (20, 12), (brightness,) * 3))


def expected(brightness):
    return sigmoid(0.1 + 1.5 * (brightness / 255 - 0.5))  # as written in helpers.py


def parts(*images):
    return [("images", image) for image in images]


def scored(client, *images):
    answer = client.post("/api/score", files=parts(*images))
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status, text):
    assert answer.status_code == status
    assert text in answer.text
    assert "\n" not in answer.text.strip()
    assert answer.headers["content-type"].startswith("text/plain")


class BaseClient:
    """Posts to paths below a URL."""

    def __init__(self, client, url):
        self.client, self.url = client, url

    def post(self, path, **request):
        return self.client.post(self.url + path, **request)


@contextmanager
def running(ensemble, explain=None, **limits):
    """The URL of a real server in a thread."""
    with listen.listen("127.0.0.1", 0) as socket:
        config = uvicorn.Config(
            make_app(ensemble, UploadLimits(**limits), explain=explain), log_level="warning", lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield listen.url_of(socket)
        finally:
            server.should_exit = True
            thread.join(timeout=30)


@contextmanager
def serving(*command):
    """The URL and the process of `serve`, which must end in order and say nothing on standard error."""
    command = [sys.executable, *map(str, command), "--port", "0", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as server:
        try:
            lines = iter(server.stdout.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            yield url, server.pid
        finally:
            server.send_signal(2)
            _, said = server.communicate(timeout=30)
    assert (server.returncode, said) == (0, "")
