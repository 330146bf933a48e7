"""The same model by several methods, those of other installed packages among them."""
