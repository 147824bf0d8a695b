"""`make run`, from the first start to Ctrl-C; runs before the session's own server is started."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openrouter_responses_pipe.webui import WebUIClient, free_port, port_is_free
from tests.e2e.host import MODEL, ROOT, WEBUI_PYTHON

START_S = 150.0
STOP_S = 10.0


def command(data: Path, port: int) -> list[str]:
    """Return what `make run` runs, with a data folder and a port of the test's own."""
    demo = [str(WEBUI_PYTHON), "-m", "openrouter_responses_pipe", "run"]
    return [*demo, "--data", str(data), "--port", str(port)]


def environment() -> dict[str, str]:
    """Return the environment without a key, so that the simulator is used."""
    return {name: value for name, value in os.environ.items() if name != "OPENROUTER_API_KEY"}


@contextmanager
def demo(data: Path, port: int, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the demo until its block is printed; end it at the end, whatever happened."""
    with (
        output.open("wb") as out,
        subprocess.Popen(
            command(data, port),
            cwd=ROOT,
            env=environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + START_S
            while "Stop " not in output.read_text(encoding="utf-8"):
                assert process.poll() is None, output.read_text(encoding="utf-8")
                assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
                time.sleep(0.1)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def children(pid: int) -> list[int]:
    """Return the processes that this one has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_run_twice_and_stop(folder: Path) -> None:
    """The second start finds the first one's account and chats; each end leaves nothing behind."""
    data, passwords = folder / "demo", []
    for ending in (signal.SIGINT, signal.SIGTERM):
        port = free_port()
        output = folder / f"demo-{ending.name}.txt"
        with demo(data, port, output) as process:
            block = re.search(
                r"Open +(\S+)\n +Login +(\S+) +password (\S+)\n", output.read_text(encoding="utf-8")
            )
            assert block, output.read_text(encoding="utf-8")
            url, email, password = block.groups()
            assert url == f"http://127.0.0.1:{port}"
            passwords.append(password)
            client = WebUIClient(url)
            client.signin(email, password)
            answer = client.complete(MODEL, "Hello")
            assert "Hello! This is" in answer["choices"][0]["message"]["content"]
            started = children(process.pid)
            assert len(started) == 2
            process.send_signal(ending)
            assert process.wait(STOP_S) == 0
        assert port_is_free(port)
        assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
        assert "Traceback" not in output.read_text(encoding="utf-8")
    assert passwords[0] == passwords[1]


def test_taken_port(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            command(folder / "never", port), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert done.stderr == f"Port {port} is already in use: choose another one with PORT=….\n"
    assert not (folder / "never").exists()
