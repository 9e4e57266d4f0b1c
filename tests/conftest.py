"""Every test sees eight CPU devices, so that a mesh is real everywhere."""

import gc
import json
import os
from pathlib import Path

import pytest
from xla_flags import QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import jax  # noqa: E402 - reads the environment above


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module():
    """Every program XLA compiles for the CPU holds memory maps, and the kernel allows a process 65530 of them
    (vm.max_map_count): a process that keeps the programs of all the tests dies of a segmentation fault."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of an environment with vLLM, for what is tested against a real server."""
    python = os.environ.get("JAXRL_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "JAXRL_VLLM_PYTHON is not set: `scripts/setup_vllm.sh --cpu DIR` makes an environment and prints it"
        )
    return python


@pytest.fixture(scope="session")
def transformers_4() -> str:
    """A folder with transformers 4 to put before the installed packages."""
    folder = os.environ.get("JAXRL_TRANSFORMERS_4")
    if not folder:
        pytest.skip(
            "JAXRL_TRANSFORMERS_4 is not set: `pip install --no-deps --target DIR -r tests/transformers_4.txt` makes the "
            "folder that it names"
        )
    return folder


@pytest.fixture(scope="session")
def served_models(tmp_path_factory) -> dict[str, Path]:
    """Random models with a tokenizer of single characters: "tied" (Llama) and "untied" (Qwen3).

    vLLM's attention for CPUs wants heads of 32, which those in tests/data have not.
    """
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    made = {}
    for name, like in (("tied", "llama32-tied"), ("untied", "qwen3")):
        folder = tmp_path_factory.mktemp(name)
        settings = json.loads((Path(__file__).parent / "data" / "hf_torch" / like / "config.json").read_text())
        settings |= {"head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.2}
        settings |= {"eos_token_id": 1, "pad_token_id": 0}
        (folder / "config.json").write_text(json.dumps(settings))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        model.save_pretrained(folder)
        letters = "abcdefghijklmnopqrstuvwxyz0123456789+= "
        vocab = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
        vocab |= {f"<{i}>": i for i in range(len(vocab), settings["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
        fast.save_pretrained(folder)
        made[name] = folder
    return made
