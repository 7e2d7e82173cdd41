import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from striped_hf.data import write_data_set

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(test_data):
    """Tiny Shakespeare."""
    return test_data / "tinyshakespeare" / "input.txt"


@pytest.fixture
def make_data(tmp_path):
    """Writes a data set from its train tokens, by default 0, 1, 2, ..., and returns its folder."""

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
def no_network(monkeypatch):
    """Makes every download fail at once, in this process and in its child processes."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """Runs one of data_scripts/ in this process, in ``tmp_path``; returns (stdout, stderr).

    If ``fails`` is given, the script must end with this error message. Starting a process takes
    seconds: one test for each script does it.
    """

    def run(name, *arguments, fails=None):
        script = str(REPOSITORY / "data_scripts" / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        if fails is None:
            runpy.run_path(script, run_name="__main__")
        else:
            with pytest.raises(SystemExit, match=fails) as caught:
                runpy.run_path(script, run_name="__main__")
            assert "\n" not in str(caught.value)
        return capsys.readouterr()

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
        # announces the whole file, sends half, and closes the connection
        if self.path.startswith("/cut"):
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """An HTTP server of ``server.files["/name"]``; /cut/name ends in the middle of the file."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.files, server.requests = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
