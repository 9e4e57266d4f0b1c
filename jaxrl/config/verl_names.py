"""verl's settings that have another name here, or none: what the config answers to somebody who brings them along."""

from __future__ import annotations

_PACKED = "nothing: rows are always packed, by actor.ppo_max_token_len_per_gpu and critic.ppo_max_token_len_per_gpu"
_MESH = "mesh.data, mesh.fsdp and mesh.tensor over all devices; of several hosts, a launcher of scripts/launch"
_FSDP = "mesh (its shape), model.remat, and actor.offload, critic.offload and ref.offload"
_VLLM_ARGS = "rollout.vllm.args, as {enforce_eager: true}"

# verl's name, with `actor_rollout_ref.` and the like taken off -> what it is here.
VERL_NAMES: dict[str, str] = {
    "actor_rollout_ref": "its parts at the top: model, actor, rollout and ref",
    "custom_reward_function": "reward.functions=[{name: path/to/file.py:function}]",
    "reward_model": "reward.model, or reward.functions",
    "actor.clip_ratio": "actor.clip_ratio_low and actor.clip_ratio_high",
    "actor.grad_clip": "actor.optim.clip_grad",
    "critic.grad_clip": "critic.optim.clip_grad",
    "critic.ppo_mini_batch_size": "actor.ppo_mini_batch_size, which holds for both",
    "critic.model": "critic.path, critic.num_layers and critic.head; the rest is of the section model",
    "critic.enable": "nothing: there is a critic where algorithm.adv_estimator needs one",
    "actor.ulysses_sequence_parallel_size": "model.shard_tokens, along mesh.tensor",
    "model.enable_gradient_checkpointing": "model.remat",
    "model.use_remove_padding": _PACKED,
    "model.trust_remote_code": "critic.head.module or reward.model.head.module: code of a checkpoint is not run",
    "model.target_modules": "model.lora_targets",
    "data.val_batch_size": "nothing: all problems are answered, rollout.max_num_seqs at a time",
    "data.return_raw_chat": "nothing: rewards are given the conversation",
    "data.reward_fn_key": "nothing: the column is data_source",
    "data.filter_overlong_prompts_workers": "nothing",
    "rollout.name": "rollout.engine",
    "rollout.gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
    "rollout.prompt_length": "data.max_prompt_length",
    "rollout.response_length": "data.max_response_length",
    "rollout.max_model_len": "nothing: it is data.max_prompt_length + data.max_response_length",
    "rollout.enforce_eager": _VLLM_ARGS,
    "rollout.enable_chunked_prefill": _VLLM_ARGS,
    "rollout.max_num_batched_tokens": _VLLM_ARGS,
    "rollout.calculate_log_probs": "nothing: they always come along",
    "rollout.do_sample": "nothing: training samples",
    "rollout.val_kwargs.do_sample": "rollout.val_kwargs.temperature, 0 being greedy",
    "trainer.n_gpus_per_node": _MESH,
    "trainer.nnodes": _MESH,
    "trainer.default_local_dir": "trainer.run_dir",
    "trainer.balance_batch": _PACKED,
    "trainer.val_only": "nothing: trainer.val_before_train validates before the first step",
    "trainer.max_actor_ckpt_to_keep": "trainer.max_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep": "trainer.max_ckpt_to_keep",
    "trainer.device": "nothing: the extra that is installed decides (cuda, tpu)",
    **{f"{role}.use_dynamic_bsz": _PACKED for role in ("actor", "critic")},
    **{f"{role}.log_prob_use_dynamic_bsz": _PACKED for role in ("rollout", "ref")},
    **{f"{role}.strategy": "nothing: XLA shards, as mesh says" for role in ("actor", "critic", "ref")},
    **{f"{role}.fsdp_config": _FSDP for role in ("actor", "critic", "ref")},
    **{f"{role}.checkpoint": "nothing: weights, optimizer and data position are always saved" for role in ("actor", "critic")},
    **{f"{role}.ppo_micro_batch_size{ending}": _PACKED for role in ("actor", "critic") for ending in ("", "_per_gpu")},
    **{
        f"{role}.log_prob_micro_batch_size{ending}": _PACKED for role in ("rollout", "ref") for ending in ("", "_per_gpu")
    },
}  # fmt: skip
