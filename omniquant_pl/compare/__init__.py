"""The same model by several methods: which one loses least, and what it costs."""
