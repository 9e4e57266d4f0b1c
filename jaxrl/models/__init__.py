"""The decoder as functions on plain trees of arrays. The only folder that imports flax."""
