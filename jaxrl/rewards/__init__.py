"""Rewards: what turns a response into a number. Host Python, no JAX; the trainer scores its rollouts here.

`make_scorer` starts the rewards of a config (built-ins from `REWARDS`, a user's `path/to/file.py:function`, an HTTP
service) and gives back a `Scorer`: samples in, scores out. `combine` adds scores computed elsewhere.
"""

from jaxrl.rewards.builtin import REWARDS
from jaxrl.rewards.score import Sample, Score, combine
from jaxrl.rewards.scorer import RewardError, Scorer, make_scorer

__all__ = ["REWARDS", "RewardError", "Sample", "Score", "Scorer", "combine", "make_scorer"]
