"""Training targets and losses."""

from .set_criterion import SetCriterion

__all__ = ['SetCriterion']
