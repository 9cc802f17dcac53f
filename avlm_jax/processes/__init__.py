"""Several processes as one run: how they find, follow and wait for each other, and end together."""
