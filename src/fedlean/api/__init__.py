"""The door for people who write Python (docs/python.md); `fedlean` gives its names when used."""
