"""Which devices are there at a step, with what memory, link and speed (docs/fleets.md)."""
