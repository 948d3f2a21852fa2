"""Grids of trainings: the grid file, its runs, and the tables made of them.

May import `scoring` and everything below it.
"""
