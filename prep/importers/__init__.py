"""Layouts that captures come in: each gives the same frames with cameras."""
