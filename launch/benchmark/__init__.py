"""Measurements: one module for each, `python -m launch.benchmark` to start them, results/ for those worth keeping."""
