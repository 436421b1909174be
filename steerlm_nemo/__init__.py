"""SteerLM on NVIDIA's stack: attribute prediction, attribute-conditioned fine-tuning, steering."""

__version__ = "0.1.0"
