"""OmniQuant post-training quantization of causal language models on PyTorch Lightning."""

__all__ = ["__version__"]

__version__ = "0.1.0"
