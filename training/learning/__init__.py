"""The model in training: how it is built, what of it is trained, its optimizers, checkpoints and routing health.

Nothing here knows of rows or batches. May import `support`, `sources`, `configuration` and the two packages.
"""
