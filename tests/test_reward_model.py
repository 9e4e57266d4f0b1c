"""The reward model scores what transformers recorded, whatever stands beside it in the batch, and refuses other models."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from jaxrl.config import Model
from jaxrl.offload import HOST_KIND
from jaxrl.parallel import make_mesh
from jaxrl.reward_model import RewardModel
from jaxrl.rewards import Sample

DATA = Path(__file__).parent / "data"
LLAMA = DATA / "heads" / "llama-seqcls-reward"
RECORDED = np.load(LLAMA / "expected.npz")
TEXTS = [
    " ".join(f"w{token}" for token in row[mask == 1])
    for row, mask in zip(RECORDED["input_ids"], RECORDED["attention_mask"], strict=True)
]
SCORES = RECORDED["logits"][:, 0]  # of three sequences of 10, 7 and 6 tokens


@pytest.fixture
def folder(tmp_path):
    """A function that copies a model and gives it a tokenizer of 64 words, w0 to w63."""

    def copy(source: Path, chat_template: str | None = None, **changes) -> str:
        target = tmp_path / source.name
        shutil.copytree(source, target)
        settings = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(settings | changes))
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=chat_template)
        tokenizer.save_pretrained(target)
        return str(target)

    return copy


def model_of(path: str, mesh=(1, 1, 1), max_tokens=256, **settings) -> RewardModel:
    model = RewardModel(
        path, make_mesh(*mesh), Model(path=path, compute_dtype="float32"), max_tokens=max_tokens, **settings
    )
    model.load()
    return model


def sample(text: str, messages=None) -> Sample:
    """A sample whose prompt is the text's first two words."""
    words = text.split()
    return Sample(
        prompt=" ".join(words[:2]) + " ", response=" ".join(words[2:]), ground_truth="", data_source="test",
        extra_info={}, response_length=len(words) - 2, finished=True, messages=messages,
    )  # fmt: skip


def rewards(model: RewardModel, samples: list[Sample]) -> list[float]:
    scores = model.score(samples)
    assert all(score.error is None and score.metrics == {} for score in scores)
    return [score.reward for score in scores]


@pytest.mark.parametrize("mesh, offload", [((1, 1, 1), ()), ((2, 2, 2), ("params",))])
def test_scores_are_those_that_transformers_recorded(folder, mesh, offload):
    model = model_of(folder(LLAMA), mesh, offload=offload)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(model.variables) if x.ndim > 2}  # the matrices of layers
    assert kinds == {HOST_KIND if offload else "device"}
    np.testing.assert_allclose(rewards(model, [sample(text) for text in TEXTS]), SCORES, atol=2e-4)  # float32


def test_order_is_kept_and_neighbours_of_any_length_do_not_matter(folder):
    long = " ".join(f"w{(7 * i) % 61}" for i in range(150))  # longer than the shortest row
    model = model_of(folder(LLAMA, max_position_embeddings=256))
    chosen = [2, 0, 1, 1, 2, 0, 0]
    mixed = rewards(model, [sample(long), *(sample(TEXTS[i]) for i in chosen), sample(long)])
    np.testing.assert_allclose(mixed[1:-1], SCORES[chosen], atol=2e-4)  # float32
    np.testing.assert_allclose([mixed[0], mixed[-1]], rewards(model, [sample(long)]) * 2, atol=1e-5)
    assert min(abs(mixed[0] - SCORES)) > 1e-3


def test_a_conversation_goes_through_the_models_own_chat_template(folder):
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model = model_of(folder(LLAMA, template))
    words = TEXTS[0].split()
    conversation = [{"role": "system", "content": words[0]}, {"role": "user", "content": words[1]}]
    others = sample("w1 w1 " + " ".join(words[2:]), messages=conversation)  # its prompt is of another template
    np.testing.assert_allclose(rewards(model, [others]), SCORES[:1], atol=2e-4)  # float32


def test_a_peft_reward_model_scores_as_in_peft(folder, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base, text = folder(DATA / "hf_torch" / "llama31"), "w5 w9 w11 w3 w20"
    model = peft.get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(torch.tensor([[5, 9, 11, 3, 20]])).logits.item()
    np.testing.assert_allclose(rewards(model_of(str(tmp_path / "adapter")), [sample(text)]), [expected], atol=2e-4)


def test_a_model_with_several_labels_is_refused(folder):
    with pytest.raises(ValueError, match="reward.model.path .* has a score head of 3 labels: give .* with one label"):
        model_of(folder(DATA / "heads" / "qwen2-seqcls-3labels"))


def test_a_model_without_a_score_head_is_refused(folder):
    with pytest.raises(
        ValueError, match="reward.model.path .* has no score head: give a sequence-classification model"
    ):
        model_of(folder(DATA / "hf_torch" / "qwen3"))


def test_a_conversation_beyond_the_context_is_an_error_of_its_own_sample(folder):
    long = " ".join(f"w{i % 61}" for i in range(100))
    short, too_long = model_of(folder(LLAMA, max_position_embeddings=64)).score([sample(TEXTS[0]), sample(long)])
    assert short.error is None
    assert "100 tokens are more than the 64 of the reward model's context" in too_long.error
