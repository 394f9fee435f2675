"""Runs other programs: their output, their time, and the most memory that they had."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


class Failed(Exception):
    """Something could not be set up or run; the message says what, and what its output ended with."""


@dataclass(frozen=True)
class Finished:
    output: str
    seconds: float
    peak_bytes: int


def run(command: list[str | Path], env: dict[str, str] | None = None, cwd: Path | None = None) -> Finished:
    """Runs `command` to its end. `output` is what it printed, errors included; `peak_bytes` its largest resident set."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as out:
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, cwd=cwd
            )
        except OSError as e:
            raise Failed(f"{words[0]}: {e.strerror}") from e
        # Only wait4 tells the memory of this one child. Popen is told the status, or it would wait for the child too.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read().decode(errors="replace")
    if process.returncode != 0:
        last = [line.strip() for line in output.splitlines() if line.strip()][-8:]
        raise Failed(f"'{' '.join(words)}' ended with {process.returncode}:\n" + "\n".join(last))
    return Finished(output, seconds, usage.ru_maxrss * 1024)
