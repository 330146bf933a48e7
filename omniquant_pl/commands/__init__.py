"""What each subcommand does: export, test, generate, compare, plan."""
