"""Evaluation: the reward-model audit, win rates and agreement between raters, each with its uncertainty.

Everything here is a pure function of arrays. Rows that share a client speech are not independent, so every
interval is clustered by speech; a rate is always a sum divided once by a count, never a mean of means.
"""
