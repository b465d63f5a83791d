"""Masks that both sides of the wire can make: what decides is small, and is sent instead."""
