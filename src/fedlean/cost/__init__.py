"""What a sub-model costs on a device: FLOPs, bytes, memory, seconds.

Everything here is a model of a device; nothing is measured while a run goes on.
"""
