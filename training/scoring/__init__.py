"""From answers to figures: mask selection, flip averaging, metrics, intervals, slices, reports and their figures.

May import `examples` and everything below it, never a command.
"""
