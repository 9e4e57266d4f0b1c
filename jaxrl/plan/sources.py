"""The `config.json` of a model, and of one in 4 bits the headers of its files: a plan reads no weights."""

from __future__ import annotations

import re
from pathlib import Path

from ..weights.bnb import dequantized_config, is_in_four_bits
from ..weights.folder import load_hf_config
from ..weights.formats import open_checkpoint
from ..weights.locate import resolve
from ..weights.pretrained import Pretrained
from ..weights.stored import Checkpoint


def described_model(path: str) -> Pretrained:
    """A model of which no tensor is read. Raises ValueError where there is no `config.json`, or it cannot be fetched.

    Of weights in 4 bits the headers of their files say which are packed, and ValueError where these are not here.
    """
    folder = _config_folder(path)
    hf_config = load_hf_config(folder)
    checkpoint = Checkpoint(folder, {}, kind="config.json")
    if is_in_four_bits(hf_config):
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"model {path!r} is in 4 bits, and which of its weights are packed stands in their files: fetch it, "
                f"`hf download {path}`, and name the folder"
            )
        checkpoint = open_checkpoint(folder)
    return Pretrained(
        name=path, checkpoint=checkpoint, hf_config=dequantized_config(hf_config), generation_config={},
        write_companions=lambda target: None, tokenizer=None,
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
