"""Files, memory, signals, formatting of text: nothing here knows of quantization."""
