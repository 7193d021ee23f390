"""A rank of `test_zero3.py`: heads of scores and of values, as in zero3_rank.py."""

from functools import partial

from tests.training import zero3_rank

run = partial(zero3_rank.run, heads=True)
