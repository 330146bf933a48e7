"""The loop over the blocks, its hooks, and how it resumes."""
