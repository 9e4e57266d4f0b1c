"""Phi-3 with a linear reward head on the last hidden state, beside its language-model output.

A model of one's own for a critic or a reward model: a subclass of `Decoder` with its modules, what they say, and the
names under which a checkpoint keeps them. Here a `Phi3ForCausalLM` whose checkpoint also holds `reward_head.weight`
[1, hidden_size] and `reward_head.bias` [1]. In a config:

    reward: {model: {path: my-org/phi3-reward, head: {module: "examples/phi3_reward.py:Phi3WithReward"}}}
    critic: {path: my-org/phi3-reward, head: {module: "examples/phi3_reward.py:Phi3WithReward"}}

Nothing in it is special to Phi-3: any family that jaxrl knows has the same hidden states. Where a checkpoint does not
hold the head (a critic that begins as a language model), it begins as its initialiser says.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import Decoder, Head
from jaxrl.weights.hf_names import Row


class Phi3WithReward(Decoder):
    def setup_head(self):
        c = self.config
        if not c.tie_embeddings:
            self.lm_head = Head((c.vocab_size, c.hidden_size), ("vocab", "embed"))
        self.reward_head = Head((c.hidden_size, 1), ("embed", None), use_bias=True)

    def touch_head(self):
        if not self.config.tie_embeddings:
            self.lm_head()
        super().touch_head()

    def scores(self, hidden):
        """[..., D] -> [..., 1], in float32: values of a critic, or the reward where the last token stands."""
        return hidden.astype(jnp.float32) @ self.reward_head().astype(jnp.float32) + self.reward_head.bias

    @classmethod
    def rows(cls, config: ModelConfig, language_model: list[Row]) -> list[Row]:
        return [
            *language_model,
            Row("reward_head.kernel", "reward_head.weight", "c d -> d c"),
            Row("reward_head.bias", "reward_head.bias", "c -> c"),
        ]
