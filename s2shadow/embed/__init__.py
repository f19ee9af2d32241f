"""Adapters to other simulators. Each needs that simulator's own package, and is imported by name."""
