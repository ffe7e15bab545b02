"""The model's parts as torch modules: encoder, output layer, and the choice of its active classes."""
