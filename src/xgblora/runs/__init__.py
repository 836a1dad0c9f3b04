"""Runs: one from configuration to files, several compared, and what to do with a finished one."""
