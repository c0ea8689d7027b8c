"""The frozen base: loading it, telling it apart, its layers, and running it."""
