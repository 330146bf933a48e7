"""One transformer block while it learns: its module, its factors, its loss."""
