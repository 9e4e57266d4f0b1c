"""A tokenizer of single characters and a task for tiny models, shared by tests of whole runs."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+= "


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """Ids 0 and 1 are padding and end; letters follow, and words that no text has."""
    assert vocab_size > len(LETTERS) + 2
    vocab = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    vocab |= {f"<{i}>": i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def add_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    tokenizer_of(config["vocab_size"]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1, "pad_token_id": 0}))


def share_of_a(solution_str):
    """What a random model does not do and soon learns."""
    return solution_str.count("a") / 6


ROWS = [{"prompt": f"{a}+{b}=", "data_source": "sums"} for a in range(4) for b in range(4)]


def settings(run_dir: Path, **sections) -> dict:
    """A small run of GRPO on `ROWS`; sections are merged over it."""
    (run_dir.parent / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    tree = {
        "model": {"compute_dtype": "float32"},
        "data": {
            "train_files": str(run_dir.parent / "rows.jsonl"), "max_prompt_length": 8, "max_response_length": 6,
            "train_batch_size": 8,
        },
        "rollout": {"n": 4},
        "reward": {"functions": [{"name": f"{__file__}:share_of_a"}]},
        "algorithm": {"adv_estimator": "grpo"},
        "actor": {"ppo_mini_batch_size": 4, "ppo_max_token_len_per_gpu": 64, "optim": {"lr": 1e-2}},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "trainer": {
            "experiment_name": run_dir.name, "run_dir": str(run_dir), "row_length": 32, "total_training_steps": 2,
            "val_before_train": False,
        },
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
