"""Make a virtual environment and fill it, saying in few lines what happens.

    python .ci/make_venv.py FOLDER STAMP PIP-ARGUMENTS…

Everything pip prints goes to FOLDER/install.log; the terminal gets one moving line, or, on failure,
the lines that matter and one sentence. The stamp file is written only when all went well, so that a
run cut short is taken up again.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|Name or service not known|name resolution|Connection refused"
    r"|Network is unreachable|ConnectTimeout|Read timed out|Max retries|No route to host"
    r"|\(from versions: none\)"
)
_STEP = re.compile(
    r"\s*(Collecting|Downloading|Using cached|Processing|Building|Installing|Preparing)\b\s*(.*)"
)


class Ticker:
    """One line that tells how far pip is: rewritten in a terminal, repeated rarely elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.step = "starting"
        self._started = time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._terminal:
            print("\r\x1b[K", end="")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def _run(self) -> None:
        pause = 0.5 if self._terminal else 20.0
        while not self._over.wait(pause):
            line = f"{self.title}: {self.seconds:.0f} s, {self.step}"
            print(
                f"\r\x1b[K{line[:100]}" if self._terminal else line,
                end="" if self._terminal else "\n",
                flush=True,
            )


def main(argv: list[str]) -> int:
    """Make or complete the environment; 0 when everything is installed."""
    folder, stamp, pip_arguments = Path(argv[0]), Path(argv[1]), argv[2:]
    wanted = [word for word in pip_arguments if not word.startswith("-")]
    print(f"Installing {' '.join(wanted)} into {folder} (once; this can take some minutes)", flush=True)
    python = folder / "bin" / "python"
    if not _works(python):
        try:
            venv.create(folder, clear=folder.exists(), symlinks=True, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{sys.executable} cannot make a virtual environment: {error}", file=sys.stderr)
            return 1
    log = folder / "install.log"
    with Ticker("  pip") as ticker:
        status = _pip(
            [str(python), "-m", "pip", "install", "--progress-bar", "off", *pip_arguments], log, ticker
        )
    if status:
        _explain(log)
        return 1
    stamp.parent.mkdir(parents=True, exist_ok=True)
    for old in stamp.parent.glob(f"{stamp.name.split('@')[0]}@*"):
        old.unlink()
    stamp.write_text(" ".join(pip_arguments) + "\n", encoding="utf-8")
    print(f"Installed in {ticker.seconds:.0f} s.", flush=True)
    return 0


def _works(python: Path) -> bool:
    """Tell whether this environment's interpreter runs and has pip."""
    try:
        return (
            subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode
            == 0
        )
    except OSError:
        return False


def _pip(command: list[str], log: Path, ticker: Ticker) -> int:
    """Run pip with its output in the log and its steps on the ticker; return its status."""
    found = 0
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            out.write(line)
            if match := _STEP.match(line):
                found += match[1] == "Collecting"
                # the last step names every package in one line
                what = "them" if match[1] == "Installing" else match[2].split(" (from")[0].strip()
                ticker.step = f"{found} packages found, {match[1].lower()} {what}"
    return pip.returncode


def _explain(log: Path) -> None:
    """Say in one sentence why pip failed; where the network is not the reason, after pip's own errors."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if _NETWORK.search(text):
        reason = "The package index cannot be reached: check the network connection and run this again."
    else:
        reason = "pip could not install the packages."
        lines = [line for line in text.splitlines() if line.startswith("ERROR") or "error:" in line]
        for line in (lines or text.splitlines())[-10:]:
            print(f"  {line[:300]}", file=sys.stderr)
    print(f"{reason} (All of pip's output: {log})", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
