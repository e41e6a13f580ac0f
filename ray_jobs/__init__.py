"""Recipes, one per job, each read top to bottom like a method section; `pipeline` runs them all."""
