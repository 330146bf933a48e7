"""Files, memory, signals, and text for people: nothing here knows of quantization."""
