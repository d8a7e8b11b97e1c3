"""A server that a run starts, with a stand-in for vLLM in place of the package."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from palate.errors import ConfigError, RunError
from palate.model.served import process
from palate.model.served.process import ServerProcess

SERVER = """
import http.server, os, sys
if "--fail" in sys.argv:
    print("WARNING 11-28 [utils.py:5] This can cause errors like OSError: [Errno 24] Too many open files")
    print("(Worker pid=7) ERROR 11-28 [x.py:9] ValueError: the model needs more memory")
    print("    raise RuntimeError(")
    print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(3)
assert os.environ["VLLM_API_KEY"] not in " ".join(sys.argv)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ["VLLM_API_KEY"].encode())
host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *list(package.parents)[:2]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(textwrap.dedent(SERVER))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2):
            return True
    except (URLError, OSError):
        return False


@pytest.mark.usefixtures("stand_in")
def test_a_server_runs_on_the_loopback_address_until_it_is_closed(tmp_path: Path) -> None:
    server = ServerProcess(Path(sys.executable), [], tmp_path / "vllm.log")
    try:
        assert server.url.startswith("http://127.0.0.1:")
        with urlopen(f"{server.url}/health") as reply:
            assert reply.read().decode() == server.key
        assert server.ended() is None
    finally:
        server.close()
    assert not answers(f"{server.url}/health")
    assert server.ended() is not None


@pytest.mark.usefixtures("stand_in")
def test_a_proxy_of_the_environment_does_not_hide_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(process, "START_LIMIT", 20)
    ServerProcess(Path(sys.executable), [], tmp_path / "vllm.log").close()


@pytest.mark.usefixtures("stand_in")
def test_a_server_that_does_not_start_is_explained_by_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"exit code 3.*vllm.log.*ends with: ValueError: the model needs more"):
        ServerProcess(Path(sys.executable), ["--fail"], tmp_path / "vllm.log")


def test_a_python_without_vllm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be run"):
        ServerProcess(tmp_path / "python", [], tmp_path / "vllm.log")
    monkeypatch.setenv("PALATE_VLLM_PYTHON", "false")
    with pytest.raises(ConfigError, match=r"'false' has no vLLM; .* --vllm-python or .* PALATE_VLLM_PYTHON"):
        ServerProcess(None, [], tmp_path / "vllm.log")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with its parent")
@pytest.mark.usefixtures("stand_in")
def test_a_server_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from palate.model.served.process import ServerProcess\n"
        f"server = ServerProcess(Path(sys.executable), [], Path({str(tmp_path / 'vllm.log')!r}))\n"
        "print(server.url, flush=True)\n"
        "time.sleep(60)"
    )
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in (os.environ["PYTHONPATH"], *sys.path) if p)
    }
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ)
    assert run.stdout is not None
    url = run.stdout.readline().strip()
    assert answers(f"{url}/health")
    run.send_signal(signal.SIGKILL)
    run.wait()
    end = time.monotonic() + 30
    while answers(f"{url}/health"):
        assert time.monotonic() < end, "the server outlives the run"
        time.sleep(0.05)
