"""Parts of a model as models of their own: pure functions of specs."""
