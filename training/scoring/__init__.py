"""Answers to figures: mask selection, flip averaging, the metrics, intervals, slices, reports and pictures of them.

May import `examples` and everything below it, never a command.
"""
