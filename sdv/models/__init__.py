"""The networks: transformers, video autoencoders, text encoders."""
