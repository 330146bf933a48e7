"""The command line: parser, help, and messages."""
