"""Real tasks: data, networks, training, the methods that merge, and what is reported of them."""
