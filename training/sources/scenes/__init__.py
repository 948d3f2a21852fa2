"""The embedded data sets: scenes drawn from a seed, with expressions that each denote one object, or none.

`dataset` is the entrance and names the rest in reading order. May import the rest of `sources` and `support`.
"""
