"""The parts of the system: sample, judge, prefer, learn, prove, serve.

The recipes in `ray_jobs/` put these parts together. A part never imports a recipe.
"""

__version__ = "0.1.0"
