"""Recipes, augmentation, optimisers, the step, the loop and the run folder."""
