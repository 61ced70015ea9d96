"""Optimizers that step in phase space: `Leapfrog`, its Langevin partner `BAOAB`."""

from .baoab import BAOAB
from .leapfrog import Leapfrog

__all__ = ["BAOAB", "Leapfrog"]
