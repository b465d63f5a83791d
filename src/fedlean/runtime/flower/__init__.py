"""Flower as the engine past one machine: a node and an app for a stock SuperLink."""
