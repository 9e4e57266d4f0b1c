"""jaxrl: reinforcement learning of language models on JAX."""
