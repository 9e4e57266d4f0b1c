"""The `config.json` of a model, and nothing else of it: a plan reads no weights."""

from __future__ import annotations

import re
from pathlib import Path

from ..weights.bnb import dequantized_config
from ..weights.folder import load_hf_config
from ..weights.locate import resolve
from ..weights.pretrained import Pretrained
from ..weights.stored import Checkpoint


def described_model(path: str) -> Pretrained:
    """A model without a tensor. Raises ValueError where there is no `config.json`, or it cannot be fetched."""
    folder = _config_folder(path)
    return Pretrained(
        name=path, checkpoint=Checkpoint(folder, {}, kind="config.json"), hf_config=dequantized_config(load_hf_config(folder)),
        generation_config={}, write_companions=lambda target: None, tokenizer=None,
    )  # fmt: skip


def _config_folder(path: str) -> Path:
    """A local folder, or of an id on the Hub that file alone."""
    folder = Path(path).expanduser()
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        return resolve(path)
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(path, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {path!r} is not a local folder, and its config.json could not be fetched ({type(error).__name__}: "
            f"{reason}): name a folder that holds a config.json, such as model.path=configs/models/qwen2-7b"
        ) from error
