"""Rows to batches: splits, drawn sentences, augmentation, streaming, prepared folders, the feature cache, copy-paste augmentation.

May import `learning` and everything below it, never `scoring` or a command.
"""
