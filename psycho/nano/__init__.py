"""The nano world: artificial counselling text with known ratings, small enough to train on one core."""
