import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from striped_hf.data import write_data_set

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_data():
    """The folder with the real data."""
    folder = os.environ.get("STRIPED_HF_TEST_DATA")
    if not folder:
        pytest.skip("STRIPED_HF_TEST_DATA is not set: no real data on this machine")
    return Path(folder)


@pytest.fixture(scope="session")
def corpus(real_data):
    """Tiny Shakespeare."""
    return real_data / "tinyshakespeare" / "input.txt"


@pytest.fixture
def make_data(tmp_path):
    """Write a data set from its train tokens, by default 0, 1, 2, ..., and return its folder."""

    def make(train=1000, val=100, vocab_size=None):
        train, val = (
            np.arange(tokens) if isinstance(tokens, int) else np.asarray(tokens)
            for tokens in (train, val)
        )
        write_data_set(
            tmp_path / "data",
            {"train": train, "val": val},
            vocab_size=vocab_size or int(max(train.max(), val.max())) + 1,
            source={"name": "numbers", "url": None, "sha256": "0" * 64},
            tokenizer_name="none",
        )
        return tmp_path / "data"

    return make


@pytest.fixture
def run_script(tmp_path):
    """Run one of data_scripts/ as a process, with no way to the network, in ``tmp_path``."""

    def run(name, *arguments, **environment):
        dead_end = dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")
        return subprocess.run(
            [sys.executable, REPOSITORY / "data_scripts" / name, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **dead_end, "HF_HUB_OFFLINE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path.removeprefix("/cut"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.path.startswith("/cut"):  # promise all, send half, hang up
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """An HTTP server: set ``server.files["/name"]``; /cut/name breaks off in the middle."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.files, server.requests = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
