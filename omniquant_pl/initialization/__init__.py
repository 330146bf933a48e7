"""Where factors start: statistics, searches, another run, a file, the files of the original OmniQuant."""
