"""Rounds over any transport of bytes: envelopes, the device's half and the server's dispatch.

Nothing here imports Flower or opens a socket; `fedlean.runtime.flower` carries the bytes.
"""
