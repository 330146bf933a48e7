"""What each subcommand does, bound to the trainer from above."""
