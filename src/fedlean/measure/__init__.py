"""Measuring the device that this runs on: round time against density, and its link.

What is measured becomes a device profile (`fedlean.cost.profile`), which PruneFL's time model and
the emulated clock then use.
"""
