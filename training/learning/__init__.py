"""The model in training: how it is built, which weights are trained, optimizers, steps, losses, checkpoints, routing health.

Nothing here reads data. May import `support`, `sources`, `configuration` and the two packages.
"""
