"""Python environments of the peers: each in one of its own, since their dependencies clash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS = ROOT / ".venv-peers"
OWN_PYTHON = ROOT / ".venv" / "bin" / "python"


class PeerInstallError(RuntimeError):
    """A peer's environment cannot be made; the message says what is missing."""


def python_of(peer: str) -> Path:
    """Return the interpreter of a peer's environment; installs it where it is missing or outdated.

    Args:
        peer: `mooncake` or `lmcache`: there is a `requirements-<peer>.txt` beside this file.
    """
    requirements = HERE / f"requirements-{peer}.txt"
    overrides = HERE / "overrides.txt"
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    wanted = hashlib.sha256(requirements.read_bytes() + overrides.read_bytes()).hexdigest()
    stamp = folder / "installed"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    uv = shutil.which("uv")
    if uv is None:
        raise PeerInstallError(f"uv is needed to install {peer}: pip install uv")
    _run([uv, "venv", "--quiet", "--clear", "--python", "3.11", str(folder)], peer)
    command = [uv, "pip", "install", "--quiet", "--python", str(python)]
    command += ["--overrides", str(overrides), "--requirements", str(requirements)]
    if wheels := _wheel_folder():
        command += ["--find-links", wheels]
    else:
        command += ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    _run(command, peer)
    stamp.write_text(wanted)
    return python


def main() -> None:
    """Make a peer's environment and print its interpreter; argument: the peer."""
    if len(sys.argv) != 2:
        sys.exit("name one peer: lmcache, mooncake or vllm-router")
    try:
        print(python_of(sys.argv[1]))
    except PeerInstallError as error:
        sys.exit(str(error))


def _wheel_folder() -> str | None:
    """Return the folder that pip's own settings name for local wheels, if there is one."""
    asked = subprocess.run(
        ["pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    )
    folder = asked.stdout.strip()
    return folder if asked.returncode == 0 and Path(folder).is_dir() else None


def _run(command: list[str], peer: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ), cwd=ROOT
    )
    if done.returncode:
        raise PeerInstallError(f"installing {peer} failed: {done.stderr.strip()[-800:]}")


if __name__ == "__main__":
    main()
