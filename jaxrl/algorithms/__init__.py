"""The maths of reinforcement learning on token arrays: pure jax.numpy, no models, no I/O, nothing else of jaxrl.

In the order data meets them: `correction` (engine against trainer), `kl` (distance to the reference, its coefficient),
`advantages` (rewards to advantages), `losses` (one number a token), `aggregation` (one weight a token), all on the
reductions in `masked`. Each file ends with the table of its choices; `choose` looks a name up and feeds a choice.
"""
