"""Training a model part by part: what is frozen, and how its share is run."""
