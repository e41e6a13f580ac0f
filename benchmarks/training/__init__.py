"""How fast the training engine is, beside TRL's trainers: see `__main__.py`."""
