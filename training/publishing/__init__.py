"""The model card that goes to the Hub with the weights, and its figures.

May import `scoring` and everything below it.
"""
