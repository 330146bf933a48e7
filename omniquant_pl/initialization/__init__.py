"""Where factors start: statistics, searches, another run, a file, the original implementation's files."""
