"""Experiments with their results, each in a folder with what makes it."""
