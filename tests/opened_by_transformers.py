"""What transformers makes of Hugging Face folders: its rotary frequencies and its logits.

`python THIS VERSION`, started by a test under each major version, opens the folders that `inputs_VERSION.npz` names, each
with its token ids, and writes `opened_by_VERSION.npz`.
"""

import sys

import numpy as np
import torch
import transformers


def opened(folder: str, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """`logits`, and a row of `inv_freq` for each set of frequencies that the model has."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(input_ids).long()).logits.numpy()
    # Of Gemma 3 both versions have two sets, under other names.
    found = {tuple(x.tolist()) for name, x in model.named_buffers() if name.endswith("inv_freq") and "orig" not in name}
    return {"logits": logits, "inv_freq": np.array(sorted(found))}


version = sys.argv[1]
assert transformers.__version__.split(".")[0] == version, f"{transformers.__file__} is {transformers.__version__}"
arrays = {}
for folder, input_ids in np.load(f"inputs_{version}.npz").items():
    arrays |= {f"{folder}/{key}": array for key, array in opened(folder, input_ids).items()}
np.savez(f"opened_by_{version}.npz", **arrays)
