"""What goes to the Hub beside the weights: the model card and its figures.

May import `scoring` and everything below it.
"""
