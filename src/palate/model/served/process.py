"""A vLLM server that a run starts beside itself, on the loopback address, and ends with itself."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from palate.errors import ConfigError, RunError
from palate.world.start import free_socket

PYTHON = "PALATE_VLLM_PYTHON"
"""Environment variable with the Python of the environment that has vLLM."""

START_LIMIT = 1800.0
"""Longest wait for a server to load its model, in seconds."""

END_LIMIT = 20.0
"""Longest wait for a server to end, in seconds."""

_PAUSE = 0.5
_END_WITH_PARENT = 1
"""Linux's PR_SET_PDEATHSIG."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ServerProcess:
    """A running vLLM server.

    Attributes:
        url, key: its address, and the key that it was given through its environment.

    Args:
        python: the Python of an environment with vLLM; None for `PALATE_VLLM_PYTHON`, else this Python.
        arguments: arguments of the server besides its address.
        log: file for its output.
        takes_weights: the server lets any program on this machine exchange all of its weights.

    Raises:
        ConfigError: that Python does not exist or has no vLLM.
        RunError: the server ends before it answers.
    """

    def __init__(
        self, python: Path | None, arguments: Sequence[str], log: Path, *, takes_weights: bool = False
    ) -> None:
        program = str(python or os.environ.get(PYTHON) or sys.executable)
        _require_vllm(program)
        self.key = secrets.token_urlsafe(24)
        self._log = log
        with free_socket() as socket:
            port = socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environ = os.environ | {
            "VLLM_API_KEY": self.key,  # an argument would be visible to other users of the machine
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if takes_weights:
            environ["VLLM_SERVER_DEV_MODE"] = "1"  # the key does not protect its endpoints
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [program, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
                 "--port", str(port), *arguments],
                env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C ends the run first, then the run ends the server
                preexec_fn=None if _LIBC is None else _end_with_parent,
            )  # fmt: skip
        with ExitStack() as undo:
            undo.callback(self.close)
            self._wait()
            undo.pop_all()

    def ended(self) -> str | None:
        """Return a sentence about the end of the process; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        last = self._last_words()
        return (
            f"the vLLM server of this run has ended with exit code {code}; its output is in "
            f"{str(self._log)!r}{f' and ends with: {last}' if last else ''}"
        )

    def close(self) -> None:
        """End the server and its processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_LIMIT)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _wait(self) -> None:
        begun = time.monotonic()
        while not _answers(f"{self.url}/health"):
            if (reason := self.ended()) is not None:
                raise RunError(reason)
            if time.monotonic() - begun > START_LIMIT:
                raise RunError(
                    f"the vLLM server did not start within {START_LIMIT:g} seconds; its output is in "
                    f"{str(self._log)!r}"
                )
            time.sleep(_PAUSE)

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = self._log.read_text("utf-8", "replace").splitlines()
            errors = [
                match[0] for line in lines if " WARNING " not in line and (match := _ERROR.search(line))
            ]
            causes = [error for error in errors if _NO_CAUSE not in error]
            said = causes or errors or lines
            return said[-1].strip()[:300] if said else ""
        return ""


_ERROR = re.compile(r"\b\w*Error: .*")
_NO_CAUSE = "See root cause above"
"""In errors of vLLM's main process, which only say that another process failed."""


def _require_vllm(program: str) -> None:
    """Check that a Python can find vLLM; this imports nothing of it."""
    look = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('vllm') else 3)"
    try:
        code = subprocess.run([program, "-c", look], capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{program!r} cannot be run ({error}); --vllm-python names the Python of an environment with vLLM"
        ) from error
    if code != 0:
        raise ConfigError(
            f"{program!r} has no vLLM; install it in an environment of its own, then name its Python with "
            f"--vllm-python or the environment variable {PYTHON}"
        )


def _end_with_parent() -> None:
    """Have Linux end this process with the one that started it, even if that is killed."""
    assert _LIBC is not None, "it was loaded before the fork"
    _LIBC.prctl(_END_WITH_PARENT, signal.SIGTERM)


def _answers(url: str) -> bool:
    direct = build_opener(ProxyHandler({}))  # a proxy cannot reach this machine's loopback address
    try:
        with direct.open(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False
