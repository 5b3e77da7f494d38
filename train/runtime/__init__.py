"""Processes, signals, files of lines: what all of training stands on."""
